"""A legal call of every public function and type that has no suite or only a wrapped one, and what must come out."""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kernel_index as ki
from tests.fuzz import contracts
from tests.fuzz.draws import B, D, H, K, T, floats, whole
from tests.fuzz.rotations import check_rope, rope


class Call(NamedTuple):
    """``build(rng)`` gives keywords of ``function``; ``check(kwargs, result)`` asserts what a legal result is."""

    function: Callable[..., Any]
    build: Callable[[random.Random], dict[str, Any]]
    check: Callable[[dict[str, Any], Any], None] | None = None


# Metadata


def validity(rng: random.Random) -> dict[str, Any]:
    return {
        "valid_token_counts": whole(rng, 0, 9, B),
        "valid_slot_counts": rng.choice([None, whole(rng, 0, 5, B)]),
        "base_block_tokens": rng.choice([1, 4]),
    }


def check_validity(kwargs: dict[str, Any], found: ki.AttentionValidity) -> None:
    tokens = kwargs["valid_token_counts"]
    slots = kwargs["valid_slot_counts"]
    assert found.mode == ("slot_prefix" if slots is not None else "none" if tokens is None else "token_prefix")
    if tokens is not None:
        assert found.token_prefix.tolist() == torch.as_tensor(tokens).reshape(-1).tolist()


def check_tile(kwargs: dict[str, Any], found: Any) -> None:
    start, stride, end = (kwargs[n] for n in ("tile_start", "block_stride", "q_chunk_end"))
    if all(isinstance(v, int) for v in (start, stride, end)):
        assert found == (start * stride <= end)


def plan(rng: random.Random) -> dict[str, Any]:
    return {
        "num_blocks": rng.randrange(40),
        "tile_size": rng.randrange(1, 9),
        "block_stride": rng.randrange(1, 20),
        "q_chunk_start": rng.randrange(200),
        "q_chunk_size": rng.randrange(1, 60),
        "left_window": rng.choice([None, 0, 5, 64]),
    }


def check_plan(kwargs: dict[str, Any], found: ki.WindowingPlan) -> None:
    tiles = -(-kwargs["num_blocks"] // kwargs["tile_size"])
    if tiles > 10**5:
        return
    end = kwargs["q_chunk_start"] + kwargs["q_chunk_size"] - 1
    future = sum(t * kwargs["tile_size"] * kwargs["block_stride"] > end for t in range(tiles))
    assert (found.q_chunk_end, found.skipped_future_tiles) == (end, future)
    assert len(found.active_tiles) + found.skipped_future_tiles + found.skipped_past_tiles == tiles


def doc_mask(rng: random.Random) -> dict[str, Any]:
    return {
        "batch_size": B,
        "seq_len": T,
        "device": "cpu",
        "doc_ids": rng.choice([None, whole(rng, -1, 3, B, T).sort(-1).values, whole(rng, -1, 3, T)]),
        "valid_token_counts": rng.choice([None, whole(rng, 0, T + 1, B)]),
        "window_size": rng.choice([(-1, -1), (2, 0), (0, 0), (1, 3)]),
        "causal": rng.random() < 0.5,
    }


def check_doc_mask(kwargs: dict[str, Any], found: Tensor) -> None:
    """Brute force, from the definition."""
    b, t = kwargs["batch_size"], kwargs["seq_len"]
    assert found.dtype == torch.bool
    assert found.shape == (b, 1, t, t)
    docs, counts = kwargs["doc_ids"], kwargs["valid_token_counts"]
    left, right = (None if w is None or w < 0 else w for w in kwargs["window_size"])
    for row in range(b):
        ids = [0] * t if docs is None else (docs if docs.ndim == 1 else docs[row]).tolist()
        count = t if counts is None else int(torch.as_tensor(counts).reshape(-1)[row])
        for q in range(t):
            for k in range(t):
                between = ids[min(q, k) : max(q, k) + 1]
                allowed = len(set(between)) == 1 and between[0] >= 0 and q < count and k < count
                allowed &= not (kwargs["causal"] and k > q)
                allowed &= left is None or k >= q - left
                allowed &= right is None or kwargs["causal"] or k <= q + right
                assert bool(found[row, 0, q, k]) == allowed, (row, q, k)


# Selections


def union(rng: random.Random) -> dict[str, Any]:
    return {
        "selected": whole(rng, -1, 9, B, T, K, 3),
        "query_tile_size": rng.randrange(1, 5),
        "num_blocks": 9,
        "selected_valid": rng.choice([None, whole(rng, 0, 2, B, T, K, 3).bool()]),
        "mode": rng.choice(["auto", "bitmap", "sort"]),
    }


def check_union(kwargs: dict[str, Any], maps: ki.UnionMaps) -> None:
    """Round trip: where a pick is valid, its place in the union holds it."""
    selected, tile = kwargs["selected"], kwargs["query_tile_size"]
    valid = selected >= 0 if kwargs["selected_valid"] is None else kwargs["selected_valid"] & (selected >= 0)
    for b, t, k, n in valid.nonzero().tolist():
        assert maps.query_union_valid[b, t, k, n]
        place = maps.query_union_indices[b, t, k, n]
        assert maps.union_block_indices[b, t // tile, k, place] == selected[b, t, k, n]
    assert int(maps.query_union_valid.sum()) <= int(valid.sum())


def blocks(rng: random.Random) -> dict[str, Any]:
    return {
        "q": floats(rng, B, 8, H, D),
        "block_keys": floats(rng, B, 4, K, D),
        "coarse_ratio": rng.choice([1, 2, 8]),
        "coarse_topc": rng.choice([1, 2, 16]),
        "final_topk": rng.choice([1, 3, 8]),
        "block_size": 2,
    }


def check_blocks(kwargs: dict[str, Any], found: ki.BlockSelection) -> None:
    indices, valid = found.indices, found.valid
    assert (indices[valid] >= 0).all()
    assert (indices[~valid] == -1).all()
    own = torch.arange(indices.shape[1]).view(1, -1, 1, 1) // kwargs["block_size"]
    assert (indices <= own).all(), "a block of the future"


def routes(rng: random.Random) -> dict[str, Any]:
    q, k = floats(rng, B, T, H, D), floats(rng, B, T, K, D)
    return {"q": q, "k": k, "block_size": rng.randrange(1, 5), "topk": rng.randrange(1, 4), "mask": ki.MaskContract()}


def check_routes(kwargs: dict[str, Any], found: Any) -> None:
    own = torch.arange(found.indices.shape[1]).view(1, -1, 1, 1) // kwargs["block_size"]
    assert (found.indices <= own).all()
    assert (found.valid == (found.indices >= 0)).all()


def key(rng: random.Random) -> dict[str, Any]:
    masks = [ki.MaskContract(), ki.MaskContract(window=(3, 0)), {"has_doc_ids": True}]
    return {"contract": rng.choice(masks), "local_window": rng.choice([None, 4]), "block_sizes": (64, 64)}


def check_key(kwargs: dict[str, Any], found: ki.ExactMaskKey) -> None:
    assert hash(found) == hash(ki.exact_mask_key(**kwargs))
    assert found == ki.exact_mask_key(**kwargs)


def tree(rng: random.Random) -> dict[str, Any]:
    runs = rng.randrange(1, 6)
    parents = [rng.randrange(-1, run) for run in range(runs)]
    return {"parents": parents, "lengths": [rng.randrange(1, 5) for _ in parents], "align": rng.choice([1, 4])}


def check_tree(kwargs: dict[str, Any], found: ki.TreePacking) -> None:
    assert int(found.is_token.sum()) == sum(kwargs["lengths"])
    assert len(found.edges.source) == sum(kwargs["lengths"]) - list(kwargs["parents"]).count(-1)
    ki.MaskContract(subtree_end=found.subtree_end, positions=found.positions).dense()


def indexer_loss(rng: random.Random) -> dict[str, Any]:
    q, k = floats(rng, B, T, H, D), floats(rng, B, T, K, D)
    weights = floats(rng, B, T, 2)
    selection = ki.lightning_indexer(floats(rng, B, T, 2, D), floats(rng, B, T, D), weights, topk=3)
    return {"selection": selection, "q": q, "k": k, "scale": rng.choice([None, 0.5]), "softcap": rng.choice([0.0, 5.0])}


def clustered(rng: random.Random) -> dict[str, Any]:
    q, k, v = floats(rng, B, T, H, D), floats(rng, B, T, K, D), floats(rng, B, T, K, D)
    config = ki.ClusteredSparseConfig(block_size=2, topk=rng.randrange(1, 5), query_tile_size=rng.choice([1, 2, 4]))
    return {"q": q, "k": k, "v": v, "config": config, "mask": ki.MaskContract(), "scale": None, "softcap": 0.0}


def check_clustered(kwargs: dict[str, Any], found: Any) -> None:
    """Picking every block is plain attention; picking fewer never looks ahead."""
    out = found[0] if isinstance(found, tuple) else found
    finite(kwargs, out)
    if kwargs["config"].topk >= T // 2:
        plain = {n: kwargs[n] for n in ("q", "k", "v", "mask", "scale", "softcap")}
        torch.testing.assert_close(
            out, ki.attention(**plain), rtol=1e-4, atol=1e-5 * float(kwargs["v"].abs().max() + 1)
        )


def clustered_routes(rng: random.Random) -> dict[str, Any]:
    return {n: v for n, v in clustered(rng).items() if n in ("q", "k", "config", "mask")}


def check_clustered_routes(kwargs: dict[str, Any], found: Any) -> None:
    check_routes({"block_size": kwargs["config"].block_size}, found)


# Caches


def decode(rng: random.Random) -> dict[str, Any]:
    q, k, v = floats(rng, B, 2, H, D), floats(rng, B, 2, K, D), floats(rng, B, 2, K, D)
    k_cache, v_cache = floats(rng, B, 8, K, D), floats(rng, B, 8, K, D)
    lengths = torch.tensor([0, 5], dtype=torch.int32)
    call = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "cache_seqlens": lengths, "k": k, "v": v, "causal": True}
    return {**call, "scale": rng.choice([None, 0.3]), "sink": rng.choice([None, floats(rng, H)])}


def check_decode(kwargs: dict[str, Any], out: Tensor) -> None:
    """Attention over what the caches hold after the step."""
    finite(kwargs, out)
    for row, cached in enumerate(kwargs["cache_seqlens"].tolist()):
        one = slice(row, row + 1), slice(cached + kwargs["k"].shape[1])
        keys, values = kwargs["k_cache"][one], kwargs["v_cache"][one]
        options = {name: kwargs[name] for name in ("scale", "sink")}
        expected = ki.attention(kwargs["q"][one[:1]], keys, values, **options, backend="reference")
        torch.testing.assert_close(out[one[:1]], expected, rtol=1e-4, atol=1e-5 * float(values.abs().max() + 1))


def moba_decode(rng: random.Random) -> dict[str, Any]:
    cache = ki.ContiguousKVCache(1, B, 8, K, D)
    cache.begin(2)
    q, k, v = floats(rng, B, 2, H, D), floats(rng, B, 2, K, D), floats(rng, B, 2, K, D)
    return {
        "q": q,
        "cache": cache,
        "k": k,
        "v": v,
        "block_size": 2,
        "topk": rng.randrange(1, 4),
        "scale": 0.3,
        "sink": floats(rng, H),
    }


def selected_decode(rng: random.Random) -> dict[str, Any]:
    cache = ki.ContiguousKVCache(1, B, 8, K, D)
    cache.begin(4)
    q, k, v = floats(rng, B, 4, H, D), floats(rng, B, 4, K, D), floats(rng, B, 4, K, D)
    block_size = rng.choice([1, 2])
    shape = rng.choice([(B, 4, 3), (B, 4, K, 3)])
    indices = whole(rng, -1, 4 // block_size, *shape)
    return {"q": q, "cache": cache, "indices": indices, "k": k, "v": v, "block_size": block_size, "scale": 0.3}


def finite(kwargs: dict[str, Any], out: Any) -> None:
    given = [v for v in kwargs.values() if isinstance(v, Tensor) and v.is_floating_point()]
    if all(v.isfinite().all() for v in given):
        assert out.isfinite().all()


CALLS = {
    "attention_validity": Call(ki.attention_validity, validity, check_validity),
    "can_score_tile": Call(
        ki.can_score_tile,
        lambda r: {"tile_start": r.randrange(9), "block_stride": r.randrange(1, 9), "q_chunk_end": r.randrange(99)},
        check_tile,
    ),
    "causal_windowing_plan": Call(ki.causal_windowing_plan, plan, check_plan),
    "doc_window_mask": Call(ki.doc_window_mask, doc_mask, check_doc_mask),
    "rope_tables": Call(ki.rope_tables, rope, check_rope),
    "union_selection": Call(ki.union_selection, union, check_union),
    "materialize_query_union_mask": Call(
        ki.materialize_query_union_mask, lambda r: {"maps": ki.union_selection(**union(r))}
    ),
    "hierarchical_block_select": Call(ki.hierarchical_block_select, blocks, check_blocks),
    "moba_route": Call(ki.moba_route, routes, check_routes),
    "clustered_sparse_attention": Call(ki.clustered_sparse_attention, clustered, check_clustered),
    "clustered_sparse_attention_with_lse": Call(ki.clustered_sparse_attention_with_lse, clustered, check_clustered),
    "clustered_route": Call(ki.clustered_route, clustered_routes, check_clustered_routes),
    "resolve_block_sparse_backend": Call(ki.resolve_block_sparse_backend, lambda r: {"requested": "auto"}),
    "along_paths": Call(ki.along_paths, contracts.paths, contracts.check_paths),
    "pack_tree": Call(ki.pack_tree, tree, check_tree),
    "exact_mask_key": Call(ki.exact_mask_key, key, check_key),
    "lightning_indexer_loss": Call(ki.lightning_indexer_loss, indexer_loss),
    "fa4_kvcache_decode": Call(ki.fa4_kvcache_decode, decode, check_decode),
    "moba_decode": Call(ki.moba_decode, moba_decode, finite),
    "selected_decode": Call(ki.selected_decode, selected_decode, finite),
    "MaskContract": Call(contracts.lowered, contracts.contract, contracts.check_lowered),
    "MaskContract.from_cu_seqlens": Call(contracts.of_lengths, contracts.lengths, contracts.check_lowered),
    "MaskContract.from_position_ids": Call(contracts.of_positions, contracts.restarts, contracts.check_positions),
    "ContiguousKVCache": Call(
        ki.ContiguousKVCache,
        lambda r: (
            dict(zip(("layers", "rows", "capacity", "kv_heads", "head_dim"), (1, B, 8, K, D), strict=True))
            | {"device": "cpu"}
        ),
    ),
    "PagedKVCache": Call(
        ki.PagedKVCache,
        lambda r: (
            dict(zip(("layers", "pages", "page_size", "kv_heads", "head_dim"), (1, 8, 4, K, D), strict=True))
            | {"device": "cpu"}
        ),
    ),
}

"""What the plans of a call say that no compiler does: tiles visited, bundles issued, bytes moved.

Splash attention runs a step for every block pair that causality leaves, whatever the documents are; a walk runs one
for every block on a row's list.  Both are charged their own compiled bundles.
"""

from typing import Any, NamedTuple

import numpy as np

from kernel_index.proofs.tpu_child import BLOCK, HEADS, KV_HEADS, SPLASH_BLOCK, TILE, TOPK, WIDTH
from kernel_index.proofs.tpu_dumps import KernelFigures

ITEM = 2  # bytes of a bfloat16
GROUP = HEADS // KV_HEADS


class Work(NamedTuple):
    """Of one forward pass: block pairs computed, in units of 512 × 512 scores of a head, bundles issued, bytes."""

    tiles: float
    bundles: float
    bytes: float


def causal_pairs(tokens: int, block: int) -> int:
    blocks = tokens // block
    return blocks * (blocks + 1) // 2


def splash_work(kernel: KernelFigures, tokens: int) -> Work:
    """Every pair under the diagonal, for each query head; keys and values are fetched for each of them.

    Its first and last step of a row are charged once for each row, to its advantage.
    """
    block = min(SPLASH_BLOCK, tokens)
    (loop, *_) = kernel.at_depth(1)
    once = sum(loop.regions) - loop.widest
    pairs = causal_pairs(tokens, block) * HEADS
    bundles = pairs * (loop.bundles - once) + HEADS * (tokens // block) * once
    moved = pairs * block * 2 * WIDTH * ITEM + 2 * HEADS * tokens * WIDTH * ITEM
    return Work(pairs * block * block / 512**2, bundles, moved)


def interval_work(kernel: KernelFigures, walk: Any, tokens: int, tile: int, block: int) -> Work:
    """The blocks of each tile, once for the query heads of a KV head."""
    counts = np.asarray(walk.spans)[0, 0, 0]
    (row, *_), (step, *_) = kernel.at_depth(1), kernel.at_depth(2)
    visits, rows = int(counts.sum()) * KV_HEADS, counts.size * KV_HEADS
    bundles = visits * step.bundles + rows * row.bundles
    moved = visits * block * 2 * WIDTH * ITEM + _per_query_bytes(tokens, words=0) + walk.spans.size * 4 * KV_HEADS
    return Work(visits * GROUP * tile * block / 512**2, bundles, moved)


def union_work(kernel: KernelFigures, walk: Any, tokens: int, words: int) -> Work:
    """The blocks of each union; an incomplete last step takes its blocks one by one."""
    counts = np.asarray(walk.spans)[0, :, 0]
    full, left = counts // walk.width, counts % walk.width
    (row, *_), (step, *_), (single, *_) = (kernel.at_depth(d) for d in (1, 2, 3))
    bundles = full.sum() * step.bundles + left.sum() * single.bundles + counts.size * row.bundles
    bundles += (left > 0).sum() * (step.bundles - step.widest)
    moved = union_bytes(walk) + _per_query_bytes(tokens, words) + 4 * (walk.spans.size + walk.lists.size)
    return Work(int(counts.sum()) * GROUP * TILE * BLOCK / 512**2, float(bundles), moved)


def union_bytes(walk: Any) -> int:
    """Keys and values of all unions."""
    return int(np.asarray(walk.spans)[0, :, 0].sum()) * BLOCK * 2 * WIDTH * ITEM


def query_bytes(tokens: int) -> int:
    """Queries and outputs."""
    return 2 * HEADS * tokens * WIDTH * ITEM


def _per_query_bytes(tokens: int, words: int) -> int:
    """Queries, outputs, log-sum-exps, both ends of the intervals, words of selected blocks."""
    return query_bytes(tokens) + HEADS * tokens * 4 * (1 + 2 + words)


def selection_work(kernel: KernelFigures, tokens: int, scored_queries: int, scored_blocks: int) -> float:
    """Bundles of phase 1: the tiles of blocks under the diagonal, then one pass for each selected block."""
    rows = tokens // scored_queries
    ends = (np.arange(rows) + 1) * scored_queries - 1
    tiles = int((ends // (BLOCK * scored_blocks) + 1).sum())
    row, (score, *_, take) = kernel.at_depth(1)[0], kernel.at_depth(2)
    return KV_HEADS * (rows * row.bundles + tiles * score.bundles + rows * TOPK * take.bundles)


def drifting_selection(tokens: int, seed: int = 0, change: float = 1 / 32) -> np.ndarray:
    """Selected blocks [1, T, K, 16] as in trained models: each query changes one of its neighbour's with this chance.

    The current block is always selected; a new one is any past block.  Neighbours share 16 of 16 blocks in 97 % of the
    cases and 15 in the rest.
    """
    generator = np.random.default_rng(seed)
    selected = np.full((1, tokens, KV_HEADS, TOPK), -1, np.int32)
    for head in range(KV_HEADS):
        own: list[int] = []
        for t in range(tokens):
            current = t // BLOCK
            if t % BLOCK == 0:
                own = [j for j in own if j != current - 1][: TOPK - 2] + ([current - 1] if current else [])
            if len(own) < min(TOPK - 1, current):
                own.append(int(generator.choice(np.setdiff1d(np.arange(current), own))))
            elif current >= TOPK and generator.random() < change:
                own[int(generator.integers(len(own)))] = int(generator.choice(np.setdiff1d(np.arange(current), own)))
            selected[0, t, head, : len(own) + 1] = sorted([*own, current])
    return selected


def document_ids(tokens: int, documents: int) -> np.ndarray:
    """Ids [1, T] of documents whose lengths grow from half to one and a half times the mean."""
    weights = np.linspace(0.5, 1.5, documents)
    ends = np.cumsum(weights / weights.sum() * tokens).astype(int)
    return np.searchsorted(ends[:-1], np.arange(tokens), side="right").astype(np.int32)[None]


def least_flops(kernel: str, case: str, tokens: int) -> float:
    """Multiplications and additions that a causal call cannot do without; where sparse, of 16 blocks for each query."""
    products = {"dkv": 4, "dq": 3}.get(kernel.rstrip(".0123456789").rpartition("_")[2], 2)
    keys = tokens / 2 if case in ("attention", "splash") else min(BLOCK * TOPK, tokens) / 2
    return 2.0 * products * HEADS * tokens * keys * WIDTH


def compare(case: str, compiled: Any, peer: Any, tokens: int) -> list[dict[str, Any]]:
    """Ratios of ours to Splash's for the work of a case; see ``Work``."""
    import jax.numpy as jnp

    import kernel_index.jax as kij
    from kernel_index.jax.attention_pallas import interval_walk
    from kernel_index.jax.block_selection_pallas import SCORED_BLOCKS, SCORED_QUERIES
    from kernel_index.jax.clustered_pallas import chunk_blocks, union_plan
    from kernel_index.jax.tile_layout import Sizes, choose_sizes

    theirs = splash_work(peer.kernel("splash_mqa_fwd"), tokens)
    forward = compiled.kernel("attention_forward")
    if case == "attention":
        sizes = choose_sizes(tokens, tokens, GROUP, None)
        masks = {"causal": kij.MaskContract()}
        masks["16 documents"] = kij.MaskContract(doc_ids=jnp.repeat(jnp.arange(16), tokens // 16)[None])
        masks["16 documents, uneven"] = kij.MaskContract(doc_ids=jnp.asarray(document_ids(tokens, 16)))
        return [
            _row(
                work,
                interval_work(forward, interval_walk(mask, tokens, tokens, *sizes[:2]), tokens, *sizes[:2]),
                theirs,
            )
            for work, mask in masks.items()
        ]
    selected = jnp.asarray(drifting_selection(tokens))
    sizes = Sizes(TILE, BLOCK, GROUP)
    bounds = kij.MaskContract().intervals(1, tokens, tokens)
    plan = union_plan(selected, bounds, tokens, sizes, chunk_blocks(BLOCK))
    ours = union_work(forward, plan.walk, tokens, -(-tokens // BLOCK // 32))
    scoring = selection_work(compiled.kernel("clustered_picks"), tokens, SCORED_QUERIES, SCORED_BLOCKS)
    least = union_bytes(plan.walk) + query_bytes(tokens)
    union = float(np.asarray(plan.walk.spans)[0, :, 0].mean())
    facts = {"mean_union": union, "union_over_picks": union / TOPK, "bytes_over_union_q_o": ours.bytes / least}
    with_selection = ours._replace(bundles=ours.bundles + scoring)
    return [
        _row("16 picks, phase 3", ours, theirs) | facts,
        _row("16 picks, phases 1 and 3", with_selection, theirs) | facts,
    ]


def _row(work: str, ours: Work, theirs: Work) -> dict[str, Any]:
    ratios = {f"{name}_ratio": a / b for name, a, b in zip(Work._fields, ours, theirs, strict=True)}
    return {"work": work} | ours._asdict() | {f"splash_{n}": x for n, x in theirs._asdict().items()} | ratios

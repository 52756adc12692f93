"""MoBA: identity laws, the published form, routing in chunks, decoding, names and receipts."""

import pytest
import torch

import kernel_index as ki
from kernel_index.core import native
from kernel_index.core.force import reload_environment
from kernel_index.core.testing import Maker
from kernel_index.kernels.sparse.moba_block_sparse import contract, flash
from kernel_index.kernels.sparse.moba_block_sparse.cases import documents, oracle
from kernel_index.routing.block_router import chunked

B, H, K, D, BLOCK = 2, 4, 2, 8, 4
BACKENDS = ["native", "cpu", "reference"]


def qkv(tokens, seed=0, scale=1.0):
    m = Maker(torch.float32, seed=seed)
    return tuple(m.normal(B, tokens, heads, D, scale=scale) for heads in (H, K, K))


def contracts(tokens):
    ids = documents(Maker(torch.float32), tokens)
    valid = ki.attention_validity(valid_token_counts=[tokens, tokens // 2])
    return (
        ki.MaskContract(),
        ki.MaskContract(window=(9, 0)),
        ki.MaskContract(doc_ids=ids),
        ki.MaskContract(window=(6, 0), doc_ids=ids, validity=valid),
    )


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_as_many_picks_as_blocks_is_dense_attention(backend):
    for mask in contracts(26):
        leaves = [x.requires_grad_() for x in qkv(26)]
        results = []
        for out in (
            ki.moba_attention(*leaves, block_size=BLOCK, topk=7, mask=mask, backend=backend),
            ki.attention(*leaves, mask, backend="reference"),
        ):
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
        for actual, expected in zip(*results, strict=True):
            assert_same(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_block_longer_than_everything_is_dense_attention(backend):
    q, k, v = qkv(26)
    dense = ki.attention(q, k, v, backend="reference")
    assert_same(ki.moba_attention(q, k, v, block_size=10**9, topk=2, backend=backend), dense)
    config = ki.ClusteredSparseConfig(block_size=10**9, topk=2)
    assert_same(ki.clustered_sparse_attention(q, k, v, config=config, backend=backend), dense)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_pick_is_the_own_block(backend):
    q, k, v = qkv(26)
    own = ki.MaskContract(doc_ids=torch.arange(26) // BLOCK)
    for mask, both in zip(contracts(26)[:2], (own, ki.MaskContract(window=(9, 0), doc_ids=own.doc_ids)), strict=True):
        out = ki.moba_attention(q, k, v, block_size=BLOCK, topk=1, mask=mask, backend=backend)
        assert_same(out, ki.attention(q, k, v, both, backend="reference"))


def published(q, k, v, block, topk):
    """The form of the paper's own plain code: gates of all blocks, +∞ at the own one, −∞ at the future, a top-k."""
    tokens, heads = q.shape[1:3]
    k, v = (x.repeat_interleave(heads // x.shape[2], 2) for x in (k, v))
    chunks = -(-tokens // block)
    means = torch.stack([k[:, i * block : (i + 1) * block].mean(1) for i in range(chunks)], 1)
    gate = torch.einsum("bthd,bnhd->bhtn", q, means)
    at = torch.arange(tokens) // block
    gate = gate.masked_fill(torch.arange(chunks) > at[:, None], -torch.inf)
    gate = gate.masked_fill(torch.arange(chunks) == at[:, None], torch.inf)
    best = gate.topk(min(topk, chunks), -1)
    chosen = torch.zeros_like(gate, dtype=torch.bool).scatter_(-1, best.indices, best.values > -torch.inf)
    allowed = chosen.repeat_interleave(block, -1)[..., :tokens] & torch.ones(tokens, tokens, dtype=torch.bool).tril()
    scores = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_equals_the_published_form(backend, scale):
    q, k, v = qkv(67, scale=scale)
    for block, topk in ((4, 5), (16, 2)):
        out = ki.moba_attention(q, k, v, block_size=block, topk=topk, backend=backend)
        assert (out - published(q, k, v, block, topk)).abs().max() <= 2e-5 * scale


def test_ties_go_to_the_smallest_block():
    q, k = torch.ones(1, 20, 1, 2), torch.ones(1, 20, 1, 2)
    k[:, 8:12] = -0.0  # a block of zeros is worse than the others, which are all alike
    picks = ki.moba_route(q, k, block_size=4, topk=3)
    assert picks.indices[0, 12:, 0].tolist() == [[0, 1, 3]] * 4 + [[0, 1, 4]] * 4
    assert picks.indices[0, :4, 0].tolist() == [[0, -1, -1]] * 4
    assert picks.valid.sum() == 4 + 8 + 3 * 12


@pytest.mark.parametrize("route_per", ["query_head", "kv_group"])
def test_routing_in_chunks_is_routing_at_once(route_per, monkeypatch):
    q, k, _ = qkv(61)
    late = ki.MaskContract(window=(20, 0), q_offset=-3)
    for mask in (*contracts(61), late):
        at_once = ki.moba_route(q, k, block_size=BLOCK, topk=4, mask=mask, route_per=route_per)
        monkeypatch.setattr(chunked, "SCORES_AT_ONCE", 7 * B * H * 16)
        in_chunks = ki.moba_route(q, k, block_size=BLOCK, topk=4, mask=mask, route_per=route_per)
        monkeypatch.undo()
        assert all(map(torch.equal, at_once, in_chunks))
        own = torch.arange(61) + (0 if mask.q_offset is None else mask.q_offset)
        assert not (at_once.indices > torch.div(own, BLOCK, rounding_mode="floor").view(-1, 1, 1).clamp(min=0)).any()


def filled(kind, rows, tokens, page=6):
    if kind == "contiguous":
        cache = ki.ContiguousKVCache(1, rows, tokens, K, D)
        return cache, cache.begin
    cache = ki.PagedKVCache(1, rows * (tokens // page + 2), page, K, D)
    names = [cache.allocate() for _ in range(rows)]
    return cache, lambda count: cache.begin(names, count)


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options", [{}, {"window_size": (9, 0), "route_per": "kv_group"}, {"softcap": 2.0, "scale": 0.5}], ids=str
)
def test_token_by_token_equals_recomputation(kind, backend, options):
    """A prompt that goes through the block-sparse core, some tokens together, then one at a time."""
    q, k, v = qkv(60)
    mask = ki.MaskContract(window=options.get("window_size"))
    rest = {n: o for n, o in options.items() if n != "window_size"}
    expected = oracle(q=q, k=k, v=v, block_size=BLOCK, topk=3, mask=mask, **rest)
    cache, begin = filled(kind, B, 60)
    at = 0
    for count in (41, 5, *[1] * 14):
        begin(count)
        part = slice(at, at + count)
        new = {"k": k[:, part], "v": v[:, part]}
        out = ki.moba_decode(q[:, part], cache, block_size=BLOCK, topk=3, backend=backend, **new, **options)
        cache.advance()
        assert_same(out, expected[:, part])
        at += count


@pytest.mark.parametrize("backend", BACKENDS)
def test_decoding_reads_the_selected_blocks_alone(backend):
    """Blocks that were not selected may hold NaN once their means are known: they are not read."""
    q, k, v = qkv(40)
    cache, begin = filled("contiguous", B, 41)
    begin(40)
    ki.moba_decode(q, cache, k=k, v=v, block_size=BLOCK, topk=2, backend=backend)
    cache.advance()
    begin(1)
    new = {"k": k[:, :1], "v": v[:, :1]}
    last = q[:, :1]
    selected = ki.moba_route(
        last, torch.cat([k, k[:, :1]], 1), block_size=BLOCK, topk=2, mask=ki.MaskContract()
    ).indices
    used = torch.zeros(B, 11, K, dtype=torch.bool)
    for b in range(B):
        for h in range(H):
            used[b, selected[b, 0, h].tolist(), h // (H // K)] = True
    assert 0 < used.sum() < used.numel() / 2
    unused = ~used.repeat_interleave(BLOCK, 1)[:, :41, :, None]
    expected = ki.attention(last, torch.cat([k, new["k"]], 1), torch.cat([v, new["v"]], 1), backend="reference")
    cache.k[0].masked_fill_(unused, torch.nan)
    cache.v[0].masked_fill_(unused, torch.nan)
    out = ki.moba_decode(last, cache, block_size=BLOCK, topk=2, backend=backend, **new)
    assert out.isfinite().all()
    assert (out - expected).abs().max() > 1e-3


def test_decoding_differentiates_the_new_tokens():
    q, k, v = (x.requires_grad_() for x in qkv(1))
    past = qkv(12, seed=1)
    cache, begin = filled("paged", B, 13)
    begin(12)
    cache.append(0, *past[1:])
    cache.advance()
    begin(1)
    with ki.receipts() as log:
        out = ki.moba_decode(q, cache, k=k, v=v, block_size=BLOCK, topk=2)
    assert log[-1].ran == "reference"
    whole = [torch.cat([p, x], 1) for p, x in zip(past, (q, k, v), strict=True)]
    expected = oracle(q=whole[0], k=whole[1], v=whole[2], block_size=BLOCK, topk=2)[:, 12:]
    for grads in zip(*(torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (out, expected)), strict=True):
        assert_same(*grads)


def test_names_and_what_they_stand_for():
    for name in ("auto", "AUTO", " Auto ", "", None, "triton"):
        assert ki.resolve_block_sparse_backend(name) == (name, "triton", "")
    assert ki.resolve_block_sparse_backend("cpu").actual == "cpu"
    if not torch.cuda.is_available():
        assert ki.resolve_block_sparse_backend("Flash") == ("Flash", "triton", "flash_cute_runtime_unavailable")
    with pytest.raises(
        ValueError, match="requested must be auto or one of triton, flash, native, cpu, reference, got 'dense'"
    ):
        ki.resolve_block_sparse_backend("dense")
    with pytest.raises(TypeError, match="must be a string or None, got int"):
        ki.resolve_block_sparse_backend(3)


@pytest.mark.parametrize("decode", [False, True])
def test_receipts_say_what_was_asked_and_what_ran(decode):
    q, k, v = qkv(32)

    def call(**backend):
        with ki.receipts() as log:
            if decode:
                cache, begin = filled("contiguous", B, 32)
                begin(32)
                ki.moba_decode(q[:, :1], cache, k=k, v=v, block_size=BLOCK, topk=2, **backend)
            else:
                ki.moba_attention(q, k, v, block_size=BLOCK, topk=2, **backend)
        (receipt,) = (r for r in log if r.op.startswith("moba"))
        return receipt, dict(receipt.details)

    receipt, said = call()
    assert (said["semantic_branch"], said["router_type"]) == ("block_sparse", "moba")
    assert said["requested_backend"] == "auto"
    assert said["requested_backend_source"] == "default"
    assert said["actual_backend"] == receipt.ran
    assert said["runtime_mode"] == "blockized_sparse_cpu"
    assert (said["blocks"], said["picks"], said["density"]) == (8, 2, 0.25)
    receipt, said = call(backend="REFERENCE")
    assert (receipt.requested, receipt.ran) == ("REFERENCE", "reference")
    assert said["requested_backend_source"] == "argument"
    assert said["fallback_reason"] == ""
    if not torch.cuda.is_available():
        receipt, said = call(backend="flash")
        assert said["requested_backend"] == receipt.requested == "flash"
        assert said["fallback_reason"] == "flash_cute_runtime_unavailable"
        assert said["actual_backend"] == receipt.ran != "flash"
    with pytest.raises(ki.Ineligible, match="expected auto or one of"):
        call(backend="dense")


def test_an_environment_variable_is_named_as_the_source(monkeypatch):
    monkeypatch.setenv("KERNEL_INDEX_BACKEND_MOBA_ATTENTION", "reference")
    reload_environment()
    try:
        with ki.receipts() as log:
            ki.moba_attention(*qkv(8), block_size=BLOCK, topk=2)
    finally:
        monkeypatch.undo()
        reload_environment()
    (receipt,) = (r for r in log if r.op == "moba_attention")
    assert receipt.details["requested_backend_source"] == "KERNEL_INDEX_BACKEND_MOBA_ATTENTION"
    assert receipt.details["actual_backend"] == "reference"


def test_picks_as_a_block_mask_of_flex_attention():
    """FlexAttention's plain form runs on a CPU: visited tiles and the predicate together say what the picks say."""
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = qkv(300)
    plain, _, _, everything = contracts(300)
    for mask, block, route_per in ((everything, 4, "query_head"), (plain, 48, "kv_group")):
        picks = ki.moba_route(q, k, block_size=block, topk=2, mask=mask, route_per=route_per)
        blocks = flash.block_mask(picks, q, k, block, mask)
        out = flex_attention(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=blocks, enable_gqa=True)
        call = {"block_size": block, "topk": 2, "mask": mask, "route_per": route_per}
        assert_same(out.transpose(1, 2), ki.moba_attention(q, k, v, backend="reference", **call))
        visited = blocks.to_dense().bool()
        assert not (blocks_needed(picks, mask, q, k, block) & ~visited).any()
        assert visited.sum() < visited.numel()


def blocks_needed(picks, mask, q, k, block):
    """Tiles of 128 × 128 in which some pair is attended to, from the dense mask."""
    member = torch.zeros(*picks.indices.shape[:3], -(-k.shape[1] // block) + 1, dtype=torch.bool)
    member.scatter_(-1, torch.where(picks.valid, picks.indices, member.shape[-1] - 1).long(), True)
    tokens = member[..., :-1].repeat_interleave(block, -1)[..., : k.shape[1]]
    pairs = tokens & mask.dense(B, q.shape[1], k.shape[1]).transpose(1, 2)
    pairs = pairs.transpose(1, 2).repeat_interleave(H // pairs.shape[2], 1)
    pad = (0, -pairs.shape[3] % 128, 0, -pairs.shape[2] % 128)
    return torch.nn.functional.pad(pairs, pad).unflatten(3, (-1, 128)).any(4).unflatten(2, (-1, 128)).any(3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
        ({"topk": 0}, ValueError, "topk must be at least 1, got 0"),
        ({"topk": True}, TypeError, "topk must be an integer, got bool"),
        ({"mask": ki.MaskContract(causal=False)}, ValueError, "mask must be causal"),
        ({"route_per": "head"}, ValueError, "route_per must be one of 'query_head', 'kv_group', got 'head'"),
        ({"backend": 3}, TypeError, "backend must be a string or None, got int"),
    ],
)
def test_bad_calls_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        ki.moba_attention(*qkv(8), **({"block_size": BLOCK, "topk": 2} | change))


def test_a_refused_step_writes_nothing_and_keeps_its_turn():
    q, k, v = qkv(3)
    cache, begin = filled("contiguous", B, 8)
    begin(3)
    with pytest.raises(ValueError, match="k must be of the 3 new tokens of this step, got 1"):
        ki.moba_decode(q, cache, k=k[:, :1], v=v[:, :1], block_size=BLOCK, topk=2)
    with pytest.raises(ki.Ineligible):
        ki.moba_decode(q, cache, k=k, v=v, block_size=BLOCK, topk=2, backend="unknown")
    with pytest.raises(TypeError, match="cache must be a KVCache or what its layer"):
        ki.moba_decode(q, {"k_cache": cache.k[0]}, k=k, v=v, block_size=BLOCK, topk=2)
    assert not cache.k.any()
    would_run = ki.explain(ki.moba_decode, q, cache, k=k, v=v, block_size=BLOCK, topk=2).would_run
    assert would_run == ("native" if native.machine_why_not() is None else "cpu")
    ki.moba_decode(q, cache, k=k, v=v, block_size=BLOCK, topk=2)
    with pytest.raises(ValueError, match="not yet served"):
        ki.moba_decode(q, cache, k=k, v=v, block_size=BLOCK, topk=2)


def test_groups_are_named():
    assert [contract.groups_of(8, 2, name) for name in contract.ROUTES] == [8, 2]


def test_the_triton_core_behind_the_router():
    """Interpreted where there is no GPU; the core's own suite has the rest."""
    call = {"block_size": BLOCK, "topk": 2, "backend": "triton"}
    if reason := ki.explain(ki.moba_attention, *qkv(4), **call).verdicts["triton"]:
        pytest.skip(reason)
    leaves = [x.requires_grad_() for x in qkv(18)]
    mask = ki.MaskContract(window=(9, 0), doc_ids=documents(Maker(torch.float32), 18))
    results = []
    for backend in ("triton", "reference"):
        out = ki.moba_attention(*leaves, block_size=BLOCK, topk=2, mask=mask, backend=backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for actual, expected in zip(*results, strict=True):
        assert_same(actual, expected)

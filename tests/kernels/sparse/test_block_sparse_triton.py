"""Block-sparse attention on Triton, interpreted: values against float64, what is visited, which bytes, which bits."""

import pytest
import torch

import kernel_index as ki
from kernel_index.core.triton import launch
from kernel_index.kernels.sparse.block_sparse_attention import plan
from kernel_index.kernels.sparse.block_sparse_attention.api import block_sparse_attention
from kernel_index.kernels.sparse.block_sparse_attention.geometry import cut_of
from kernel_index.kernels.sparse.block_sparse_attention.plan import forward_plan, key_plan
from kernel_index.proofs.errors import floor, relative_error
from kernel_index.proofs.traffic import counted

interpreted = pytest.mark.skipif(not launch.interpreting(), reason="runs in Triton's interpreter, on a CPU")

DOCUMENTS = ki.MaskContract(window=(9, 0), doc_ids=torch.tensor([3] * 7 + [1] * 9 + [3] * 4 + [-1]))


def draw(b, t, s, h, g, k, d, dv, n, block, *, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    picks = torch.randint(-1, -(-s // block), (b, t, g, n), generator=generator)
    return normal(b, t, h, d), normal(b, s, k, d), normal(b, s, k, dv), picks


def formula(q, k, v, picks, block_size, mask, softcap=0.0):
    """Dense softmax under picks ∧ mask, in the inputs' own dtype."""
    (b, t, h, d), s = q.shape, k.shape[1]
    k, v = (x.repeat_interleave(h // x.shape[2], 2) for x in (k, v))
    picks = picks.repeat_interleave(h // picks.shape[2], 2)
    picked = (picks[..., None] == torch.arange(s) // block_size).any(3).transpose(1, 2)
    start, end = mask.intervals(b, t, s)
    inside = (torch.arange(s) >= start[..., None]) & (torch.arange(s) < end[..., None])
    allowed = picked & inside[:, None]
    z = torch.einsum("bthd,bshd->bhts", q, k) * d**-0.5
    z = softcap * torch.tanh(z / softcap) if softcap else z
    some = allowed.any(-1, keepdim=True)
    z = z.masked_fill(~allowed, -torch.inf).masked_fill(~some, 0.0)
    p = z.softmax(-1).masked_fill(~some, 0.0)
    lse = z.logsumexp(-1).masked_fill(~some[..., 0], -torch.inf)
    return torch.einsum("bhts,bshd->bthd", p, v), lse


def with_gradients(function, q, k, v, dtype):
    q, k, v = (x.to(dtype).requires_grad_() for x in (q, k, v))
    out, lse = function(q, k, v)
    generator = torch.Generator().manual_seed(1)
    up = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (out, lse)]
    return [x.detach() for x in (out, lse)] + list(torch.autograd.grad([out, lse], [q, k, v], up))


# The conformance test has its own cases; these are what only a tiled kernel can get wrong.
CALLS = {
    "T > S, one group of two, softcap": ((1, 21, 9, 4, 2, 1, 8, 8, 2, 4), {"softcap": 2.0}),
    "documents, a window, padding": ((2, 21, 21, 4, 2, 2, 8, 8, 4, 8), {"mask": DOCUMENTS}),
    "more heads than rows of a program": ((1, 3, 8, 40, 1, 1, 8, 8, 2, 4), {}),
    "blocks of several steps": ((1, 24, 40, 8, 1, 1, 8, 5, 1, 40), {"mask": ki.MaskContract(window=(25, 0))}),
}


def contenders(sizes, extra):
    """Inputs, the kernel under test, and the plain formula."""
    q, k, v, picks = draw(*sizes)
    block, mask, softcap = sizes[-1], extra.get("mask", ki.MaskContract()), extra.get("softcap", 0.0)

    def ours(q, k, v):
        return block_sparse_attention(q, k, v, picks, block_size=block, mask=mask, softcap=softcap, backend="triton")

    def plain(q, k, v):
        return formula(q, k, v, picks, block, mask, softcap)

    return (q, k, v), ours, plain


@interpreted
@pytest.mark.parametrize("name", CALLS)
def test_values_and_gradients(name):
    (q, k, v), ours, plain = contenders(*CALLS[name])
    single, double = torch.float32, torch.float64
    actual, eager, truth = (
        with_gradients(f, q, k, v, t) for f, t in ((ours, single), (plain, single), (plain, double))
    )
    # δ and dp are rounded apart, each by 1 + log2 D units, and cancel: see attention's cases.
    cancelled = 2 * (1 + 3) * torch.finfo(torch.float32).eps
    for label, a, e, t in zip(("out", "lse", "dq", "dk", "dv"), actual, eager, truth, strict=True):
        budget = 2 * relative_error(e, t) + floor(a.dtype) + cancelled
        assert relative_error(a, t) <= budget, label


@interpreted
def test_all_blocks_picked_is_dense_attention():
    q, k, v, _ = draw(1, 13, 13, 4, 2, 2, 8, 8, 1, 4)
    everything = torch.arange(4).expand(1, 13, 2, 4)
    out, lse = block_sparse_attention(q, k, v, everything, block_size=4, backend="triton")
    dense, dense_lse = ki.attention_with_lse(q, k, v, backend="reference")
    assert relative_error(out, dense) <= 2 * floor(torch.float32)
    assert relative_error(lse, dense_lse) <= 2 * floor(torch.float32)


@interpreted
def test_a_block_that_only_neighbours_picked_is_not_seen():
    """Neighbours of one tile with disjoint picks: a change of a block changes those that picked it and nobody else."""
    q, k, v, _ = draw(1, 16, 16, 1, 1, 1, 8, 8, 1, 4)
    picks = (torch.arange(16) % 4).view(1, 16, 1, 1)
    mask = ki.MaskContract(causal=False)

    def run(k, v):
        return block_sparse_attention(q, k, v, picks, block_size=4, mask=mask, backend="triton")

    before = run(k, v)
    k, v = k.clone(), v.clone()
    k[:, 4:8] += 1
    v[:, 4:8] -= 2
    after = run(k, v)
    picked = picks.flatten() == 1
    assert torch.equal(before.out[:, ~picked], after.out[:, ~picked])
    assert torch.equal(before.lse[..., ~picked], after.lse[..., ~picked])
    assert (before.out[:, picked] != after.out[:, picked]).all()


@interpreted
def test_duplicates_and_what_is_no_pick_change_no_bit():
    q, k, v, _ = draw(1, 11, 11, 2, 2, 1, 8, 8, 1, 4)
    once = torch.tensor([1, 0, -1, -1]).expand(1, 11, 2, 4)
    again = torch.tensor([0, 1, 1, 2]).expand(1, 11, 2, 4)
    valid = torch.tensor([True, True, True, False]).expand(1, 11, 2, 4)

    def run(picks, valid=None):
        def call(q, k, v):
            return block_sparse_attention(q, k, v, picks, selected_valid=valid, block_size=4, backend="triton")

        return with_gradients(call, q, k, v, torch.float32)

    for a, b in zip(run(once), run(again, valid), strict=True):
        assert torch.equal(a, b)


@interpreted
def test_key_and_value_bytes_are_those_of_the_unions():
    """Forward and dQ load each block of a tile's union once for all the heads of a group, dK and dV each block once."""
    b, t, h, g, d, block = 1, 32, 4, 2, 16, 16
    q, k, v, _ = draw(b, t, t, h, g, g, d, d, 1, block)
    picks = torch.randint(0, 2, (b, t, g, 3), generator=torch.Generator().manual_seed(2))
    picks[:, :16] = 0  # causal: no pick of a block that is wholly ahead
    cut = cut_of(h // g, q.element_size(), 64)
    tiles = picks.view(b, t // cut.queries, cut.queries, g, 3).transpose(2, 3).flatten(3)
    unions = sum(len(set(tile.tolist())) for tile in tiles.flatten(0, 2))
    expected = 2 * unions * block * d * k.element_size()
    q.requires_grad_()
    with counted(of={"keys": k, "values": v}) as traffic:
        out, _ = block_sparse_attention(q, k, v, picks, block_size=block, backend="triton")
        torch.autograd.grad(out.sum(), q)
    launched = [c for c in traffic.counts if c.is_launch]
    assert [c.name for c in launched] == ["_forward_kernel", "_queries_kernel"]
    for count in launched:
        assert count.of["keys"] + count.of["values"] == pytest.approx(expected, rel=0.03)
    k.requires_grad_()
    with counted(of={"keys": k, "values": v}) as traffic:
        torch.autograd.grad(block_sparse_attention(q, k, v, picks, block_size=block, backend="triton").out.sum(), k)
    assert traffic.counts[-1].of == {"keys": 4 * k.numel(), "values": 4 * v.numel()}
    assert traffic.atomics == 0


@pytest.mark.parametrize("tile", [1, 4, 64])
@pytest.mark.parametrize("seed", range(3))
def test_the_plan_is_what_counting_gives(tile, seed):
    """Unions, members, and every key block's list of queries, against loops over sets."""
    generator = torch.Generator().manual_seed(seed)
    batch, queries, groups, picks, keys, size = 2, 70, 2, 5, 50, 8
    blocks = -(-keys // size)
    selected = torch.randint(-2, blocks + 2, (batch, queries, groups, picks), generator=generator).to(torch.int16)
    valid = torch.rand(selected.shape, generator=generator) < 0.8
    mask = ki.MaskContract(window=(20, 0))
    bounds = mask.kernel_intervals(batch, queries, keys, device="cpu")
    unions = forward_plan(selected, valid, blocks, tile)
    lists = key_plan(unions.pairs, tile, bounds.q_start, bounds.q_end, queries, size)
    for b in range(batch):
        for g in range(groups):
            own = [
                {p for p, kept in zip(*row, strict=True) if kept and 0 <= p < blocks}
                for row in zip(selected[b, :, g].tolist(), valid[b, :, g].tolist(), strict=True)
            ]
            for i in range(unions.sizes.shape[2]):
                together = own[i * tile : (i + 1) * tile]
                union = sorted(set().union(*together))
                length = int(unions.sizes[b, g, i])
                assert unions.blocks[b, g, i, :length].tolist() == union
                members = [sum(1 << q for q, mine in enumerate(together) if j in mine) for j in union]
                assert [m % 2**64 for m in unions.members[b, g, i, :length].tolist()] == members
            for j in range(blocks):
                first, whole, cease, last = lists.bounds[b, g, j].tolist()
                assert first <= whole <= cease <= last
                seen = bounds.q_start[0, j * size], bounds.q_end[0, min((j + 1) * size, keys) - 1]
                expected = [t for t in range(queries) if j in own[t] and seen[0] <= t < seen[1]]
                assert lists.queries[first:last].tolist() == expected
                every = bounds.q_start[0, min((j + 1) * size, keys) - 1], bounds.q_end[0, j * size]
                assert lists.queries[whole:cease].tolist() == [t for t in expected if every[0] <= t < every[1]]


@interpreted
@pytest.mark.parametrize("waste", [0, 2, 99])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("picks", [1, 5])
def test_unions_and_their_rule_are_what_counting_gives(picks, waste, seed, monkeypatch):
    from kernel_index.kernels.sparse.block_sparse_attention import triton_plan

    monkeypatch.setattr(plan, "WASTE", waste)
    generator = torch.Generator().manual_seed(seed)
    batch, queries, groups, blocks, tile = 2, 22, 2, 7, 4
    selected = torch.randint(-2, blocks + 2, (batch, queries, groups, picks), generator=generator).to(torch.int16)
    selected[:, 4:8, :, 0] = 3  # a tile that shares more
    valid = torch.rand(selected.shape, generator=generator) < 0.8
    valid[:, 8:12] = False  # a tile that selects nothing
    union, members, sizes = triton_plan.unions_plan(selected, valid, blocks, tile)
    ways = set()
    for b in range(batch):
        for g in range(groups):
            rows = zip(selected[b, :, g].tolist(), valid[b, :, g].tolist(), strict=True)
            own = [{p for p, kept in zip(*row, strict=True) if kept and 0 <= p < blocks} for row in rows]
            for i in range(sizes.shape[2]):
                together = own[i * tile : (i + 1) * tile]
                expected = sorted(set.union(*together))
                by_union = len(expected) * tile <= waste * sum(map(len, together))
                assert int(sizes[b, g, i]) == (len(expected) if by_union else -1)
                assert union[b, g, i, : len(expected)].tolist() == expected
                bits = [sum(1 << q for q, mine in enumerate(together) if j in mine) for j in expected]
                assert members[b, g, i, : len(expected)].tolist() == bits
                ways.add(by_union)
    assert ways == ({True} if waste == 99 else {True, False})


@pytest.mark.parametrize(
    ("group", "tile", "expected"), [(1, 64, (32, 1)), (4, 64, (8, 4)), (3, 1, (4, 4)), (3, 6, (4, 4)), (40, 8, (1, 32))]
)
def test_heads_first_then_queries_fill_a_program(group, tile, expected):
    cut = cut_of(group, 4, tile)
    assert (cut.queries, cut.heads) == expected


@interpreted
def test_who_may_not():
    q, k, v, picks = draw(1, 4, 4, 1, 1, 1, 8, 8, 1, 4)

    def rule(**changed):
        call = {"q": q, "k": k, "v": v, "selected": picks, "block_size": 4, "backend": "triton"} | changed
        return ki.explain(block_sparse_attention, **call).verdicts["triton"]

    assert rule() is None
    assert rule(q=q.double(), k=k.double(), v=v.double()) == "needs float32, bfloat16 or float16"
    wide = torch.zeros(1, 4, 1, 257)
    assert rule(v=wide) == "needs head sizes of at most 256"

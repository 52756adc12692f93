"""Block-sparse attention by lists of picks, interpreted: values and gradients, cuts of the work, the rule."""

import pytest
import torch

import kernel_index as ki
from kernel_index.core.triton import launch
from kernel_index.kernels.sparse.block_sparse_attention import lists
from kernel_index.kernels.sparse.block_sparse_attention.api import block_sparse_attention
from kernel_index.kernels.sparse.block_sparse_attention.geometry import cut_of
from kernel_index.proofs.errors import floor, relative_error
from kernel_index.proofs.traffic import counted
from tests.kernels.sparse.test_block_sparse_triton import DOCUMENTS, contenders, draw, with_gradients

interpreted = pytest.mark.skipif(not launch.interpreting(), reason="runs in Triton's interpreter, on a CPU")

CALLS = {
    "grouped keys, duplicates, no picks": ((2, 40, 40, 4, 4, 2, 8, 8, 5, 8), {}),
    "documents, a window, padding": ((2, 21, 21, 4, 4, 2, 8, 5, 4, 8), {"mask": DOCUMENTS}),
    "T > S, softcap, a short last block": ((1, 21, 9, 2, 2, 1, 8, 8, 2, 4), {"softcap": 2.0}),
    "blocks cut in two": ((1, 140, 300, 2, 2, 1, 8, 8, 1, 128), {"mask": ki.MaskContract(causal=False)}),
}


@pytest.fixture
def by_lists(monkeypatch):
    monkeypatch.setattr(lists, "WASTE", 0)


@interpreted
@pytest.mark.thorough_if(when=lambda name, small: small or not name.startswith(("T > S", "blocks")))
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("small", [False, True])
def test_values_and_gradients(name, small, by_lists, monkeypatch):
    if small:  # many parts of a list, few heads at a time
        monkeypatch.setattr(lists, "PART", 6)
        monkeypatch.setattr(lists, "PARTIAL_BYTES", 1)
    (q, k, v), ours, plain = contenders(*CALLS[name])
    truth = with_gradients(plain, q, k, v, torch.float64)
    naive = with_gradients(plain, q, k, v, torch.float32)
    got, again = (with_gradients(ours, q, k, v, torch.float32) for _ in range(2))
    for mine, same, its, want in zip(got, again, naive, truth, strict=True):
        assert torch.equal(mine, same)
        assert torch.equal(mine.isinf(), want.isinf())
        finite = want.isfinite()
        budget = 2 * relative_error(its[finite], want[finite]) + 8 * floor(torch.float32)
        assert relative_error(mine[finite], want[finite]) <= budget


@interpreted
def test_what_is_launched(by_lists):
    """One pass over the lists each way, whatever reads it: nothing goes by tile, nothing is added by atomics."""
    q, k, v, picks = draw(1, 32, 32, 2, 2, 1, 8, 8, 3, 8)
    k.requires_grad_()
    with counted(of={"keys": k, "values": v}) as traffic:
        torch.autograd.grad(block_sparse_attention(q, k, v, picks, block_size=8, backend="triton").out.sum(), k)
    names = [c.name for c in traffic.counts if c.is_launch]
    backward = ["_delta_kernel", "_lists_kernel", "_merge_queries_kernel", "_merge_keys_kernel"]
    assert names == ["_partials_kernel", "_merge_kernel", *backward]
    assert traffic.atomics == 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("part", [4, 1024])
def test_the_plan_is_what_counting_gives(seed, part, monkeypatch):
    monkeypatch.setattr(lists, "PART", part)
    generator = torch.Generator().manual_seed(seed)
    batch, queries, groups, picks, blocks = 2, 37, 3, 4, 9
    selected = torch.randint(-2, blocks + 2, (batch, queries, groups, picks), generator=generator).to(torch.int16)
    valid = torch.rand(selected.shape, generator=generator) < 0.8
    plan = lists.list_plan(selected, valid, blocks)
    assert [x.shape for x in plan] == [x.shape for x in lists.allocate_list_plan(selected, valid, blocks)]
    assert [x.dtype for x in plan] == [x.dtype for x in lists.allocate_list_plan(selected, valid, blocks)]
    flat, kept = selected.flatten().tolist(), valid.flatten().tolist()
    for b in range(batch):
        for g in range(groups):
            own = b * groups + g
            for j in range(blocks):
                places = [((b * queries + t) * groups + g) * picks + n for t in range(queries) for n in range(picks)]
                expected = [i for i in places if flat[i] == j and kept[i]]
                first, last = plan.parts[own, j : j + 2].tolist()
                got = []
                for block, begin, start, stop in plan.items[own, first:last].tolist():
                    assert (block, begin + len(got)) == (j, start)
                    assert 0 < stop - start <= part
                    got += plan.order[start:stop].tolist()
                assert got == expected
            rest = plan.items[own, int(plan.parts[own, -1]) :]
            assert torch.equal(rest[:, 2], rest[:, 3])


def test_the_rule():
    alone, together = cut_of(1, 2, 64), cut_of(8, 2, 64)
    assert lists.use_lists(alone, 256, 64, 1024, 16)
    assert lists.use_lists(alone, 256, 512, 128, 3)
    assert not lists.use_lists(together, 256, 64, 1024, 16)  # heads that share their picks
    assert not lists.use_lists(alone, 256, 64, 64, 16)  # few blocks: a union wastes little
    assert not lists.use_lists(alone, 512, 64, 1024, 16)
    assert not lists.use_lists(alone, 256, 96, 1024, 16)  # not cut into blocks of 64


def test_heads_are_cut_evenly(monkeypatch):
    monkeypatch.setattr(lists, "PARTIAL_BYTES", 100)
    assert lists.heads_at_once(10, 12, 2, 1) == 6  # ten would fit: one key head's
    assert lists.heads_at_once(30, 12, 2, 1) == 3
    assert lists.heads_at_once(1000, 12, 2, 1) == 1
    assert lists.heads_at_once(1, 12, 2, 2) == 24

"""Block-sparse attention by lists of picks, interpreted: values and gradients, cuts of the work, the rule."""

import pytest
import torch

import kernel_index as ki
from kernel_index.core.target import Target, has_package, pretend
from kernel_index.core.triton import launch
from kernel_index.kernels.sparse.block_sparse_attention import lists, plan, triton_plan
from kernel_index.kernels.sparse.block_sparse_attention.api import block_sparse_attention
from kernel_index.kernels.sparse.block_sparse_attention.contract import BlockSparseCall
from kernel_index.kernels.sparse.block_sparse_attention.geometry import Cut, cut_of
from kernel_index.proofs.errors import floor, relative_error
from kernel_index.proofs.traffic import counted
from tests.kernels.sparse.test_block_sparse_triton import DOCUMENTS, contenders, draw, with_gradients

interpreted = pytest.mark.skipif(not launch.interpreting(), reason="runs in Triton's interpreter, on a CPU")

CALLS = {
    "grouped keys, duplicates, no picks": ((2, 40, 40, 4, 4, 2, 8, 8, 5, 8), {}),
    "documents, a window, padding": ((2, 21, 21, 4, 4, 2, 8, 5, 4, 8), {"mask": DOCUMENTS}),
    "T > S, softcap, a short last block": ((1, 21, 9, 2, 2, 1, 8, 8, 2, 4), {"softcap": 2.0}),
    "two heads together, documents": ((2, 21, 21, 4, 2, 2, 8, 5, 4, 8), {"mask": DOCUMENTS}),
    "three heads together, softcap": ((1, 21, 30, 6, 2, 1, 8, 8, 3, 4), {"softcap": 2.0}),
    "two heads together, blocks cut in two": ((1, 140, 300, 4, 2, 2, 8, 8, 1, 128), {}),
    "blocks cut in two": ((1, 140, 300, 2, 2, 1, 8, 8, 1, 128), {"mask": ki.MaskContract(causal=False)}),
}


@pytest.fixture
def by_lists(monkeypatch):
    monkeypatch.setattr(lists, "use_lists", lambda *_: True)


@pytest.fixture
def by_both(monkeypatch):
    monkeypatch.setattr(lists, "BOTH_EVERYWHERE", True)


@interpreted
@pytest.mark.thorough_if(
    when=lambda name, small: small or not name.startswith(("T > S", "blocks", "two heads together, b"))
)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("small", [False, True])
def test_values_and_gradients(name, small, by_lists, monkeypatch):
    if small:  # many parts of a list, few heads at a time
        monkeypatch.setattr(lists, "PART_ROWS", {"forward": 6, "backward": 6})
        monkeypatch.setattr(lists, "PARTIAL_BYTES", 1)
        monkeypatch.setattr(lists, "FEWEST", 8)
    compare(name)


@interpreted
@pytest.mark.thorough_if(when=lambda name, waste: waste != 3.5)
@pytest.mark.parametrize("waste", [0, 3.5, 99])
@pytest.mark.parametrize(
    "name", ["two heads together, documents", "three heads together, softcap", "two heads together, blocks cut in two"]
)
def test_tiles_by_unions_beside_tiles_by_lists(name, waste, by_both, monkeypatch):
    """0: all that select something go by lists; 99: all go by unions."""
    monkeypatch.setattr(plan, "WASTE", waste)
    sizes = []
    unions = triton_plan.unions_plan
    monkeypatch.setattr(triton_plan, "unions_plan", lambda *a: sizes.append(unions(*a)[2]) or unions(*a))
    compare(name)
    went = [bool((size < 0).any()) for size in sizes], [bool((size > 0).any()) for size in sizes]
    assert went == ([waste < 99] * len(sizes), [waste > 0] * len(sizes))


def compare(name):
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
    plan = ["_bucket_kernel", "_order_kernel", "_parts_kernel"]
    assert names == [*plan, "_partials_kernel", "_merge_kernel", *backward]
    assert traffic.atomics == 0


@interpreted
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("part", "chunk"), [(4, 37), (4, 16), (1024, 16)])
def test_the_plan_is_what_counting_gives(seed, part, chunk, monkeypatch):
    from kernel_index.kernels.sparse.block_sparse_attention import triton_plan

    monkeypatch.setattr(lists, "FEWEST", chunk)
    monkeypatch.setattr(lists, "PARTIAL_BYTES", 1)
    generator = torch.Generator().manual_seed(seed)
    batch, queries, groups, picks, blocks = 2, 37, 3, 4, 9
    selected = torch.randint(-2, blocks + 2, (batch, queries, groups, picks), generator=generator).to(torch.int16)
    valid = torch.rand(selected.shape, generator=generator) < 0.8
    found = triton_plan.list_plan(selected, valid, blocks, 1, part)
    allocated = lists.allocate_list_plan(selected, valid, blocks, 1, part)
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in allocated]
    flat, kept = selected.flatten().tolist(), valid.flatten().tolist()
    firsts = range(0, queries, chunk)
    for own, (b, g, first) in enumerate((b, g, t) for b in range(batch) for g in range(groups) for t in firsts):
        for j in range(blocks):
            inside = range(first, min(first + chunk, queries))
            places = [((b * queries + t) * groups + g) * picks + n for t in inside for n in range(picks)]
            entries = [(i // picks // groups % queries * 4 + i % picks) for i in places if flat[i] == j and kept[i]]
            expected = [-1 if i and e // 4 == entries[i - 1] // 4 else e for i, e in enumerate(entries)]
            begin, end = found.parts[own, j : j + 2].tolist()
            got = []
            for block, first_of_list, start, stop in found.items[own, begin:end].tolist():
                assert (block, first_of_list + len(got)) == (j, start)
                assert 0 < stop - start <= part
                got += found.order[start:stop].tolist()
            assert got == expected
        rest = found.items[own, int(found.parts[own, -1]) :]
        assert torch.equal(rest[:, 2], rest[:, 3])


def test_the_rule():
    alone, together = cut_of(1, 2, 64), cut_of(8, 2, 64)
    assert lists.use_lists(alone, 256, 64, 1024, 16)
    assert lists.use_lists(alone, 256, 512, 128, 3)
    assert not lists.use_lists(together, 256, 64, 1024, 16)  # heads that share their picks
    assert not lists.use_lists(alone, 256, 64, 64, 16)  # few blocks: a union wastes little
    assert not lists.use_lists(alone, 512, 64, 1024, 16)
    assert not lists.use_lists(alone, 256, 96, 1024, 16)  # not cut into blocks of 64


def test_segments_are_cut_evenly(monkeypatch):
    monkeypatch.setattr(lists, "PARTIAL_BYTES", 100)
    two_heads = lists.Segments(batch=1, groups=12, group=1, queries=64, count=1, chunk=64)
    assert lists.segments_at_once(10, two_heads, 2) == 6  # ten would fit: one KV head's
    assert lists.segments_at_once(30, two_heads, 2) == 3
    assert lists.segments_at_once(1000, two_heads, 2) == 1
    assert lists.segments_at_once(1, two_heads._replace(batch=2), 2) == 24
    assert lists.segments_at_once(30, two_heads._replace(chunk=16), 12) == 2  # of the four chunks of a head


@pytest.mark.skipif(not has_package("triton"), reason="needs Triton")
def test_two_consumers_share_a_union_on_hopper():
    q, k, cut = *(torch.empty(1, 8, 8, n, dtype=torch.bfloat16, device="meta") for n in (128, 64)), Cut(8, 8, 8)
    with pretend(Target("cuda", 90)):
        assert lists.tile_of(cut, q, k, 64) == 16
        assert {lists.tile_of(cut, q, k, 128), lists.tile_of(cut, q.float(), k, 64)} == {8}
        assert lists.tile_of(Cut(8, 8, 7), q, k, 64) == 8  # heads that are no power of two
        assert lists.tile_of(cut, q, k[..., :48], 64) == 8
    with pretend(Target("cuda", 100)):
        assert lists.tile_of(cut, q, k, 64) == 8


def test_both_ways_are_taken_on_hopper():
    q, k = (torch.empty(1, n, heads, 128, dtype=torch.bfloat16, device="meta") for n, heads in ((8, 8), (512, 1)))
    selected = torch.empty(1, 8, 1, 2, dtype=torch.int64, device="meta")
    call = BlockSparseCall(q, k, k, selected, None, 64, ki.MaskContract(), None, 0.0, 64, None)
    together = cut_of(8, 2, 64)
    with_gradient = call._replace(q=q.clone().requires_grad_())
    three = selected.new_empty(1, 8, 1, 3)
    assert not lists.use_both(together, call, 64)
    with pretend(Target("cuda", 90)):
        assert lists.use_both(together, call, 64)
        assert not lists.use_both(cut_of(1, 2, 64), call, 64)
        assert lists.use_both(together, with_gradient, 64)
        assert not lists.use_both(together, call._replace(selected=three), 64)  # a union has at most 8 of 3
        assert not lists.use_both(cut_of(32, 2, 64), call, 64)  # tiles of two queries
    with pretend(Target("cuda", 100)):
        assert not lists.use_both(together, call, 64)

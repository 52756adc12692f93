"""The ``cpu`` backend over a prefix tree: squares and rectangles of its runs, merged by their log-sum-exp."""

import pytest
import torch
from hypothesis import given, settings

import kernel_index as ki
from kernel_index.kernels.attention.dense_attention import rectangles
from kernel_index.kernels.attention.dense_attention.rectangles import tree_pieces
from kernel_index.masks.doc_window_mask.cases import dense_oracle
from tests.masks.trees import tree_calls


def test_pieces_hold_every_allowed_pair_once(monkeypatch):
    """A window, a count or a document that cuts a path leaves none; other trees have pieces."""
    monkeypatch.setattr(rectangles, "RUN", 1)
    cut = []

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(tree_calls())
    def check(call):
        mask, rows, queries, keys = call
        found = tree_pieces(mask, mask.sizes(rows, queries, keys))
        cut.append(not found)
        if not found:
            return
        held = torch.zeros(rows, queries, keys, dtype=torch.int64)
        for p in found:
            square = torch.ones(p.q.stop - p.q.start, p.k.stop - p.k.start, dtype=torch.int64)
            held[p.batch, p.q, p.k] += square.tril() if p.kind == "causal" else square
        assert torch.equal(held, dense_oracle(mask, rows, queries, keys).to(torch.int64))

    check()
    assert cut.count(True) >= 10
    assert cut.count(False) >= 10


def test_a_shared_prompt_is_one_rectangle_for_all_answers():
    mask = ki.MaskContract(subtree_end=ki.pack_tree([-1, *[0] * 8], [512, *[64] * 8]).subtree_end)
    found = tree_pieces(mask, mask.sizes(1, 1024))
    assert [p.kind for p in found] == ["causal", "full", *["causal"] * 8]
    assert (found[1].q, found[1].k) == (slice(512, 1024), slice(0, 512))
    short = ki.MaskContract(subtree_end=ki.pack_tree([-1, *[0] * 8], [512, *[1] * 8]).subtree_end)
    assert not tree_pieces(short, short.sizes(1, 520)), "57 tokens a run: chunks of many runs are fewer calls"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("align", [1, 16])
def test_merged_pieces_are_attention_along_paths(monkeypatch, dtype, align):
    """Outputs, log-sum-exp and gradients, with a sink and without; a path of six runs is merged from six pieces."""
    monkeypatch.setattr(rectangles, "RUN", 1)
    tree = ki.pack_tree([-1, 0, 1, 2, 3, 4, 3, 1, 0, -1], [5, 3, 7, 1, 9, 4, 6, 8, 2, 5], align=align)
    mask, tokens = ki.MaskContract(subtree_end=tree.subtree_end), len(tree.positions)
    assert tree_pieces(mask, mask.sizes(2, tokens))
    torch.manual_seed(0)
    exact = [torch.randn(2, tokens, heads, 16, dtype=dtype).double().requires_grad_() for heads in (4, 2, 2)]
    sink = torch.randn(4, dtype=torch.float64).requires_grad_()
    above = torch.randn(2, tokens, 4, 16, dtype=dtype).double()
    # A piece, and the merged sum, are each rounded once to the dtype; gradients are sums over at most 50 tokens.
    bound = 8 * torch.finfo(dtype).eps
    for sinks in ([], [sink]):
        leaves = [x.detach().to(dtype).requires_grad_() for x in exact]
        sinks_too = [x.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_() for x in sinks]
        found, expected = (
            ki.attention_with_lse(*x, mask, sink=(s or [None])[0], backend=b)
            for x, s, b in ((leaves, sinks_too, "cpu"), (exact, sinks, "reference"))
        )
        torch.testing.assert_close(found.out.double(), expected.out, rtol=bound, atol=bound)
        torch.testing.assert_close(found.lse.double(), expected.lse, rtol=bound, atol=bound)
        ours = torch.autograd.grad(found.out, [*leaves, *sinks_too], above.to(dtype))
        theirs = torch.autograd.grad(expected.out, [*exact, *sinks], above)
        for a, e in zip(ours, theirs, strict=True):
            assert float((a.double() - e).abs().max()) <= bound * float(e.abs().max().clamp(min=1))


def test_scores_that_overflow_in_one_piece_leave_the_others(monkeypatch):
    """A query whose logits are not finite has NaN as on every backend; its neighbours keep their results."""
    monkeypatch.setattr(rectangles, "RUN", 1)
    mask = ki.MaskContract(subtree_end=ki.pack_tree([-1, 0, 0], [4, 3, 3]).subtree_end)
    q, k, v = (torch.randn(1, 10, 2, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    k[0, 5] = torch.nan
    found, expected = (ki.attention(q, k, v, mask, backend=b) for b in ("cpu", "reference"))
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert found.isnan().any()
    assert not found[0, [*range(5), *range(7, 10)]].isnan().any()

"""Attention of one backend on a GPU against the reference in float32: output, log-sum-exp and all gradients."""

import torch

import kernel_index as ki
from kernel_index.core.testing import Maker

MASKS = {
    "documents": lambda: ki.MaskContract(doc_ids=torch.tensor([[0] * 300 + [1] * 130 + [-1] * 70 + [2] * 200] * 2)),
    "window": lambda: ki.MaskContract(doc_ids=torch.tensor([[0] * 450 + [1] * 250] * 2), window=(100, 0)),
    "prefix": lambda: ki.MaskContract(prefix=torch.tensor([90, 400])),
    "valid": lambda: ki.MaskContract(causal=False, validity=ki.attention_validity(valid_token_counts=[700, 333])),
    "offset": lambda: ki.MaskContract(q_offset=torch.tensor([0, -30])),
    "tree": lambda: ki.MaskContract(subtree_end=ki.pack_tree([-1, 0, 1, 1, 0], [300, 90, 150, 60, 100]).subtree_end),
}
"""For two rows of 700 tokens."""


def compare_on_a_gpu(mask, leaves, *, softcap=0.0, sink=None, backend="fa4", form=None):
    """``leaves``: q, k and v, which want gradients; ``form``: the lowering that the receipt must name."""
    m = Maker(torch.bfloat16, device="cuda")
    (B, T, H, _), DV = leaves[0].shape, leaves[2].shape[3]
    up, up_lse = m.normal(B, T, H, DV), m.normal(B, H, T, dtype=torch.float32)
    leaves = [*leaves, *([] if sink is None else [sink])]
    results = []
    exact_leaves = [x.detach().float().requires_grad_() for x in leaves]
    for inputs, name in ((leaves, backend), (exact_leaves, "reference")):
        with ki.receipts() as log:
            out, lse = ki.attention_with_lse(
                *inputs[:3], mask, softcap=softcap, sink=None if sink is None else inputs[3], backend=name
            )
        assert name == "reference" or form is None or log[0].details == {"mask_lowering": form}
        loss = (out.float() * up.float()).sum() + (lse.masked_fill(lse.isneginf(), 0.0) * up_lse).sum()
        results.append([out, lse, *torch.autograd.grad(loss, inputs)])
    assert torch.equal(results[0][1].isneginf(), results[1][1].isneginf())
    for actual, exact in zip(*results, strict=True):
        error = (actual.float() - exact).nan_to_num(neginf=0.0).norm() / exact.masked_fill(exact.isinf(), 0.0).norm()
        assert error <= torch.finfo(torch.bfloat16).eps


def leaves_of(rows, tokens, heads, width, value_width=None, keys=None):
    """q, k and v with 4 query heads for each of ``heads`` KV heads."""
    m = Maker(torch.bfloat16, device="cuda")
    keys = keys or tokens
    shapes = (tokens, 4 * heads, width), (keys, heads, width), (keys, heads, value_width or width)
    return [m.normal(rows, *shape).requires_grad_() for shape in shapes]


def sink_of(heads):
    return Maker(torch.bfloat16, device="cuda").normal(heads, dtype=torch.float32).requires_grad_()

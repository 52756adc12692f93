"""The two kernels around a GPU kernel that is not ours, in Triton's interpreter around PyTorch's own attention."""

import math

import pytest
import torch
from torch import Tensor

import kernel_index as ki
from kernel_index.core import excluded
from kernel_index.core.testing import Maker
from kernel_index.core.triton import launch
from kernel_index.kernels.attention.dense_attention.cases import qkv
from kernel_index.kernels.attention.dense_attention.contract import AttentionCall
from kernel_index.kernels.attention.dense_attention.reference import attention_reference

pytestmark = pytest.mark.skipif(not launch.interpreting(), reason="runs in Triton's interpreter, on a CPU")

T = 150  # three tiles of rows, two of keys, five of the copy: the last ones short
DOCUMENTS = (torch.arange(T) >= 70).to(torch.int32).expand(2, T)
MASKS = {
    "causal": ki.MaskContract(),
    "window": ki.MaskContract(window=(20, 0)),
    "both sides": ki.MaskContract(causal=False, window=(9, 4)),
    "documents": ki.MaskContract(doc_ids=DOCUMENTS),
    "tree": ki.MaskContract(subtree_end=ki.pack_tree([-1, 0, 0, 1], [60, 45, 25, 20]).subtree_end),
}
PLAIN = attention_reference.__wrapped__  # without the rule of this module: 0 · NaN is NaN there


def attend(mask: ki.MaskContract, tensors: dict[str, Tensor], monkeypatch) -> tuple[Tensor, Tensor, list[Tensor]]:
    monkeypatch.setattr(excluded.rules, "host_readable", lambda *_: False)
    leaves = [tensors[x].clone().requires_grad_() for x in ("q", "k", "v")]
    call = AttentionCall(*leaves, mask=mask, scale=None, softcap=0.0, sink=None, with_lse=True)
    out, lse = excluded.run_guarded(PLAIN, call, on_device=True)
    seen = out.detach().clone(), lse.detach().clone()
    return *seen, list(torch.autograd.grad(out, leaves, torch.where(out.isfinite(), 1.0, 0.0)))


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_rows_that_see_it_are_nan(name, dtype, monkeypatch):
    mask, tensors = MASKS[name], qkv(Maker(dtype), 2, T, T, 4, 2, 24)
    plain = attend(mask, tensors, monkeypatch)
    assert all(x.isfinite().all() for x in (plain[0], plain[1], *plain[2]))
    bad = torch.zeros(2, T, 2, dtype=torch.bool)
    bad[0, 90:100, 1] = bad[1, 3, 0] = True
    poisoned = {x: y.clone() for x, y in tensors.items()}
    poisoned["v"][bad] = math.inf
    poisoned["k"][1, 3, 0, 5] = math.nan
    out, lse, (d_q, _, _) = attend(mask, poisoned, monkeypatch)
    allowed = mask.dense(2, T, T)[:, 0]  # [B, T, S]
    spoiled = (allowed[..., None] & bad[:, None]).any(2).repeat_interleave(2, 2)  # [B, T, H]
    assert spoiled.any()
    assert not spoiled.all()
    for found, before, rows in (
        (out, plain[0], spoiled),
        (lse, plain[1], spoiled.transpose(1, 2)),
        (d_q, plain[2][0], spoiled),
    ):
        assert not found[rows].isfinite().any()
        assert torch.equal(found[~rows], before[~rows])


def test_without_anything_wrong_nothing_is_copied_back(monkeypatch):
    """The kernels' copies are bit by bit the operands, whatever their strides."""
    from kernel_index.core.triton.excluded import finite_keys

    packed = torch.randn(2, T, 3, 2, 24).to(torch.bfloat16)
    k, v = packed[:, :, 1], packed[:, :, 2]
    copy_k, copy_v, keys = finite_keys(k, v, copy_k=True)
    assert torch.equal(copy_k, k)
    assert torch.equal(copy_v, v)
    assert copy_k.is_contiguous()
    assert keys.some.item() == 0
    assert not keys.bad.any()

"""PyTorch's scaled_dot_product_attention, with the mask in the cheapest form that it understands."""

import functools

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernel_index.core.excluded import run_guarded
from kernel_index.kernels.attention.dense_attention.contract import AttentionCall, OutAndLse, lowering
from kernel_index.masks.doc_window_mask.intervals import Sizes
from kernel_index.masks.doc_window_mask.mask import MaskContract


def attention_sdpa(call: AttentionCall) -> OutAndLse:
    sizes = call.sizes
    form = lowering(sizes, call.mask)
    if form == "none":
        return _attend(form, sizes, call)
    return run_guarded(functools.partial(_attend, form, sizes), call, on_device=form == "is_causal")


def _attend(form: str, sizes: Sizes, call: AttentionCall) -> OutAndLse:
    q, k, v, mask, scale = call.q, call.k, call.v, call.mask, call.scale
    grouped = False
    if q.shape[2] != k.shape[2]:  # a branch, so that it is a bool while sizes are symbols
        grouped = True
    # A last dimension that is not dense sends torch to its O(T·S) formula without notice.
    q_BHTD, k_BKSD, v_BKSD = ((x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2) for x in (q, k, v))
    if form != "dense":
        out = scaled_dot_product_attention(
            q_BHTD, k_BKSD, v_BKSD, is_causal=form == "is_causal", scale=scale, enable_gqa=grouped
        )
        return out.transpose(1, 2).contiguous(), None
    allowed, empty = mask.remember("sdpa", sizes, lambda: _open_mask(mask, sizes))
    out = scaled_dot_product_attention(q_BHTD, k_BKSD, v_BKSD, attn_mask=allowed, scale=scale, enable_gqa=grouped)
    out = out.transpose(1, 2).masked_fill(empty[:, :, None, None], 0.0)
    return out.contiguous(), None


def _open_mask(mask: MaskContract, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """The dense mask with its empty rows opened, and which rows those are.

    What torch's kernels make of a row without a key differs between devices and versions (zeros, NaN, an average).  So
    such a row attends to everything and its output is then replaced by 0, which also zeroes what it sends backward.
    """
    bounds = mask.row_bounds(sizes)
    empty = bounds.start == bounds.end
    allowed = bounds.all_allowed(slice(None), sizes.keys)
    allowed |= empty[..., None]
    return allowed[:, None], empty

"""flash-attn-4: windows by its own arguments, documents as packed sequences; a ``mask_mod`` would disable both."""

import torch
from torch import Tensor

from kernel_index.kernels.attention.dense_attention.packing import no_tokens, packed, unpacked
from kernel_index.masks.attention_arguments import scale_of, sizes_of
from kernel_index.masks.doc_window_mask.mask import MaskContract


def attention_with_lse_fa4(
    q: Tensor, k: Tensor, v: Tensor, mask: MaskContract, scale: float | None, softcap: float, sink: Tensor | None
) -> tuple[Tensor, Tensor]:
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    sizes = sizes_of(q, k, mask)
    left, right = mask.reach_within(sizes)
    how = {
        "softmax_scale": scale_of(q, scale),
        "causal": right == 0,
        # None is "no window"; -1 beside causal would select the package's local kernel with no left end at all
        "window_size": (left, right) if left is not None or right not in (None, 0) else (None, None),
        "softcap": softcap,
        "return_lse": True,
    }
    if not mask.has_tensors:
        out, lse = flash_attn_func(q.contiguous(), k.contiguous(), v.contiguous(), **how)
        return out, lse
    lengths = mask.varlen(sizes.batch, sizes.queries, sizes.keys, device=q.device)
    if lengths.max_seqlen_q == 0:
        out, lse = no_tokens(q, k, v), q.new_empty(q.shape[2], 0, dtype=torch.float32)
    else:
        out, lse = flash_attn_varlen_func(
            *(packed(x, lengths) for x in (q, k, v)),
            cu_seqlens_q=lengths.cu_seqlens_q,
            cu_seqlens_k=lengths.cu_seqlens_k,
            max_seqlen_q=lengths.max_seqlen_q,
            max_seqlen_k=lengths.max_seqlen_k,
            **how,
        )
    lse = unpacked(lse.transpose(0, 1), lengths, sizes.batch, sizes.queries, fill=float("-inf"))
    return unpacked(out, lengths, sizes.batch, sizes.queries), lse.transpose(1, 2).contiguous()

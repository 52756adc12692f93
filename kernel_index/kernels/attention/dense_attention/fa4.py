"""flash-attn-4: windows by its own arguments, documents as packed sequences; a ``mask_mod`` would disable both."""

import torch

from kernel_index.core.excluded import guarded_on_device
from kernel_index.kernels.attention.dense_attention.contract import AttentionCall, OutAndLse
from kernel_index.kernels.attention.dense_attention.packing import no_tokens, packed, unpacked
from kernel_index.masks.attention_arguments import scale_of


@guarded_on_device
def attention_fa4(call: AttentionCall) -> OutAndLse:
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    q, k, v, mask, sizes = call.q, call.k, call.v, call.mask, call.sizes
    left, right = mask.window_bounds_within(sizes)
    options = {
        "softmax_scale": scale_of(q, call.scale),
        "causal": right == 0,
        # None is "no window"; -1 beside causal would select the package's local kernel with no left end at all
        "window_size": (left, right) if left is not None or right not in (None, 0) else (None, None),
        "softcap": call.softcap,
        "learnable_sink": call.sink,
        "return_lse": True,
    }
    if mask.is_band:
        out, lse = flash_attn_func(q.contiguous(), k.contiguous(), v.contiguous(), **options)
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
            **options,
        )
    lse = unpacked(lse.transpose(0, 1), lengths, sizes.batch, sizes.queries, fill=float("-inf"))
    out = unpacked(out, lengths, sizes.batch, sizes.queries)
    return out, lse.transpose(1, 2).contiguous()

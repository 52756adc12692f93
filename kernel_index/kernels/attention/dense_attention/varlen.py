"""PyTorch's variable-length attention: documents as packed sequences, windows by its own argument."""

from typing import Any

from kernel_index.core.excluded import guarded_on_device
from kernel_index.kernels.attention.dense_attention.contract import AttentionCall, OutAndLse
from kernel_index.kernels.attention.dense_attention.packing import no_tokens, packed, unpacked
from kernel_index.masks.attention_arguments import scale_of


@guarded_on_device
def attention_varlen(call: AttentionCall) -> OutAndLse:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v, mask, sizes = call.q, call.k, call.v, call.mask, call.sizes
    lengths = mask.varlen(sizes.batch, sizes.queries, sizes.keys, device=q.device)
    if lengths.max_seqlen_q == 0:
        return unpacked(no_tokens(q, k, v), lengths, sizes.batch, sizes.queries), None
    out: Any = varlen_attn(
        packed(q, lengths),
        packed(k, lengths),
        packed(v, lengths),
        lengths.cu_seqlens_q,
        lengths.cu_seqlens_k,
        lengths.max_seqlen_q,
        lengths.max_seqlen_k,
        scale=scale_of(q, call.scale),
        window_size=lengths.window,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return unpacked(out, lengths, sizes.batch, sizes.queries), None

"""PyTorch's variable-length attention: documents as packed sequences, windows by its own argument."""

from typing import Any

from torch import Tensor

from kernel_index.kernels.attention.dense_attention.packing import no_tokens, packed, unpacked
from kernel_index.masks.attention_arguments import scale_of, sizes_of
from kernel_index.masks.doc_window_mask.mask import MaskContract


def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, mask: MaskContract, scale: float | None, softcap: float, sink: Tensor | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    sizes = sizes_of(q, k, mask)
    lengths = mask.varlen(sizes.batch, sizes.queries, sizes.keys, device=q.device)
    if lengths.max_seqlen_q == 0:
        return unpacked(no_tokens(q, k, v), lengths, sizes.batch, sizes.queries)
    out: Any = varlen_attn(
        packed(q, lengths),
        packed(k, lengths),
        packed(v, lengths),
        lengths.cu_seqlens_q,
        lengths.cu_seqlens_k,
        lengths.max_seqlen_q,
        lengths.max_seqlen_k,
        scale=scale_of(q, scale),
        window_size=lengths.window,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return unpacked(out, lengths, sizes.batch, sizes.queries)

"""Which keys a query sees, in flash-attn-4's own language: it asks within the tiles that are partly allowed.

Imported only where the package is.  The tensors are those of ``TileMask``.
"""

# pyrefly: ignore-errors
import cutlass
import cutlass.cute as cute
from flash_attn.cute import utils


@cute.jit
def causal(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
    """From a first key to the query itself."""
    start = utils.scalar_to_ssa(aux_tensors[0][batch[0], q_idx[0]], cutlass.Int32)
    return (kv_idx >= start) & (kv_idx <= q_idx)


@cute.jit
def interval(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
    start = utils.scalar_to_ssa(aux_tensors[0][batch[0], q_idx[0]], cutlass.Int32)
    end = utils.scalar_to_ssa(aux_tensors[1][batch[0], q_idx[0]], cutlass.Int32)
    return (kv_idx >= start) & (kv_idx < end)


@cute.jit
def path(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
    start = utils.scalar_to_ssa(aux_tensors[0][batch[0], q_idx[0]], cutlass.Int32)
    end = utils.scalar_to_ssa(aux_tensors[1][batch[0], q_idx[0]], cutlass.Int32)
    q_end = utils.scalar_to_ssa(aux_tensors[2][batch[0], kv_idx[0]], cutlass.Int32)
    return (kv_idx >= start) & (kv_idx < end) & (q_idx < q_end)

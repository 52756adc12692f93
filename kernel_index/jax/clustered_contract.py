"""Argument checks and backend eligibility of ``kernel_index.jax.clustered_sparse_attention``.

JAX is imported when a call is checked.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

from kernel_index.jax.attention_contract import check_attention, interpreted_not_worth, pallas_arrays_why_not
from kernel_index.kernels.sparse.clustered_sparse_three_phase.config import ClusteredSparseConfig

if TYPE_CHECKING:
    import jax

    from kernel_index.jax.mask import MaskContract

PHASES = ("scoring", "union", "attention")
COVERED = "topk_covers_all_blocks"


class ClusteredCall(NamedTuple):
    """One checked call."""

    q: "jax.Array"  # [B, T, H, D]
    k: "jax.Array"  # [B, S, K, D]
    v: "jax.Array"  # [B, S, K, Dv]
    config: ClusteredSparseConfig
    mask: "MaskContract"
    scale: float | None
    softcap: float

    @property
    def reroute(self) -> str:
        """Why the call needs no selection: ``topk`` covers all blocks; empty where it needs one."""
        return COVERED if self.config.topk >= -(-self.k.shape[1] // self.config.block_size) else ""


def check(q: Any, k: Any, v: Any, config: Any, mask: Any, scale: Any, softcap: Any) -> ClusteredCall:
    from kernel_index.jax.routing import check_routable

    mask = check_attention(q, k, v, mask, scale, softcap)
    if not isinstance(config, ClusteredSparseConfig):
        raise TypeError(f"config must be a ClusteredSparseConfig, got {type(config).__name__}")
    check_routable(mask)
    return ClusteredCall(q, k, v, config, mask, scale, softcap)


def pallas_why_not(call: ClusteredCall) -> str | None:
    if call.config.block_size % 8 or call.config.query_tile_size % 8:
        return "needs a block size and a query tile size that are multiples of 8"
    return pallas_arrays_why_not(call.q, call.v)


def pallas_not_worth(call: ClusteredCall) -> str | None:
    return interpreted_not_worth(call.q)

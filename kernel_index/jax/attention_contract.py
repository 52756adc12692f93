"""Argument checks and backend eligibility of ``kernel_index.jax.attention``; JAX is imported when a call is checked."""

from typing import TYPE_CHECKING, Any, NamedTuple

from kernel_index.core import checks as host
from kernel_index.masks.attention_arguments import check_scoring

if TYPE_CHECKING:
    import jax

    from kernel_index.jax.mask import MaskContract

WIDEST_HEAD = 256
"""Largest head size of the Pallas kernels."""


class AttentionCall(NamedTuple):
    """One checked call."""

    q: "jax.Array"  # [B, T, H, D]
    k: "jax.Array"  # [B, S, K, D]
    v: "jax.Array"  # [B, S, K, Dv]
    mask: "MaskContract"
    scale: float | None
    softcap: float
    sink: "jax.Array | None"  # [H]
    block_sizes: tuple[int, int] | None  # queries of a tile, keys of a block


def check(q: Any, k: Any, v: Any, mask: Any, scale: Any, softcap: Any, sink: Any, block_sizes: Any) -> AttentionCall:
    mask = check_attention(q, k, v, mask, scale, softcap, sink)
    check_block_sizes(block_sizes)
    return AttentionCall(q, k, v, mask, scale, softcap, sink, block_sizes)


def check_attention(q: Any, k: Any, v: Any, mask: Any, scale: Any, softcap: Any, sink: Any = None) -> "MaskContract":
    """Raise ``TypeError`` or ``ValueError`` for what does not fit; return the mask for JAX.

    These are the checks of ``masks.attention_arguments.check_attention`` for JAX arrays, in the same words.  Devices
    are not compared: JAX does that itself, and a traced array has none.
    """
    from kernel_index.jax import checks
    from kernel_index.jax.mask import as_contract

    for name, value, legend in (("q", q, "[B, T, H, D]"), ("k", k, "[B, S, K, D]"), ("v", v, "[B, S, K, Dv]")):
        checks.is_floating(name, value)
        checks.has_rank(name, value, 4, legend)
        checks.has_dtype(name, value, q.dtype, "like q")
    batch, _, heads, width = q.shape
    keys, kv_heads = k.shape[1:3]
    checks.has_shape("k", k, (batch, keys, kv_heads, width), "[B, S, K, D] with q's B and D,")
    checks.has_shape("v", v, (batch, keys, kv_heads, v.shape[3]), "[B, S, K, Dv] with k's B, S and K,")
    if width < 1:
        raise ValueError(f"q must be of head size at least 1, got shape {tuple(q.shape)}")
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"q must be of a multiple of k's {kv_heads} heads, got {heads}")
    mask = as_contract(mask, q.shape[1], keys)
    mask.check_sizes(batch, keys)
    check_scoring(scale, softcap)
    if sink is not None:
        checks.is_floating("sink", sink)
        checks.has_shape("sink", sink, (heads,), "one logit for each query head, [H]")
    return mask


def check_block_sizes(block_sizes: Any) -> None:
    if block_sizes is None:
        return
    if not isinstance(block_sizes, tuple) or len(block_sizes) != 2:
        raise ValueError(f"block_sizes must be a pair (queries, keys), got {block_sizes!r}")
    for i, size in enumerate(block_sizes):
        host.is_int(f"block_sizes[{i}]", size, minimum=1)
        if size % 8:
            raise ValueError(f"block_sizes[{i}] must be a multiple of 8, got {size}")


def pallas_why_not(call: AttentionCall) -> str | None:
    return pallas_arrays_why_not(call.q, call.v)


def pallas_not_worth(call: AttentionCall) -> str | None:
    return interpreted_not_worth(call.q)


def pallas_arrays_why_not(q: "jax.Array", v: "jax.Array") -> str | None:
    """The rules that every Pallas kernel of attention shares."""
    from kernel_index.jax.target import is_interpreted, platform_of

    if is_interpreted(q) is not None and platform_of(q) not in ("tpu", "cpu"):
        return "needs a TPU (or a CPU, where Pallas is interpreted)"
    if q.dtype.name not in ("float32", "bfloat16"):
        return "needs float32 or bfloat16"
    if max(q.shape[-1], v.shape[-1]) > WIDEST_HEAD:
        return "needs head sizes of at most 256"
    return None


def interpreted_not_worth(q: "jax.Array") -> str | None:
    from kernel_index.jax.target import platform_of

    return "where there is no TPU Pallas is interpreted, which is slow" if platform_of(q) != "tpu" else None

"""Rotary position embedding of queries and keys in one pass, and the tables that it reads."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor

from kernel_index.core import native, stable
from kernel_index.core.dispatch import Backend, Ineligible, always, choose
from kernel_index.core.numerics import is_invariant
from kernel_index.core.stable import ELEMENTWISE, ON_A_GPU
from kernel_index.kernels.attention.fused_rope_qk import contract, tables
from kernel_index.kernels.attention.fused_rope_qk.reference import rope_qk_reference
from kernel_index.kernels.attention.fused_rope_qk.tables import RopeTables
from kernel_index.kernels.attention.fused_rope_qk.torch_op import rope_qk_inductor, rope_qk_native, rope_qk_triton

RopeBackend = Literal["auto", "triton", "native", "inductor", "reference"]

BACKENDS = (
    Backend("triton", contract.triton_why_not, rope_qk_triton, contract.triton_not_worth, invariant=ON_A_GPU),
    Backend(
        "native",
        contract.native_why_not,
        rope_qk_native,
        native.once_built(native.ROWS, not_worth=contract.native_not_worth),
        invariant=ELEMENTWISE,
    ),
    Backend("inductor", contract.inductor_why_not, rope_qk_inductor, contract.inductor_not_worth),
    Backend("reference", always, rope_qk_reference),
)


class RotatedQK(NamedTuple):
    """What ``fused_rope_qk`` returns: the rotated queries and keys.

    >>> import torch, kernel_index as ki
    >>> q, k = torch.ones(1, 3, 4, 8), torch.ones(1, 3, 2, 8)
    >>> rotated = ki.fused_rope_qk(q, k, ki.rope_tables(torch.arange(3), 8))
    >>> rotated.q.shape, rotated.k.shape
    (torch.Size([1, 3, 4, 8]), torch.Size([1, 3, 2, 8]))
    """

    q: Tensor
    k: Tensor


def fused_rope_qk(
    q: Tensor,
    k: Tensor,
    cos: Tensor | RopeTables,
    sin: Tensor | None = None,
    *,
    interleaved: bool = False,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    backend: RopeBackend = "auto",
) -> RotatedQK:
    """Rotate queries and keys by their positions, both in one launch.

    Each pair of channels ``(x1, x2)`` becomes ``(x1·cos − x2·sin, x2·cos + x1·sin)``, computed in float32 at least.
    The pairs are channels i and i + R/2 (the Llama and Hugging Face convention), or 2i and 2i + 1 if ``interleaved``;
    channels from R on pass through.  ``sin → −sin`` undoes the rotation, and is what the backward pass does: it keeps
    cos and sin only, and costs nothing for a q or k that needs no gradient.  Double backward works.

    With ``q_weight``, and likewise for k, each head is normalized before its rotation, in the same launch::

        q ← q / √(mean(q², over D) + eps) · (q_weight + weight_offset)

    in float32 at least, all D channels, with one rounding after the rotation; models that round between the two differ
    by that rounding.  Backward keeps q, k and the weights too, and computes 1/rms again; the weights' gradients are
    sums in float32 in a fixed order.

    Args:
        q: ``[B, T, H, D]``, any floating dtype.  Under autocast q and k are cast as those of
            ``F.scaled_dot_product_attention``; cos and sin are not.
        k: ``[B, T, K, D]``, q's dtype; H and K are free.
        cos: ``[1 or B, T, 1, R/2]`` with ``R <= D``, any floating dtype; nothing else broadcasts.  Or what
            ``rope_tables`` returned, and then no sin.
        sin: cos's shape and dtype.  A cos or sin that needs a gradient gets one, from the reference.
        interleaved: whether a pair is two neighbouring channels.
        q_weight: ``[D]``, any floating dtype, for an RMS norm of every head of q; None for no norm.
        k_weight: the same for k.
        eps: what is added to the mean square.
        weight_offset: what is added to the weights: 1 for a weight stored around 0.
        backend: ``"auto"`` or a backend's name; a named backend runs or raises ``Ineligible``.

    Returns:
        ``RotatedQK(q, k)``: new contiguous tensors of q's and k's shapes and dtype.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
        Ineligible: the named backend cannot run this call.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021; the norm: Qwen3, 2025.

    >>> import torch, kernel_index as ki
    >>> q = torch.tensor([1.0, 0.0]).expand(1, 2, 1, 2)
    >>> ki.fused_rope_qk(q, q, ki.rope_tables(torch.arange(2), 2)).q[0, :, 0]
    tensor([[1.0000, 0.0000],
            [0.5403, 0.8415]])
    """
    call = contract.check(q, k, cos, sin, interleaved, q_weight, k_weight, eps, weight_offset)
    return RotatedQK(*choose("fused_rope_qk", BACKENDS, backend, call).run(call))


def rope_tables(
    positions: Tensor,
    dim: int,
    base: float | None = 10000.0,
    scaling: Mapping[str, Any] | None = None,
    *,
    seq_len: int | None = None,
) -> RopeTables:
    """The cosines and sines that ``fused_rope_qk`` reads.

    ``angle[t, i] = positions[t] · f_i`` with ``f_i = base ** (-2i / R)``, computed in float64 so that a position
    beyond 2**24 loses nothing before the rounding to float32.  ``scaling`` changes ``f_i`` in one of the ways that
    stretch the context of a trained model; it is Hugging Face's ``rope_parameters``, as a configuration holds them:

    - ``{"rope_type": "linear", "factor": s}`` divides every frequency by s;
    - ``{"rope_type": "dynamic", "factor": s, "original_max_position_embeddings": n}`` multiplies the base by
      ``(s · seq_len / n − (s − 1)) ** (R / (R − 2))`` where seq_len is greater than n;
    - ``{"rope_type": "yarn", "factor": s, "original_max_position_embeddings": n}`` divides the slow ones, keeps the
      fast ones, blends between, and multiplies both tables by the attention factor ``0.1·ln(s) + 1``.  Optional:
      ``attention_factor``, ``beta_fast`` (32), ``beta_slow`` (1), ``mscale``, ``mscale_all_dim``, ``truncate`` (True);
    - ``{"rope_type": "longrope", "short_factor": […], "long_factor": […], "original_max_position_embeddings": n,
      "factor": s}`` divides each frequency by a number of its own, from the long list where seq_len is greater than n,
      and multiplies both tables by ``attention_factor``, which is ``√(1 + ln(s)/ln(n))`` by default;
    - ``{"rope_type": "llama3", "factor": s, "low_freq_factor": a, "high_freq_factor": b,
      "original_max_position_embeddings": n}`` divides by wavelength;
    - ``{"rope_type": "proportional", "partial_rotary_factor": p}`` keeps the fastest share p of the frequencies and
      makes the others 0; R stays dim.

    With a ``partial_rotary_factor`` in any other type, dim is the head size and ``R = int(dim · factor)``.  ``dynamic``
    and ``longrope`` take the configuration's ``max_position_embeddings`` in the place of n and of ``s · n``.  ``type``
    is read as ``rope_type``, ``"default"`` is the plain table, a value of None is an absent key, a ``rope_theta`` must
    equal ``base`` where both are given, and any other key is an error.

    Args:
        positions: integer tensor ``[T]`` or ``[B, T]``, in tokens; negative positions rotate backwards.
        dim: R, the number of rotated channels: even, at least 2; the head size with a ``partial_rotary_factor``.
        base: the wavelength in tokens of the slowest pair, over 2π; greater than 1.  None reads ``rope_theta``.
        scaling: a mapping as above, or None.
        seq_len: tokens of the sequence, for ``dynamic`` and ``longrope``; None for one within the original context.

    Returns:
        ``RopeTables(cos, sin)``: float32 ``[1 or B, T, 1, R/2]`` on the device of positions.

    Raises:
        TypeError, ValueError: an argument, a key or a value of ``scaling`` is not as above.
        Ineligible: under ``numerics("invariant")``, on a CPU without its C++ kernels, or another device.

    Source: Su et al. 2021; Chen et al. 2023 (linear); Peng et al., "YaRN", 2023, for dynamic too; Ding et al.,
        "LongRoPE", 2024; the releases of Llama 3.1 (llama3) and Gemma 4 (proportional).

    >>> import torch, kernel_index as ki
    >>> ki.rope_tables(torch.arange(4), 2).cos.flatten()
    tensor([ 1.0000,  0.5403, -0.4161, -0.9900])
    """
    contract.check_tables(positions, dim, base, scaling, seq_len)
    frequencies, amplitude = tables.frequencies(dim, base, scaling, positions.device, seq_len)
    angles = (positions.double().unsqueeze(-1) * frequencies).unsqueeze(-2)
    if positions.ndim == 1:
        angles = angles.unsqueeze(0)
    if not is_invariant():
        return RopeTables((angles.cos() * amplitude).float(), (angles.sin() * amplitude).float())
    if (rule := contract.invariant_tables_why_not(angles)) is not None:
        raise Ineligible(f"rope_tables: numerics('invariant') cannot run this call ({rule})")
    return RopeTables((stable.cos(angles) * amplitude).float(), (stable.sin(angles) * amplitude).float())

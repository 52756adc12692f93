"""Softmax attention under one mask contract."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kernel_index.core import device_documents, native
from kernel_index.core.dispatch import Backend, always, choose
from kernel_index.core.document_attention import ATTENTION
from kernel_index.kernels.attention.dense_attention import contract, gpu_rules
from kernel_index.kernels.attention.dense_attention.contract import AttentionCall, OutAndLse
from kernel_index.kernels.attention.dense_attention.cpu import attention_cpu
from kernel_index.kernels.attention.dense_attention.flex import attention_flex
from kernel_index.kernels.attention.dense_attention.native import SOURCE, attention_native
from kernel_index.kernels.attention.dense_attention.reference import attention_reference
from kernel_index.kernels.attention.dense_attention.sdpa import attention_sdpa
from kernel_index.kernels.attention.dense_attention.torch_op import attention_triton
from kernel_index.kernels.attention.dense_attention.torch_op_fa4 import attention_fa4_traced
from kernel_index.kernels.attention.dense_attention.varlen import attention_varlen
from kernel_index.masks.attention_arguments import EVERYTHING_BEFORE
from kernel_index.masks.doc_window_mask.mask import MaskContract


def _attention_fa4(call: AttentionCall) -> OutAndLse:
    if torch.compiler.is_compiling():
        return attention_fa4_traced(call)
    from kernel_index.kernels.attention.dense_attention.fa4 import attention_fa4

    return attention_fa4(call)


def _attention_gluon(call: AttentionCall) -> OutAndLse:
    from kernel_index.kernels.attention.dense_attention.gluon import attention_gluon

    return attention_gluon(call)


AttentionBackend = Literal["auto", "fa4", "triton", "gluon", "flex", "varlen", "native", "cpu", "sdpa", "reference"]

BACKENDS = (
    Backend("fa4", gpu_rules.fa4_why_not, _attention_fa4, gpu_rules.fa4_not_worth, details=gpu_rules.fa4_details),
    Backend(
        "triton",
        gpu_rules.triton_why_not,
        attention_triton,
        gpu_rules.triton_not_worth,
        invariant=device_documents.ATTENTION,
    ),
    Backend("gluon", gpu_rules.gluon_why_not, _attention_gluon, gpu_rules.gluon_not_worth),
    Backend("flex", gpu_rules.flex_why_not, attention_flex, gpu_rules.flex_not_worth),
    Backend("varlen", gpu_rules.varlen_why_not, attention_varlen, gpu_rules.varlen_not_worth),
    Backend(
        "native",
        contract.native_why_not,
        attention_native,
        native.once_built(SOURCE, not_worth=contract.native_not_worth),
        invariant=ATTENTION,
    ),
    Backend("cpu", contract.cpu_why_not, attention_cpu, contract.cpu_not_worth),
    Backend("sdpa", contract.sdpa_why_not, attention_sdpa, details=contract.sdpa_details),
    Backend("reference", always, attention_reference),
)


class AttentionOutput(NamedTuple):
    """``out`` [B, T, H, Dv] in q's dtype; ``lse`` [B, H, T], natural logarithm, float32 (float64 for float64).

    >>> import torch, kernel_index as ki
    >>> q = torch.zeros(1, 2, 1, 4)
    >>> ki.attention_with_lse(q, q, q).lse
    tensor([[[0.0000, 0.6931]]])
    """

    out: Tensor
    lse: Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: MaskContract = EVERYTHING_BEFORE,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    backend: AttentionBackend = "auto",
) -> Tensor:
    """Softmax attention over the keys that the mask allows.

    With G = H / K query heads for each KV head, ``z = scale · q[t, h]·k[s, h // G]``, and
    ``z = softcap · tanh(z / softcap)`` where a softcap is given::

        out[t, h] = Σ_s exp(z[t, s]) · v[s, h // G] / (exp(sink[h]) + Σ_s exp(z[t, s]))      over allowed s

    Softmax and sums are in float32 at least.  A query that may attend to nothing gives exactly 0 and gradient 0.  Keys
    and values that the mask excludes have no influence, also where they are NaN or infinity.

    Args:
        q: [B, T, H, D], any floating dtype.  Under autocast q, k and v are cast as those of
            ``F.scaled_dot_product_attention``.
        k: [B, S, K, D], q's dtype; H is a multiple of K, and nothing is repeated in memory.
        v: [B, S, K, Dv], q's dtype.
        mask: the keys that each query may attend to; causal by default, aligned with the last key where T ≠ S.  With
            T > S give one: by default it is an error, since it is what the layout [B, H, T, D] of PyTorch looks like.
        scale: factor of the scores; ``D ** -0.5`` by default.
        softcap: bound of the scores; 0 is off.
        sink: [H], learnable sink logits: terms of the denominator without a value; None for no such term.
        backend: ``"auto"`` or a backend's name; a named backend runs or raises ``Ineligible``.

    Returns:
        [B, T, H, Dv], contiguous, q's dtype.

    Raises:
        TypeError: a tensor is not floating, dtypes differ, or ``mask`` is not a ``MaskContract``.
        ValueError: shapes, heads, devices or the mask's sizes do not fit, T > S with the default mask, or softcap is
            negative.
        Ineligible: the named backend cannot run this call.

    Source: Vaswani et al., 2017; grouped heads: Ainslie et al., 2023; softcap: Gemma 2; sink: gpt-oss.

    >>> import torch, kernel_index as ki
    >>> q, k = torch.ones(1, 2, 4, 8), torch.ones(1, 2, 2, 8)
    >>> v = k * torch.tensor([1.0, 3.0]).view(1, 2, 1, 1)
    >>> ki.attention(q, k, v)[0, :, 0, 0]
    tensor([1., 2.])
    """
    call = contract.check(q, k, v, mask, scale, softcap, sink, with_lse=False)
    return choose("attention", BACKENDS, backend, call).run(call)[0]


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: MaskContract = EVERYTHING_BEFORE,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    backend: AttentionBackend = "auto",
) -> AttentionOutput:
    """``attention`` together with the logarithm of its denominator.

    ``lse[h, t] = log(exp(sink[h]) + Σ_s exp(z[t, s]))`` with the natural logarithm: the sink is included, as in
    FlashAttention 4.  A query that may attend to nothing gives −inf, also where there is a sink, and gradient 0.

    Args:
        q: as in ``attention``, and so are the others.

    Returns:
        ``AttentionOutput(out [B, T, H, Dv], lse [B, H, T])``; both carry gradients, an unused one costs nothing.

    Raises:
        TypeError, ValueError, Ineligible: as ``attention``.

    Source: as ``attention``.

    >>> import torch, kernel_index as ki
    >>> q = torch.zeros(1, 3, 1, 8)
    >>> ki.attention_with_lse(q, q, q).lse.exp()
    tensor([[[1., 2., 3.]]])
    """
    call = contract.check(q, k, v, mask, scale, softcap, sink, with_lse=True)
    return AttentionOutput(*choose("attention_with_lse", BACKENDS, backend, call).run(call))

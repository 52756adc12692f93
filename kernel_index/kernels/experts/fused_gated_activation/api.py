"""act(gate) · up, the activation between the projections of a gated MLP: SwiGLU, GEGLU, ReGLU."""

from dataclasses import replace
from functools import partial
from typing import Literal

from torch import Tensor, nn

from kernel_index.core import numerics, rules
from kernel_index.core.dispatch import Backend, Choice, always, choose
from kernel_index.core.stable import ELEMENTWISE, ON_A_GPU
from kernel_index.kernels.experts.fused_gated_activation import contract
from kernel_index.kernels.experts.fused_gated_activation.contract import GatedKind
from kernel_index.kernels.experts.fused_gated_activation.reference import gated_activation_reference
from kernel_index.kernels.experts.fused_gated_activation.torch_op import (
    gated_activation_inductor,
    gated_activation_native,
    gated_activation_triton,
    gated_linear_triton,
)

GatedActivationBackend = Literal["auto", "triton", "native", "inductor", "reference"]

BACKENDS = (
    Backend(
        "triton",
        contract.triton_why_not,
        gated_activation_triton,
        contract.triton_not_worth,
        contract.kept_bytes,
        ON_A_GPU,
    ),
    Backend(
        "native",
        contract.native_why_not,
        gated_activation_native,
        numerics.not_worth,
        contract.kept_bytes,
        ELEMENTWISE,
    ),
    Backend(
        "inductor",
        contract.inductor_why_not,
        gated_activation_inductor,
        contract.inductor_not_worth,
        contract.kept_bytes,
    ),
    Backend("reference", always, gated_activation_reference),
)


def fused_gated_activation(
    gate: Tensor,
    up: Tensor,
    *,
    kind: GatedKind = "silu",
    linear: tuple[Tensor, Tensor | None] | None = None,
    backend: GatedActivationBackend = "auto",
) -> Tensor:
    """The activation of a gated MLP in one pass over memory.

    ``y = act(gate) · up``, computed in float32 at least and rounded once, with::

        silu       act(x) = x · sigmoid(x)
        gelu       act(x) = x · (1 + erf(x / √2)) / 2
        gelu_tanh  act(x) = x · (1 + tanh(√(2/π) · (x + 0.044715 · x³))) / 2
        relu       act(x) = max(x, 0)
        relu2      act(x) = max(x, 0)²

    Backward recomputes act and its slope from gate and up; nothing else is kept.  The gradient of gate is exactly 0
    where ``gate <= 0`` for ``relu`` and ``relu2``, even for an infinite ``up`` or upstream gradient.  NaN propagates.
    Double backward works.

    Args:
        gate: any shape, any floating dtype.  Gate and up may be the two halves of one projection's last dimension, as
            ``chunk(2, -1)`` returns them: the Triton kernel reads them where they are.
        up: gate's shape and dtype.
        kind: the activation, as above.
        linear: weight [O, F] and bias [O] or None of the linear layer behind, F being the last dimension of gate: its
            result is returned then.  The Triton kernel does not keep y for the gradient of weight: the pass that makes
            the gradients of gate and up makes it again.  Both are cast to gate's dtype.
        backend: ``"auto"`` or a backend's name; a named backend runs or raises ``Ineligible``.

    Returns:
        A new contiguous tensor of gate's shape and dtype; with ``linear``, [..., O].

    Raises:
        TypeError: an argument is not a floating-point tensor, or the dtypes of gate and up differ.
        ValueError: shapes or devices do not fit, or the kind is none of the above.
        Ineligible: the named backend cannot run this call; ``linear`` in invariant numerics.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020.

    >>> import torch, kernel_index as ki
    >>> ki.fused_gated_activation(torch.tensor([-1.0, 0.0, 1.0]), torch.full((3,), 2.0))
    tensor([-0.5379,  0.0000,  1.4621])
    """
    call = contract.check(gate, up, kind)
    if linear is None:
        return choose("fused_gated_activation", BACKENDS, backend, call).run(call)
    weight, bias = contract.check_linear(call, linear)
    numerics.needs_ordinary_numerics(
        "fused_gated_activation", "its linear= is a product of PyTorch: give the result to ki.linear"
    )
    return _with_linear(choose("fused_gated_activation", BACKENDS, backend, call), call, weight, bias)


def _with_linear(choice: Choice, call: contract.Call, weight: Tensor, bias: Tensor | None) -> Tensor:
    weight, bias = weight.to(call.gate.dtype), None if bias is None else bias.to(call.gate.dtype)  # as autocast does
    if choice.backend.name != "triton" or not rules.wants_gradient(weight):  # nobody else reads the activation again
        return nn.functional.linear(choice.run(call), weight, bias)
    run = partial(gated_linear_triton, weight=weight, bias=bias)
    return replace(choice, backend=replace(choice.backend, run=run)).run(call)

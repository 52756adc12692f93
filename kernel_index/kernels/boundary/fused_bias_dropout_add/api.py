"""Bias, dropout and the residual addition that end a block."""

from typing import Literal

from torch import Tensor

from kernel_index.core import numerics
from kernel_index.core.dispatch import Backend, always, choose
from kernel_index.core.stable import EXACT, ON_A_GPU
from kernel_index.kernels.boundary.fused_bias_dropout_add import contract
from kernel_index.kernels.boundary.fused_bias_dropout_add.reference import bias_dropout_add_reference
from kernel_index.kernels.boundary.fused_bias_dropout_add.torch_op import (
    bias_dropout_add_inductor,
    bias_dropout_add_native,
    bias_dropout_add_triton,
)

BiasDropoutAddBackend = Literal["auto", "triton", "native", "inductor", "reference"]

BACKENDS = (
    Backend("triton", contract.triton_why_not, bias_dropout_add_triton, contract.triton_not_worth, invariant=ON_A_GPU),
    Backend("native", contract.native_why_not, bias_dropout_add_native, numerics.not_worth, invariant=EXACT),
    Backend("inductor", contract.inductor_why_not, bias_dropout_add_inductor, contract.inductor_not_worth),
    Backend("reference", always, bias_dropout_add_reference),
)


def fused_bias_dropout_add(
    x: Tensor,
    residual: Tensor,
    *,
    bias: Tensor | None = None,
    p: float = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
    backend: BiasDropoutAddBackend = "auto",
) -> Tensor:
    """Bias, dropout and residual addition in one pass over memory, with a mask that is rebuilt and never stored.

    ``out = residual + keep·(x + bias) / (1 − p)``, computed in float32 (float64 if an argument is) and rounded once.

    ``keep`` is a function of the seed and of the element's row-major index, and of nothing else: every backend, every
    memory layout, backward and recomputation under ``torch.utils.checkpoint`` see the same mask, bit for bit.  It is
    Philox-4x32-10; ``docs/decisions/0003-dropout-mask.md`` defines it.  A dropped element is the residual exactly, even
    where x is infinite; with ``p=1`` all are.  With ``p=0`` or ``training=False`` no random number is drawn.  Nothing
    is written in place.

    Args:
        x: the block's output, any shape ``[..., C]``, any floating dtype.
        residual: exactly of x's shape, any floating dtype.
        bias: ``[C]``, or None.  Its gradient is summed in float32, in a fixed order.
        p: the probability to drop an element, between 0 and 1.
        training: False is the same as ``p=0``.
        seed: a 64-bit integer, or an int64 tensor of one element on x's device, whose value may change between the
            replays of a CUDA graph or the calls of a compiled function.  None draws one from the device's default
            generator, so ``torch.manual_seed`` reproduces it.  Give each layer and each rank a seed of its own.
        backend: ``"auto"`` or a backend's name; a named backend runs or raises ``Ineligible``.

    Returns:
        A new contiguous tensor of x's shape and residual's dtype, differentiable twice.

    Raises:
        TypeError: an argument has the wrong type or is not a floating-point tensor.
        ValueError: the shapes or devices differ, p is out of range, or seed is not one 64-bit number.
        Ineligible: the named backend cannot run this call.

    Source: Srivastava et al., "Dropout", 2014; Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.

    >>> import torch, kernel_index as ki
    >>> ki.fused_bias_dropout_add(torch.ones(6), torch.zeros(6), p=0.5, seed=0)
    tensor([0., 2., 0., 2., 2., 0.])
    """
    call = contract.check(x, residual, bias, p, training, seed)
    return choose("fused_bias_dropout_add", BACKENDS, backend, call).run(call)

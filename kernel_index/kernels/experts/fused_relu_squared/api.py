"""relu(x)**2, the activation of Primer and of Nemotron's experts."""

from typing import Literal

from torch import Tensor

from kernel_index.core.dispatch import Backend, always, choose
from kernel_index.core.stable import EXACT, ON_A_GPU
from kernel_index.kernels.experts.fused_relu_squared import contract
from kernel_index.kernels.experts.fused_relu_squared.reference import relu_squared_reference
from kernel_index.kernels.experts.fused_relu_squared.torch_op import relu_squared_inductor, relu_squared_triton

ReluSquaredBackend = Literal["auto", "triton", "inductor", "reference"]

BACKENDS = (
    Backend(
        "triton",
        contract.triton_why_not,
        relu_squared_triton,
        contract.triton_not_worth,
        contract.kept_bytes,
        ON_A_GPU,
    ),
    Backend(
        "inductor",
        contract.inductor_why_not,
        relu_squared_inductor,
        contract.inductor_not_worth,
        contract.kept_bytes,
        EXACT,
    ),
    Backend("reference", always, relu_squared_reference, invariant=EXACT),
)


def fused_relu_squared(x: Tensor, *, backend: ReluSquaredBackend = "auto") -> Tensor:
    """Squared ReLU in one pass over memory.

    ``y = relu(x)**2``, computed in float32 at least, so that float16 overflows only where the result itself does.
    The gradient is ``2·relu(x)·g``: exactly 0 where ``x <= 0``, even for an infinite ``g``.  NaN propagates.  Double
    backward works.

    Args:
        x: any shape, any floating dtype.
        backend: ``"auto"`` or a backend's name; a named backend runs or raises ``Ineligible``.

    Returns:
        A new contiguous tensor of x's shape and dtype.

    Raises:
        TypeError: x is not a floating-point tensor.
        Ineligible: the named backend cannot run this call.

    Source: So et al., "Primer: Searching for Efficient Transformers", 2021.

    >>> import torch, kernel_index as ki
    >>> ki.fused_relu_squared(torch.tensor([-1.0, 0.5, 3.0]))
    tensor([0.0000, 0.2500, 9.0000])
    """
    contract.check(x)
    return choose("fused_relu_squared", BACKENDS, backend, x).run(x)

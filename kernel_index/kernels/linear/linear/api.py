"""A linear layer's product, with a form whose rows do not depend on each other."""

from typing import Literal

from torch import Tensor

from kernel_index.core import device_products, numerics
from kernel_index.core.dispatch import Backend, always, choose
from kernel_index.core.products import PRODUCT
from kernel_index.kernels.linear.linear import contract
from kernel_index.kernels.linear.linear import torch_op_repeated as repeated
from kernel_index.kernels.linear.linear.reference import linear_reference, linear_torch
from kernel_index.kernels.linear.linear.torch_op import linear_native, linear_triton

LinearBackend = Literal["auto", "triton", "native", "torch", "reference"]

BACKENDS = (
    Backend("triton", contract.triton_why_not, linear_triton, numerics.not_worth, invariant=device_products.PRODUCT),
    Backend("native", contract.native_why_not, linear_native, numerics.not_worth, invariant=PRODUCT),
    Backend("torch", contract.torch_why_not, linear_torch),
    Backend("reference", always, linear_reference),
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: LinearBackend = "auto") -> Tensor:
    """``x · weightᵀ + bias``; under ``ki.numerics("invariant")`` a row of it depends on that row of x alone.

    ``y[…, f] = Σ_c x[…, c] · weight[f, c] + bias[f]``, summed in float32 at least.  ``F.linear`` computes the same, but
    its kernel may change with the number of rows, and with it the last bits of every row.  The invariant form sums over
    c in one fixed order, whatever the number of rows, their places and the number of threads.  Its gradient of x has
    independent rows too.  The gradients of weight and bias are sums over rows, in the order of the rows.

    Args:
        x: [..., C], any floating dtype; the invariant form takes float32, bfloat16 and on a GPU float16.  Under
            autocast the arguments are cast as ``F.linear`` casts them.
        weight: [F, C], x's dtype.
        bias: [F], x's dtype, or None.
        backend: ``"auto"`` or a backend's name; a named backend runs or raises ``Ineligible``.  ``"torch"`` is
            ``F.linear``, which ``auto`` takes in ordinary mode.

    Returns:
        [..., F], contiguous, x's dtype.

    Raises:
        TypeError: a tensor is not floating, or dtypes differ.
        ValueError: shapes or devices do not fit.
        Ineligible: the named backend cannot run this call.

    Source: He and Thinking Machines Lab, "Defeating Nondeterminism in LLM Inference", 2025, for the aim.

    >>> import torch, kernel_index as ki
    >>> ki.linear(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]]))
    tensor([[11., 17.]])
    """
    key = repeated.key_of(x, weight, bias) if backend == "auto" else None
    if key is not None and key in repeated.KNOWN:
        return repeated.run(x, weight, bias)
    call = contract.check(x, weight, bias)
    choice = choose("linear", BACKENDS, backend, call)
    y = choice.run(call)
    if choice.backend.name == "triton":
        repeated.remember(key)
    return y

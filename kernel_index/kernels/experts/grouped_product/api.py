"""Products of consecutive groups of rows with a matrix of each group's own: a mixture of experts' projections."""

from typing import Literal

from torch import Tensor

from kernel_index.core import device_products, numerics
from kernel_index.core.dispatch import Backend, always, choose
from kernel_index.core.products import PRODUCT
from kernel_index.kernels.experts.grouped_product import contract
from kernel_index.kernels.experts.grouped_product.reference import grouped_product_reference
from kernel_index.kernels.experts.grouped_product.torch_op import grouped_product_op
from kernel_index.kernels.experts.grouped_product.torch_op_rows import grouped_product_native, grouped_product_triton

BACKENDS = (
    Backend(
        "triton", contract.triton_why_not, grouped_product_triton, numerics.not_worth, invariant=device_products.PRODUCT
    ),
    Backend("native", contract.native_why_not, grouped_product_native, numerics.not_worth, invariant=PRODUCT),
    Backend("grouped_mm", contract.grouped_mm_why_not, grouped_product_op),
    Backend("reference", always, grouped_product_reference),
)

GroupedProductBackend = Literal["auto", "triton", "native", "grouped_mm", "reference"]


def grouped_product(x: Tensor, weight: Tensor, offsets: Tensor, *, backend: GroupedProductBackend = "auto") -> Tensor:
    """Multiply each row by the matrix of its group, all groups in one call.

    ``y[s] = weight[e] · x[s]`` for the rows s of group e, which are ``offsets[e − 1] ≤ s < offsets[e]``.  A group may
    be empty.  Gradients for x and weight; those of an empty group are 0.  No host synchronisation on a GPU.
    Under ``ki.numerics("invariant")`` a row does not depend on how many others its group has.

    Args:
        x: [S, C], rows in the order of their groups, any floating dtype.
        weight: [E, F, C], x's dtype.
        offsets: int32 [E], the end of each group; they do not decrease, and the last one is S.  On a CPU this is
            checked; elsewhere rows beyond the last offset are undefined.
        backend: ``"auto"`` or a backend's name; a named backend runs or raises ``Ineligible``.  ``"grouped_mm"`` is
            ``torch.nn.functional.grouped_mm``, which needs rows of C and F elements in multiples of 16 bytes.

    Returns:
        [S, F], x's dtype, also under autocast.

    Raises:
        TypeError: an argument is no tensor of its dtype.
        ValueError: a shape, a device or an offset is wrong.
        Ineligible: the named backend cannot run this call.

    Source: Gale et al., "MegaBlocks: Efficient Sparse Training with Mixture-of-Experts", 2022.

    >>> import torch, kernel_index as ki
    >>> weight = torch.stack([torch.ones(4, 4), torch.full((4, 4), 3.0)])
    >>> ki.grouped_product(torch.ones(3, 4), weight, torch.tensor([1, 3], dtype=torch.int32))[:, 0]
    tensor([ 4., 12., 12.])
    """
    contract.check(x, weight, offsets)
    return choose("grouped_product", BACKENDS, backend, x, weight, offsets).run(x, weight, offsets)

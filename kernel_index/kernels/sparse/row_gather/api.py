"""Gather rows of one tensor, or the same rows of keys and of values, by index."""

from typing import Literal, NamedTuple

from torch import Tensor

from kernel_index.core.dispatch import Backend, always, choose
from kernel_index.core.stable import EXACT
from kernel_index.kernels.sparse.row_gather import contract
from kernel_index.kernels.sparse.row_gather.contract import GIANT as GIANT
from kernel_index.kernels.sparse.row_gather.reference import gather_reference
from kernel_index.kernels.sparse.row_gather.torch_op import gather_eager, gather_triton

GatherBackend = Literal["auto", "triton", "eager", "reference"]

BACKENDS = (
    Backend("triton", contract.triton_why_not, gather_triton, contract.triton_not_worth, invariant=EXACT),
    Backend("eager", contract.eager_why_not, gather_eager, invariant=EXACT),
    Backend("reference", always, gather_reference),
)


class GatheredPair(NamedTuple):
    """The gathered rows of the two sources.

    >>> import torch, kernel_index as ki
    >>> pair = ki.gather_rows_pair(torch.ones(3, 1, 2), torch.zeros(3, 1, 1), torch.tensor([2]))
    >>> pair.a.shape, pair.b.shape
    (torch.Size([1, 1, 2]), torch.Size([1, 1, 1]))
    """

    a: Tensor
    b: Tensor


def gather_rows(src: Tensor, idx: Tensor, *, backend: GatherBackend = "auto") -> Tensor:
    """Rows of a tensor by index, bit for bit: ``out[r] = src[idx[r]]``.

    The gradient of a row is the sum over the indices that select it, added up in float32 at least in a fixed order and
    rounded once; a row that no index selects gets zeros.

    Args:
        src: [N, H, D], any dtype.  The Triton backend takes a contiguous one.
        idx: [R], int32 or int64, in [0, N); rows may repeat.  ``triton`` takes 1 to 1,000,000 of them; above, the
            receipt says ``giant_row_fallback`` and ``index_select`` runs.
        backend: ``"auto"`` or a backend's name; a named backend runs or raises ``Ineligible``.

    Returns:
        [R, H, D] of src's dtype, contiguous.  Differentiable twice.

    Raises:
        TypeError, ValueError: an argument breaks its rule.
        IndexError: an index is negative or too large; on a GPU a device-side assertion, as of ``index_select``.
        Ineligible: the named backend cannot run this call.

    Source: the definition of ``torch.index_select``.

    >>> import torch, kernel_index as ki
    >>> ki.gather_rows(torch.arange(3.0).view(3, 1, 1), torch.tensor([2, 0, 2])).flatten()
    tensor([2., 0., 2.])
    """
    contract.check({"src": src}, idx)
    call = (src, None, idx)
    return choose("gather_rows", BACKENDS, backend, *call).run(*call)[0]


def gather_rows_pair(a: Tensor, b: Tensor, idx: Tensor, *, backend: GatherBackend = "auto") -> GatheredPair:
    """The same rows of two tensors, with one check and one launch: ``(a[idx], b[idx])``.

    Args:
        a: [N, H, D], any dtype.
        b: [N, H, Db]; D and dtype may differ from a's.
        idx: [R], as of ``gather_rows``.
        backend: ``"auto"`` or a backend's name; a named backend runs or raises ``Ineligible``.

    Returns:
        ``(a, b)``: [R, H, D] and [R, H, Db].  Either may be unused; it then costs nothing in backward.

    Raises:
        TypeError, ValueError, IndexError, Ineligible: as ``gather_rows``.

    Source: the definition of ``torch.index_select``.

    >>> import torch, kernel_index as ki
    >>> keys, values = torch.arange(3.0).view(3, 1, 1), torch.arange(3.0, 6.0).view(3, 1, 1)
    >>> [t.flatten().tolist() for t in ki.gather_rows_pair(keys, values, torch.tensor([1, 1]))]
    [[1.0, 1.0], [4.0, 4.0]]
    """
    contract.check({"a": a, "b": b}, idx)
    if b is None:
        raise TypeError("b must be a torch.Tensor, got NoneType")
    call = (a, b, idx)
    return GatheredPair(*choose("gather_rows_pair", BACKENDS, backend, *call).run(*call))

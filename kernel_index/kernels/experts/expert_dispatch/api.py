"""Rows in the order of their experts: where each goes, the way there, and the weighted sum back."""

from typing import Literal, NamedTuple

from torch import Tensor

from kernel_index.core.dispatch import Backend, always, choose
from kernel_index.core.stable import EXACT, ON_A_GPU
from kernel_index.kernels.experts.expert_dispatch import contract
from kernel_index.kernels.experts.expert_dispatch.reference import (
    combine_reference,
    dispatch_reference,
    plan_reference,
)
from kernel_index.kernels.experts.expert_dispatch.torch_op import combine_triton, dispatch_triton, plan_triton

DispatchBackend = Literal["auto", "triton", "reference"]

PLAN_BACKENDS = (
    Backend("triton", contract.triton_plan_why_not, plan_triton, contract.triton_not_worth, invariant=EXACT),
    Backend("reference", always, plan_reference, invariant=EXACT),
)

DISPATCH_BACKENDS = (
    Backend("triton", contract.triton_dispatch_why_not, dispatch_triton, contract.triton_not_worth, invariant=ON_A_GPU),
    Backend("reference", always, dispatch_reference, invariant=EXACT),
)

COMBINE_BACKENDS = (
    Backend(
        "triton", contract.triton_combine_why_not, combine_triton, contract.triton_combine_not_worth, invariant=ON_A_GPU
    ),
    Backend("reference", always, combine_reference, invariant=EXACT),
)


class ExpertPlan(NamedTuple):
    """``slots`` int32 [N, k]: the row of each (token, choice); ``offsets`` int32 [E]: the end of each expert's rows.

    >>> import torch, kernel_index as ki
    >>> ki.expert_plan(torch.tensor([[1], [0], [1]]), 2).offsets
    tensor([1, 3], dtype=torch.int32)
    """

    slots: Tensor
    offsets: Tensor


def expert_plan(experts: Tensor, count: int, *, backend: DispatchBackend = "auto") -> ExpertPlan:
    """Where the rows of ``grouped_product`` stand: all rows of expert 0, then those of expert 1, and so on.

    Within an expert rows keep the order of ``experts.flatten()``: a stable counting sort.  No token is dropped, and
    nothing is read on the host.

    Args:
        experts: [N, k], int64 or int32, in [0, count); on a CPU this is checked.
        count: the number of experts, at least 1.
        backend: ``"auto"`` or a backend's name; a named backend runs or raises ``Ineligible``.

    Returns:
        ``(slots, offsets)``, for ``expert_dispatch``, ``grouped_product`` and ``expert_combine``.

    Raises:
        TypeError, ValueError: an argument breaks its rule.
        Ineligible: the named backend cannot run this call.

    Source: Gale et al., "MegaBlocks: Efficient Sparse Training with Mixture-of-Experts", 2022.

    >>> import torch, kernel_index as ki
    >>> ki.expert_plan(torch.tensor([[1, 0], [0, 2]]), 3).slots
    tensor([[2, 0],
            [1, 3]], dtype=torch.int32)
    """
    contract.check_plan(experts, count)
    return ExpertPlan(*choose("expert_plan", PLAN_BACKENDS, backend, experts, count).run(experts, count))


def expert_dispatch(x: Tensor, slots: Tensor, *, backend: DispatchBackend = "auto") -> Tensor:
    """Copy each token's row to its slots, bit for bit: ``out[slots[n, j]] = x[n]``.

    The gradient of a token is the sum over its slots, added up in float32 at least and rounded once.

    Args:
        x: [N, C], any floating dtype.
        slots: [N, k], int32 or int64: each number below N·k once.
        backend: ``"auto"`` or a backend's name; a named backend runs or raises ``Ineligible``.

    Returns:
        [N·k, C] of x's dtype, contiguous.

    Raises:
        TypeError, ValueError: an argument breaks its rule.
        Ineligible: the named backend cannot run this call.

    Source: Gale et al., "MegaBlocks: Efficient Sparse Training with Mixture-of-Experts", 2022.

    >>> import torch, kernel_index as ki
    >>> ki.expert_dispatch(torch.tensor([[1.0], [2.0]]), torch.tensor([[2, 0], [1, 3]])).flatten()
    tensor([1., 2., 1., 2.])
    """
    contract.check_dispatch(x, slots)
    return choose("expert_dispatch", DISPATCH_BACKENDS, backend, x, slots).run(x, slots)


def expert_combine(
    rows: Tensor, weights: Tensor, slots: Tensor, base: Tensor | None = None, *, backend: DispatchBackend = "auto"
) -> Tensor:
    """The weighted sum of each token's rows: ``out[n] = base[n] + Σ_j weights[n, j] · rows[slots[n, j]]``.

    Summed in float32 (float64 if rows or weights are) in the order of j, then base, and rounded once.

    Args:
        rows: [N·k, C], any floating dtype: what the experts made of the rows of ``expert_dispatch``.
        weights: [N, k], any floating dtype.
        slots: [N, k], int32 or int64: each number below N·k once.
        base: [N, C] of rows' dtype, such as a shared expert's output; None for none.
        backend: ``"auto"`` or a backend's name; a named backend runs or raises ``Ineligible``.

    Returns:
        [N, C] of rows' dtype, contiguous.  Differentiable in rows, weights and base.

    Raises:
        TypeError, ValueError: an argument breaks its rule.
        Ineligible: the named backend cannot run this call.

    Source: Shazeer et al., "Outrageously Large Neural Networks", 2017, equation 1.

    >>> import torch, kernel_index as ki
    >>> slots, weights = torch.tensor([[2, 0], [1, 3]]), torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    >>> ki.expert_combine(torch.tensor([[1.0], [2.0], [3.0], [4.0]]), weights, slots).flatten()
    tensor([2., 2.])
    """
    call = contract.check_combine(rows, weights, slots, base)
    return choose("expert_combine", COMBINE_BACKENDS, backend, call).run(call)

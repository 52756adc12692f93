"""The experts of a layer behind their router: rows, both products with the activation between, the weighted sum."""

from typing import Literal

from torch import Tensor

from kernel_index.core.dispatch import Backend, always, choose
from kernel_index.core.numerics import Recipe
from kernel_index.kernels.experts.expert_mlp import contract
from kernel_index.kernels.experts.expert_mlp.contract import ExpertActivation
from kernel_index.kernels.experts.expert_mlp.parts import expert_mlp_parts
from kernel_index.kernels.experts.expert_mlp.reference import expert_mlp_reference
from kernel_index.kernels.experts.expert_mlp.torch_op import expert_mlp_triton

ExpertMLPBackend = Literal["auto", "triton", "parts", "reference"]

PARTS = Recipe("experts 1: the recipes of the functions that they are made of")

BACKENDS = (
    Backend("triton", contract.triton_why_not, expert_mlp_triton, contract.triton_not_worth, invariant=PARTS),
    Backend("parts", always, expert_mlp_parts, invariant=PARTS),
    Backend("reference", always, expert_mlp_reference),
)


def expert_mlp(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    weights: Tensor,
    slots: Tensor,
    offsets: Tensor,
    base: Tensor | None = None,
    *,
    activation: ExpertActivation = "relu2",
    backend: ExpertMLPBackend = "auto",
) -> Tensor:
    """The weighted sum of what each token's experts make of it.

    With e the expert of token n's choice j, as ``expert_plan`` has put it into ``slots`` and ``offsets``::

        out[n] = base[n] + Σ_j weights[n, j] · down[e] · act(up[e] · x[n])

        relu2    act(h) = max(h, 0)²
        swiglu   act(h) = silu(h[:F]) · h[F:]

    The same as ``expert_dispatch``, ``grouped_product``, the activation, ``grouped_product`` and ``expert_combine``,
    which is what ``backend="parts"`` calls.  The Triton backend keeps x and the results of the first product alone:
    backward takes the rows again, and makes the activation, its gradient and that of the weights in one pass.

    Args:
        x: [N, C], any floating dtype.
        up: [E, F, C], or [E, 2·F, C] for ``"swiglu"``, x's dtype.
        down: [E, C, F], x's dtype.
        weights: [N, k], any floating dtype.
        slots: [N, k], int32 or int64: the row of each token's choice among all N·k, each number once.
        offsets: int32 [E]: the end of each expert's rows.
        base: [N, C] of x's dtype, such as a shared expert's output; None for none.
        activation: ``"relu2"`` or ``"swiglu"``.
        backend: ``"auto"`` or a backend's name; a named backend runs or raises ``Ineligible``.

    Returns:
        [N, C] of x's dtype, contiguous.  Differentiable in x, up, down, weights and base.

    Raises:
        TypeError, ValueError: an argument breaks its rule.
        Ineligible: the named backend cannot run this call.

    Source: Shazeer et al., "Outrageously Large Neural Networks", 2017; the gradient of the weights from that of the
        activation as in Guo et al., "SonicMoE", 2025.

    >>> import torch, kernel_index as ki
    >>> slots, offsets = ki.expert_plan(torch.tensor([[1], [0]]), 2)
    >>> up, down = torch.ones(2, 8, 8), torch.stack([torch.ones(8, 8), torch.full((8, 8), 2.0)])
    >>> ki.expert_mlp(torch.ones(2, 8), up, down, torch.ones(2, 1), slots, offsets)[:, 0]
    tensor([1024.,  512.])
    """
    call = contract.check(x, up, down, weights, slots, offsets, base, activation)
    return choose("expert_mlp", BACKENDS, backend, call).run(call)

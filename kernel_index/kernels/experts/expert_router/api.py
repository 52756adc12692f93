"""Which experts a token is sent to, and with which weights: scores, selection and normalisation in one launch."""

from typing import Literal, NamedTuple

from torch import Tensor

from kernel_index.core.dispatch import Backend, always, choose
from kernel_index.core.numerics import Recipe
from kernel_index.core.products import PRODUCT
from kernel_index.core.stable import ELEMENTWISE
from kernel_index.kernels.experts.expert_router import contract
from kernel_index.kernels.experts.expert_router.contract import Scores
from kernel_index.kernels.experts.expert_router.reference import route_reference
from kernel_index.kernels.experts.expert_router.torch_op import route_triton

RouterBackend = Literal["auto", "triton", "reference"]

ROUTE = Recipe(f"router 1: float32 scores by {PRODUCT.text}; {ELEMENTWISE.text}")
ON_DEVICE = Recipe(
    "router on a GPU 2: products as exact as float32, of bfloat16 by three parts of the weight, in blocks of 64 "
    "channels by rising index, in tiles of a size that the experts decide; scores, selection and weights of a token by "
    "one program"
)

BACKENDS = (
    Backend("triton", contract.triton_why_not, route_triton, contract.triton_not_worth, invariant=ON_DEVICE),
    Backend("reference", always, route_reference, invariant=ROUTE),
)


class Routing(NamedTuple):
    """``experts`` [N, k] int64, best first; ``weights`` [N, k] float32; ``load`` [E] int64, tokens of each expert.

    >>> import torch, kernel_index as ki
    >>> ki.expert_route(torch.eye(2), torch.eye(2), None, 1).load
    tensor([1, 1])
    """

    experts: Tensor
    weights: Tensor
    load: Tensor


def expert_route(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    topk: int,
    *,
    scores: Scores = "sigmoid",
    backend: RouterBackend = "auto",
) -> Routing:
    """Score every expert for every token in float32 and select the best ``topk``.

    ::

        score   = sigmoid(weight · x)                     or softmax(weight · x)
        experts = the topk largest of score + bias        of equal ones the smaller index
        weights = score[experts] / Σ score[experts]       score[experts] itself for topk = 1 of several experts

    Products and sums are float32 at least, whatever the dtype of x, also under autocast.  ``bias`` decides the
    selection alone: it has no gradient, and the weights do not have it in them.

    Args:
        x: [N, C], any floating dtype.
        weight: [E, C], any floating dtype.
        bias: [E], any floating dtype, or None.
        topk: experts of a token, 1 to E.
        scores: ``"sigmoid"`` or ``"softmax"``.
        backend: ``"auto"`` or a backend's name; a named backend runs or raises ``Ineligible``.

    Returns:
        ``Routing(experts, weights, load)``; ``weights`` is differentiable in x and weight, float64 for float64 inputs.

    Raises:
        TypeError, ValueError: an argument breaks its rule.
        Ineligible: the named backend cannot run this call.

    Source: Fedus et al., "Switch Transformers", 2021; Wang et al., "Auxiliary-Loss-Free Load Balancing", 2024.

    >>> import torch, kernel_index as ki
    >>> routing = ki.expert_route(torch.ones(1, 2), torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]), None, 2)
    >>> routing.experts, routing.weights.round(decimals=2)
    (tensor([[2, 1]]), tensor([[0.5300, 0.4700]]))
    """
    call = contract.check(x, weight, bias, topk, scores)
    return Routing(*choose("expert_route", BACKENDS, backend, call).run(call))

"""A mixture of experts without a capacity limit: every token is computed by every expert its router selects."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

import kernel_index as ki
from kernel_index.core import checks
from kernel_index.core.numerics import is_invariant
from kernel_index.nn.mlp import MLPS, Activation, swiglu
from kernel_index.nn.residual import Branch

Scores = Literal["sigmoid", "softmax"]
Routing = ki.Routing


class Router(nn.Module):
    """Scores every expert for every token in float32, in any dtype of the model, and selects the best ``topk``.

    ``bias`` [E] is added to the scores for the selection alone.  The weights are the scores of the selected experts,
    divided by their sum.  With ``topk=1`` the weight is the score itself (Fedus et al., 2021): divided by itself it
    would be 1, and the router would get no gradient.  A single expert has the weight 1.  ``balance`` changes the bias
    against the counted load, instead of an auxiliary loss (Wang et al., 2024).  Of equal scores the expert of smaller
    index is selected.

    ``counted`` [N], bool: the tokens that the load counts, for a caller that computes padding too; all of them if None.
    """

    counted: Tensor | None = None
    weight: Tensor
    bias: Tensor
    load: Tensor
    pending: Tensor

    def __init__(self, dim: int, experts: int, topk: int, *, scores: Scores = "sigmoid"):
        super().__init__()
        checks.is_int("experts", experts, minimum=1)
        checks.is_int("topk", topk, minimum=1)
        if topk > experts:
            raise ValueError(f"topk must be at most the number of experts ({experts}), got {topk}")
        checks.one_of("scores", scores, get_args(Scores))
        self.topk, self.scores = topk, scores
        self.weight = nn.Parameter(torch.randn(experts, dim) / math.sqrt(dim))
        self.register_buffer("bias", torch.zeros(experts))
        self.register_buffer("load", torch.zeros(experts, dtype=torch.int64), persistent=False)
        self.register_buffer("pending", torch.zeros(experts, dtype=torch.int64), persistent=False)

    def forward(self, x_NC: Tensor) -> Routing:
        routing = ki.expert_route(x_NC, self.weight, self.bias, self.topk, scores=self.scores)
        if self.training:
            self.load.copy_(self._load(routing))  # written, not added: a recomputed forward must not count twice
        return routing

    def _load(self, routing: Routing) -> Tensor:
        if self.counted is None or len(self.counted) != len(routing.experts):
            return routing.load
        ones = self.counted.to(torch.int64)[:, None].expand_as(routing.experts)
        return torch.zeros_like(routing.load).index_add_(0, routing.experts.flatten(), ones.flatten())

    @torch.no_grad()
    def count(self) -> None:
        """Add the latest forward's load to what the next ``balance`` uses."""
        self.pending += self.load

    @torch.no_grad()
    def balance(self, rate: float) -> None:
        """Raise the bias of experts with less than the mean load and lower the bias of those with more."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.pending)
        load = self.pending.float()
        self.bias += rate * torch.sign(load.mean() - load)
        self.pending.zero_()


class Experts(nn.Module):
    """``Σ_k weight_k · down_k(act(up_k(x)))`` over the experts k of each token, plus a shared expert for all tokens.

    ``ki.expert_plan`` puts tokens into the order of their experts, and ``ki.expert_mlp`` multiplies them and adds up
    each token's rows in a fixed order, so that results repeat bit for bit.  No token is dropped.

    Args:
        dim: channels C.
        hidden: width F of one expert.
        experts: number of experts E.
        topk: experts of a token.
        shared: width of the shared expert; 0 for none.
        activation: ``"relu2"`` or ``"swiglu"``.
        scores: ``"sigmoid"`` or ``"softmax"``.
        recompute: compute the activation again in backward instead of keeping it, as ``SquaredReLUMLP`` does; always
            so in ``numerics("invariant")``, where the two ways would have other gradients.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        experts: int,
        topk: int,
        shared: int = 0,
        activation: Activation = "relu2",
        scores: Scores = "sigmoid",
        recompute: bool = True,
    ):
        super().__init__()
        checks.one_of("activation", activation, tuple(MLPS))
        for name, size, least in (("dim", dim, 1), ("hidden", hidden, 1), ("shared", shared, 0)):
            checks.is_int(name, size, minimum=least)
        if dim % 8 or hidden % 8:
            raise ValueError(f"dim and hidden must be multiples of 8 for the grouped product, got {dim} and {hidden}")
        self.activation, self.recompute = activation, recompute
        self.router = Router(dim, experts, topk, scores=scores)
        width = hidden if activation == "relu2" else 2 * hidden
        self.up = nn.Parameter(torch.randn(experts, width, dim) / math.sqrt(dim))
        self.down = nn.Parameter(torch.randn(experts, dim, hidden) / math.sqrt(hidden))
        self.shared = MLPS[activation](dim, shared) if shared else None

    def forward(self, x_BTC: Tensor) -> Branch:
        dtype = torch.get_autocast_dtype(x_BTC.device.type) if checks.is_autocast(x_BTC.device) else x_BTC.dtype
        self._check(x_BTC, dtype)
        x_NC = x_BTC.reshape(-1, x_BTC.shape[-1])
        routing = self.router(x_NC)
        plan = ki.expert_plan(routing.experts, self.router.bias.numel())  # S = N·k rows in the order of their experts
        shared_NC = None if self.shared is None else self.shared(x_BTC)[0].reshape(x_NC.shape)
        x_NC, up, down = x_NC.to(dtype), self.up.to(dtype), self.down.to(dtype)
        if self.recompute or is_invariant():  # one function has other bits backward than its parts
            kind = self.activation
            out_NC = ki.expert_mlp(x_NC, up, down, routing.weights, *plan, base=shared_NC, activation=kind)
        else:
            h_SF = ki.grouped_product(ki.expert_dispatch(x_NC, plan.slots), up, plan.offsets)
            active_SF = ki.fused_relu_squared(h_SF) if self.activation == "relu2" else swiglu(h_SF)
            rows_SC = ki.grouped_product(active_SF, down, plan.offsets)
            out_NC = ki.expert_combine(rows_SC, routing.weights, plan.slots, shared_NC)
        return out_NC.view(x_BTC.shape), None

    def _check(self, x_BTC: Tensor, dtype: torch.dtype) -> None:
        width = self.router.weight.shape[1]
        if x_BTC.shape[-1] != width:
            raise ValueError(f"x must be [..., C] with C = {width}, got shape {tuple(x_BTC.shape)}")
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"x must be of float32, bfloat16 or float16 for the grouped product, got {dtype}")

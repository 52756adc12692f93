"""A mixture of experts without a capacity limit: every token is computed by every expert its router selects."""

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kernel_index as ki
from kernel_index.core import checks, stable
from kernel_index.core.numerics import is_invariant
from kernel_index.nn.mlp import MLPS, Activation, swiglu
from kernel_index.nn.residual import Branch

Scores = Literal["sigmoid", "softmax"]


class Routing(NamedTuple):
    """``experts`` [N, k] int64, best first; ``weights`` [N, k] float32; ``load`` [E] int64, tokens of each expert."""

    experts: Tensor
    weights: Tensor
    load: Tensor


class Router(nn.Module):
    """Scores every expert for every token in float32, in any dtype of the model, and selects the best ``topk``.

    ``bias`` [E] is added to the scores for the selection alone.  The weights are the scores of the selected experts,
    divided by their sum.  With ``topk=1`` the weight is the score itself (Fedus et al., 2021): divided by itself it
    would be 1, and the router would get no gradient.  A single expert has the weight 1.  ``balance`` changes the bias
    against the counted load, instead of an auxiliary loss (Wang et al., 2024).  Of equal scores the expert of smaller
    index is selected.
    """

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
        with torch.autocast(x_NC.device.type, enabled=False):
            scores_NE = self._scores(x_NC)
        ranked = (scores_NE.detach() + self.bias).sort(stable=True, dim=-1, descending=True).indices
        experts_Nk = ranked[:, : self.topk]
        weights_Nk = scores_NE.gather(-1, experts_Nk)
        if self.topk > 1 or self.bias.numel() == 1:
            total_N = stable.sum_of(weights_Nk, -1) if is_invariant() else weights_Nk.sum(-1)
            weights_Nk = weights_Nk / total_N[:, None].clamp_min(1e-20)
        every = torch.arange(self.bias.numel(), device=x_NC.device)
        load_E = (experts_Nk.reshape(-1, 1) == every).sum(0)
        if self.training:
            self.load.copy_(load_E)  # written, not added: a recomputed forward must not count twice
        return Routing(experts_Nk, weights_Nk, load_E)

    def _scores(self, x_NC: Tensor) -> Tensor:
        """Float32 [N, E]."""
        if is_invariant():
            return stable.with_gradient(self.scores, ki.linear(x_NC.float(), self.weight.float()))
        logits_NE = x_NC.float() @ self.weight.float().T
        return logits_NE.sigmoid() if self.scores == "sigmoid" else logits_NE.softmax(-1)

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

    Tokens are gathered in the order of their experts, multiplied by ``ki.grouped_product``, and gathered back.  The sum
    over a token's experts has a fixed order, so that results repeat bit for bit.  No token is dropped.

    Args:
        dim: channels C.
        hidden: width F of one expert.
        experts: number of experts E.
        topk: experts of a token.
        shared: width of the shared expert; 0 for none.
        activation: ``"relu2"`` or ``"swiglu"``.
        scores: ``"sigmoid"`` or ``"softmax"``.
        recompute: compute the activation again in backward instead of keeping it, as ``SquaredReLUMLP`` does.
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
        order_S = routing.experts.flatten().argsort(
            stable=True
        )  # row s of the grouped product is the (token, k) pair order[s]
        offsets_E = routing.load.cumsum(0).to(torch.int32)
        x_SC = ki.gather_rows(x_NC.to(dtype)[:, None], order_S // self.router.topk)[:, 0]
        h_SF = ki.grouped_product(x_SC, self.up.to(dtype), offsets_E)
        if self.recompute and torch.is_grad_enabled():
            out_SC = checkpoint(self._second_half, h_SF, offsets_E, use_reentrant=False, preserve_rng_state=False)
        else:
            out_SC = self._second_half(h_SF, offsets_E)
        back_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(len(order_S), device=order_S.device))
        out_NkC = ki.gather_rows(out_SC[:, None], back_S).view(*routing.experts.shape, x_NC.shape[-1])
        weighted_NkC = out_NkC * routing.weights[..., None]
        out_NC = (stable.sum_of(weighted_NkC, 1) if is_invariant() else weighted_NkC.sum(1)).to(dtype)
        out_BTC = out_NC.view(x_BTC.shape)
        return (out_BTC if self.shared is None else out_BTC + self.shared(x_BTC)[0]), None

    def _check(self, x_BTC: Tensor, dtype: torch.dtype) -> None:
        width = self.router.weight.shape[1]
        if x_BTC.shape[-1] != width:
            raise ValueError(f"x must be [..., C] with C = {width}, got shape {tuple(x_BTC.shape)}")
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"x must be of float32, bfloat16 or float16 for the grouped product, got {dtype}")

    def _second_half(self, h_SF: Tensor, offsets_E: Tensor) -> Tensor:
        active = ki.fused_relu_squared(h_SF) if self.activation == "relu2" else swiglu(h_SF)
        return ki.grouped_product(active, self.down.to(active.dtype), offsets_E)

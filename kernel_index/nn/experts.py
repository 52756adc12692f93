"""A mixture of experts without capacity: every token reaches every expert that its router picked."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kernel_index as ki
from kernel_index.core import checks
from kernel_index.nn.grouped import grouped_product
from kernel_index.nn.mlp import MLPS, swiglu
from kernel_index.nn.residual import Branch

SCORES = ("sigmoid", "softmax")


class Routing(NamedTuple):
    """``experts`` [N, k] int64 by falling preference, ``weights`` [N, k] float32, ``load`` [E] int64 tokens each."""

    experts: Tensor
    weights: Tensor
    load: Tensor


class Router(nn.Module):
    """Scores every expert for every token in float32, whatever the model computes in, and picks the best ``topk``.

    ``bias`` [E] is added to the scores for the choice alone; the weights are the scores of the chosen, divided by their
    sum.  ``balance`` moves it against the load that was counted, instead of a loss (Wang et al., 2024).  Ties go to the
    expert of smaller index.
    """

    weight: Tensor
    bias: Tensor
    load: Tensor
    pending: Tensor

    def __init__(self, dim: int, experts: int, topk: int, *, scores: str = "sigmoid"):
        super().__init__()
        checks.is_int("experts", experts, minimum=1)
        checks.is_int("topk", topk, minimum=1)
        if topk > experts:
            raise ValueError(f"topk must be at most the number of experts ({experts}), got {topk}")
        checks.one_of("scores", scores, SCORES)
        self.topk, self.scores = topk, scores
        self.weight = nn.Parameter(torch.randn(experts, dim) / math.sqrt(dim))
        self.register_buffer("bias", torch.zeros(experts))
        self.register_buffer("load", torch.zeros(experts, dtype=torch.int64), persistent=False)
        self.register_buffer("pending", torch.zeros(experts, dtype=torch.int64), persistent=False)

    def forward(self, x_NC: Tensor) -> Routing:
        with torch.autocast(x_NC.device.type, enabled=False):
            logits_NE = x_NC.float() @ self.weight.float().T
        scores_NE = logits_NE.sigmoid() if self.scores == "sigmoid" else logits_NE.softmax(-1)
        ranked = (scores_NE.detach() + self.bias).sort(stable=True, dim=-1, descending=True).indices
        experts_Nk = ranked[:, : self.topk]
        weights_Nk = scores_NE.gather(-1, experts_Nk)
        weights_Nk = weights_Nk / weights_Nk.sum(-1, keepdim=True).clamp_min(1e-20)
        every = torch.arange(self.bias.numel(), device=x_NC.device)
        load_E = (experts_Nk.reshape(-1, 1) == every).sum(0)
        if self.training:
            self.load.copy_(load_E)  # written, not added: a recomputed forward must not count twice
        return Routing(experts_Nk, weights_Nk, load_E)

    @torch.no_grad()
    def count(self) -> None:
        """Take the latest forward's load into account for the next ``balance``."""
        self.pending += self.load

    @torch.no_grad()
    def balance(self, rate: float) -> None:
        """Raise the bias of experts with less than the mean of the counted load, lower that of the others."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.pending)
        load = self.pending.float()
        self.bias += rate * torch.sign(load.mean() - load)
        self.pending.zero_()


class Experts(nn.Module):
    """``Σ_k weight_k · down_k(act(up_k(x)))`` over the experts k of each token, and a shared expert that sees them all.

    Tokens are gathered in the order of their experts, multiplied in one grouped product, and gathered back, so that
    the sum over a token's experts has a fixed order and results repeat bit for bit.  No token is ever dropped.
    The grouped product is used on the CPU too: there it took half the time of a loop over experts.

    Args:
        dim: channels C.
        hidden: width F of one expert.
        experts: their number E.
        topk: experts of a token.
        shared: width of the shared expert; 0 for none.
        activation: ``"relu2"`` or ``"swiglu"``.
        scores: ``"sigmoid"`` or ``"softmax"``.
        recompute: form the squared activation again in backward instead of keeping it, as ``SquaredReLUMLP`` does.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        experts: int,
        topk: int,
        shared: int = 0,
        activation: str = "relu2",
        scores: str = "sigmoid",
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
        order_S = routing.experts.flatten().argsort(stable=True)  # slot s of the grouped product serves pick order[s]
        offsets_E = routing.load.cumsum(0).to(torch.int32)
        picked = ki.gather_rows(x_NC.to(dtype)[:, None], order_S // self.router.topk)[:, 0]
        h_SF = grouped_product(picked, self.up.to(dtype), offsets_E)
        if self.recompute and torch.is_grad_enabled():
            out_SC = checkpoint(self._second_half, h_SF, offsets_E, use_reentrant=False, preserve_rng_state=False)
        else:
            out_SC = self._second_half(h_SF, offsets_E)
        back_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(len(order_S), device=order_S.device))
        out_NkC = ki.gather_rows(out_SC[:, None], back_S).view(*routing.experts.shape, x_NC.shape[-1])
        out_NC = (out_NkC * routing.weights[..., None]).sum(1).to(dtype)
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
        return grouped_product(active, self.down.to(active.dtype), offsets_E)

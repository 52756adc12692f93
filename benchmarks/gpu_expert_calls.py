"""Calls of a mixture of experts, ours and those of other libraries: what ``gpu_experts`` times.

Every call takes the same leaves and computes the same function, so that one upstream gradient fits all of a part.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kernel_index as ki
from benchmarks.gpu_session import LeftOut
from kernel_index.nn.mlp import Activation

Call = Callable[[], Tensor]
Peers = dict[str, Callable[[], Call]]


@dataclass(frozen=True)
class Cell:
    """So many tokens of C channels, experts of width I, and how many of them a token has."""

    name: str
    tokens: int
    channels: int
    hidden: int
    experts: int
    topk: int
    activation: Activation

    @property
    def pairs(self) -> int:
        return self.tokens * self.topk

    @property
    def width(self) -> int:
        """Of the first product."""
        return self.hidden * (2 if self.activation == "swiglu" else 1)

    @property
    def flops(self) -> int:
        """Of the two products, forward."""
        return 2 * self.pairs * self.channels * (self.width + self.hidden)


CELLS = (
    Cell("large", 32768, 2048, 1024, 64, 8, "swiglu"),
    Cell("base", 32768, 1024, 1024, 32, 4, "relu2"),
    Cell("base", 32768, 1024, 1024, 32, 4, "swiglu"),
    Cell("small", 32768, 512, 768, 16, 2, "relu2"),
    Cell("small", 32768, 512, 768, 16, 2, "swiglu"),
)
TINY = (Cell("tiny", 24, 16, 8, 4, 2, "swiglu"), Cell("tiny", 24, 16, 8, 4, 2, "relu2"))


@dataclass
class Inputs:
    """The tensors of a cell.  Tokens go to experts as a router at its start sends them."""

    cell: Cell
    device: str
    x: Tensor = field(init=False)
    router: Tensor = field(init=False)
    up: Tensor = field(init=False)
    down: Tensor = field(init=False)
    experts: Tensor = field(init=False)
    weights: Tensor = field(init=False)
    plan: ki.ExpertPlan = field(init=False)
    order: Tensor = field(init=False)

    def __post_init__(self) -> None:
        cell, g = self.cell, torch.Generator(self.device).manual_seed(0)
        dtype = torch.bfloat16

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, device=self.device) / shape[-1] ** 0.5

        self.x = (normal(cell.tokens, cell.channels) * cell.channels**0.5).to(dtype).requires_grad_()
        self.router = normal(cell.experts, cell.channels).requires_grad_()
        self.up = normal(cell.experts, cell.width, cell.channels).to(dtype).requires_grad_()
        self.down = normal(cell.experts, cell.channels, cell.hidden).to(dtype).requires_grad_()
        with torch.no_grad():
            routing = ki.expert_route(self.x, self.router, None, cell.topk, scores="softmax")
        self.experts, self.weights = routing.experts, routing.weights.requires_grad_()
        self.plan = ki.expert_plan(self.experts, cell.experts)
        self.order = self.experts.flatten().argsort(stable=True)

    @property
    def starts(self) -> Tensor:
        """int32 [E + 1]: where the rows of each expert begin, and their number."""
        return F.pad(self.plan.offsets, (1, 0))

    @property
    def tokens_of_rows(self) -> Tensor:
        """int32 [N·k]: the token of each row in the order of the experts."""
        return (self.order // self.cell.topk).int()

    def rows(self, width: int) -> Tensor:
        g = torch.Generator(self.device).manual_seed(1)
        shape = self.cell.pairs, width
        return torch.randn(shape, generator=g, device=self.device).to(torch.bfloat16).requires_grad_()


@dataclass
class Part:
    """A part of the layer: its leaves, our call and those of others, each prepared when its turn comes."""

    name: str
    leaves: list[Tensor]
    calls: Peers
    flops: int = 0
    tolerance: float = 2e-2


def ready(call: Call) -> Callable[[], Call]:
    return lambda: call


def parts(inputs: Inputs) -> Iterator[Part]:
    yield router(inputs)
    yield dispatch(inputs)
    yield product(inputs)
    yield combine(inputs)
    yield layer(inputs)


def router(inputs: Inputs) -> Part:
    """The weights of each token's experts: a softmax over their scores.

    SonicMoE's scores are of the tokens' dtype: experts of nearly equal scores change places.
    """
    x, weight, topk = inputs.x, inputs.router, inputs.cell.topk

    def plain() -> Tensor:
        scores = F.linear(x.float(), weight).softmax(-1)
        best = scores.topk(topk, -1).values
        return best / best.sum(-1, keepdim=True)

    def sonic() -> Call:
        from sonicmoe.functional import TC_Softmax_Topk_Router_Function as Function

        return lambda: Function.apply(F.linear(x, weight.to(x.dtype)), len(weight), topk, True, False)[0]

    calls = {
        "kernel_index": ready(lambda: ki.expert_route(x, weight, None, topk, scores="softmax").weights),
        "PyTorch": ready(plain),
        "SonicMoE": sonic,
    }
    return Part("router", [x, weight], calls, tolerance=0.5)


def dispatch(inputs: Inputs) -> Part:
    """The order of the rows, and the rows in it."""
    x, experts, cell = inputs.x, inputs.experts, inputs.cell

    def ours() -> Tensor:
        return ki.expert_dispatch(x, ki.expert_plan(experts, cell.experts).slots)

    def plain() -> Tensor:
        return x[experts.flatten().argsort(stable=True) // cell.topk]

    return Part("dispatch", [x], {"kernel_index": ready(ours), "PyTorch": ready(plain)})


def product(inputs: Inputs) -> Part:
    """The first product alone; quack's gathers its rows itself, from rows that are in order here."""
    cell, up, offsets, starts = inputs.cell, inputs.up, inputs.plan.offsets, inputs.starts
    x = inputs.rows(cell.channels)
    same = torch.arange(cell.pairs, dtype=torch.int32, device=x.device)
    calls = {
        "kernel_index": ready(lambda: ki.grouped_product(x, up, offsets)),
        "PyTorch grouped_mm": ready(lambda: F.grouped_mm(x, up.transpose(1, 2), offs=offsets)),
        "quack": lambda: partial(quack_product(False), x, up, starts, None),
        "quack, gathered": lambda: partial(quack_product(False), x, up, starts, same),
        "quack, tuned": lambda: partial(quack_product(True), x, up, starts, None),
    }
    return Part("product", [x, up], calls, 2 * cell.pairs * cell.channels * cell.width)


def quack_product(tuned: bool) -> Callable[..., Tensor]:
    from quack.gemm_interface import gemm

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, starts: Tensor, rows: Tensor | None) -> Tensor:
            ctx.save_for_backward(x, weight, starts, rows)
            return gemm(x, weight.transpose(1, 2), cu_seqlens_m=starts, A_idx=rows, tuned=tuned)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
            x, weight, starts, rows = ctx.saved_tensors
            d_x = gemm(g, weight, cu_seqlens_m=starts, tuned=tuned)
            d_weight = torch.empty_like(weight)
            gemm(x.T, g, out=d_weight.transpose(1, 2), cu_seqlens_k=starts, A_idx=rows, tuned=tuned)
            return d_x, d_weight, None, None

    return Product.apply


@functools.cache
def keys_of_quack() -> None:
    """quack 0.6.5 has no key for some values of nvidia-cutlass-dsl 4.8 that its epilogues depend on: their names do.

    Keys are for a cache of compiled kernels; a process that compiles its own needs no more.
    """
    from quack.gemm_runtime import identity

    known = identity.semantic_value_key

    def key(value: Any, seen: Any) -> Any:
        try:
            return known(value, seen)
        except TypeError:
            return type(value).__qualname__, getattr(value, "__qualname__", getattr(value, "name", ""))

    identity.semantic_value_key = key


def combine(inputs: Inputs) -> Part:
    weights, slots, rows = inputs.weights, inputs.plan.slots, inputs.rows(inputs.cell.channels)

    def plain() -> Tensor:
        of_tokens = rows[slots.flatten().long()].view(*slots.shape, -1)
        return (of_tokens * weights.to(rows.dtype)[..., None]).sum(1)

    calls = {"kernel_index": ready(lambda: ki.expert_combine(rows, weights, slots)), "PyTorch": ready(plain)}
    return Part("combine", [rows, weights], calls)


def layer(inputs: Inputs) -> Part:
    """From tokens, their experts and weights to the sum, with the order of the rows."""
    x, up, down, cell = inputs.x, inputs.up, inputs.down, inputs.cell
    experts, weights = inputs.experts, inputs.weights

    def ours(backend: str) -> Tensor:
        plan = ki.expert_plan(experts, cell.experts)
        return ki.expert_mlp(x, up, down, weights, *plan, activation=cell.activation, backend=backend)

    by = "triton" if x.is_cuda else "auto"
    calls: Peers = {
        "kernel_index": ready(lambda: ours(by)),
        "kernel_index, by parts": ready(lambda: ours("parts")),
        "PyTorch grouped_mm": ready(lambda: plain_layer(inputs)),
        "torch.compile": lambda: compiled(inputs),
        "Liger-Kernel": lambda: liger_layer(inputs),
        "SonicMoE": lambda: sonic_layer(inputs),
        "Megatron": megatron,
    }
    return Part("layer", [x, up, down, weights], calls, cell.flops)


def plain_layer(inputs: Inputs) -> Tensor:
    """A sort, a gather, PyTorch's products and an addition by index, as models have it that use ``grouped_mm``."""
    cell, x = inputs.cell, inputs.x
    flat = inputs.experts.flatten()
    order = flat.argsort(stable=True)
    ends = torch.histc(flat.float(), cell.experts, 0, cell.experts - 1).cumsum(0).int()
    h = F.grouped_mm(x[order // cell.topk], inputs.up.transpose(1, 2), offs=ends)
    if cell.activation == "swiglu":
        gate, value = h.chunk(2, -1)
        h = F.silu(gate) * value
    else:
        h = F.relu(h).square()
    out = F.grouped_mm(h, inputs.down.transpose(1, 2), offs=ends)
    out = out * inputs.weights.flatten()[order, None].to(out.dtype)
    return torch.zeros_like(x).index_add(0, order // cell.topk, out)


def compiled(inputs: Inputs) -> Call:
    if not inputs.x.is_cuda:
        raise LeftOut("compiling takes long in a dry run")
    torch._dynamo.reset()
    return torch.compile(partial(plain_layer, inputs), dynamic=False)


def liger_layer(inputs: Inputs) -> Call:
    if inputs.cell.activation != "swiglu":
        raise LeftOut("Liger-Kernel has no relu²")
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction as Function

    experts = inputs.experts.int()
    return lambda: Function.apply(inputs.x, inputs.up, inputs.down, experts, inputs.weights)


def sonic_layer(inputs: Inputs) -> Call:
    """With quack's own choice of configurations, not tuned for each shape; gate and up one after the other."""
    if inputs.cell.activation != "swiglu":
        raise LeftOut("SonicMoE's products on quack have no relu²")
    from sonicmoe import functional
    from sonicmoe.enums import ActivationType

    keys_of_quack()
    for module in (functional.forward, functional.backward):
        for name in ("gemm", "gemm_gated", "gemm_dgated"):
            if (found := getattr(module, name, None)) is not None and not isinstance(found, partial):
                setattr(module, name, partial(found, tuned=False))
    cell, x = inputs.cell, inputs.x
    up, down = inputs.up.permute(1, 2, 0), inputs.down.permute(1, 2, 0)
    tokens = torch.arange(cell.tokens, dtype=torch.int32, device=x.device).repeat_interleave(cell.topk)
    experts = inputs.experts.flatten().int()
    stream = torch.cuda.current_stream().cuda_stream
    rest = (up, None, down, None, cell.experts, stream, ActivationType.SWIGLU)
    call = functional.moe_general_routing_inputs
    return lambda: call(x, inputs.weights.flatten(), tokens, experts, *rest, concat_layout=True)[0]


def megatron() -> Call:
    """Its grouped products are Transformer Engine's, whose part for PyTorch is built from source."""
    import transformer_engine.pytorch  # noqa: F401

    raise LeftOut("Transformer Engine is installed, but the call is not written")

"""Calls of a mixture of experts, ours and those of other libraries: what ``gpu_experts`` times.

Every call takes the same leaves and computes the same function, so that one upstream gradient fits all of a part.
"""

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
        "SonicMoE": lambda: sonic_layer(inputs, tuned=False),
        "SonicMoE, tuned": lambda: sonic_layer(inputs, tuned=True),
        "Megatron, one by one": lambda: megatron_layer(inputs),
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


def sonic_layer(inputs: Inputs, tuned: bool) -> Call:
    """Its products have rows of one number of experts each, as behind its router; gate and up one after the other.

    ``tuned``: quack tries its configurations at each product's first call, as it does by default, and keeps the best;
    otherwise it chooses by the shape.
    """
    if inputs.cell.activation != "swiglu":
        raise LeftOut("SonicMoE's products on quack have no relu²")
    from quack import gemm_interface
    from sonicmoe import functional
    from sonicmoe.enums import ActivationType

    for module in (functional.forward, functional.backward):
        for name in ("gemm", "gemm_gated", "gemm_dgated"):
            if hasattr(module, name):
                setattr(module, name, partial(getattr(gemm_interface, name), tuned=tuned))
    cell, x, kind = inputs.cell, inputs.x, ActivationType.SWIGLU
    up, down = inputs.up.permute(1, 2, 0), inputs.down.permute(1, 2, 0)
    experts = inputs.experts.int()

    def call() -> Tensor:
        counts, starts, *rows = (
            torch.empty(size, dtype=torch.int32, device=x.device)
            for size in (cell.experts, cell.experts + 1, *[cell.pairs] * 3)
        )
        functional.TC_topk_router_metadata_triton(experts, cell.experts, counts, starts, *rows)
        shared = (*rows, None, False, kind)
        first = (x, up, None, starts, cell.pairs, cell.topk, *shared, False, True)
        active, kept = functional._UpProjection.apply(*first)
        last = (active, kept, down, None, inputs.weights, starts, cell.tokens, cell.topk, *shared)
        return functional._DownProjection.apply(*last)

    return call


def megatron_layer(inputs: Inputs) -> Call:
    """What Megatron-core has without Transformer Engine: its own sorting of rows, and one expert after another.

    Its grouped products are Transformer Engine's, whose part for PyTorch is built from source.  The experts' weights
    are parts of ours, so that the gradients are put together at the end, in one pass over them.
    """
    from megatron.core import parallel_state
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.moe_utils import permute, unpermute
    from megatron.core.transformer.transformer_config import TransformerConfig

    cell, x = inputs.cell, inputs.x
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
        parallel_state.initialize_model_parallel()
    gated = cell.activation == "swiglu"
    config = TransformerConfig(
        num_layers=1, hidden_size=cell.channels, num_attention_heads=1, ffn_hidden_size=cell.hidden,
        num_moe_experts=cell.experts, moe_router_topk=cell.topk, gated_linear_unit=gated, add_bias_linear=False,
        activation_func=F.silu if gated else squared_relu(), bias_activation_fusion=gated, params_dtype=x.dtype,
        bf16=True, perform_initialization=False, use_cpu_initialization=True,
    )  # fmt: skip
    groups = ProcessGroupCollection.use_mpu_process_groups()
    layers = LocalSpecProvider().grouped_mlp_modules(False)(cell.experts, config, pg_collection=groups)
    for layer in layers.local_experts:
        for product in (layer.linear_fc1, layer.linear_fc2):
            del product.weight
    chosen = torch.zeros(cell.tokens, cell.experts, dtype=torch.bool, device=x.device)
    chosen.scatter_(1, inputs.experts.long(), True)

    def call() -> Tensor:
        for layer, up, down in zip(layers.local_experts, inputs.up.unbind(), inputs.down.unbind(), strict=True):
            layer.linear_fc1.weight, layer.linear_fc2.weight = up, down
        probs = x.new_zeros(chosen.shape, dtype=torch.float32).scatter(1, inputs.experts.long(), inputs.weights)
        rows, of_rows, order, *_ = permute(x, chosen, probs, num_out_tokens=cell.pairs)
        out, _ = layers(rows, chosen.sum(0), of_rows)
        return unpermute(out, order, x.shape)

    return call


def squared_relu() -> Callable[..., Tensor]:
    from megatron.core.activations import squared_relu

    return squared_relu

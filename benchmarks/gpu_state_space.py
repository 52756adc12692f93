"""What do the state-space kernels take on a GPU, beside PyTorch's formulas, the packages of Mamba and a copy?

``python -m benchmarks.gpu_state_space``: the scan, the convolution and the gated norm in bfloat16, forward, then both
ways; then a training step of the whole mixer under bfloat16 autocast.  Times are of the device, by CUDA graphs where a
call can be captured.  ``copy`` is what a copy of the compulsory bytes takes: arguments once in, results once out.

Predicted on an H200 for 32,768 tokens and 32 heads: the scan moves 0.9 GB forward and 1.8 GB more backward, since the
states between chunks go through memory: 0.25 ms, and 1.0 to 1.2 ms with the backward pass, whose kernel issues more
instructions than its bytes take time.  Convolution and norm at 60 to 90 % of the copy's speed.
"""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor

import kernel_index as ki
from benchmarks.gpu_session import Rows, add_row, needs_gpu
from benchmarks.harness import console
from kernel_index.core.testing import Maker, Suite, suites
from kernel_index.kernels.state_space.causal_conv1d import cases as conv_cases
from kernel_index.kernels.state_space.gated_rms_norm import cases as norm_cases
from kernel_index.kernels.state_space.ssd_scan import cases as scan_cases
from kernel_index.lm.train import forced_backend
from kernel_index.nn import Mamba2
from kernel_index.proofs.errors import tensors_of
from kernel_index.proofs.numerics import launch_errors
from kernel_index.proofs.tune import timing

OPS = ("ssd_scan", "causal_conv1d", "gated_rms_norm")

Kwargs = dict[str, Any]
Function = Callable[..., Any]


@dataclass(frozen=True)
class Cell:
    """Rows of so many tokens, heads of 64 channels with 128 columns of state, and groups."""

    rows: int
    tokens: int
    heads: int
    groups: int

    def __str__(self) -> str:
        return f"{self.rows} × {self.tokens}, {self.heads} heads, {self.groups} groups"


CELLS = tuple(
    Cell(rows, 8192, heads, groups) for rows in (1, 4) for heads, groups in ((24, 1), (32, 1), (64, 1), (64, 8))
)
TINY = (Cell(1, 40, 2, 1),)


def scan_peers(kwargs: Kwargs) -> dict[str, Function]:
    def mamba_ssm() -> Tensor:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        names = {"x": "x", "dt": "dt", "A": "a", "B": "b", "C": "c", "D": "d", "dt_bias": "dt_bias"}
        given = {name: kwargs[own] for name, own in names.items()}
        return mamba_chunk_scan_combined(**given, chunk_size=256, dt_softplus=True)

    def fla() -> Tensor:
        """b and c copied for every head, x·dt and the decays made outside, without the skip."""
        from fla.ops.simple_gla import chunk_simple_gla

        heads, groups = kwargs["x"].shape[2], kwargs["b"].shape[2]
        b, c = (kwargs[n].repeat_interleave(heads // groups, 2) for n in ("b", "c"))
        dt = torch.nn.functional.softplus(kwargs["dt"].float() + kwargs["dt_bias"])
        v = (kwargs["x"] * dt[..., None]).to(kwargs["x"].dtype)
        return chunk_simple_gla(c, b, v, g=dt * kwargs["a"], scale=1.0)[0]

    return {"mamba_ssm": mamba_ssm, "flash-linear-attention": fla}


def conv_peers(kwargs: Kwargs) -> dict[str, Function]:
    def package() -> Tensor:
        from causal_conv1d import causal_conv1d_fn

        y = causal_conv1d_fn(kwargs["x"].transpose(1, 2), kwargs["weight"], None, activation="silu")
        return y.transpose(1, 2)

    return {"causal_conv1d": package}


def norm_peers(kwargs: Kwargs) -> dict[str, Function]:
    def mamba_ssm() -> Tensor:
        from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

        given = kwargs["x"], kwargs["weight"], None
        return rmsnorm_fn(*given, z=kwargs["gate"], eps=1e-6, norm_before_gate=False)

    return {"mamba_ssm": mamba_ssm}


CASES = {"ssd_scan": scan_cases, "causal_conv1d": conv_cases, "gated_rms_norm": norm_cases}
"""Where each function's compulsory bytes are counted."""


def calls(cell: Cell, device: str) -> Iterator[tuple[str, Kwargs, Callable[[Kwargs], dict[str, Function]]]]:
    """Each function, its arguments, and the other libraries' calls of the same."""
    m, inner, state = Maker(torch.bfloat16, device=device), cell.heads * 64, 128
    sizes = {"H": cell.heads, "P": 64, "G": cell.groups, "N": state}
    yield "ssd_scan", scan_cases.raw(m, cell.rows, cell.tokens, **sizes), scan_peers
    channels = inner + 2 * cell.groups * state
    yield "causal_conv1d", conv_cases.layer(m, cell.rows, cell.tokens, channels, low=True), conv_peers
    yield "gated_rms_norm", norm_cases.call(m, cell.rows, cell.tokens, inner), norm_peers


def contenders(suite: Suite, kwargs: Kwargs, peers: dict[str, Function]) -> dict[str, Function]:
    ours = {"kernel_index": lambda: suite.function(**kwargs, backend="triton")}
    return ours | {"PyTorch": lambda: suite.function(**kwargs, backend="reference")} | peers


def output(found: Any) -> Tensor:
    return tensors_of(found)[0]


def measured(function: Function, leaves: list[Tensor], upstream: Tensor, dry: bool) -> list[float]:
    """Microseconds forward, and forward and backward."""

    def forward() -> Tensor:
        with torch.no_grad():
            return output(function())

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(output(function()), leaves, upstream, allow_unused=True)

    if dry:
        forward()
        both()
        return [1.0, 1.0]
    return [timing.device_us([step])[0] for step in (forward, both)]


def compare(cell: Cell, suites_by_op: dict[str, Suite], bandwidth: float, device: str, out: Path | None = None) -> None:
    for op, kwargs, peers in calls(cell, device):
        suite = suites_by_op[op]
        names = [n for n in suite.differentiable if isinstance(kwargs.get(n), Tensor)]
        kwargs |= {n: kwargs[n].detach().requires_grad_() for n in names}
        forward, backward = CASES[op].compulsory(kwargs)
        limits = [1e6 * size / bandwidth for size in (forward, forward + backward)]
        console.print(f"{op}, {cell}: copy {limits[0]:.0f} and {limits[1]:.0f} µs", highlight=False)
        exact, upstream = None, torch.randn_like(kwargs["x"])
        for name, function in contenders(suite, kwargs, peers(kwargs)).items():
            try:
                got = output(function()).detach()
                times = measured(function, [kwargs[n] for n in names], upstream, device == "cpu")
            except (ImportError, ki.Ineligible, *launch_errors()) as error:
                console.print(f"  {name}: left out: {type(error).__name__}: {str(error)[:120]}", highlight=False)
                continue
            exact = got if name == "kernel_index" or exact is None else exact
            apart = "" if got is exact else f", {timing.error_of(got, exact):.1e} apart"
            shares = " and ".join(f"{limit / took:.2f}" for limit, took in zip(limits, times, strict=True))
            said = f"  {name}: {times[0]:.0f} and {times[1]:.0f} µs, {shares} of the copy's speed{apart}"
            console.print(said, highlight=False)
            row = {"case": str(cell), "contender": name, "us": round(times[0], 1), "both_us": round(times[1], 1)}
            add_row(out, op, row)
        gc.collect()


def mixer_step(backend: str, cell: Cell) -> Callable[[], object]:
    """Forward and backward of a mixer over four documents in each row."""
    torch.manual_seed(0)
    mixer = Mamba2(cell.heads * 32, cell.heads, 64, state=128, groups=cell.groups).cuda()
    x = torch.randn(cell.rows, cell.tokens, cell.heads * 32, device="cuda").requires_grad_()
    ids = (torch.arange(cell.tokens) // (cell.tokens // 4)).cuda()
    leaves = [x, *mixer.parameters()]

    def step() -> object:
        with forced_backend(backend), torch.autocast("cuda", torch.bfloat16):
            y = mixer(x, ki.MaskContract(doc_ids=ids))[0]
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    return step


def main(rounds: int = 5, device: str = "cuda", out: Rows = None) -> None:
    """``device="cpu"``: tiny sizes through the interpreter; its times mean nothing."""
    by_op = {s.op: s for s in suites()}
    if device == "cpu":
        for cell in TINY:
            compare(cell, by_op, 1e9, device)
        return
    needs_gpu("a CUDA device; --device cpu does without")
    torch.cuda.set_stream(torch.cuda.Stream())
    bandwidth = timing.copy_bandwidth()
    console.print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s")
    for cell in CELLS:
        compare(cell, by_op, bandwidth, device, out)
        torch.cuda.empty_cache()
    cell = CELLS[-2]
    for backend in ("auto", "reference"):
        step = mixer_step(backend, cell)
        step()
        best = min(timing.elapsed(step) for _ in range(rounds))
        console.print(f"mixer, {cell}, {backend}: forward and backward {1e3 * best:.2f} ms", highlight=False)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    typer.run(main)

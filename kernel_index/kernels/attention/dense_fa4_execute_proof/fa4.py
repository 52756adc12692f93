"""The program of the proof: runs or compiles one call of flash-attn-4, and reports after every stage.

``emit`` fills in PARAMETERS, and ``runner`` runs the file in a separate process: it imports nothing of kernel_index.
A crash or a time limit keeps what was reported before.
"""

import hashlib
import importlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PARAMETERS: dict[str, Any] = {}
ROUNDS = 20


class Report(dict):
    """Recorded facts; each ``add`` writes all of them to the file."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    def add(self, **facts: Any) -> None:
        self.update(facts)
        partial = self.path.with_suffix(".part")
        partial.write_text(json.dumps(self, allow_nan=False))
        os.replace(partial, self.path)


def number(value: float | Tensor) -> float | str:
    """A float, or a string for NaN and infinity: JSON has neither, and the verifier accepts no string as a number."""
    value = float(value)
    return value if abs(value) < float("inf") else str(value)


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout.split()
    return lines[0] if lines else None


def facts(device: str) -> dict[str, Any]:
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": driver(),
        "flash-attn-4": version("flash-attn-4"),
        "nvidia-cutlass-dsl": version("nvidia-cutlass-dsl"),
    }
    found: dict[str, Any] = {"type": device, "name": platform.machine(), "capability": None}
    if device == "cuda":
        found |= {
            "name": torch.cuda.get_device_name(),
            "capability": list(torch.cuda.get_device_capability()),
            "memory": torch.cuda.get_device_properties(0).total_memory,
        }
    variables = ("FLASH_ATTENTION_", "CUTE_DSL_", "CUDA_VISIBLE_DEVICES", "TRITON_")
    environment = {n: v for n, v in sorted(os.environ.items()) if n.startswith(variables)}
    return {"versions": versions, "device": found, "platform": platform.platform(), "environment": environment}


def plain(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Attention [B, T, H, D] with every operation in the dtype of the inputs."""
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q * q.shape[-1] ** -0.5, k)
    if causal:
        ahead = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(ahead, -torch.inf)
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)


def with_gradients(function: Any, inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def measured(actual: Tensor, exact: Tensor, baseline: Tensor) -> dict[str, Any]:
    """The numbers of FlashAttention's rule: error ≤ 2 × error of PyTorch in the same dtype + rounding tolerance."""
    rounded = exact.to(actual.dtype)
    tolerance = 2 * (rounded + 0.3 - 0.3 - rounded).abs().max().float()
    error = (actual.float() - exact).abs()
    return {
        "shape": list(actual.shape),
        "dtype": str(actual.dtype).removeprefix("torch."),
        "nan": int(actual.isnan().sum()),
        "inf": int(actual.isinf().sum()),
        "max_abs": number(actual.float().abs().max()),
        "reference_max_abs": number(exact.abs().max()),
        "max_abs_error": number(error.max()),
        "max_relative_error": number((error / (exact.abs() + exact.square().mean().sqrt())).max()),
        "baseline_max_abs_error": number((baseline.float() - exact).abs().max()),
        "tolerance": number(tolerance),
    }


def execute(report: Report) -> None:
    device, causal = PARAMETERS["device"], PARAMETERS["causal"]
    report.add(**facts(device))
    flash = importlib.import_module("flash_attn.cute").flash_attn_func
    report.add(import_success=True)
    dtype = getattr(torch, PARAMETERS["dtype"])
    b, t, h, k, d = PARAMETERS["shape"].values()
    generator = torch.Generator().manual_seed(PARAMETERS["seed"])
    sizes = ((b, t, h, d), (b, t, k, d), (b, t, k, d), (b, t, h, d))
    *inputs, upstream = [torch.randn(s, generator=generator).to(device=device, dtype=dtype) for s in sizes]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash(q, k, v, causal=causal)
        return out[0] if isinstance(out, tuple) else out

    def plainly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plain(q, k, v, causal)

    leaves = [x.detach().requires_grad_() for x in inputs]
    names, out, grads = observed(lambda: run(*leaves), leaves, upstream, device, report)
    report.add(kernels=names)
    torch.backends.cuda.matmul.allow_tf32 = False
    exact = with_gradients(plainly, [x.float() for x in inputs], upstream)
    baseline = with_gradients(plainly, inputs, upstream)
    labels = ("out", "dq", "dk", "dv")
    results = zip(labels, [out, *grads], exact, baseline, strict=True)
    report.add(numerics={label: measured(*tensors) for label, *tensors in results})
    del exact, baseline
    report.add(**cost(lambda: torch.autograd.grad(run(*leaves), leaves, upstream), device))


def observed(
    forward: Any, leaves: list[Tensor], upstream: Tensor, device: str, report: Report
) -> tuple[list[str], Tensor, tuple[Tensor, ...]]:
    """Run forward and backward once; return the names of the device kernels that the profiler saw, and the results."""
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if device == "cuda" else activity.CPU]) as profile:
        out = forward()
        wait(device)
        report.add(forward_success=True)
        grads = torch.autograd.grad(out, leaves, upstream)
        wait(device)
        report.add(backward_success=True)
    on_device = [e for e in profile.events() or () if e.device_type == torch.autograd.DeviceType.CUDA]
    return sorted({e.name for e in on_device}), out.detach(), grads


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def cost(step: Any, device: str) -> dict[str, Any]:
    """Median milliseconds of forward and backward together, and the peak bytes that they allocate."""
    step()
    wait(device)
    seconds, before, peak = [], 0, 0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    for _ in range(ROUNDS):
        start = time.perf_counter()
        step()
        wait(device)
        seconds.append(time.perf_counter() - start)
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() - before
    return {"median_milliseconds": 1e3 * statistics.median(seconds), "peak_memory_bytes": peak}


def compile_ahead(report: Report) -> None:
    """Compile the package's forward and backward kernels to machine code for an architecture without a device."""
    report.add(**facts("none"))
    modules: list[Any] = [importlib.import_module(name) for name in ("cutlass.utils", "cutlass.utils.hardware_info")]

    class Hardware:  # replaces the three numbers that the compiler asks the driver for, by those of the target
        def __init__(self, device_id: int = 0):
            self.multiprocessors = int(os.environ["FLASH_ATTENTION_NUM_SMS"])

        def get_device_multiprocessor_count(self) -> int:
            return self.multiprocessors

        def get_max_active_clusters(self, cluster_size: int, stream: Any = None) -> int:
            return self.multiprocessors // cluster_size

        def get_l2_cache_size_in_bytes(self) -> int:
            return 50 * 2**20

    for module in modules:
        module.HardwareInfo = Hardware
    interface = importlib.import_module("flash_attn.cute.interface")
    report.add(import_success=True, cubins=[])
    interface.cute.compile = Compiler(interface.cute.compile, report)
    from torch._subclasses.fake_tensor import FakeTensorMode

    dtype, causal = getattr(torch, PARAMETERS["dtype"]), PARAMETERS["causal"]
    b, t, h, k, d = PARAMETERS["shape"].values()
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, key, v = (torch.empty(b, t, n, d, dtype=dtype, device="cuda") for n in (h, k, k))
        # Autograd on a fake CUDA tensor aborts a PyTorch without CUDA, so forward and backward are called directly.
        out, lse, *_ = interface._flash_attn_fwd(q, key, v, causal=causal, return_lse=True)
        report.add(forward_success=True, output={"shape": list(out.shape), "dtype": str(out.dtype)})
        interface._flash_attn_bwd(q, key, v, out, torch.empty_like(out), lse, causal=causal)
        report.add(backward_success=True)


class Compiler:
    """Wraps the package's compiler and records the machine code that each call returns."""

    def __init__(self, real: Any, report: Report):
        self.real, self.report = real, report

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        compiled = self.real(*args, **kwargs | {"options": f"{kwargs.get('options', '')} --keep-cubin".strip()})
        code = compiled.artifacts.CUBIN
        row = {
            "kernel": type(args[0]).__name__,
            "bytes": len(code),
            "sha256": hashlib.sha256(code).hexdigest(),
            "seconds": round(time.perf_counter() - start, 2),
        }
        self.report.add(cubins=[*self.report["cubins"], row])
        return compiled

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def __getitem__(self, name: Any) -> Any:
        return self.real[name]


def main() -> None:
    report = Report(Path(sys.argv[1]))
    report.add(import_success=False, forward_success=False, backward_success=False)
    try:
        execute(report) if PARAMETERS["mode"] == "execute" else compile_ahead(report)
    except ModuleNotFoundError as error:
        report.add(missing=error.name)
        raise
    report.add(finished=True)


if __name__ == "__main__":
    main()

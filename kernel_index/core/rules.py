"""Eligibility rules that several kernels share: which tensors, modes and devices a backend needs.

A rule reads metadata only (type, dtype, device, strides, grad mode, installed packages), never a value.  It returns
None, or the rule that the call breaks as a fixed sentence.
"""

from typing import Any

import torch
from torch import Tensor

from kernel_index.core.target import Target, has_package, target_of
from kernel_index.core.triton.launch import interpreting

HALF = (torch.float16, torch.bfloat16)
WIDEST_HEAD = 256
"""Largest head size of the Triton attention kernels: a row of it fits into registers."""

MOST_HEADS_OF_ROWS = 65_535
"""Batch rows times heads of the kernels that have these on the second axis of their grid, which holds no more."""

MIN_ARCH = 80

PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)
"""Types that override no operator; a kernel would bypass what a subclass overrides."""

INSIDE_FUNCTORCH = "inside a torch.func transform"
NEEDS_PLAIN = "needs plain tensors, not a tensor subclass"
NEEDS_CPU = "needs CPU tensors"
NEEDS_CUDA = "needs CUDA tensors"
ON_A_CPU = "needs CUDA or ROCm tensors (or TRITON_INTERPRET=1)"
NEEDS_NARROW_HEADS = "needs head sizes of at most 256"  # WIDEST_HEAD
NEEDS_FEW_HEADS_OF_ROWS = "needs at most 65,535 batch rows times heads"  # MOST_HEADS_OF_ROWS
NEEDS_TRITON_DTYPE = "needs float32, bfloat16 or float16"
NO_BACKWARD = "has no backward; use backend='reference' when gradients are needed"
ONLY_FLOAT32 = "computes in float32: float64 is the reference's"

NEGATED = "needs tensors without the negative bit: call resolve_neg() first"
"""For lazily negated views, such as ``z.conj().imag``: their memory holds the values with the opposite sign."""


def inside_functorch() -> bool:
    """Whether a torch.func transform (vmap, grad, jvp) is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None


inside_functorch._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see dispatch.py


def inside_dispatch_mode() -> bool:
    """Whether a ``TorchDispatchMode`` is active, such as FakeTensorMode or a FLOP counter."""
    return torch._C._len_torch_dispatch_stack() > 0


def records_operators() -> bool:
    """Whether ``make_fx`` or ``torch.jit.trace`` records what runs: a kernel that is no operator would be left out."""
    proxies = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)
    return proxies is not None or torch._C._get_tracing_state() is not None


def host_readable(*tensors: Tensor | None) -> bool:
    """Whether values may be read here: all tensors plain and on the CPU, and no trace, mode or transform is active."""
    if torch.compiler.is_compiling() or inside_functorch() or inside_dispatch_mode():
        return False
    return all(t is None or (t.device.type == "cpu" and type(t) in PLAIN) for t in tensors)


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether grad mode is on and one of the tensors requires a gradient."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def opaque_why_not(*tensors: Any) -> str | None:
    """The rules of compiled code for the CPU: it reads memory directly, so a trace or a mode would not see it."""
    if torch.compiler.is_compiling():
        return "torch.compile is tracing: the plain formula is traced into the caller's graph"
    if inside_functorch():
        return INSIDE_FUNCTORCH
    if inside_dispatch_mode() or torch._C._get_tracing_state() is not None:
        return "inside a TorchDispatchMode or torch.jit.trace, which compiled code does not see"
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            continue
        if type(tensor) not in PLAIN:
            return NEEDS_PLAIN
        if not tensor.is_cpu:
            return NEEDS_CPU
        if tensor.is_neg():
            return NEGATED
    return None


def plain_why_not(*tensors: Any) -> str | None:
    """The rules of every backend that is PyTorch with an autograd Function of its own: both would bypass a subclass."""
    if inside_functorch():
        return INSIDE_FUNCTORCH
    if any(isinstance(t, Tensor) and type(t) not in PLAIN for t in tensors):
        return NEEDS_PLAIN
    return None


def triton_why_not(*tensors: Any) -> str | None:
    """The rules that every Triton backend shares; arguments that are not tensors are ignored."""
    if not has_package("triton"):
        return "needs the triton package (pip install triton)"
    if inside_functorch():
        return INSIDE_FUNCTORCH
    eager, asked = not torch.compiler.is_compiling(), None
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            continue
        if type(tensor) not in PLAIN:
            return NEEDS_PLAIN
        if eager and tensor.is_neg():
            return NEGATED
        if tensor.is_cpu and not interpreting():  # decides most calls on a CPU without a look-up
            return ON_A_CPU
        if tensor.dtype == torch.float64:
            return ONLY_FLOAT32
        if (device := tensor.device) != asked:  # most tensors of a call are on one device
            asked = device
            if (rule := _device_rule(target_of(device))) is not None:
                return rule
    return None


def _device_rule(target: Target) -> str | None:
    if target.kind == "cpu":
        return None if interpreting() else ON_A_CPU
    if target.kind not in ("cuda", "hip"):
        return ON_A_CPU
    if interpreting():
        return "TRITON_INTERPRET=1 interprets on the CPU"
    if isinstance(target.arch, int) and target.arch < MIN_ARCH:
        return "needs compute capability 8.0 or newer"
    return None


def triton_not_worth(*tensors: Any) -> str | None:
    """``auto`` does not use the interpreter."""
    on_cpu = any(isinstance(t, Tensor) and target_of(t.device).kind == "cpu" for t in tensors)
    return "interpreted on a CPU: only when asked for by name" if on_cpu else None

"""``prove aot``: compile every Triton kernel for GPUs that are not here, as the launchers would, and read the result.

Each suite's production-size call runs forward and backward on tensors of the meta device that count as tensors of the
target, so kernels, configurations and specialisations are those that ``pick_config`` chooses there.  Each launch is
turned into an ahead-of-time compilation to machine code; nothing is executed.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction

from kernel_index.core import ops
from kernel_index.core.target import Target, pretend
from kernel_index.core.testing import Maker, Suite, suites
from kernel_index.core.triton.overwritten_tiles import overwritten
from kernel_index.proofs.errors import differentiable, run
from kernel_index.proofs.unset_registers import reads_of_unset

TARGETS = {
    "sm80": Target("cuda", 80),
    "sm90": Target("cuda", 90),
    "sm100": Target("cuda", 100),
    "sm120": Target("cuda", 120),
    "gfx942": Target("hip", "gfx942"),
    "gfx950": Target("hip", "gfx950"),
}

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
"""Of a launch, what the compiler reads."""


@dataclass(frozen=True)
class Compiled:
    """One kernel for one target: registers of a thread, bytes it spills, shared memory of a program.

    ``unset``: instructions that may read a uniform register before it is written, of kernels in Gluon.
    """

    op: str
    kernel: str
    target: str
    warps: int
    stages: int
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    bytes: int = 0
    error: str = ""
    unset: int = 0


@dataclass(frozen=True)
class Launch:
    """A launch as the launcher asked for it."""

    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, int], ...]


ONLY_ON = {"gluon": "sm90"}
"""Backends whose kernels are written for one architecture."""


def prove(targets: tuple[str, ...], ops: tuple[str, ...] | None = None) -> Iterator[Compiled]:
    """Yield what each kernel compiles to, for the production-size call of each suite in bfloat16."""
    for suite in suites():
        if is_compiled(suite) and (ops is None or suite.op in ops):
            for name in targets:
                backends = ("triton", *(b.name for b in suite.backends if ONLY_ON.get(b.name) == name))
                for launch in (launch for backend in backends for launch in launches(suite, TARGETS[name], backend)):
                    yield compile_for(suite.op, launch, name)


def is_compiled(suite: Suite) -> bool:
    """Whether it has a Triton backend and a call of production size."""
    return suite.real is not None and "triton" in [b.name for b in suite.backends]


def launches(suite: Suite, target: Target, backend: str = "triton") -> list[Launch]:
    """The distinct launches of a suite's production-size call, forward and backward."""
    found: dict[Launch, None] = {}
    real = JITFunction.run

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found[_launch(kernel, args, kwargs)] = None

    JITFunction.run = record  # type: ignore[method-assign]
    try:
        with pretend(target), _Launchers():
            kwargs = suite.real(Maker(torch.bfloat16, device="meta"))  # type: ignore[misc]
            names = differentiable(suite, kwargs, backend)
            run(suite.function, kwargs, names, backend=backend)
    finally:
        JITFunction.run = real  # type: ignore[method-assign]
    return list(found)


class _Launchers(TorchDispatchMode):
    """Calls the launcher of a registered op, where the meta device would call its fake."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        launcher = ops.LAUNCHERS.get(op.name())
        return (launcher or op)(*args, **(kwargs or {}))


def _launch(kernel: JITFunction, args: tuple, kwargs: dict[str, Any]) -> Launch:
    given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, aligned = {}, {}, []
    for i, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        kind = "constexpr" if parameter.is_constexpr else _kind(value)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = value
        elif isinstance(value, Tensor) or (kind in ("i32", "i64") and value % 16 == 0):
            aligned.append(i)  # what the compiler at run time learns from an address or a size
    options = tuple((n, kwargs[n]) for n in OPTIONS if n in kwargs)
    return Launch(kernel, tuple(signature.items()), tuple(constants.items()), tuple(aligned), options)


def _kind(value: Any) -> str:
    """Triton's own specialisation: None and 1 are constants."""
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    if hasattr(value, "block_shape"):  # what the copy engine of Hopper is told of a tensor
        return f"tensordesc<{POINTERS[value.base.dtype][1:]}{list(value.block_shape)},{value.layout!r}>"
    if value is None or (value == 1 and type(value) is int):
        return "constexpr"
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def source_of(launch: Launch) -> ASTSource:
    """What Triton compiles for a launch."""
    attributes = {(i,): [["tt.divisibility", 16]] for i in launch.aligned}
    of_language = GluonASTSource if launch.kernel.is_gluon() else ASTSource
    return of_language(launch.kernel, dict(launch.signature), constexprs=dict(launch.constants), attrs=attributes)


def compile_for(op: str, launch: Launch, name: str) -> Compiled:
    target = TARGETS[name]
    options = dict(launch.options)
    place = (op, launch.kernel.__name__, name, options.get("num_warps", 4), options.get("num_stages", 0))
    source = source_of(launch)
    backend = GPUTarget(target.kind, target.arch, 32 if target.kind == "cuda" else 64)
    try:
        built = triton.compile(source, target=backend, options=options)
    except (triton.errors.TritonError, RuntimeError, ValueError) as error:
        return Compiled(*place, error=f"{type(error).__name__}: {error}"[:300])
    read = _read_cubin if target.kind == "cuda" else _read_hsaco
    registers, spilled, size, code = read(built.asm)
    unset = len(reads_of_unset(code)) if launch.kernel.is_gluon() else 0
    tiles = () if launch.kernel.is_gluon() else overwritten(built.asm.get("ttgir", ""))
    error = f"a product reads an overwritten tile: {tiles[0]}"[:300] if tiles else ""
    return Compiled(*place, registers, spilled, built.metadata.shared, size, error, unset)


def _read_cubin(asm: dict[str, Any]) -> tuple[int, int, int, str]:
    """Registers, bytes of local memory stored to, size and instructions: from NVIDIA's tools in Triton's package."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        code = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    registers = max(map(int, re.findall(r"REG:(\d+)", usage)))
    widths = re.findall(r"\bSTL(?:\.(\d+))?", code)  # stores to local memory: 32 bits, or as many as the suffix says
    return registers, sum(int(w or 32) // 8 for w in widths), len(asm["cubin"]), code


def _read_hsaco(asm: dict[str, Any]) -> tuple[int, int, int, str]:
    text = asm["amdgcn"]

    def figure(name: str) -> int:
        return max(map(int, re.findall(rf"\.{name}:\s+(\d+)", text)), default=0)

    return figure("vgpr_count"), 4 * figure("vgpr_spill_count"), len(asm["hsaco"]), text

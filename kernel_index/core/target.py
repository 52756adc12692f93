"""The kind and architecture of a device, and the installed packages.  Probed once; constant while Dynamo traces."""

import contextlib
import functools
import importlib
import importlib.util
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, slots=True)
class Target:
    """``kind``: ``"cpu"``, ``"cuda"``, ``"hip"`` or another device type.  ``arch``: 90 for sm_90, ``"gfx942"``."""

    kind: str
    arch: int | str = 0


@functools.cache
def _probe(kind: str, index: int) -> Target:
    if kind != "cuda":
        return Target(kind)
    if torch.version.hip:
        return Target("hip", torch.cuda.get_device_properties(index).gcnArchName.split(":")[0])
    major, minor = torch.cuda.get_device_capability(index)
    return Target("cuda", 10 * major + minor)


def target_of(device: torch.device) -> Target:
    """The ``Target`` of a torch device."""
    if device.type == "meta" and _PRETENDED:
        return _PRETENDED[-1]
    return _probe(device.type, device.index or 0)


_PRETENDED: list[Target] = []


@contextlib.contextmanager
def pretend(target: Target) -> Iterator[None]:
    """Inside the block, meta tensors count as tensors on ``target``: a proof compiles for absent hardware that way."""
    _PRETENDED.append(target)
    try:
        yield
    finally:
        _PRETENDED.pop()


@functools.cache
def _find_package(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def has_package(name: str) -> bool:
    """Whether a top-level package is installed; does not import it."""
    return _find_package(name)


@functools.cache
def _ask_fa4() -> str | None:
    if not has_package("flash_attn"):
        return NEEDS_FA4
    try:
        importlib.import_module("flash_attn.cute")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        if getattr(error, "name", "") == "flash_attn.cute":
            return f"{NEEDS_FA4}: the flash_attn that is installed is another one"
        return f"flash-attn-4 cannot be imported: {type(error).__name__}: {error}"
    return None


def fa4_package_why_not() -> str | None:
    """Why flash-attn-4 cannot be called here, or None.

    Version 2 of FlashAttention installs a package of the same name, so this one is imported to know: seconds, once.
    """
    return _ask_fa4()


@functools.cache
def _ask_triton() -> tuple[int, ...]:
    if not has_package("triton"):
        return 0, 0
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2]))


def triton_version() -> tuple[int, ...]:
    """Major and minor, (0, 0) without it.  The module is asked: its distribution has several names."""
    return _ask_triton()


NEEDS_FA4 = "needs the flash-attn-4 package (pip install flash-attn-4)"
NO_COMPILER = "no C++ compiler (g++ or clang++) found"
NO_GXX = "needs g++, or another C++ compiler named by the variable CXX"
NO_VECTORS = "needs a CPU with AVX2, or with AVX-512 and PyTorch's oneDNN"


@functools.cache
def cxx_compiler() -> str | None:
    """The path of the C++ compiler: that of the variable ``CXX``, else g++ or clang++."""
    chosen = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, [chosen] if chosen else ["g++", "clang++"])), None)


def has_cxx_compiler() -> bool:
    """Whether there is a C++ compiler."""
    return cxx_compiler() is not None


@functools.cache
def has_inductor_compiler() -> bool:
    """Whether there is the C++ compiler that Inductor asks for, even for a cached kernel: g++ or that of ``CXX``."""
    return shutil.which(os.environ.get("CXX") or "g++") is not None


Instructions = Literal["AVX512", "AVX2"]


@functools.cache
def vector_instructions() -> Instructions | None:
    """What native kernels are compiled for here: AVX-512 with oneDNN's products, else AVX2 with products of our own.

    >>> from kernel_index.core.target import vector_instructions
    >>> vector_instructions() in ("AVX512", "AVX2", None)
    True
    """
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512" and torch.backends.mkldnn.is_available():
        return "AVX512"
    return "AVX2" if capability in ("AVX512", "AVX2") else None


def has_vectors() -> bool:
    """Whether native kernels run here."""
    return _has_vectors()


@functools.cache
def _has_vectors() -> bool:
    return vector_instructions() is not None


def has_bfloat16_products() -> bool:
    """Whether native kernels multiply bfloat16 here; without AVX512_BF16 oneDNN's brgemm ends the process."""
    return _has_bfloat16_products()


@functools.cache
def _has_bfloat16_products() -> bool:
    if vector_instructions() == "AVX2":
        return True
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return supported is not None and bool(supported())


def _native_why_not() -> str | None:
    if not has_cxx_compiler():
        return NO_COMPILER
    return None if has_vectors() else NO_VECTORS


def _has_hopper() -> bool:
    return any(_probe("cuda", index) == Target("cuda", 90) for index in range(torch.cuda.device_count()))


def machine_rules() -> dict[str, str | None]:
    """For each kind of backend that `kernel-index doctor` lists, why this machine cannot run it at all, or None.

    A backend without an entry here may run on every machine that its own rules allow.
    """
    cuda = torch.cuda.is_available()
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    return {
        "reference": None,
        "sdpa": None,
        "native": _native_why_not(),
        "cpu": None,
        "chunked": None,
        "sharded": None
        if torch.distributed.is_available() and torch.distributed.is_initialized()
        else "needs a process group (torch.distributed.init_process_group)",
        "eager": None,
        "grouped_mm": None,
        "inductor": None if has_inductor_compiler() else NO_GXX,
        "triton": None
        if has_package("triton") and (cuda or interpreting)
        else "needs the triton package (pip install triton) and a CUDA or ROCm device (or TRITON_INTERPRET=1)",
        "fa4": fa4_package_why_not() if cuda else f"{NEEDS_FA4} and a CUDA device",
        "gluon": None
        if has_package("triton") and cuda and not interpreting and _has_hopper()
        else "needs the triton package (pip install triton), 3.6 or later, and a CUDA device of sm_90",
        "flex": None if cuda else "needs a CUDA device: FlexAttention has no backward on a CPU",
        "varlen": None if cuda else "needs a CUDA device",
        "pallas": None if has_package("jax") else "needs the jax package (pip install jax)",
        "xla": None if has_package("jax") else "needs the jax package (pip install jax)",
    }


def machine_why_not(backend: str) -> str | None:
    """Why this machine cannot run a backend at all, or None.  The backend's own rules may still decline a call."""
    return machine_rules().get(backend)


# See dispatch.py: Dynamo runs these as plain Python while it traces and keeps the result, but for a
# ``functools.cache``: it traces what that wraps.
for _constant in (
    target_of, has_package, fa4_package_why_not, triton_version, has_cxx_compiler, has_vectors, has_bfloat16_products,
):  # fmt: skip
    _constant._dynamo_marked_constant = True  # type: ignore[attr-defined]

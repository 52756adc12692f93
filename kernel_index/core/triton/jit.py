"""The decorator of every Triton function here: its kernels say at each launch whether products and sums are fused.

Triton's own default differs between versions and can be changed by an environment variable, and with it results would.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from kernel_index.core import ahead
from kernel_index.core.triton.launch import interpreting
from kernel_index.core.triton.overwritten_tiles import overwritten

ENABLE_FP_FUSION = True
"""A product and its sum are one instruction with one rounding (FMA): so it was in every figure that is recorded."""

ON_ROCM = torch.version.hip is not None

MOST_KNOWN = 4096
"""Launches that a kernel remembers; then it begins anew."""


class Ahead(JITFunction):
    """A kernel that threads may compile while ``torch.compile`` traces its op: ``core/ahead.py``."""

    def run(self, *args: Any, grid: Any, warmup: bool, **constants: Any) -> Any:
        return super().run(*args, grid=grid, warmup=warmup or ahead.is_learning(), **constants)

    def _do_compile(self, key: Any, signature: Any, device: Any, *rest: Any) -> Any:
        compiled = functools.partial(self._right, super()._do_compile, key, signature, device, *rest)
        if ahead.is_learning():
            ahead.submit(self, key, compiled)
            return None
        ahead.wait_for(self)
        return self.device_caches[device][0].get(key) or compiled()

    def _right(
        self, build: Callable[..., Any], key: Any, signature: Any, device: Any, constants: Any, options: Any, *rest: Any
    ) -> Any:
        """The compiled kernel, without stages where they would let a copy fall on what a product still reads."""
        kernel = build(key, signature, device, constants, options, *rest)
        if overwritten(_text_of(kernel)):
            plain = dataclasses.replace(options, num_stages=1)
            kernel = build(key, signature, device, constants, plain, *rest)
            if found := overwritten(_text_of(kernel)):
                raise RuntimeError(
                    f"Triton compiled {self.__name__} so that a product reads an overwritten tile: {found[0]}"
                )
        return kernel


def _text_of(kernel: Any) -> str:
    """Of its GPU dialect; none where a hook compiles it elsewhere or later."""
    return getattr(kernel, "asm", {}).get("ttgir", "")


class ShortWay:
    """Mixed in before the class of Triton's or Gluon's function: ``enable_fp_fusion`` in every launch, and a short way
    for a launch like an earlier one.

    Triton looks at every argument of a launch before it finds the compiled kernel: 41 us for 29 of them on the host of
    an H200, 16 us by this way.  Alike are launches whose arguments are of the same kinds by Triton's own rules.
    """

    params: Any
    arg_names: Any
    pre_run_hooks: Any
    run: Any

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return functools.partial(self._start, grid)

    def _start(self, grid: Any, *args: Any, **constants: Any) -> Any:
        if not _takes_short_way(args[0]) or self.pre_run_hooks:
            return self.run(*args, grid=grid, warmup=False, enable_fp_fusion=ENABLE_FP_FUSION, **constants)
        if (known := self.__dict__.get("known_launches")) is None:
            known = self.known_launches = {}
            self.constant_parameters = tuple(p.is_constexpr for p in self.params)
        device, kinds, passed = torch.cuda.current_device(), list[Any](), list[Any]()
        for constant, arg in zip(self.constant_parameters, args, strict=False):
            if isinstance(arg, Tensor):
                address = arg.data_ptr()
                kinds += (arg.dtype, address & 15 == 0)
                arg = address  # of a tensor, the launcher would ask the driver where its memory is
            else:
                kinds.append((type(arg), arg) if constant else _kind(arg))
            passed.append(arg)
        key = (device, *kinds, *constants.items())
        if (found := known.get(key)) is None:
            kernel = self.run(*args, grid=grid, warmup=False, enable_fp_fusion=ENABLE_FP_FUSION, **constants)
            names = self.arg_names[len(args) :]
            if all(name in constants for name in names):
                if len(known) >= MOST_KNOWN:
                    known.clear()
                known[key] = _Compiled(kernel, tuple(constants[name] for name in names))
            return kernel
        found.launch(device, *_three(grid), *passed)
        return found.kernel


class Kernel(ShortWay, Ahead):
    """Of Triton."""


class _Compiled(NamedTuple):
    """A compiled kernel, and the values of the constants that end its arguments."""

    kernel: Any
    constants: tuple[Any, ...]

    def launch(self, device: int, x: int, y: int, z: int, *args: Any) -> None:
        kernel, stream = self.kernel, driver.active.get_current_stream(device)
        kernel.run(
            x, y, z, stream, kernel.function, kernel.packed_metadata, None, None, None, *args, *self.constants
        )  # fmt: skip


def _three(grid: Any) -> tuple[int, int, int]:
    return (*grid, 1, 1)[:3]


Place = tuple[int, Any]
"""A device and its stream."""


def place_of(first: Tensor) -> Place | None:
    """Where prepared launches of tensors like this one go: asked once for several; None where Triton must launch."""
    if not _takes_short_way(first):
        return None
    device = torch.cuda.current_device()
    return device, driver.active.get_current_stream(device)


class Prepared:
    """A launch of which all but the tensors is settled: for the steps of a decoding loop, where the host is the limit.

    Whoever keeps one calls it with tensors of the same dtypes in the same order; those arguments come first.  Compiled
    kernels are given addresses: of a tensor, the launcher would ask the driver whether its memory is on the device.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], numbers: tuple[Any, ...], **constants: Any):
        self.kernel, self.grid, self.numbers, self.constants = kernel, _three(grid), numbers, constants
        self.compiled: dict[Any, tuple[Any, ...]] = {}

    def __call__(self, place: Place | None, *tensors: Tensor) -> None:
        if place is None:
            self.kernel[self.grid](*tensors, *self.numbers, **self.constants)
            return
        device, stream = place
        addresses, bits = [t.data_ptr() for t in tensors], 0
        for address in addresses:
            bits |= address
        key = device if bits & 15 == 0 else (device, *(address & 15 for address in addresses))
        found = self.compiled.get(key)
        if found is None:
            kernel = self.kernel._start(self.grid, *tensors, *self.numbers, **self.constants)
            names = self.kernel.arg_names[len(tensors) + len(self.numbers) :]
            rest = (*self.numbers, *(self.constants[name] for name in names))
            self.compiled[key] = (kernel.run, kernel.function, kernel.packed_metadata, rest)
            return
        run, function, metadata, rest = found
        run(*self.grid, stream, function, metadata, None, None, None, *addresses, *rest)


def _kind(arg: Any) -> Any:
    """What Triton compiles for, beside type and alignment of a pointer: of an integer 1, multiples of 16, its width."""
    if type(arg) is int:
        return 1 if arg == 1 else (arg & 15 == 0, arg.bit_length() >> 5)
    if hasattr(arg, "block_shape"):  # what the copy engine of Hopper is told of a tensor
        return arg.base.dtype, *arg.block_shape, arg.layout
    return type(arg) if type(arg) is float else (type(arg), arg)


def _takes_short_way(first: Any) -> bool:
    """Whether a launch whose first argument this is may skip Triton's own look at all of them.

    Not for ROCm, whose compiler also asks how much memory a pointer has; not where a profiler's hook or a debugging
    option is set; and a meta tensor only stands for a launch.
    """
    if not isinstance(first, Tensor):
        first = getattr(first, "base", first)  # of a descriptor
    if not isinstance(first, Tensor) or not first.is_cuda or ON_ROCM:
        return False
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return not (getattr(enter, "calls", enter) or getattr(leave, "calls", leave) or runtime.debug)


def jit(function: Callable[..., Any], **options: Any) -> Any:
    """``triton.jit`` for kernels and for the device functions that they call."""
    return triton.jit(function, **options) if interpreting() else Kernel(function, **options)

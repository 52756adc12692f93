"""``prove traffic``: count the bytes that kernels load and store, in Triton's interpreter.

For each launch: ``lanes``, every unmasked lane of every load and store; ``sectors``, distinct 32-byte sectors, reads
and writes apart, which is what a launch must move between memory and a perfect L2 cache.  ATen ops between the
launches count their inputs and outputs once.  Counts are exact and affine in the rows, so two small sizes give those of
a large one; they say nothing about time.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton.runtime.interpreter as interpreter
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SECTOR = 32

VIEWS = (
    "detach view _unsafe_view reshape t transpose permute expand slice select squeeze unsqueeze as_strided alias split "
    "split_with_sizes chunk unbind empty empty_like empty_strided new_empty lift_fresh _reshape_alias unfold"
)
"""ATen ops that move nothing."""

WRITES_ONLY = "zeros zeros_like ones ones_like full full_like fill_ zero_ new_zeros new_ones new_full"


@dataclass
class Count:
    """Bytes of one launch or ATen op."""

    name: str
    is_launch: bool
    lanes: int = 0
    sectors: int = 0
    atomics: int = 0
    of: dict[str, int] = field(default_factory=dict)  # unmasked lanes of the tensors that were asked about
    touched: dict[str, list[np.ndarray]] = field(default_factory=lambda: {"load": [], "store": []}, repr=False)

    def add(self, kind: str, addresses: np.ndarray, size: int) -> None:
        self.lanes += addresses.size * size
        if addresses.size:
            ends = np.concatenate([addresses // SECTOR, (addresses + size - 1) // SECTOR])
            self.touched[kind].append(np.unique(ends))

    def close(self) -> None:
        self.sectors = SECTOR * sum(np.unique(np.concatenate(t)).size for t in self.touched.values() if t)
        self.touched = {}


@dataclass
class Traffic:
    """What ``counted`` saw, in order."""

    counts: list[Count] = field(default_factory=list)

    @property
    def launches(self) -> int:
        return sum(c.is_launch for c in self.counts)

    @property
    def others(self) -> int:
        """ATen ops between the launches."""
        return sum(not c.is_launch for c in self.counts)

    @property
    def atomics(self) -> int:
        return sum(c.atomics for c in self.counts)

    @property
    def sectors(self) -> int:
        return sum(c.sectors for c in self.counts)

    @property
    def lanes(self) -> int:
        return sum(c.lanes for c in self.counts)


@contextlib.contextmanager
def counted(of: Mapping[str, Tensor] | None = None) -> Iterator[Traffic]:
    """Count every interpreted launch and every ATen op of the block; ``of`` names tensors to tell apart."""
    traffic, current = Traffic(), []
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    spans = {name: _span(t) for name, t in (of or {}).items()}
    saved = {name: getattr(builder, name) for name in _patches(current, builder, spans)}
    run = executor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        count = Count(getattr(self.fn, "__name__", "kernel"), is_launch=True)
        current.append(count)
        try:
            return run(self, *args, **kwargs)
        finally:
            current.pop()
            count.close()
            traffic.counts.append(count)

    for name, patch in _patches(current, builder, spans).items():
        setattr(builder, name, patch)
    executor.__call__ = launch
    try:
        with _Aten(traffic, current):
            yield traffic
    finally:
        executor.__call__ = run
        for name, original in saved.items():
            setattr(builder, name, original)


def _span(tensor: Tensor) -> tuple[int, int]:
    """The addresses of a dense tensor."""
    return tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()


def _patches(current: list[Count], builder: Any, spans: dict[str, tuple[int, int]]) -> dict[str, Callable[..., Any]]:
    """The interpreter's loads, stores and atomics, counting first; plain and descriptor accesses pass through them."""
    load, store = builder.create_masked_load, builder.create_masked_store
    rmw = builder.create_atomic_rmw

    def note(kind: str, pointers: Any, mask: Any) -> None:
        if current:
            addresses = np.asarray(pointers.data)
            if mask is not None:
                addresses, chosen = np.broadcast_arrays(addresses, np.asarray(mask.data))
                addresses = addresses[chosen.astype(bool)]
            size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
            addresses = addresses.reshape(-1).astype(np.int64)
            current[-1].add(kind, addresses, size)
            for name, (first, last) in spans.items():
                inside = int(((addresses >= first) & (addresses < last)).sum())
                current[-1].of[name] = current[-1].of.get(name, 0) + inside * size

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any, **extra: Any) -> Any:
        note("load", pointers, mask)
        return load(self, pointers, mask, *rest, **extra)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **extra: Any) -> Any:
        note("store", pointers, mask)
        return store(self, pointers, value, mask, *rest, **extra)

    def counted_rmw(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **extra: Any) -> Any:
        note("load", pointers, mask)
        note("store", pointers, mask)
        if current:
            current[-1].atomics += 1
        return rmw(self, op, pointers, value, mask, *rest, **extra)

    return {
        "create_masked_load": counted_load,
        "create_masked_store": counted_store,
        "create_atomic_rmw": counted_rmw,
    }


class _Aten(TorchDispatchMode):
    """Counts ATen ops outside of launches; the interpreter's own copies to the host happen inside them."""

    def __init__(self, traffic: Traffic, current: list[Count]):
        super().__init__()
        self.traffic, self.current = traffic, current

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        name = op.overloadpacket.__name__
        if self.current or op.namespace == "kernel_index" or name in VIEWS.split():
            return out
        written = _bytes(torch.utils._pytree.tree_leaves(out))
        read = 0 if name in WRITES_ONLY.split() else _bytes(torch.utils._pytree.tree_leaves(args))
        if name == "copy_":
            read = _bytes(args[1:2])
        count = Count(f"aten.{name}", is_launch=False, lanes=read + written, sectors=read + written)
        self.traffic.counts.append(count)
        return out


def _bytes(values: Any) -> int:
    """Bytes of the distinct tensors; a dimension of stride 0 counts once."""
    seen = {}
    for t in values:
        if isinstance(t, Tensor):
            sizes = [n for n, stride in zip(t.shape, t.stride(), strict=True) if stride != 0]
            seen[t.data_ptr(), tuple(t.shape), t.stride()] = int(np.prod(sizes, dtype=np.int64)) * t.element_size()
    return sum(seen.values())

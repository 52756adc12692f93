"""Does calling leak?  ``python -m tests.leaks CALLS`` prints what grew between two looks, CALLS mixed calls apart.

Every public function with backends takes part, on every backend that runs on this machine, forward and backward, with
sizes that change from call to call.  Triton's kernels, which are interpreted on a CPU, take every twelfth call.
"""

import ctypes
import functools
import gc
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

import kernel_index as ki
from kernel_index.core.inductor import Region
from tests.mixed_calls import Mixed, mixed_calls

SIZES = (8, 13, 5, 21, 16, 3, 34)
WARM_UP = len(SIZES)


def compiled_graphs() -> int:
    stats = torch._dynamo.utils.counters["stats"]
    return stats["unique_graphs"] + sum(torch._dynamo.utils.counters["graph_break"].values())


def look() -> dict[str, int]:
    """What the process holds: bytes, tensors, and entries of every cache."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # what is free goes back, so that what is resident is held
        libc.malloc_trim(0)
    objects = gc.get_objects()
    regions = [o for o in objects if issubclass(type(o), Region)]
    caches = [o for o in objects if issubclass(type(o), ki.MaskKernelCache)]
    memos = {
        id(value): value
        for name, module in list(sys.modules.items())
        if name.startswith("kernel_index")
        for value in vars(module).values()
        if isinstance(value, functools._lru_cache_wrapper)
    }
    return {
        "resident bytes": int(Path("/proc/self/statm").read_text().split()[1]) * 4096,
        "tensors": sum(issubclass(type(o), torch.Tensor) for o in objects),
        "objects": len(objects),
        "regions": len(regions),
        "variants of regions": sum(len(r.variants) for r in regions),
        "kernels of mask caches": sum(len(c) for c in caches),
        "entries of memoised functions": sum(m.cache_info().currsize for m in memos.values()),
        "graphs of Dynamo": compiled_graphs(),
    }


def endless(calls: list[Mixed]) -> Iterator[tuple[Mixed, int]]:
    """The calls in turn, each with the next size; a Triton call after every eleven others."""
    interpreted = itertools.cycle([c for c in calls if c.backend == "triton"])
    others = [c for c in calls if c.backend != "triton"]
    steps = itertools.count()
    for round_ in itertools.count():
        for call in others:
            if next(steps) % 11 == 10:
                yield next(interpreted), 5
            yield call, SIZES[round_ % len(SIZES)]


def main(count: int) -> dict[str, int]:
    """Growth over ``count`` calls, after a warm-up in which every call has had every size."""
    torch.set_num_threads(1)
    calls = mixed_calls()
    for call in calls:
        for n in (5,) if call.backend == "triton" else SIZES:
            call.results(n)
    mixed = endless(calls)
    for call, n in itertools.islice(mixed, 100):
        call.results(n)
    before = look()
    made = {str(call) for call, n in itertools.islice(mixed, count) if call.results(n) is not None}
    after = look()
    return {name: after[name] - value for name, value in before.items()} | {"kinds of calls": len(made)}


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]))))

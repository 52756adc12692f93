"""Times of calls on a GPU: device time by replay of one CUDA graph over several sets of inputs, and host time."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Call = Callable[[], object]

CACHE = 60e6
"""Bytes of the largest L2 cache that is measured on; sets of inputs together are three times as large."""

SLOW = 0.2
"""Seconds from which on a call is timed twice by events: its launches do not matter."""

BROKEN = ("illegal memory", "device-side assert triggered", "unspecified launch", "misaligned address")
"""Parts of the errors after which nothing runs any more in a process."""


def sets_for(size: int, most: int = 48) -> int:
    """How many sets of inputs of so many bytes do not fit the L2 cache together."""
    return max(1, min(most, int(3 * CACHE // max(size, 1)) + 1))


def elapsed(call: Call) -> float:
    """Seconds on the device, between two events."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def device_us(calls: Sequence[Call], budget: float = 0.25) -> tuple[float, str]:
    """Median microseconds of one call, and how it was timed: ``graph``, or ``events`` where a capture failed.

    One CUDA graph runs every call once, on the current stream: autograd runs a backward on its forward's stream.
    """
    warm_up(calls)
    if len(calls) == 1 and (once := elapsed(calls[0])) > SLOW:
        return 1e6 * min(once, elapsed(calls[0])), "events"
    run, how = _captured(calls)
    return median_us(run, len(calls), budget), how


def warm_up(calls: Sequence[Call]) -> None:
    """What is compiled or chosen in a first call has been."""
    for _ in range(2):
        for call in calls[:4]:
            call()
    torch.cuda.synchronize()


def replay_of(calls: Sequence[Call]) -> Call:
    """One run of all calls, by ``device_us``'s graph where they can be captured: ``median_us`` times it later."""
    warm_up(calls)
    return _captured(calls)[0]


def median_us(run: Call, count: int, budget: float = 0.25) -> float:
    """Median microseconds of one of the ``count`` calls in a run."""
    run()
    repeats = max(5, min(30, int(budget / max(elapsed(run), 1e-6))))
    return 1e6 * statistics.median(elapsed(run) for _ in range(repeats)) / count


def _captured(calls: Sequence[Call]) -> tuple[Call, str]:
    def eager() -> None:
        for call in calls:
            call()

    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            kept = [call() for call in calls]  # each call writes to memory of its own
        del kept
    except RuntimeError as error:  # the call waits for the device, which cannot be captured
        if is_broken(error):
            raise
        torch.cuda.synchronize()
        return eager, "events"
    return graph.replay, "graph"


def host_us(call: Call, device: float = 0.0) -> float:
    """Microseconds until an eager call returns, without waiting for its ``device`` microseconds of work."""
    calls = 50 if device < 1e3 else 5
    for _ in range(calls // 5):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    spent = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1e6 * spent / calls


def copy_bandwidth() -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * 4 * source.numel() / statistics.median(elapsed(lambda: target.copy_(source)) for _ in range(15))


def error_of(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ ÷ ‖want‖ in float64; NaN where something is not finite."""
    a, b = (t.detach().to(torch.float64).flatten() for t in (got, want.to(got.device)))
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def is_broken(error: BaseException) -> bool:
    """Whether no kernel can be launched any more in this process."""
    return any(part in str(error) for part in BROKEN)

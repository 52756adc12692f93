"""One way to compare: same process, alternating order, medians, ratios.

Machines are noisy, so a time alone says little; the ratio of two contenders measured in turn says more.  Memory is
measured in a process of its own for each contender, as the high-water mark above what was resident before the call.
"""

import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

console = Console(width=140)


@dataclass(frozen=True)
class Contender:
    """``prepare()`` builds inputs and returns the call to be timed; ``ours`` marks the index's own."""

    name: str
    prepare: Callable[[], Callable[[], object]]
    ours: bool = False


@dataclass
class Question:
    """Contenders on a GPU that compute the same; ``inputs()`` makes fresh leaves.

    ``bytes`` are those that any kernel must move, forward and backward.
    """

    name: str
    contenders: dict[str, Callable[..., Any]]
    inputs: Callable[[], tuple[Any, ...]]
    bytes: tuple[int, int] | None = None
    memory: bool = False
    together: bool = False  # time forward and backward as one


@dataclass
class Row:
    """What one contender cost: seconds of every timed call, of the first call, and bytes above its inputs.

    ``share`` is compulsory bytes ÷ time ÷ the bandwidth of a copy, where a GPU's was measured.
    """

    contender: str
    seconds: list[float]
    first: float | None
    memory: int | None = None
    share: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass
class Comparison:
    """A question, its contenders, and the targets ``{contender: highest allowed ratio of ours to it}``."""

    title: str
    rows: list[Row]
    ours: str
    targets: dict[str, float] = field(default_factory=dict)
    memory_targets: dict[str, float] = field(default_factory=dict)

    def row(self, name: str) -> Row:
        return next(r for r in self.rows if r.contender == name)

    def ratio(self, name: str) -> float:
        return self.row(self.ours).median / self.row(name).median

    def memory_ratio(self, name: str) -> float | None:
        ours, theirs = self.row(self.ours).memory, self.row(name).memory
        return ours / theirs if ours is not None and theirs else None

    def show(self) -> None:
        table = Table("contender", "median", "min", "first call", "memory", "ours ÷ it", "target", title=self.title)
        for r in self.rows:
            memory = "" if r.memory is None else f"{r.memory / 2**20:,.0f} MiB"
            ratio, target = "", ""
            if r.contender != self.ours:
                ratio = f"{_short(self.ratio(r.contender))}×"
                target = _judge(self.ratio(r.contender), self.targets.get(r.contender))
                if (m := self.memory_ratio(r.contender)) is not None:
                    ratio += f" time, {_short(m)}× memory"
                    target += " " + _judge(m, self.memory_targets.get(r.contender))
            first = "" if r.first is None else duration(r.first)
            times = (duration(r.median), duration(min(r.seconds)), first)
            table.add_row(r.contender, *times, memory, ratio, target)
        console.print(table)


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def _short(ratio: float) -> str:
    """Two digits that say something: 0.05 would be as good as 0.045."""
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"


def _judge(ratio: float, target: float | None) -> str:
    if target is None:
        return ""
    return f"≤ {_short(target)} [{'green]met' if ratio <= target else 'red]missed'}[/]"


def compare(
    title: str,
    contenders: Sequence[Contender],
    *,
    rounds: int = 9,
    targets: dict[str, float] | None = None,
    memory_targets: dict[str, float] | None = None,
) -> Comparison:
    """Time the contenders in turn, every round in another order; memory too if it has targets."""
    if _ONLY:
        if title == _ONLY[0]:
            _measure_memory(next(c for c in contenders if c.name == _ONLY[1]))
        return Comparison(title, [], "")
    calls, rows = [], []
    for c in contenders:
        call = c.prepare()
        start = time.perf_counter()
        call()
        rows.append(Row(c.name, [], time.perf_counter() - start))
        call()  # a second warm-up: the first may have compiled only the forward
        calls.append(call)
    for i in range(rounds):
        for j in range(len(calls)):
            k = (i + j) % len(calls)
            start = time.perf_counter()
            calls[k]()
            rows[k].seconds.append(time.perf_counter() - start)
    del calls
    if memory_targets is not None:
        for c, row in zip(contenders, rows, strict=True):
            row.memory = peak_memory(title, c)
    ours = next(c.name for c in contenders if c.ours)
    result = Comparison(title, rows, ours, targets or {}, memory_targets or {})
    result.show()
    return result


def peak_memory(title: str, contender: Contender) -> int:
    """Bytes that a second call adds at its peak, in a fresh process (a first call pays for compilers and caches).

    The process runs the benchmark's module up to this contender: a fork of a process whose OpenMP threads have started
    can hang.
    """
    command = [sys.executable, "-m", "benchmarks.memory", contender.prepare.__module__, title, contender.name]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, check=True, text=True)
    return int(done.stdout.split()[-1])


def measure_only(title: str, contender: str) -> None:
    """Make ``compare`` skip everything but this contender of this comparison, print its memory and end the process."""
    _ONLY[:] = [title, contender]


_ONLY: list[str] = []


def _measure_memory(contender: Contender) -> None:
    call = contender.prepare()
    call()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to what is resident now
    before = _status_kib("VmRSS")
    call()
    print(1024 * (_status_kib("VmHWM") - before), flush=True)
    os._exit(0)


def _status_kib(name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError(f"/proc/self/status has no {name}")
    return int(match.group(1))

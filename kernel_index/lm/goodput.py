"""Where the time of a run went."""

import contextlib
import statistics
import time
from collections.abc import Iterator

PHASES = ("step", "data", "evaluate", "checkpoint", "compile")


class Goodput:
    """Seconds by phase.  The first step of a process also compiles: what it takes beyond the median of the later ones
    counts as ``compile``.  ``earlier`` holds the seconds of the processes that a resumed run has behind it.

    >>> clock = iter([0.0, 10.0, 10.0, 11.0, 11.0, 12.0]).__next__
    >>> goodput = Goodput(clock)
    >>> for _ in range(3):
    ...     with goodput.phase("step"):
    ...         pass
    >>> goodput.shares()
    {'step': 0.25, 'data': 0.0, 'evaluate': 0.0, 'checkpoint': 0.0, 'compile': 0.75}
    """

    def __init__(self, clock=time.perf_counter):
        self.clock = clock
        self.steps: list[float] = []
        self.others = dict.fromkeys(PHASES[1:], 0.0)
        self.earlier = dict.fromkeys(PHASES, 0.0)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self.clock()
        try:
            yield
        finally:
            seconds = self.clock() - start
            if name == "step":
                self.steps.append(seconds)
            else:
                self.others[name] += seconds

    def seconds(self) -> dict[str, float]:
        """By phase; all of the first step counts as a step as long as there is no other to compare it with."""
        later = self.steps[1:]
        extra = max(0.0, self.steps[0] - statistics.median(later)) if later else 0.0
        own = {"step": sum(self.steps) - extra, **self.others, "compile": extra}
        return {name: value + self.earlier[name] for name, value in own.items()}

    def shares(self) -> dict[str, float]:
        """By phase, of the time that was measured."""
        seconds = self.seconds()
        whole = sum(seconds.values())
        return {name: value / whole if whole else 0.0 for name, value in seconds.items()}

    def __str__(self) -> str:
        shares = self.shares()
        rest = ", ".join(f"{name} {100 * shares[name]:.0f} %" for name in PHASES[1:])
        return f"goodput {100 * shares['step']:.0f} % of the time in training steps ({rest})"

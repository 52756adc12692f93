"""How a run's time is divided into phases."""

import contextlib
import math
import statistics
import time
from collections.abc import Iterator
from typing import Literal, get_args

Phase = Literal["step", "data", "evaluate", "checkpoint", "compile"]
PHASES: tuple[Phase, ...] = get_args(Phase)


class Goodput:
    """Seconds by phase.  The first step of a process also compiles, and so do others that say so (``prepares``): their
    time beyond the median of the other steps counts as ``compile``.  ``earlier`` holds the seconds of a resumed run
    before this process.

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
        self.preparing = [True]  # of each step begun so far, and of the next one
        self.others: dict[Phase, float] = dict.fromkeys(PHASES[1:], 0.0)
        self.earlier = dict.fromkeys(PHASES, 0.0)

    def prepares(self) -> None:
        """The step that runs now also compiles or records kernels."""
        self.preparing[-1] = True

    @contextlib.contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        start = self.clock()
        try:
            yield
        finally:
            seconds = self.clock() - start
            if name == "step":
                self.steps.append(seconds)
                self.preparing.append(False)
            else:
                self.others[name] += seconds

    def seconds(self) -> dict[Phase, float]:
        """By phase.  While every step has prepared something, all of their time counts as steps."""
        steps = list(zip(self.steps, self.preparing, strict=False))
        others = [seconds for seconds, prepares in steps if not prepares]
        usual = statistics.median(others) if others else math.inf
        extra = sum(max(0.0, seconds - usual) for seconds, prepares in steps if prepares)
        own: dict[Phase, float] = {"step": sum(self.steps) - extra, **self.others, "compile": extra}
        return {name: value + self.earlier[name] for name, value in own.items()}

    def shares(self) -> dict[Phase, float]:
        """By phase, as a share of the measured time."""
        seconds = self.seconds()
        whole = sum(seconds.values())
        return {name: value / whole if whole else 0.0 for name, value in seconds.items()}

    def __str__(self) -> str:
        shares = self.shares()
        rest = ", ".join(f"{name} {100 * shares[name]:.0f} %" for name in PHASES[1:])
        return f"goodput {100 * shares['step']:.0f} % of the time in training steps ({rest})"

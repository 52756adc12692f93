"""One table by several processes on one GPU: they compile beside each other, and one at a time measures.

Most of such a table's time is compiling.  Times are medians of many replays, which a first launch of another process
lengthens once; whatever takes the GPU longer than that waits for its turn.
"""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.gpu_session import Session
from benchmarks.harness import console

MOST = 14
"""Processes at most: each has a context on the GPU, and a cell's tensors while it compiles."""

GRACE = 30.0
"""Seconds for a cell that was begun in time."""

Processes = Annotated[int, typer.Option(help="How many compile beside each other; 0: as many as processors, but 14.")]
Share = Annotated[str, typer.Option(help="i/n: only every n-th cell; what --processes starts has it.")]
Turn = Annotated[str, typer.Option(help="A file that is locked while times are measured.")]


@contextlib.contextmanager
def alone(turn: str) -> Iterator[None]:
    """While no other process that was given the same file is here."""
    if not turn:
        yield
        return
    with open(turn, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_of_share(index: int, share: str) -> bool:
    if not share:
        return True
    number, processes = map(int, share.split("/"))
    return index % processes == number


def number_of(processes: int) -> int:
    return processes or max(1, min(MOST, len(os.sched_getaffinity(0)) - 2))


def in_processes(session: Session, processes: int, seconds: float, options: list[str]) -> None:
    """Run this module ``processes`` times, each for its share of the cells, and add their rows to the session."""
    spec = sys.modules["__main__"].__spec__
    module = [sys.executable, "-m", spec.name if spec else "benchmarks"]
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    end, known = time.monotonic() + seconds + GRACE, len(session.rows())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # whoever ends this process ends those that it started
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / f"{i}.json" for i in range(processes)]
        started = []
        for i, out in enumerate(outs):
            out.write_text(json.dumps(session.content))
            given = ["--out", str(out), "--share", f"{i}/{processes}", "--turn", f"{folder}/turn", *options]
            with out.with_suffix(".txt").open("w") as said:
                started.append(subprocess.Popen([*module, *given], env=environment, stdout=said, stderr=said))
        try:
            for child in started:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(max(1.0, end - time.monotonic()))
        finally:
            for child in started:
                child.kill()
                child.wait()
        say(outs, [child.returncode for child in started])
        for out in outs:
            found = json.loads(out.read_text())
            session.rows().extend(found[session.kind][known:])
            lost = session.content.setdefault("lost", [])
            lost.extend(one for one in found.get("lost", []) if one not in lost)
    session.save()


def say(outs: list[Path], codes: list[int]) -> None:
    """What was left out, each once, and all that a process said that failed."""
    left_out: dict[str, None] = {}
    for out, code in zip(outs, codes, strict=True):
        text = out.with_suffix(".txt").read_text()
        left_out |= dict.fromkeys(line for line in text.splitlines() if line.startswith("left out"))
        if code:
            console.print(f"a process ended with {code}\n{text}", highlight=False, markup=False, soft_wrap=True)
    for line in left_out:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

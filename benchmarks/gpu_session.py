"""What the benchmarks of attention and decoding on a GPU share: options, rows that are kept, and one table."""

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.harness import console
from kernel_index.core.atomic_write import write_whole
from kernel_index.core.dispatch import Ineligible
from kernel_index.core.target import has_package
from kernel_index.core.terminal import print_table
from kernel_index.index.entry import ROOT
from kernel_index.proofs.numerics import launch_errors
from kernel_index.proofs.record import machine
from kernel_index.proofs.tune import timing

Out = Annotated[Path, typer.Option(help="The file of figures; cells that it holds are not measured again.")]
Rows = Annotated[Path | None, typer.Option("--out", help="A file of figures to which the rows are added.")]
Only = Annotated[str, typer.Option(help="Only cells whose name contains one of these, separated by commas.")]
Seconds = Annotated[float, typer.Option(help="Start no new cell after so many seconds.")]
DryRun = Annotated[bool, typer.Option(help="Tiny sizes on the CPU through the interpreter; times mean nothing.")]
Warm = Annotated[str, typer.Option(help="i/n: run every n-th call once, which compiles it, and time nothing.")]

PEERS = (
    "flash-attn-4", "flashinfer-python", "flash-linear-attention", "liger-kernel", "mamba-ssm", "quack-kernels",
    "sonic-moe", "transformers",
)  # fmt: skip
NOTES = (
    "Device times are replays of CUDA graphs over sets of inputs that do not fit the L2 cache together.",
    "host_us: until an eager call returns.  share: compulsory bytes ÷ time ÷ the bandwidth of a copy.",
    "ratio: auto ÷ the fastest contender that is not ours.  regret: auto ÷ our fastest backend.",
)


def failures() -> tuple[type[BaseException], ...]:
    """What a contender may raise: its own verdict, and no reason to stop the others."""
    found = (*launch_errors(), AssertionError, LookupError)
    if has_package("cutlass"):
        from cutlass.base_dsl.common import DSLBaseError

        found += (DSLBaseError,)
    return found


def needs_gpu(what: str = "a CUDA device", dry_run: bool = False) -> None:
    """End the command with a line that says so where there is none."""
    if not dry_run and not torch.cuda.is_available():
        raise typer.BadParameter(f"needs {what}")


class LeftOut(Exception):
    """A contender that cannot take part, and why."""


class Session:
    """The rows of one benchmark; the file is written after every row."""

    def __init__(self, kind: str, out: Path, only: str, seconds: float, dry_run: bool, warm: str):
        needs_gpu("a CUDA device; --dry-run does without", dry_run)
        self.kind, self.out, self.only, self.dry, self.warm = kind, out, only.split(","), dry_run, warm
        self.end, self.left_out, self.calls = time.monotonic() + seconds, {}, 0
        self.content: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
        if dry_run:
            os.environ["TRITON_INTERPRET"] = "1"
            self.bandwidth = 1e9
        else:
            torch._dynamo.config.recompile_limit = 4096
            torch.cuda.set_stream(torch.cuda.Stream())
            known = self.content.get("copy_bytes_per_second")
            self.bandwidth = 1e9 if warm else known or timing.copy_bandwidth()
        found = {"machine": described(dry_run), "copy_bytes_per_second": self.bandwidth, "notes": list(NOTES)}
        self.content = found | self.content
        if self.content["machine"] != found["machine"]:
            raise typer.BadParameter(f"--out must be a new file or one of this machine, commit and day, got {out}")
        self.bandwidth = self.content["copy_bytes_per_second"]
        console.print(self.content["machine"], f"copy {self.bandwidth / 1e12:.2f} TB/s", highlight=False)

    def wants(self, cell: str, done: bool) -> bool:
        """Whether to measure a cell now: asked for, not done, and in time."""
        if done or not any(part in cell for part in self.only):
            return False
        if not self.warm and time.monotonic() > self.end:
            console.print(f"no time left for {cell}", highlight=False)
            return False
        return True

    def is_another(self) -> bool:
        """Whether another process of those that warm has the next call.  Where ``n`` is the number of contenders each
        process has one of them, and compiles it at the first cell for all that follow."""
        if not self.warm:
            return False
        self.calls += 1
        number, processes = map(int, self.warm.split("/"))
        return self.calls % processes != number

    def rows(self, kind: str = "") -> list[dict[str, Any]]:
        return self.content.setdefault(kind or self.kind, [])

    def add(self, row: dict[str, Any], kind: str = "") -> None:
        if not self.warm:
            self.rows(kind).append(row)
            self.save()

    def save(self) -> None:
        write_whole(self.out, json.dumps(self.content, indent=1, ensure_ascii=False) + "\n")

    def measured(
        self, cell: str, contenders: dict[str, Callable[[], Any]], measure: Callable[[Any], dict[str, Any]]
    ) -> dict[str, dict[str, Any]]:
        """``measure`` of each contender that could be prepared and run; a line says why another was left out."""
        found = {}
        lost = self.content.setdefault("lost", [])
        for name, prepare in contenders.items():
            if [cell, name] in lost or self.is_another():
                continue
            try:
                found[name] = measure(prepare())
            except (LeftOut, ImportError, NotImplementedError, Ineligible) as error:
                self.say(name, str(error))
            except failures() as error:
                self.say(f"{name} ({cell})", f"{type(error).__name__}: {error}")
                if timing.is_broken(error):
                    self._start_anew(cell, name)
                error.__traceback__ = None  # its frames hold tensors
            if not self.dry:
                torch.cuda.empty_cache()
        return found

    def say(self, name: str, why: str) -> None:
        """Say once for each name why it was left out."""
        why = " ".join(why.split())[:200]
        if self.left_out.setdefault(name, why) is why:
            console.print(f"left out: {name}: {why}", highlight=False, markup=False, soft_wrap=True)

    def _start_anew(self, cell: str, name: str) -> None:
        """This process can launch nothing more: another one goes on without the contender."""
        self.content["lost"].append([cell, name])
        self.save()
        spec = sys.modules["__main__"].__spec__  # None where a file was started, not a module
        started = [sys.argv[0]] if spec is None else ["-m", spec.name]
        os.execv(sys.executable, [sys.executable, *started, *sys.argv[1:]])

    def device(self, calls: list[timing.Call], budget: float = 0.25) -> tuple[float, str]:
        """Microseconds of a call, and how it was timed."""
        if self.dry or self.warm:
            calls[0]()
            return 1.0, "not timed"
        return timing.device_us(calls, budget)

    def host(self, call: timing.Call, device: float) -> float:
        return 1.0 if self.dry or self.warm else timing.host_us(call, device)


def described(dry_run: bool) -> dict[str, Any]:
    """Machine and versions, those of the peers that are installed too, and the commit."""
    found: dict[str, Any] = machine("cpu" if dry_run else "cuda")
    for name in PEERS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    git = ["git", "-C", str(ROOT.parent), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        commit = ""
    return found | ({"commit": commit} if commit else {})


def add_row(out: Path | None, kind: str, row: dict[str, Any]) -> None:
    """Add a row to a file of figures, for a benchmark that prints its own lines; without a file nothing is kept."""
    if out is None:
        return
    content: dict[str, Any] = {"machine": described(not torch.cuda.is_available())}
    content |= json.loads(out.read_text()) if out.exists() else {}
    content.setdefault(kind, []).append(row)
    write_whole(out, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def verdict(auto: float, ran: str, ours: dict[str, float], peers: dict[str, float]) -> dict[str, Any]:
    """Who auto took, its regret against our named backends, and its ratio to the fastest peer."""
    row: dict[str, Any] = {"ran": ran}
    if ours:
        best = min(ours, key=ours.__getitem__)
        row |= {"best": best, "regret": round(auto / ours[best], 3)}
    if peers:
        peer = min(peers, key=peers.__getitem__)
        row |= {"ratio": round(auto / peers[peer], 3), "peer": peer}
    return row


def show(rows: Iterable[dict[str, Any]], title: str, head: tuple[str, ...], line: Callable[..., list[str]]) -> None:
    """The rows as a table, then the worst regrets and ratios."""
    found = list(rows)
    print_table(console, head, [line(row) for row in found], title)
    for key in ("regret", "ratio"):
        worst = sorted((r for r in found if r.get(key, 0) > 1.03), key=lambda r: -r[key])
        other = "best" if key == "regret" else "peer"
        said = "; ".join(f"{r[key]:.2f} {line(r)[0]} ({r['ran']}; {r[other]})" for r in worst[:6])
        console.print(f"{key} over 1.03 in {len(worst)} of {len(found)}: {said or 'none'}", highlight=False)
    errors = [e for r in found for e in (r.get("error") or {}).items() if not e[1] < 2e-2]
    console.print(f"errors over 2e-2 or NaN: {errors[:6] or 'none'}", highlight=False, markup=False)


def joined(files: Iterable[Path]) -> Iterator[tuple[str, Any]]:
    """The contents of several calls' files as one: rows one after another, the rest from the first."""
    contents = [json.loads(path.read_text()) for path in files]
    if any(c["machine"] != contents[0]["machine"] for c in contents):
        raise typer.BadParameter("FILES must be of one machine, commit and day")
    for key in dict.fromkeys(k for c in contents for k in c):
        values = [c[key] for c in contents if key in c]
        is_rows = isinstance(values[0], list) and key != "notes"
        yield key, list(itertools.chain(*values)) if is_rows else values[0]


def join(files: list[Path], out: Annotated[Path, typer.Option(help="The file to write.")]) -> None:
    """Join the files of several calls into one record, as ``benchmarks/results`` keeps."""
    content = {key: value for key, value in joined(files) if key != "lost"}
    write_whole(out, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    typer.run(join)

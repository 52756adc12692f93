"""``python -m benchmarks [NAME…] [--save FILE]``: run the comparisons and print ratios."""

import importlib
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.harness import console, machine, save

HELPERS = ("__init__", "__main__", "harness", "memory", "gpu", "gpu_questions")
NAMES = tuple(sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in HELPERS))


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"Any of: {', '.join(NAMES)}. [default: all]")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed calls of each contender.")] = 9,
    out: Annotated[Path | None, typer.Option("--save", help="Write the figures as JSON.")] = None,
) -> None:
    """Compare the index's kernels with what a user would take instead, side by side in one process."""
    for name in names or ():
        if name not in NAMES:
            raise typer.BadParameter(f"must be one of {', '.join(NAMES)}, got {name!r}")
    console.print(", ".join(f"{k} {v}" for k, v in machine().items()), highlight=False)
    results = []
    for name in names or NAMES:
        module = importlib.import_module(f"benchmarks.{name}")
        console.print(f"\n[bold]{module.__doc__.strip().splitlines()[0]}[/]")
        results += module.main(rounds=rounds)
    if out is not None:
        save(results, out)
        console.print(f"Saved {out}")


if __name__ == "__main__":
    typer.run(main)

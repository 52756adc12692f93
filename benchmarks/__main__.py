"""``python -m benchmarks``: the same as ``kernel-index bench``."""

import typer

from benchmarks.command import bench_command

if __name__ == "__main__":
    typer.run(bench_command)

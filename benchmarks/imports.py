"""What does ``import kernel_index`` cost beyond ``import torch``?  Target: 0.3 s."""

import statistics
import subprocess
import sys

from benchmarks.harness import Comparison, Row, console

CODE = """
import time
start = time.perf_counter(); import torch; middle = time.perf_counter(); import kernel_index; end = time.perf_counter()
print(middle - start, end - middle)
"""
OPS = ()  # no kernel runs
TARGET = 0.3


def main(rounds: int = 9) -> list[Comparison]:
    times = []
    for _ in range(rounds):
        done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
        times.append([float(t) for t in done.stdout.split()])
    framework, ours = ([t[i] for t in times] for i in range(2))
    rows = [Row("import kernel_index, after torch", ours, ours[0]), Row("import torch", framework, framework[0])]
    for row in rows:
        console.print(f"{row.contender:>40}: {row.median:6.3f} s")
    verdict = "met" if statistics.median(ours) < TARGET else "missed"
    console.print(f"target: under {TARGET} s beyond import torch: {verdict}")
    return [Comparison("import time", rows, rows[0].contender)]

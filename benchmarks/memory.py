"""``python -m benchmarks.memory MODULE TITLE CONTENDER``: what ``harness.peak_memory`` runs in a process of its own."""

import importlib
import sys

from benchmarks.harness import measure_only

if __name__ == "__main__":
    module, title, contender = sys.argv[1:]
    measure_only(title, contender)
    importlib.import_module(module).main()

"""``python -m benchmarks``: what ``make bench`` runs."""

from benchmarks.command import app
from kernel_index.cli.main import use_cache_folder

if __name__ == "__main__":
    use_cache_folder()
    app(prog_name="python -m benchmarks")

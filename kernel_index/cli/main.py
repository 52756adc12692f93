"""The ``kernel-index`` command.  The commands themselves are in ``commands.py``, which needs the ``cli`` extra."""

import os
import sys
from pathlib import Path

EXTRA = ("typer", "rich", "safetensors", "numpy", "matplotlib", "jinja2")
"""The packages of the ``cli`` extra."""


def cache_folder() -> Path:
    """Where the command line keeps Inductor's compiled kernels: the user's cache folder, which survives a reboot."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kernel_index" / "inductor"


def use_cache_folder() -> None:
    """Keep compiled kernels in ``cache_folder()``, unless the user chose a folder: for a process of a command.

    A library must not move its host's cache, but the process of a command is our own.  Inductor reads the variable when
    it first compiles, so setting it after ``import torch`` is early enough.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder()))


def main() -> None:
    """Run the command line."""
    use_cache_folder()
    try:
        from kernel_index.cli.commands import app

        app()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA:
            raise
        sys.exit(f"kernel-index needs the {package} package: pip install kernel-index[cli]")

"""The ``kernel-index`` command.  The commands themselves are in ``commands.py``, which needs the ``cli`` extra."""

import os
import sys
from pathlib import Path

from kernel_index.cli import streams

EXTRA = ("typer", "rich", "tyro", "safetensors", "matplotlib", "jinja2")
"""The packages of the ``cli`` extra."""


def cache_folder() -> Path:
    """Where the command line keeps Inductor's compiled kernels: the user's cache folder, which survives a reboot."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kernel_index" / "inductor"


def _writable_folder() -> Path:
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} is not writable")
    return folder


def use_cache_folder() -> None:
    """Keep compiled kernels in ``cache_folder()``, unless the user chose a folder: for a process of a command.

    A library must not move its host's cache, but the process of a command is our own.  Inductor reads the variable when
    it first compiles, so setting it after ``import torch`` is early enough.  Without a folder that can be written, as
    in a container without a home, PyTorch's own folder for temporary files is used.
    """
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return
    try:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(_writable_folder())
    except (RuntimeError, OSError) as error:  # RuntimeError: no home
        sys.stderr.write(f"kernel-index: compiled kernels go to PyTorch's cache folder: {error}\n")


def _command() -> None:
    from kernel_index.cli.commands import app

    app()


def main() -> None:
    """Run the command line."""
    use_cache_folder()
    try:
        streams.run(_command)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA:
            raise
        sys.exit(f"kernel-index needs the {package} package: pip install 'kernel-index[cli]'")

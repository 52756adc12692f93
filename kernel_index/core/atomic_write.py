"""Writes a file completely or not at all: after a kill or on a full disk the old file is still there."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write to a draft in the same folder, made if missing, and rename it to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    try:
        draft.write_text(text)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)

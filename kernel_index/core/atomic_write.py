"""Files that are whole or not there: a kill or a full disk in the middle of writing leaves the old one."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write beside the place and move it there; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    try:
        draft.write_text(text)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)

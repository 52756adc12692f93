"""The standard streams of a command's process: what is printed is written, or one line says why it was not."""

import codecs
import contextlib
import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn

IN_ASCII = {"✓": "+", "✗": "x", "–": "-", "×": "x", "÷": "/", "…": "..."}
"""What stands for a character that the stream's encoding lacks; for any other it is ``?``."""

FAILED = 1


def _in_ascii(error: UnicodeError) -> tuple[str | bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    with contextlib.suppress(UnicodeEncodeError):  # a file's name that is not UTF-8: its bytes
        return codecs.lookup_error("surrogateescape")(error)
    return "".join(IN_ASCII.get(c, "?") for c in error.object[error.start : error.end]), error.end


def run(command: Callable[[], object]) -> NoReturn:
    """Run a command and end the process with its exit status; 1 where the standard output could not be written."""
    if sys.stdout is None:  # closed: the next file that is opened would get its number
        _fail("the standard output is closed")
    codecs.register_error("in_ascii", _in_ascii)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="in_ascii")  # any other is the user's choice
    status: str | int | None = None
    try:
        status = _status(command)
        sys.stdout.flush()
    except OSError as error:
        _drop_output()
        if not status and not isinstance(error, BrokenPipeError):  # else the command has said why, or it is `| head`
            _fail(str(error))
        status = status or FAILED
    sys.exit(status)


def _status(command: Callable[[], object]) -> str | int | None:
    try:
        command()
    except SystemExit as ended:
        return ended.code
    return None


def _drop_output() -> None:
    """What cannot be written: Python would try again at its end, and print a traceback."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(reason: str) -> NoReturn:
    with contextlib.suppress(OSError, AttributeError):  # AttributeError: the standard error is closed, too
        sys.stderr.write(f"error: {reason}\n")
    sys.exit(FAILED)

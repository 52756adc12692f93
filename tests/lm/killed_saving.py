"""Kill a process at every moment of a save: ``python -m tests.lm.killed_saving FOLDER FIRST SECOND``.

In ``FOLDER/n`` a child saves step FIRST and begins with step SECOND; before its n-th touch of the file system it is
killed, with half of a file written where it was about to write one.  Prints how often until a child came through.
"""

import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

import torch

from kernel_index.lm import checkpoint as ckpt

EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.fsync")


def tensors(number: int) -> ckpt.Checkpoint:
    """Which save a checkpoint is of can be read from its values, not only from its step."""
    model = {"weight": torch.full((3, 5), float(number)), "bias": torch.full((5,), -float(number))}
    return ckpt.Checkpoint(
        number % 100, model, {":rng": torch.full((4,), number, dtype=torch.uint8)}, {"number": number}
    )


def save_and_die(run: Path, first: int, second: int, at: int) -> NoReturn:
    ckpt.write(run, tensors(first))
    seen = [0]

    def touch(event: str, args: tuple) -> None:
        if event in EVENTS:
            seen[0] += 1
            if seen[0] == at:
                os.kill(os.getpid(), signal.SIGKILL)

    def sync(handle: int) -> None:
        """Half a file, then the event, then the rest: the moment in the middle of writing."""
        size = os.fstat(handle).st_size
        if os.path.isfile(f"/proc/self/fd/{handle}") and size:
            content = Path(f"/proc/self/fd/{handle}").read_bytes()
            os.truncate(handle, size // 2)
            touch("os.fsync", ())
            os.pwrite(handle, content, 0)
        touch("os.fsync", ())

    ckpt.os.fsync = sync
    sys.addaudithook(touch)
    ckpt.write(run, tensors(second))
    os._exit(0)


def main(folder: Path, first: int, second: int) -> int:
    for at in range(1, 500):
        child = os.fork()
        if child == 0:
            save_and_die(folder / str(at), first, second, at)
        status = os.waitpid(child, 0)[1]
        if status == 0:
            return at - 1
        assert os.WIFSIGNALED(status), status
    raise AssertionError("a save touches the file system less often than that")


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), *map(int, sys.argv[2:])))

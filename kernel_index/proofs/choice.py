"""What a proof's command line may name: operators, backends of them, and a device of this machine."""

from collections.abc import Callable, Iterable

import torch
import typer

from kernel_index.core.testing import Suite, suites


def of_list(option: str, name: str, known: Iterable[str], where: str = "") -> None:
    """Wrong use of the command line if ``name`` is not known."""
    known = tuple(dict.fromkeys(known))
    if name not in known:
        raise typer.BadParameter(f"{option} must be one of {', '.join(known)}{where}, got {name!r}")


def operators(given: Iterable[str] | None, proven: Callable[[Suite], bool] = lambda _: True) -> tuple[str, ...] | None:
    """The operators to prove; None, all that ``proven`` holds for."""
    names = [s.op for s in suites() if proven(s)]
    for name in given or ():
        of_list("--op", name, names)
    return tuple(given) if given else None


def backends(given: Iterable[str] | None, ops: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """The backends to prove: each must be one of every operator that is named."""
    named = [s for s in suites() if ops is not None and s.op in ops]
    for name in given or ():
        of_list("--backend", name, (b.name for s in suites() for b in s.backends))
        for suite in named:
            of_list("--backend", name, (b.name for b in suite.backends), f" for {suite.op}")
    return tuple(given) if given else None


def device(name: str) -> str:
    """A device of this machine whose tensors have values."""
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # PyTorch asserts that CUDA was compiled in
        reason = str(error).partition("\n")[0]
        raise typer.BadParameter(f"--device must be a device of this machine, got {name!r}: {reason}") from error
    return name

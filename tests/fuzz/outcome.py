"""What a fuzzed call may do: give what it should, or say no.  Everything else is a failure."""

import contextlib
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import kernel_index as ki
from kernel_index.proofs.errors import clone_inputs

SECONDS = 180
"""A call of a few thousand elements that takes longer hangs; the first one may compile, on a busy machine."""

REFUSALS = dict.fromkeys(("gather_rows", "gather_rows_pair"), (ValueError, TypeError, IndexError))
"""A row that is not there is an IndexError, as it is for ``index_select``; everybody else has two kinds."""

COUNTS: Counter[tuple[str, str]] = Counter()


class Refused:
    """The call said no, in words."""

    def __init__(self, error: Exception):
        self.error = error


def outcome_of(name: str, call: Callable[[], Any]) -> Any:
    """The result of a call, or ``Refused``; any other exception passes through and fails the test."""
    with _in_time():
        try:
            result = call()
        except REFUSALS.get(name, (ValueError, TypeError)) as error:  # Ineligible is a ValueError
            result = Refused(error)
    kind = "ran"
    if isinstance(result, Refused):
        kind = "Ineligible" if isinstance(result.error, ki.Ineligible) else type(result.error).__name__
        assert str(result.error), "a refusal says why"
    COUNTS[name, kind] += 1
    return result


@contextlib.contextmanager
def _in_time() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"no answer within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not (value.is_meta or value.is_quantized)


@contextlib.contextmanager
def nothing_written(kwargs: dict[str, Any], but: tuple[str, ...] = ()) -> Iterator[None]:
    """The caller's tensors are the same afterwards, in value and in shape."""
    watched = {k: v for k, v in kwargs.items() if k not in but and _is_plain(v)}
    before = clone_inputs(watched)
    yield
    for name, old in before.items():
        new = kwargs[name]
        assert new is watched[name]
        assert new.shape == old.shape
        assert torch.equal(new.isnan(), old.isnan()) if new.is_floating_point() else True
        assert torch.equal(new.nan_to_num(), old.nan_to_num()) if new.is_floating_point() else torch.equal(new, old)

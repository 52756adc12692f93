"""A lock for threads that does not outlive a fork."""

import contextlib
import os
import threading
import weakref
from collections.abc import Iterator


class ThreadLock:
    """Lets one thread in at a time, that one again and again.

    A forked child, such as a worker of a ``DataLoader``, finds it open: the thread that held it at that moment is not
    there and would never let go.

    >>> from kernel_index.core.locks import ThreadLock
    >>> lock = ThreadLock()
    >>> with lock.held(), lock.held():
    ...     pass
    """

    def __init__(self):
        self._lock = threading.RLock()
        _LOCKS.add(self)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        with self._lock:  # this very object is released, also where a child has got another one meanwhile
            yield


_LOCKS: "weakref.WeakSet[ThreadLock]" = weakref.WeakSet()


def _open_all() -> None:
    for lock in _LOCKS:
        lock._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_open_all)

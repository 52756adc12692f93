"""``ThreadLock``: a lock between threads that is free again in a forked child."""

import contextlib
import os
import threading
import weakref
from collections.abc import Iterator


class ThreadLock:
    """A reentrant lock.

    It is free in a forked child, such as a worker of a ``DataLoader``: the thread that held it during the fork does not
    exist in the child, and would never release it.

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
        with self._lock:  # releases this object even if a fork has replaced self._lock
            yield


_LOCKS: "weakref.WeakSet[ThreadLock]" = weakref.WeakSet()


def _replace_all() -> None:
    for lock in _LOCKS:
        lock._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_replace_all)

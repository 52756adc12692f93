"""``MaskKernelCache``: compiled kernels, found by the static part of their mask."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from kernel_index.core import checks
from kernel_index.core.locks import ThreadLock
from kernel_index.masks.exact_mask_contract_cache.key import ExactMaskKey


class MaskKernelCache:
    """The ``maxsize`` most recently used kernels, by ``ExactMaskKey``; counts ``hits``, ``misses`` and ``evictions``.

    A cached kernel was built for the same causality, window, kinds of metadata, sizes and versions.  It takes the
    batch's tensors as arguments, so a new batch costs no compilation and a write to a tensor changes the next result.
    Threads may share a cache; each key is built once.

    Args:
        maxsize: kernels kept, at least 1; the least recently used one is evicted.

    >>> import torch, kernel_index as ki
    >>> cache = ki.MaskKernelCache(maxsize=8)
    >>> for ids in ([[0, 0, 1]], [[5, 6, 6]]):
    ...     mask = ki.MaskContract(doc_ids=torch.tensor(ids))
    ...     _ = cache.get(ki.exact_mask_key(mask, backend="flex"), lambda key: f"compiled for window {key.window}")
    >>> cache.hits, cache.misses, cache.evictions
    (1, 1, 0)
    """

    def __init__(self, maxsize: int = 64):
        checks.is_int("maxsize", maxsize, minimum=1)
        self.maxsize = maxsize
        self.hits = self.misses = self.evictions = 0
        self._kernels: OrderedDict[ExactMaskKey, Any] = OrderedDict()
        self._lock = ThreadLock()  # reentrant: a build may ask for another kernel

    def get(self, key: ExactMaskKey, build: Callable[[ExactMaskKey], Any]) -> Any:
        """The kernel of a key, from ``build(key)`` the first time.  Nothing is kept if ``build`` raises.

        ``build`` gets the key alone, so that a kernel cannot keep a tensor of one batch for the next.
        """
        if not isinstance(key, ExactMaskKey):
            raise TypeError(f"key must be made by exact_mask_key, got {type(key).__name__}")
        with self._lock.held():
            if key in self._kernels:
                self.hits += 1
                self._kernels.move_to_end(key)
                return self._kernels[key]
            self.misses += 1
            kernel = self._kernels[key] = build(key)
            while len(self._kernels) > self.maxsize:
                self._kernels.popitem(last=False)
                self.evictions += 1
            return kernel

    def clear(self) -> None:
        """Remove all kernels and reset the counters."""
        with self._lock.held():
            self._kernels.clear()
            self.hits = self.misses = self.evictions = 0

    def __len__(self) -> int:
        return len(self._kernels)

    def __contains__(self, key: object) -> bool:
        return key in self._kernels

    def __repr__(self) -> str:
        counts = f"hits={self.hits}, misses={self.misses}, evictions={self.evictions}"
        return f"MaskKernelCache(maxsize={self.maxsize}, kernels={len(self)}, {counts})"

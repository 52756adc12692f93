"""Compiled JAX functions, cached by the static part of their mask in an ``exact_mask_contract_cache``."""

import dataclasses
from collections.abc import Callable
from typing import Any

from kernel_index.jax.mask import MaskContract
from kernel_index.masks.exact_mask_contract_cache.api import exact_mask_key
from kernel_index.masks.exact_mask_contract_cache.cache import MaskKernelCache
from kernel_index.masks.exact_mask_contract_cache.key import ExactMaskKey

FIELDS = tuple(field.name for field in dataclasses.fields(MaskContract))


def key_of(mask: MaskContract, dtype: Any, backend: str, block_sizes: tuple[int, int] | None) -> ExactMaskKey:
    """The static part of a call's mask: no array, and nothing that may differ between two batches."""
    fields = {name: getattr(mask, name) for name in FIELDS}
    return exact_mask_key(fields, dtype=dtype, backend=backend, block_sizes=block_sizes)


def mask_of(key: ExactMaskKey, arrays: MaskContract) -> MaskContract:
    """The mask of a key with the arrays of a batch."""
    return dataclasses.replace(arrays, causal=key.causal, window=key.window)


class MaskKernels:
    """The compiled functions of one op.

    A function is built from its key alone.  It takes the documents, counts and offset of a batch as arguments, so a new
    batch compiles nothing.  ``cache`` holds ``hits``, ``misses`` and ``evictions``.
    """

    def __init__(self, op: str, build: Callable[[ExactMaskKey], Any], maxsize: int = 64):
        self.op, self.build, self.cache = op, build, MaskKernelCache(maxsize)

    def has(self, *what: Any) -> bool:
        return key_of(*what) in self.cache

    def get(self, *what: Any) -> Any:
        return self.cache.get(key_of(*what), self.build)

    def compilations(self) -> int:
        """How many programs XLA has compiled for the cached functions: one for each shape of their arguments."""
        return sum(function._cache_size() for function in self.cache._kernels.values())

    def __repr__(self) -> str:
        return f"MaskKernels({self.op}, {self.cache!r})"

"""``ExactMaskKey``: the key of a compiled mask kernel, from which a mask can be rebuilt."""

import functools
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_index.masks.attention_validity_prefix.validity import AttentionValidity
from kernel_index.masks.doc_window_mask.contract import Window
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.masks.exact_mask_contract_cache import contract

LAYOUT = 4
"""Increased when a field of the key changes its meaning."""

PACKAGES = {"triton": "triton", "fa4": "flash-attn-4", "pallas": "jax"}
"""The package that compiles a backend's kernels, where it is not torch."""


class ExactMaskKey(NamedTuple):
    """The static part of a mask: made by ``exact_mask_key``, compared and hashed as a tuple.

    ``window`` holds the window bounds, None for unlimited.  ``local_window`` is the number of previous tokens that a
    sparse kernel attends to besides the selected ones.  ``has_…`` say that each batch has documents, counts, an offset
    and so on; ``slot_tokens`` is the size of a slot where slots are counted.  No field holds a tensor or depends on its
    content, identity or size.

    >>> import torch, kernel_index as ki
    >>> key = ki.exact_mask_key(ki.MaskContract(doc_ids=torch.tensor([[0, 0, 1]])))
    >>> key.rebuild(doc_ids=torch.tensor([[3, 4, 4]])).intervals().start.tolist()
    [[0, 1, 1]]
    """

    causal: bool
    window: Window
    local_window: int | None
    has_doc_ids: bool
    has_valid_counts: bool
    slot_tokens: int | None
    has_q_offset: bool
    has_key_validity: bool
    has_prefix: bool
    has_subtree_end: bool
    has_positions: bool
    has_cu_seqlens: bool
    has_two_cu_seqlens: bool
    block_sizes: tuple[int, int] | None
    dtype: str | None
    backend: str
    versions: tuple[tuple[str, Any], ...]

    def rebuild(
        self,
        *,
        doc_ids: Tensor | None = None,
        validity: AttentionValidity | None = None,
        q_offset: int | Tensor | None = None,
        key_validity: AttentionValidity | None = None,
        prefix: int | Tensor | None = None,
        subtree_end: Tensor | None = None,
        positions: Tensor | None = None,
        cu_seqlens: tuple[Tensor, Tensor | None] | None = None,
    ) -> MaskContract:
        """The mask of this key with a batch's tensors.

        Raises ``ValueError`` if one of them is missing although the key says that it exists, or given although the key
        says that it does not: a kernel that ignores documents must not serve a batch that has them.
        """
        plain = {
            "doc_ids": doc_ids, "q_offset": q_offset, "prefix": prefix, "subtree_end": subtree_end,
            "positions": positions, "cu_seqlens": cu_seqlens,
        }  # fmt: skip
        for name, value in plain.items():
            contract.check_same(name, getattr(self, contract.PRESENCE[name]), value)
        if contract.are_two(cu_seqlens) != self.has_two_cu_seqlens:
            wanted, got = ("two lists", "one") if self.has_two_cu_seqlens else ("one list", "two")
            raise ValueError(f"cu_seqlens must have {wanted}, as the key says, got {got}")
        has_counts = validity is not None and contract.mode_of(validity) != "none"
        contract.check_same("validity", self.has_valid_counts, validity if has_counts else None)
        has_keys = key_validity is not None and contract.mode_of(key_validity) != "none"
        contract.check_same("key_validity", self.has_key_validity, key_validity if has_keys else None)
        slots = contract.slot_tokens({"validity": validity}, has_counts)
        if slots != self.slot_tokens:
            raise ValueError(f"validity must have slots of {self.slot_tokens} tokens, as the key says, got {slots}")
        return MaskContract(self.causal, self.window, validity=validity, key_validity=key_validity, **plain)


@functools.cache
def versions_for(backend: str) -> tuple[tuple[str, Any], ...]:
    """Versions of the packages that a compiled kernel depends on."""
    found: list[tuple[str, Any]] = [("exact_mask_key", LAYOUT), ("torch", str(torch.__version__))]
    package = PACKAGES.get(backend)
    if package is not None:
        try:
            found.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            found.append((package, None))
    return tuple(found)

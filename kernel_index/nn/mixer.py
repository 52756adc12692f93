"""The base class of the mixers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import kernel_index as ki
from kernel_index.core import checks
from kernel_index.core.numerics import needs_ordinary_numerics


class Mixer(nn.Module):
    """Maps (normed [B, T, C], mask, rope tables, and a cache if there is one) to a ``Branch``.

    ``window`` is the number of previous tokens that a query sees besides itself, None for all; ``rope_dim`` the number
    of rotated channels, None for a mixer without positions; ``out`` the last projection of the branch.
    """

    window: int | None = None
    rope_dim: int | None = None
    out: nn.Linear

    def contract(self, mask: "ki.MaskContract") -> "ki.MaskContract":
        """The batch's mask narrowed to this layer's window.  Layers with equal windows should share the result."""
        return mask if self.window is None else mask.with_window(self.window, 0)


def rows_by_length(lengths: Sequence[int]) -> dict[int, list[int]]:
    """The rows of each length: they can be one call where rows do not depend on each other."""
    found: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        found.setdefault(length, []).append(row)
    return found


def prefixes(layer: Any, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Keys and values [rows, n, K, D] of rows that have one length."""
    k, v = zip(*(layer.prefix(row) for row in rows), strict=True)
    return torch.cat(k), torch.cat(v)


def cache_dtype(layer: Any, weight: Tensor) -> torch.dtype:
    """The dtype of a layer's cache: autocast may be on now and not where the cache was made, or the reverse.

    In invariant numerics it must be that of the products here, to which training rounds keys and values.
    """
    dtype, here = layer["k_cache"].dtype, checks.product_dtype(weight)
    if dtype != here:
        needs_ordinary_numerics(
            "decoding",
            f"the cache must have the dtype of the keys here, {here}, got {dtype}: make it under this autocast",
        )
    return dtype


def in_order(found: list[Tensor], groups: dict[int, list[int]]) -> Tensor:
    """The results for the groups as rows of one tensor."""
    if len(found) == 1:
        return found[0]
    places = [row for rows in groups.values() for row in rows]
    order = sorted(range(len(places)), key=places.__getitem__)
    return torch.cat(found)[order]

"""Tile sizes of the Triton kernels, and what they take of a tree."""

from typing import NamedTuple

import torch
from torch import Tensor

from kernel_index.core.target import Target, target_of
from kernel_index.core.triton.launch import (
    INTERPRETED_CONFIG,
    THREE_PROGRAMS,
    AttentionLaunch,
    Config,
    attention_launch,
    interpreting,
    next_power_of_2,
    row_stride,
)
from kernel_index.masks.doc_window_mask.intervals import Sizes
from kernel_index.masks.doc_window_mask.mask import MaskContract
from kernel_index.masks.prefix_tree.tiles import listed


def pick_config(kernel: str, width: int, element_bytes: int, target: Target) -> Config:
    """The geometry for ``forward``, ``queries`` or ``keys``, from the larger head size alone.

    The fastest that spill no register on sm_90 and sm_100 without a softcap; timed on an H200, T = 16384, causal.  Only
    dQ in float32 spills at 128 columns on sm_90, and a few bytes where the careful walk stands beside the first one
    (docs/decisions/0015).
    """
    if interpreting():
        return INTERPRETED_CONFIG
    if element_bytes == 4:  # no tensor cores in full float32: small tiles keep the accumulators in registers
        return Config(64, 32, 4, 1) if width <= 64 else Config(32, 16, 4, 1)
    if width > 128:
        return Config(64, 32, 4, 2) if kernel == "forward" else Config(32, 32, 4, 1)
    hopper, roomy = target.arch == 90, target.arch in (90, 100)  # roomy: 227 KiB of shared memory
    stages = 3 if roomy or target.arch == 80 else 2
    if kernel == "forward" or (kernel == "queries" and width <= 64):
        return Config(64, 64, 4, stages, THREE_PROGRAMS if roomy and width <= 64 else None)
    if kernel == "queries":
        return Config(128, 64, 8, 3 if hopper else 2) if roomy else Config(64, 32, 4, 1)
    if width <= 64:
        return Config(64, 64, 4, 2) if hopper else Config(64, 32, 4, 2)
    return Config(128, 32, 8, 1) if roomy else Config(32, 32, 4, 1)


class Paths(NamedTuple):
    """What a tree adds to the bounds: the other side of the pair, and the tiles of each tile as a list.

    ``bounds``: ``q_end`` [rows, S] for ``forward`` and ``queries``, or ``k_start`` and ``k_end`` [rows, T] for
    ``keys``; int32.  ``tiles``: int32 [rows, n, 2 + 2m]: how many of the m tiles are full and how many are masked, the
    full ones, the masked ones.
    """

    bounds: tuple[Tensor, ...]
    tiles: Tensor

    def strides(self) -> tuple[int, int, int]:
        """From one row to the next of ``bounds`` and of ``tiles``, and m."""
        rows, n, width = self.tiles.shape
        return row_stride(self.bounds[0]), 0 if rows == 1 else n * width, (width - 2) // 2


def paths_of(tiles: Tensor | None, *bounds: Tensor | None) -> Paths | None:
    return None if tiles is None else Paths(tuple(x for x in bounds if x is not None), tiles)


def tile_lists(kernel: str, q: Tensor, k: Tensor, v: Tensor, mask: MaskContract, sizes: Sizes) -> Tensor:
    """``Paths.tiles`` for ``forward``, ``queries`` or ``keys``; the contract keeps them."""
    blocks = _tile_sizes(kernel, q, k, v)

    def build() -> tuple[Tensor]:
        partial, full = listed(mask.row_bounds(sizes), sizes.keys, blocks, by_key=kernel == "keys")
        counts = [of_kind.counts[..., None] for of_kind in (full, partial)]
        return (torch.cat([*counts, full.indices, partial.indices], 2),)

    return mask.remember(f"tile_lists_{kernel}", (blocks, sizes), build)[0]


def _tile_sizes(kernel: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int]:
    """The queries and the keys of a tile."""
    config = _config_of(kernel, q, v, k.shape[1] if kernel == "keys" else q.shape[1])
    return (config.step, config.tile) if kernel == "keys" else (config.tile, config.step)


def _config_of(kernel: str, q: Tensor, v: Tensor, rows: int) -> Config:
    config = pick_config(kernel, max(q.shape[3], v.shape[3]), q.element_size(), target_of(q.device))
    return config._replace(tile=min(config.tile, max(16, next_power_of_2(rows))))  # few rows: no wider than they are


def launch_of(
    kernel: str, q: Tensor, v: Tensor, rows: int, scale: float | None, softcap: float, **constants: bool
) -> AttentionLaunch:
    config = _config_of(kernel, q, v, rows)
    tile, step = ("BN", "BM") if kernel == "keys" else ("BM", "BN")
    return attention_launch(config, q, v, scale, softcap, **{tile: config.tile, step: config.step}, **constants)


def arguments_of(paths: Paths | None, bounds: int) -> tuple[tuple[Tensor | None, ...], tuple[int, int, int]]:
    """The pointers and the strides that a kernel takes of ``paths``."""
    if paths is None:
        return (None,) * (bounds + 1), (0, 0, 0)
    return (*paths.bounds, paths.tiles), paths.strides()

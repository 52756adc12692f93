"""Tiles of the Triton kernels, and when queries go together; needs no Triton."""

from torch import Tensor

from kernel_index.core.target import Target, target_of
from kernel_index.core.triton.launch import (
    INTERPRETED_CONFIG,
    AttentionLaunch,
    Config,
    attention_launch,
    interpreting,
    next_power_of_2,
)

TOGETHER = 8
"""Queries go together while the union of a tile has at most this many times the tokens of one of them.

A single query fills half of the rows of a product or less, so that it takes as long as about so many of a full tile.
"""


def pick_config(kernel: str, width: int, element_bytes: int, target: Target) -> Config:
    """``kernel``: ``"single"`` for one query, ``"forward"``, ``"queries"`` or ``"keys"`` for a tile.

    ``tile``: rows of a program, for ``"keys"`` tokens; ``step``: tokens of a step, for ``"keys"`` rows.  Depends on the
    larger head size alone.
    """
    if interpreting():
        return INTERPRETED_CONFIG
    if element_bytes == 4:
        if kernel == "single":
            return Config(0, 32, 4, 1) if width <= 64 else Config(0, 16, 8, 1)
        return Config(64, 32, 4, 1) if width <= 64 else Config(32, 16, 4, 1)
    if kernel == "single":
        return Config(0, 64 if width <= 64 else 32, 4, 2) if width <= 128 else Config(0, 16, 4, 1)
    if width > 128:
        return Config(64, 32, 4, 1) if kernel == "forward" else Config(32, 32, 4, 1)
    roomy = target.arch in (90, 100)  # 227 KiB of shared memory
    if kernel == "forward":
        return Config(64, 64, 4, 3 if roomy else 2)
    if kernel == "queries":
        return Config(128, 64, 8, 2) if roomy and width > 64 else Config(64, 32 if width > 64 else 64, 4, 2)
    if width <= 64:
        return Config(64, 64, 4, 2)
    return Config(64, 32, 4, 2) if roomy else Config(32, 32, 4, 1)


def launch_of(kernel: str, q: Tensor, v: Tensor, scale: float, softcap: float, shared: bool) -> AttentionLaunch:
    config = pick_config(kernel, max(q.shape[3], v.shape[3]), q.element_size(), target_of(q.device))
    return attention_launch(config, q, v, scale, softcap, SHARED=shared)


def padded_group(q: Tensor, k: Tensor) -> int:
    """The heads of a KV head as rows of a tile: a power of 2."""
    return next_power_of_2(q.shape[2] // max(1, k.shape[2]))

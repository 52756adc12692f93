"""Sizes, tiles and warps of the launches of ``ssd_scan``; needs no Triton."""

from typing import Literal, NamedTuple

from torch import Tensor

from kernel_index.core.numerics import is_invariant
from kernel_index.core.target import Target, target_of
from kernel_index.core.triton.launch import (
    SMALLEST_DOT,
    Config,
    ceil_div,
    dot_block,
    interpreting,
    next_power_of_2,
    processors,
)


class Sizes(NamedTuple):
    """Sizes of a call; ``chunk`` is Q."""

    B: int
    T: int
    H: int
    P: int
    G: int
    N: int
    chunk: int

    @property
    def chunks(self) -> int:
        return ceil_div(self.T, self.chunk)

    @property
    def heads_of_group(self) -> int:
        return self.H // self.G

    @classmethod
    def of(cls, x: Tensor, b: Tensor) -> "Sizes":
        """Short rows take a chunk no longer than they are, but under invariant numerics."""
        longest = longest_chunk(target_of(x.device), x.element_size())
        B, T, H, P = x.shape
        G, N = b.shape[2:]
        shortest = longest if is_invariant() else SMALLEST_DOT
        return cls(B, T, H, P, G, N, min(longest, max(shortest, next_power_of_2(T))))


def longest_chunk(target: Target, element_bytes: int) -> int:
    """Tokens of a chunk: 64 where a product's operands stay in shared memory, 32 where they are in registers, too.

    A product in float32, without tensor cores, holds most.  The interpreter takes short ones: tests have several.
    """
    if interpreting() or element_bytes == 4:
        return SMALLEST_DOT
    return 64 if isinstance(target.arch, int) and 90 <= target.arch < 120 else 32


def walk_config(sizes: Sizes, like: Tensor) -> Config:
    """``tile`` rows and ``step`` columns of the state that a program keeps: the most that still occupy the device.

    Under invariant numerics the number of rows has no part in it, nor in the heads of a program: other tiles may be
    multiplied by other instructions, and heads of one program are summed before those of another.
    """
    rows, columns = min(dot_block(sizes.P), 64), min(dot_block(sizes.N), 128)
    while not is_invariant() and sizes.B * sizes.H * ceil_div(sizes.P, rows) * ceil_div(sizes.N, columns) < processors(
        like
    ):
        if columns > 32 and columns >= rows:
            columns //= 2
        elif rows > 32:
            rows //= 2
        else:
            break
    return Config(rows, columns, 4 if rows * columns <= 4096 else 8, 3 if like.element_size() == 2 else 2)


Kernel = Literal["forward", "states", "chunk"]
"""``scan_kernel``, ``through_states_kernel`` or ``within_chunk_kernel``."""

MOST_HEADS: dict[Kernel, int] = {"forward": 8, "states": 16, "chunk": 16}
"""That a program takes one after another: they share b and c, and what is summed over them goes to memory once."""


def chunks_config(sizes: Sizes, like: Tensor, kernel: Kernel) -> Config:
    """``tile``: heads of a program, fewer where that occupies the device; ``step``: the chunk.

    Backward, accumulators want eight warps, except those of b and c of small states; AMD has as many registers in four.
    Timed on an H200.
    """
    group = sizes.heads_of_group
    heads = min(MOST_HEADS[kernel], group)
    while (
        not is_invariant()
        and heads > 1
        and sizes.B * sizes.chunks * sizes.G * ceil_div(group, heads) < 2 * processors(like)
    ):
        heads = ceil_div(heads, 2)
    narrow, hip = like.element_size() == 2, target_of(like.device).kind == "hip"
    state = dot_block(sizes.P) * dot_block(sizes.N)
    many = not narrow or state > 64 * 128 or kernel == "chunk" or (kernel == "states" and state > 64 * 64)
    pipelined = narrow and state <= 64 * 128 and kernel != "states" and not hip
    return Config(heads, sizes.chunk, 8 if many and not hip else 4, 2 if pipelined else 1)

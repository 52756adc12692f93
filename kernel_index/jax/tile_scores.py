"""The arithmetic that the Pallas kernels of attention share: scores of a tile, transposed, and which of them count.

Scores are held transposed, keys × queries.  Then everything that belongs to a query (its interval, the blocks selected
for it, row_max, row_sum, log-sum-exp) is one row that broadcasts over the keys at no cost, maxima and sums run over
sublanes instead of lanes, and the query heads of a KV head are adjacent columns: a tile has ``C = G · tile`` columns.

    z = scale · k·qᵀ, softcap·tanh(z / softcap) where there is a softcap,     p = exp(z − lse)
    o = pᵀ·v,  dv = p·do,  ds = p · (v·doᵀ − δ) · dz,  dk = scale · ds·q,  dq = scale · dsᵀ·k,  δ = Σ do·o − dlse

A query attends to key s of block j if its interval holds s and, where blocks are selected, j is selected for it.  In a
prefix tree the query must also stand before the end of the queries that see s.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax

from kernel_index.jax.tile_layout import LANES

NN = (((1,), (0,)), ((), ()))  # which dimensions of the two operands are summed over
NT = (((1,), (1,)), ((), ()))
TN = (((0,), (0,)), ((), ()))
MASKED = -1e30
"""The score of a masked key.  Finite, because the difference of two such scores has to be 0; −∞ would give NaN."""
LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Setup:
    """What a kernel is compiled for, beside its shapes."""

    block: int
    scale: float
    softcap: float
    interpret: bool | None  # None: as the platform that the program is lowered for says

    @property
    def base2(self) -> float:
        """The factor from a score of ``scores`` to an exponent of 2."""
        return LOG2E if self.softcap else self.scale * LOG2E


def dot(a: Any, b: Any, dims: Any) -> Any:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def scores(k: Any, q: Any, setup: Setup) -> Any:
    """Scores [keys, C] of k [keys, D] and q [C, D]; without a softcap ``Setup.base2`` applies the scale, at no cost."""
    s = dot(k, q, NT)  # [keys, C]
    return setup.softcap * jnp.tanh(s * (setup.scale / setup.softcap)) if setup.softcap else s


def key_column(row: Any, size: int) -> Any:
    """The first numbers of a row [1, L] as a column [size, 1]; ``TileMasks.q_end`` is kept in rows, which are short."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:size, :1]


def allowed(
    bounds: Any, word_of: Callable[[Any], Any] | None, blocks: list[Any], size: int, q_end: Any | None = None
) -> Any:
    """Which keys each query attends to, bool [len(blocks) · size, C], for ``bounds`` [2 or 3, C] of ``TileMasks``.

    ``word_of(block)`` is the word [1, C] of ``TileMasks.members`` that holds the block; None where all blocks count.
    ``q_end`` [size, 1]: in a tree, the end of the queries that see each key of the one block.
    """
    key = lax.broadcasted_iota(jnp.int32, (size, bounds.shape[1]), 0)  # [size, C]
    masks = []
    for block in blocks:
        low, high = bounds[0:1], bounds[1:2]  # [1, C]
        if word_of is not None:
            is_member = (word_of(block) >> (block & 31)) & 1
            high = jnp.where(is_member > 0, high, 0)
        position = key + block * size
        masks.append((position >= low) & (position < high))
    if q_end is not None:
        return masks[0] & (bounds[2:3] < q_end)
    return masks[0] if len(masks) == 1 else jnp.concatenate(masks, 0)

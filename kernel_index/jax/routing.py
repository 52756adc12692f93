"""Legal blocks of a query, mean keys of blocks, the best blocks, and the union of a tile: inside jit.

The semantics are those of ``kernel_index.routing.legal_blocks``, ``hierarchical_block_expansion`` and
``union_selection_query_mask``, to the bit on indices; shapes are static and nothing has a gradient.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernel_index.jax import checks
from kernel_index.jax.block_walk import marked_first
from kernel_index.jax.mask import MaskContract
from kernel_index.jax.mask_bounds import segments
from kernel_index.routing.union_selection_query_mask.contract import MODES

UnionMode = Literal["auto", "bitmap", "sort"]
LOWEST, HIGHEST = jnp.iinfo(jnp.int32).min, jnp.iinfo(jnp.int32).max


class LegalBlocks(NamedTuple):
    """The blocks ``first ≤ j < current`` are routable, ``current`` is always selected; int32 [rows, T].

    ``current`` is −1 where a query attends to nothing, and the number of blocks for a query after the last one.
    """

    first: jax.Array
    current: jax.Array


def num_blocks(keys: int, block_size: int) -> int:
    return -(-keys // block_size)


def check_routable(mask: MaskContract) -> None:
    """Raise ``ValueError`` for a mask under which past blocks and the current one are not those of a query."""
    if not mask.causal:
        raise ValueError("mask must be causal: a router takes past blocks and the current one, got causal=False")
    if mask.is_tree:
        name = "positions" if mask.subtree_end is None else "subtree_end"
        raise ValueError(f"{name} must be None: a router selects blocks of one interval of keys, got a prefix tree")
    if mask.prefix is not None:
        raise ValueError("prefix must be None: a router takes past blocks and the current one, got a prefix")
    if mask.key_validity is not None:
        raise ValueError(
            "key_validity must be None where blocks are selected: validity counts queries and keys, got one"
        )
    if isinstance(mask.q_offset, jax.Array) and mask.q_offset.ndim > 0:
        raise ValueError(
            f"q_offset must be one number for all rows where blocks are selected, got shape {mask.q_offset.shape}"
        )


def legal_blocks(mask: MaskContract, batch: int, queries: int, keys: int, block_size: int) -> LegalBlocks:
    """The routable blocks of every query: wholly before its current block, with a key that it may attend to."""
    check_routable(mask)
    start, end = mask.intervals(batch, queries, keys)
    offset = keys - queries if mask.q_offset is None else mask.q_offset
    position = jnp.arange(queries, dtype=jnp.int32) + offset
    attends = start < end
    current = jnp.minimum(position // block_size, num_blocks(keys, block_size))
    return LegalBlocks(jnp.where(attends, start // block_size, 0), jnp.where(attends, current, -1))


def block_means(k: jax.Array, block_size: int, mask: MaskContract) -> jax.Array:
    """The mean key of each block, float32 [B, blocks, K, D]; where documents meet in it, of the last of them alone."""
    wide = lax.stop_gradient(k).astype(jnp.float32)
    batch, keys, heads, width = wide.shape
    blocks = num_blocks(keys, block_size)
    position = jnp.arange(keys, dtype=jnp.int32)
    kept = jnp.ones((1, keys), bool)
    if mask.doc_ids is not None:
        last = jnp.minimum((position // block_size + 1) * block_size - 1, keys - 1)
        begin, _ = segments(jnp.atleast_2d(mask.doc_ids))
        kept = position >= begin[:, last]
    wide = jnp.where(kept[..., None, None], wide, 0.0)
    padding = blocks * block_size - keys
    sums = jnp.pad(wide, ((0, 0), (0, padding), (0, 0), (0, 0))).reshape(batch, blocks, block_size, heads, width).sum(2)
    counted = jnp.pad(kept, ((0, 0), (0, padding))).reshape(-1, blocks, block_size).sum(2)
    return sums / counted[..., None, None]


def group_queries(q: jax.Array, groups: int) -> jax.Array:
    """The mean query of each group of heads, float32 [B, T, G, D]: its score is the mean of the group's scores."""
    wide = lax.stop_gradient(q).astype(jnp.float32)
    return wide.reshape(*q.shape[:2], groups, -1, q.shape[3]).mean(3)


def score_order(scores: Any) -> Any:
    """int32 of the same order as the float32 scores; −0.0 and 0.0 are a tie."""
    bits = lax.bitcast_convert_type(scores.astype(jnp.float32) + 0.0, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def top_blocks(scores: jax.Array, legal: LegalBlocks, topk: int) -> jax.Array:
    """The current block and the best routable ones, ``topk`` in all, int32 [B, T, G, topk]: ascending, then −1.

    ``scores`` float32 [B, T, G, blocks]; among equal ones the smallest index wins.
    """
    block = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    first, current = (x[:, :, None, None] for x in legal)
    keys = jnp.where((block >= first) & (block < current), score_order(scores), LOWEST)
    return best_indices(jnp.where(block == current, HIGHEST, keys), topk)


def best_indices(keys: jax.Array, topk: int) -> jax.Array:
    """The indices of the ``topk`` highest keys that are above ``LOWEST``, ascending, then −1."""
    kept = min(topk, keys.shape[-1])
    best, indices = lax.top_k(keys, kept)
    indices = jnp.sort(jnp.where(best > LOWEST, indices.astype(jnp.int32), HIGHEST), -1)
    indices = jnp.pad(indices, [(0, 0)] * (indices.ndim - 1) + [(0, topk - kept)], constant_values=HIGHEST)
    return jnp.where(indices < HIGHEST, indices, -1)


def expanded_blocks(scores: jax.Array, legal: LegalBlocks, topk: int, ratio: int, topc: int) -> jax.Array:
    """``top_blocks`` among the children of the ``topc`` best groups of ``ratio`` blocks.

    The score of a group is the mean of its legal blocks' scores.
    """
    blocks = scores.shape[-1]
    groups = num_blocks(blocks, ratio)
    if groups <= topc:
        return top_blocks(scores, legal, topk)
    padded = jnp.pad(scores, [(0, 0)] * 3 + [(0, groups * ratio - blocks)])
    block = jnp.arange(groups * ratio, dtype=jnp.int32)
    first, current = (x[:, :, None, None] for x in legal)
    routable = ((block >= first) & (block < current)).reshape(*first.shape[:3], groups, ratio)
    children = jnp.where(routable, padded.reshape(*scores.shape[:3], groups, ratio), 0.0)
    count = routable.sum(-1)
    mean = children.sum(-1) / jnp.maximum(count, 1)
    best, best_groups = lax.top_k(jnp.where(count > 0, score_order(mean), LOWEST), topc)
    chosen = jnp.any((best_groups[..., None] == jnp.arange(groups)) & (best > LOWEST)[..., None], -2)
    chosen = jnp.repeat(chosen, ratio, axis=-1)[..., :blocks]
    block = block[:blocks]
    keys = jnp.where((block >= first) & (block < current) & chosen, score_order(scores), LOWEST)
    return best_indices(jnp.where(block == current, HIGHEST, keys), topk)


class UnionMaps(NamedTuple):
    """The maps of ``kernel_index.union_selection``, as JAX arrays."""

    union_block_indices: jax.Array
    union_sizes: jax.Array
    query_union_indices: jax.Array
    query_union_valid: jax.Array


def tile_marks(selected: jax.Array, tile: int, blocks: int) -> jax.Array:
    """Which blocks are selected for each tile of queries, bool [B, tiles, K, blocks]; ``selected`` has −1 for none.

    Compared and reduced instead of scattered: a TPU scatters one element at a time.
    """
    batch, queries, groups, count = selected.shape
    tiles = -(-queries // tile)
    padded = jnp.pad(selected, ((0, 0), (0, tiles * tile - queries), (0, 0), (0, 0)), constant_values=-1)
    padded = padded.reshape(batch, tiles, tile, groups, count).swapaxes(2, 3).reshape(batch, tiles, groups, -1)
    return jnp.any(padded[..., None] == jnp.arange(blocks, dtype=jnp.int32), -2)


def union_selection(
    selected: jax.Array,
    *,
    query_tile_size: int,
    num_blocks: int,
    selected_valid: jax.Array | None = None,
    mode: UnionMode = "auto",
) -> UnionMaps:
    """``kernel_index.union_selection`` for JAX arrays: the same maps, static shapes, inside jit.

    Args:
        selected: integers [B, T, K, n], block indices in any order, duplicates allowed; negative for none.
        query_tile_size: queries of a tile.
        num_blocks: blocks there are.
        selected_valid: bool [B, T, K, n], False for none.
        mode: ``"auto"``, ``"bitmap"`` or ``"sort"``; here all are computed by bitmap; the maps are the same.

    Returns:
        ``UnionMaps`` with ``U = min(query_tile_size · n, num_blocks)`` indices for each union.

    Raises:
        TypeError, ValueError: as torch's.

    Source: as torch's.

    >>> import jax.numpy as jnp, kernel_index.jax as kij
    >>> maps = kij.union_selection(jnp.array([[4, 1], [1, -1]]).reshape(1, 2, 1, 2), query_tile_size=2, num_blocks=5)
    >>> maps.union_block_indices.tolist(), maps.query_union_indices[0, :, 0].tolist()
    ([[[[1, 4, -1, -1]]]], [[1, 0], [0, -1]])
    """
    _check_selection(selected, query_tile_size, num_blocks, selected_valid, mode)
    valid = selected >= 0 if selected_valid is None else (selected >= 0) & selected_valid
    chosen = jnp.where(valid, selected, -1).astype(jnp.int32)
    marks = tile_marks(chosen, query_tile_size, num_blocks)
    order, sizes = marked_first(marks)
    width = min(query_tile_size * selected.shape[-1], num_blocks)
    union = jnp.where(jnp.arange(width) < sizes[..., None], order[..., :width], -1)
    rank = jnp.cumsum(marks, -1, dtype=jnp.int32) - 1
    rank_of_query = jnp.repeat(rank, query_tile_size, axis=1)[:, : selected.shape[1]]  # [B, T, K, blocks]
    slot = jnp.take_along_axis(rank_of_query, jnp.maximum(chosen, 0), -1) if num_blocks else chosen
    return UnionMaps(union, sizes, jnp.where(valid, slot, -1), valid)


def _check_selection(selected: Any, tile: Any, blocks: Any, valid: Any, mode: Any) -> None:
    checks.is_integer_array("selected", selected)
    checks.has_rank("selected", selected, 4, "[B, T, K, n]")
    checks.host.is_int("query_tile_size", tile, minimum=1)
    checks.host.is_int("num_blocks", blocks, minimum=0)
    if valid is not None:
        checks.is_array("selected_valid", valid)
        checks.has_dtype("selected_valid", valid, jnp.bool_, "like every validity mask")
        checks.has_shape("selected_valid", valid, tuple(selected.shape), "of selected's shape")
    checks.host.one_of("mode", mode, MODES)
    if not checks.is_traced(selected) and all(d.platform == "cpu" for d in selected.devices()):
        beyond = selected >= blocks
        if valid is not None and not checks.is_traced(valid):
            beyond = beyond & valid
        if bool(beyond.any()) and not checks.is_traced(valid):
            worst = int(jnp.max(jnp.where(beyond, selected, -1)))
            raise ValueError(f"selected must be of block indices below {blocks}, or negative for none, got {worst}")

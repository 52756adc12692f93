"""Attention of tiles of queries over blocks of keys on a TPU: forward, dQ, and dK with dV.

Scores are held transposed, keys × queries.  Then everything that belongs to a query (its interval, what it picked,
maximum, sum, log-sum-exp) is one row that spreads over the keys for nothing, maxima and sums run over sublanes instead
of lanes, and the query heads of a key head simply stand beside each other: a tile has ``C = G · tile`` columns.

    z = scale · k·qᵀ, softcap·tanh(z / softcap) where there is a softcap,     p = exp(z − lse)
    o = pᵀ·v,  dv = p·do,  ds = p · (v·doᵀ − δ) · dz,  dk = scale · ds·q,  dq = scale · dsᵀ·k,  δ = Σ do·o − dlse

A query attends to key s of block j if its interval holds s and, where blocks are picked, j is among its picks.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernel_index.jax.walk import Steps, Walk, smem_specs

NN = (((1,), (0,)), ((), ()))  # which dimensions of the two operands are summed over
NT = (((1,), (1,)), ((), ()))
TN = (((0,), (0,)), ((), ()))
NOTHING = -1e30  # stands for −inf where the difference of two is taken; finite, so that it is 0
LOG2E = math.log2(math.e)
VMEM_LIMIT = 48 << 20


@dataclass(frozen=True)
class Setup:
    """What a kernel is compiled for, beside its shapes."""

    block: int
    scale: float
    softcap: float
    interpret: bool

    @property
    def base2(self) -> float:
        """From a score as ``_scores`` leaves it to an exponent of 2."""
        return LOG2E if self.softcap else self.scale * LOG2E


class Tiles(NamedTuple):
    """Who may attend to what.  ``bounds`` int32 [B', tiles, 2, C]: first key and end; B' is 1 where rows are alike.

    ``members`` int32 [B, K, tiles, words, 1, C]: bit ``j % 32`` of word ``j // 32`` is set where a query picked block
    j; None where every block may be visited.
    """

    bounds: jax.Array
    members: jax.Array | None


def dot(a: Any, b: Any, dims: Any) -> Any:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def scores(k: Any, q: Any, setup: Setup) -> Any:
    """Scores [keys, C]; without a softcap the scale is left to the exponent, where it costs nothing."""
    s = dot(k, q, NT)
    return setup.softcap * jnp.tanh(s * (setup.scale / setup.softcap)) if setup.softcap else s


def allowed(bounds: Any, word: Any, blocks: list[Any], size: int) -> Any:
    """Bool [len(blocks) · size, C]; ``word(block)`` is the word [1, C] of members that holds the block, or None."""
    key = lax.broadcasted_iota(jnp.int32, (size, bounds.shape[1]), 0)
    parts = []
    for block in blocks:
        low, high = bounds[0:1], bounds[1:2]
        if word is not None:
            is_member = (word(block) >> (block & 31)) & 1
            high = jnp.where(is_member > 0, high, 0)
        position = key + block * size
        parts.append((position >= low) & (position < high))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, 0)


def visit(steps: Steps, size: int, attend: Any) -> Any:
    """``compute`` for ``Steps.run``: all blocks of a step at once, those of an incomplete last step one by one.

    ``attend(slot, at, blocks)`` computes the given blocks, which lie at ``at`` in the buffer.
    """

    def compute(step: Any, slot: Any) -> None:
        begin = step * steps.width
        if steps.width == 1:
            attend(slot, 0, [steps.entry(begin)])
            return

        @pl.when(begin + steps.width <= steps.count)
        def _() -> None:
            attend(slot, 0, [steps.entry(begin + i) for i in range(steps.width)])

        @pl.when(begin + steps.width > steps.count)
        def _() -> None:
            def one(i: Any, _: Any) -> Any:
                attend(slot, pl.multiple_of(i * size, size), [steps.entry(begin + i)])
                return 0

            lax.fori_loop(0, steps.count - begin, one, 0)

    return compute


def key_copies(k_hbm: Any, v_hbm: Any, k_buffer: Any, v_buffer: Any, sems: Any, size: int) -> Any:
    b, h = pl.program_id(0), pl.program_id(1)

    def copies(_: Any, block: Any, slot: Any, place: int) -> tuple:
        source = pl.ds(pl.multiple_of(block * size, size), size)
        target = pl.ds(place * size, size)
        return (
            pltpu.make_async_copy(k_hbm.at[b, h, source], k_buffer.at[slot, target], sems.at[0, slot, place]),
            pltpu.make_async_copy(v_hbm.at[b, h, source], v_buffer.at[slot, target], sems.at[1, slot, place]),
        )

    return copies


class Refs(NamedTuple):
    """What every kernel takes, in the order in which it takes it."""

    spans: Any
    lists: Any
    q: Any
    bounds: Any
    members: Any
    k: Any
    v: Any
    rest: tuple

    def word(self, columns: slice = slice(None)) -> Any:
        """For ``allowed``, where the members of this tile are in VMEM."""
        return None if self.members is None else lambda block: self.members[0, 0, 0, block >> 5, :, columns]


def _sorted_refs(refs: tuple, has_lists: bool, has_members: bool) -> Refs:
    rest = list(refs)
    spans, lists = rest.pop(0), rest.pop(0) if has_lists else None
    q, bounds = rest.pop(0), rest.pop(0)
    members = rest.pop(0) if has_members else None
    return Refs(spans, lists, q, bounds, members, rest.pop(0), rest.pop(0), tuple(rest))


def call(
    kernel: Any,
    name: str,
    setup: Setup,
    walk: Walk,
    tiles: Tiles,
    operands: tuple[jax.Array, ...],
    specs: tuple[pl.BlockSpec, ...],
    outputs: tuple[tuple[jax.ShapeDtypeStruct, pl.BlockSpec], ...],
    scratch: list[Any],
) -> tuple[jax.Array, ...]:
    has_lists, has_members = walk.lists is not None, tiles.members is not None

    def body(*refs: Any) -> None:
        kernel(_sorted_refs(refs, has_lists, has_members), setup, walk.width)

    batch, heads = operands[0].shape[:2]
    if not setup.interpret:  # or XLA brings small arrays to VMEM, and copies from there are loops of the vector unit
        operands = tuple(
            pltpu.with_memory_space_constraint(x, pltpu.HBM) if s is IN_HBM else x
            for x, s in zip(operands, specs, strict=True)
        )
    return pl.pallas_call(
        body,
        grid=(batch, heads, walk.rows),
        in_specs=[*smem_specs(walk), *specs],
        out_specs=[spec for _, spec in outputs],
        out_shape=[shape for shape, _ in outputs],
        scratch_shapes=[*scratch, pltpu.SMEM((1,), jnp.int32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
            disable_bounds_checks=True,
        ),
        name=name,
        interpret=setup.interpret,
    )(*(x for x in walk if x is not None), *operands)


def over_batches(function: Callable[..., Any]) -> Callable[..., Any]:
    """``vmap`` as more rows of the batch: Mosaic cannot batch a kernel that copies from HBM by itself.

    ``function(setup, walk, tiles, q, …)``; arrays of one row that serve all batches are not repeated.
    """

    @functools.wraps(function)
    def folded(setup: Setup, *arrays: Any) -> Any:
        run = jax.custom_batching.custom_vmap(functools.partial(function, setup))

        @run.def_vmap
        def _(size: int, in_batched: Any, *arrays: Any) -> tuple[Any, Any]:
            rows = arrays[2].shape[1 if in_batched[2] else 0]

            def fold(x: jax.Array, is_mapped: bool) -> jax.Array:
                if not is_mapped and x.shape[0] == 1:
                    return x
                x = x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
                return jnp.broadcast_to(x, (size, rows, *x.shape[2:])).reshape(size * rows, *x.shape[2:])

            out = folded(setup, *jax.tree.map(fold, list(arrays), in_batched))
            out = jax.tree.map(lambda x: x.reshape(size, rows, *x.shape[1:]), out)
            return out, jax.tree.map(lambda _: True, out)

        return run(*arrays)

    return folded


def per_row(*shape: int) -> pl.BlockSpec:
    """The part of an array [B, K, rows, *shape] that belongs to a row."""
    return pl.BlockSpec((1, 1, 1, *shape), lambda b, h, r: (b, h, r, *(0 for _ in shape)))


def bounds_spec(bounds: jax.Array) -> pl.BlockSpec:
    alike = bounds.shape[0] == 1
    return pl.BlockSpec((1, 1, *bounds.shape[2:]), lambda b, h, r: (0 if alike else b, r, 0, 0))


def result(shape: tuple[int, ...], dtype: Any, like: jax.Array) -> jax.ShapeDtypeStruct:
    """An output that varies over the mesh axes over which ``like`` does, for shard_map."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).mat)


IN_HBM = pl.BlockSpec(memory_space=pltpu.HBM)

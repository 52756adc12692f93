"""How the Pallas kernels of attention are launched: their operands and specs, named refs, and ``vmap``."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernel_index.jax.block_walk import Walk, smem_specs
from kernel_index.jax.tile_scores import Setup

VMEM_LIMIT = 48 << 20
IN_HBM = pl.BlockSpec(memory_space=pltpu.HBM)


class TileMasks(NamedTuple):
    """Which keys each query may attend to.

    ``bounds`` int32 [B', tiles, 2, C]: first key and end; B' is 1 where rows are alike.  In a tree [B', tiles, 3, C],
    and the third number is the index of the query.
    ``members`` int32 [B, K, tiles, words, 1, C]: bit ``j % 32`` of word ``j // 32`` is set where block j is selected
    for a query; None where every block may be visited.
    ``q_end`` int32 [B', blocks, 1, L]: in a tree, the end of the queries that see each key; else None.
    """

    bounds: jax.Array
    members: jax.Array | None = None
    q_end: jax.Array | None = None

    @property
    def given(self) -> tuple[jax.Array, ...]:
        """Those that there are, in the order of ``Refs``."""
        return tuple(x for x in self if x is not None)

    def specs(self, of_tile: bool) -> list[pl.BlockSpec]:
        """The specs of ``given`` for a kernel whose rows are tiles of queries, or blocks of keys.

        What belongs to a row comes to VMEM with it; the kernel copies the rest from HBM.
        """
        found = [bounds_spec(self.bounds) if of_tile else IN_HBM]
        if self.members is not None:
            found.append(per_row(*self.members.shape[3:]) if of_tile else IN_HBM)
        if self.q_end is not None:
            found.append(IN_HBM if of_tile else bounds_spec(self.q_end))
        return found

    def key_buffers(self) -> list[Any]:
        """The scratch of ``kv_copies`` for what belongs to the keys of a block."""
        return [] if self.q_end is None else [pltpu.VMEM((2, *self.q_end.shape[2:]), jnp.int32)]


class Refs(NamedTuple):
    """The refs that every kernel takes, in this order; ``own`` are the further inputs, outputs and scratch of one."""

    spans: Any
    lists: Any
    q: Any
    bounds: Any
    members: Any
    q_end: Any
    k: Any
    v: Any
    own: tuple

    def word_of(self, columns: slice = slice(None)) -> Callable[[Any], Any] | None:
        """For ``allowed``, where the members of this tile are in VMEM."""
        return None if self.members is None else lambda block: self.members[0, 0, 0, block >> 5, :, columns]


def _named_refs(refs: tuple, has_lists: bool, masks: TileMasks) -> Refs:
    left = iter(refs)
    spans, lists = next(left), next(left) if has_lists else None
    q, bounds = next(left), next(left)
    members, q_end = (None if x is None else next(left) for x in masks[1:])
    return Refs(spans, lists, q, bounds, members, q_end, next(left), next(left), tuple(left))


def launch(
    kernel: Callable[[Refs, Setup, int], None],
    name: str,
    setup: Setup,
    walk: Walk,
    masks: TileMasks,
    operands: tuple[jax.Array, ...],
    specs: tuple[pl.BlockSpec, ...],
    outputs: tuple[tuple[jax.ShapeDtypeStruct, pl.BlockSpec], ...],
    scratch: list[Any],
) -> tuple[jax.Array, ...]:
    """Run ``kernel(refs, setup, walk.width)`` over batch, KV heads and the walk's rows."""
    has_lists = walk.lists is not None

    def body(*refs: Any) -> None:
        kernel(_named_refs(refs, has_lists, masks), setup, walk.width)

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

    ``function(setup, walk, masks, q, …)``; arrays of one row that serve all batches are not repeated.
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
    """One row of an array [B, K, rows, *shape]."""
    return pl.BlockSpec((1, 1, 1, *shape), lambda b, h, r: (b, h, r, *(0 for _ in shape)))


def bounds_spec(bounds: jax.Array) -> pl.BlockSpec:
    alike = bounds.shape[0] == 1
    return pl.BlockSpec((1, 1, *bounds.shape[2:]), lambda b, h, r: (0 if alike else b, r, 0, 0))


def result(shape: tuple[int, ...], dtype: Any, like: jax.Array) -> jax.ShapeDtypeStruct:
    """An output that varies over the mesh axes over which ``like`` does, for shard_map."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).mat)

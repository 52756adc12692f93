"""Compile one case for one TPU generation that need not be here: ``python -m kernel_index.proofs.tpu_child …``.

Runs in a process of its own, because libtpu reads its flags once.  Prints one line of JSON and, where ``--hlo`` says
so, leaves the compiled program.
"""

import argparse
import functools
import json
import os
from pathlib import Path
from typing import Any

BATCH, HEADS, KV_HEADS, WIDTH = 1, 8, 2, 128
BLOCK, TILE, TOPK = 128, 256, 16
SPLASH_BLOCK = 512


def _environment() -> None:
    """What keeps libtpu from asking a machine that is no TPU what it is."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-4"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),  # other compilations may run beside this one
    ):
        os.environ.setdefault(name, value)


def build(case: str, tokens: int, array: Any, backward: bool) -> tuple[Any, tuple]:
    """The function of a case and its abstract arguments; ``array(shape, dtype)`` makes one."""
    import jax
    import jax.numpy as jnp

    import kernel_index.jax as kij

    q = array((BATCH, tokens, HEADS, WIDTH), jnp.bfloat16)
    kv = array((BATCH, tokens, KV_HEADS, WIDTH), jnp.bfloat16)
    if case == "splash":
        attend, operands = _splash(tokens), (q, kv, kv)
    elif case == "attention":

        def attend(q: Any, k: Any, v: Any, ids: Any) -> Any:
            return kij.attention(q, k, v, kij.MaskContract(doc_ids=ids), backend="pallas")

        operands = (q, kv, kv, array((BATCH, tokens), jnp.int32))
    else:
        hierarchy = (8, 16) if case == "clustered-hierarchical" else None
        config = kij.ClusteredSparseConfig(BLOCK, TOPK, TILE, hierarchy)

        def attend(q: Any, k: Any, v: Any, ids: Any) -> Any:
            mask = kij.MaskContract(doc_ids=ids)
            return kij.clustered_sparse_attention(q, k, v, config=config, mask=mask, backend="pallas")

        operands = (q, kv, kv, array((BATCH, tokens), jnp.int32))
    if not backward:
        return attend, operands
    loss = lambda *a: jnp.sum(attend(*a).astype(jnp.float32))  # noqa: E731
    return jax.value_and_grad(loss, (0, 1, 2)), operands


def _splash(tokens: int) -> Any:
    """JAX's own kernel for the same heads, causal, with the block sizes that the same tiles ask for."""
    import jax
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    block = min(SPLASH_BLOCK, tokens)
    mask = splash.MultiHeadMask([splash.CausalMask((tokens, tokens)) for _ in range(HEADS // KV_HEADS)])
    names = "block_q block_kv block_kv_compute block_q_dkv block_kv_dkv block_kv_dkv_compute block_q_dq block_kv_dq"
    sizes = splash.BlockSizes(**dict.fromkeys(names.split(), block))
    kernel = splash.make_splash_mqa_single_device(mask, block_sizes=sizes)

    def attend(q: Any, k: Any, v: Any) -> Any:
        grouped = q.reshape(BATCH, tokens, KV_HEADS, HEADS // KV_HEADS, WIDTH).transpose(0, 2, 3, 1, 4)
        out = jax.vmap(jax.vmap(kernel))(grouped * WIDTH**-0.5, k.swapaxes(1, 2), v.swapaxes(1, 2))
        return out.transpose(0, 3, 1, 2, 4).reshape(q.shape)

    return attend


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("case")
    parser.add_argument("topology")
    parser.add_argument("tokens", type=int)
    parser.add_argument("--forward", action="store_true")
    parser.add_argument("--hlo", type=Path)
    args = parser.parse_args()
    _environment()
    import jax
    from jax.experimental import topologies

    from kernel_index.jax.target import pretend

    topology = topologies.get_topology_desc(platform="tpu", topology_name=args.topology)
    place = jax.sharding.SingleDeviceSharding(topology.devices[0])
    array = functools.partial(jax.ShapeDtypeStruct, sharding=place)
    function, operands = build(args.case, args.tokens, array, not args.forward)
    with pretend("tpu"):
        compiled = jax.jit(function).lower(*operands).compile()
    memory = compiled.memory_analysis()
    if args.hlo:
        args.hlo.write_text(compiled.as_text())
    names = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
    print(json.dumps({name: getattr(memory, name) for name in names}))


if __name__ == "__main__":
    main()

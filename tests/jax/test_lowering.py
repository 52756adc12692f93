"""The place of tracing is not the place of running: what is lowered for a TPU holds the kernels, on whatever host."""

import importlib.util
import os

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

import kernel_index as ki  # noqa: E402
import kernel_index.jax as kij  # noqa: E402

CONFIG = kij.ClusteredSparseConfig(block_size=128, topk=1, query_tile_size=128)


def attention(q, k, v):
    return kij.attention(q, k, v, backend="pallas")


def clustered(q, k, v):
    return kij.clustered_sparse_attention(q, k, v, config=CONFIG, backend="pallas")


def loss(function):
    return lambda *x: (function(*x).astype(jnp.float32) ** 2).sum()


def operands(array):
    return array((1, 256, 2, 128), jnp.bfloat16), *(array((1, 256, 1, 128), jnp.bfloat16) for _ in range(2))


@pytest.mark.parametrize(("function", "kernels"), [(attention, 1), (clustered, 2)])
def test_lowered_for_a_tpu_on_this_host_it_holds_the_kernels(function, kernels):
    traced = jax.jit(function).trace(*operands(jax.ShapeDtypeStruct))
    assert traced.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") == kernels
    assert "tpu_custom_call" not in traced.lower(lowering_platforms=("cpu",)).as_text()
    backward = jax.jit(jax.grad(loss(function), (0, 1, 2))).trace(*operands(jax.ShapeDtypeStruct))
    assert backward.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") == kernels + 2


@pytest.mark.parametrize("function", [attention, clustered])
def test_the_same_function_runs_on_this_host(function):
    drawn = np.random.default_rng(0)
    arrays = operands(lambda shape, dtype: jnp.asarray(drawn.standard_normal(shape), dtype))
    inside = jax.jit(function)(*arrays)
    assert np.array_equal(inside, function(*arrays))


def test_the_receipt_says_that_the_mode_is_decided_at_lowering():
    with ki.receipts() as log:
        jax.jit(lambda *x: attention(*x)).trace(*operands(jax.ShapeDtypeStruct))
    assert [(r.ran, r.details["mode"]) for r in log] == [("pallas", "compiled for a TPU, interpreted elsewhere")]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the libtpu package (the tpu extra)")
def test_a_topology_that_is_not_here_compiles_it(monkeypatch):
    from jax.experimental import topologies

    for name, value in {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
                        "TPU_ACCELERATOR_TYPE": "v5litepod-4", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}.items():  # fmt: skip
        monkeypatch.setenv(name, os.environ.get(name, value))
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    place = jax.sharding.SingleDeviceSharding(topology.devices[0])
    arrays = operands(lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=place))
    lowered = jax.jit(attention).lower(*arrays)
    assert "tpu_custom_call" in lowered.as_text()
    assert "attention_forward" in lowered.compile().as_text()

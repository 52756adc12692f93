"""Interval attention: the Pallas kernels, interpreted, against torch in float64; transformations; receipts; cache."""

import subprocess
import sys

import numpy as np
import pytest
import torch

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

import kernel_index as ki  # noqa: E402
import kernel_index.jax as kij  # noqa: E402
from kernel_index.core.force import reload_environment  # noqa: E402
from kernel_index.jax.attention_compiled import KERNELS  # noqa: E402
from kernel_index.jax.mask import as_contract  # noqa: E402
from tests.jax.arrays import DTYPES, docs, draw, to_jax, with_gradients, within_budget  # noqa: E402

# δ is taken from the rounded output and dp from v, and p · (dp − δ) cancels: two dot products of D = 8 terms, each
# rounded by 1 + log2(D) units.
UNITS = 2.0 * (1 + 3)
SMALL = {"backend": "pallas", "block_sizes": (16, 16)}


def packed(tokens: int) -> ki.MaskContract:
    """Documents with padding, a window, a row that ends early, and with it blocks that must not be fetched."""
    validity = ki.attention_validity(valid_token_counts=[tokens, 30])
    return ki.MaskContract(window=(20, 0), doc_ids=torch.from_numpy(docs(tokens)), validity=validity)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pallas_is_right_forward_and_backward(dtype):
    mask = packed(45)
    q, k, v, upstream = draw(0, dtype, (2, 45, 4, 8), (2, 45, 2, 8), (2, 45, 2, 8), (2, 45, 4, 8))
    attend = lambda q, k, v: ki.attention(q, k, v, mask, softcap=3.0, backend="reference")  # noqa: E731
    truth = with_gradients(attend, [q, k, v], upstream, torch.float64)
    plain = with_gradients(attend, [q, k, v], upstream)
    k[1, 32:], v[1, 32:] = torch.nan, torch.nan  # behind the prefix: a block that is fetched would show
    jax_mask = as_contract(mask)

    @jax.jit
    def all_of_them(q, k, v, g):
        out, pull = jax.vjp(lambda *x: kij.attention(*x, jax_mask, softcap=3.0, **SMALL), q, k, v)
        return out, *pull(g)

    within_budget(all_of_them(*map(to_jax, (q, k, v, upstream))), plain, truth, DTYPES[dtype], UNITS)


def test_sink_scale_and_unequal_lengths():
    q, k, v = draw(1, "float32", (1, 7, 4, 8), (1, 20, 2, 8), (1, 20, 2, 6))
    (sink,) = draw(2, "float32", (4,))
    options = {"scale": 0.7, "softcap": 0.0}
    out, lse = ki.attention_with_lse(q.double(), k.double(), v.double(), **options, sink=sink.double())
    plain = ki.attention(q, k, v, **options, sink=sink, backend="reference")
    for how in (SMALL, {"backend": "xla"}):
        found = kij.attention_with_lse(*map(to_jax, (q, k, v)), **options, sink=to_jax(sink), **how)
        within_budget([found.out], [plain], [out], torch.float32, UNITS)
        assert np.allclose(found.lse, lse, rtol=1e-6, atol=1e-6)


def test_long_rows_are_taken_in_chunks(monkeypatch):
    from kernel_index.jax import reference

    q, k, v = map(to_jax, draw(3, "float32", (2, 13, 2, 4), (2, 13, 1, 4), (2, 13, 1, 4)))
    whole = kij.attention(q, k, v)
    monkeypatch.setattr(reference, "SCORES_AT_ONCE", 2 * 2 * 13 * 5)
    KERNELS.cache.clear()
    assert np.allclose(kij.attention(q, k, v), whole, rtol=1e-6, atol=1e-6)
    KERNELS.cache.clear()


def test_vmap_is_a_larger_batch():
    q, k, v = map(to_jax, draw(4, "float32", (2, 2, 20, 2, 8), (2, 2, 20, 1, 8), (2, 2, 20, 1, 8)))
    ids = jnp.asarray(docs(20))
    mapped = jax.vmap(lambda q, k, v: kij.attention(q, k, v, kij.MaskContract(doc_ids=ids), **SMALL))(q, k, v)
    flat = [x.reshape(4, *x.shape[2:]) for x in (q, k, v)]
    whole = kij.attention(*flat, kij.MaskContract(doc_ids=jnp.tile(ids, (2, 1))), **SMALL)
    assert np.array_equal(mapped.reshape(whole.shape), whole)


@pytest.mark.thorough
def test_vmap_over_trees_is_a_larger_batch():
    q, k, v = map(to_jax, draw(4, "float32", (2, 2, 20, 2, 8), (2, 2, 20, 1, 8), (2, 2, 20, 1, 8)))
    trees = ki.pack_tree([-1, 0, 0], [9, 5, 6]), ki.pack_tree([-1, 0, 1, 0], [3, 7, 4, 6])
    ends = jnp.asarray(np.stack([tree.subtree_end for tree in trees]))

    def attend(q, k, v, ends):
        return (kij.attention(q, k, v, kij.MaskContract(subtree_end=ends), **SMALL) ** 2).sum()

    gradients = jax.grad(attend, (0, 1, 2))
    mapped = jax.vmap(gradients)(q, k, v, ends)
    flat = [x.reshape(4, *x.shape[2:]) for x in (q, k, v)]
    for a, b in zip(mapped, gradients(*flat, jnp.repeat(ends, 2, 0)), strict=True):
        assert np.array_equal(a.reshape(b.shape), b)


SHARDED = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, PartitionSpec as P
import kernel_index.jax as kij
q, k = (jax.random.normal(jax.random.key(i), (4, 24, h, 8)) for i, h in ((0, 8), (1, 4)))
ids = jnp.repeat(jnp.arange(3), 8)[None].repeat(4, 0)
config = kij.ClusteredSparseConfig(block_size=8, topk=2, query_tile_size=8)
calls = {
    "attention": lambda q, k, ids, backend: kij.attention(q, k, k, kij.MaskContract(doc_ids=ids), backend=backend),
    "clustered": lambda q, k, ids, backend: kij.clustered_sparse_attention(
        q, k, k, config=config, mask=kij.MaskContract(doc_ids=ids), backend=backend),
}
mesh = Mesh(np.array(jax.devices()), ("x",))
for name, call in calls.items():
    whole = call(q, k, ids, "xla")
    over_heads, over_batch = (P(None, None, "x"), P(), "pallas"), (P("x"), P("x"), "xla")
    for spec, ids_spec, backend in ((over_heads,) if name == "clustered" else (over_heads, over_batch)):
        run = jax.shard_map(lambda q, k, i: call(q, k, i, backend), mesh=mesh, in_specs=(spec, spec, ids_spec),
                            out_specs=spec, check_vma=backend == "xla")  # the interpreter loops over unvarying indices
        print(name, spec, float(jnp.abs(run(q, k, ids) - whole).max()) < 1e-5)
"""


@pytest.mark.thorough
def test_shard_map_over_heads_and_batch():
    done = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert all(line.endswith("True") for line in lines), lines


def test_receipts_and_explain():
    q = jnp.ones((1, 4, 1, 8))
    with ki.receipts() as log:
        kij.attention(q, q, q)
        jax.jit(lambda q: kij.attention(q, q, q, backend="xla"))(q)
    assert [(r.op, r.requested, r.ran) for r in log] == [
        ("jax.attention", "auto", "xla"),
        ("jax.attention", "xla", "xla"),
    ]
    assert dict(log[0].declined) == {"pallas": "where there is no TPU Pallas is interpreted, which is slow"}
    assert ki.explain(kij.attention, q, q, q, backend="pallas").details["mode"] == "interpreted"
    half = q.astype(jnp.float16)
    with pytest.raises(ki.Ineligible, match="needs float32 or bfloat16"):
        kij.attention(half, half, half, backend="pallas")


def test_the_reference_is_xla_and_strict_refuses_it_on_a_tpu(monkeypatch):
    from kernel_index.jax.target import pretend

    q = jnp.ones((1, 4, 1, 8), jnp.float16)  # which pallas declines
    monkeypatch.setenv("KERNEL_INDEX_BACKEND", "reference")
    reload_environment()
    assert ki.explain(kij.attention, q, q, q).would_run == "xla"
    monkeypatch.delenv("KERNEL_INDEX_BACKEND")
    reload_environment()
    with pretend("tpu"):
        assert ki.explain(kij.attention, q, q, q).would_run == "xla"
        with ki.strict():
            assert ki.explain(kij.attention, q, q, q).would_run is None


def test_one_compilation_serves_every_batch():
    KERNELS.cache.clear()
    q = jnp.ones((2, 8, 1, 4))
    details = []
    for seed in range(4):
        ids = jnp.asarray(np.random.default_rng(seed).integers(0, 3, (2, 8)))
        with ki.receipts() as log:
            kij.attention(q, q, q, kij.MaskContract(doc_ids=ids, window=(-1, 0)))
        details.append(log[0].details["mask_cache"])
    cache = KERNELS.cache
    assert details == ["miss", "hit", "hit", "hit"]
    assert (cache.misses, cache.hits, KERNELS.compilations()) == (1, 3, 1)
    kij.attention(q, q, q, kij.MaskContract(window=(2, 0)))
    assert (cache.misses, KERNELS.compilations()) == (2, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": jnp.ones((1, 4, 3, 8)), "v": jnp.ones((1, 4, 3, 8))}, "q must be of a multiple of k's 3 heads, got 2"),
        (
            {"v": jnp.ones((1, 5, 1, 8))},
            "v must be [B, S, K, Dv] with k's B, S and K, (1, 4, 1, 8), got shape (1, 5, 1, 8)",
        ),
        ({"q": jnp.ones((1, 4, 2, 8), int)}, "q must be a floating-point array, got int32"),
        ({"softcap": -1.0}, "softcap must be at least 0 (0 is off), got -1.0"),
        ({"block_sizes": (12, 16)}, "block_sizes[0] must be a multiple of 8, got 12"),
    ],
)
def test_bad_calls_say_what_must_be(change, message):
    call = {"q": jnp.ones((1, 4, 2, 8)), "k": jnp.ones((1, 4, 1, 8)), "v": jnp.ones((1, 4, 1, 8))} | change
    with pytest.raises((TypeError, ValueError)) as error:
        kij.attention(**call)
    assert str(error.value) == message

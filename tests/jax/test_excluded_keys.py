"""What a mask excludes has no influence in JAX: NaN and infinity stay with the rows that may see them."""

import math
from typing import Any, NamedTuple

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

import kernel_index.jax as kij  # noqa: E402

T = 45
NAMES = ("q", "k", "v", "d_out")
CONFIG = kij.ClusteredSparseConfig(block_size=8, topk=3, query_tile_size=8)
ROUTES = ("xla", "pallas", "clustered xla", "clustered pallas")


class Law(NamedTuple):
    """A mask, and which of the T tokens hold what is not finite.

    ``queries`` see none of these keys, and ``keys`` are seen by none of these queries; ``empty`` tokens see nothing and
    are seen by nothing.
    """

    mask: dict[str, Any]
    bad: slice
    queries: slice
    keys: slice
    empty: slice = slice(0, 0)


def documents(cut: int) -> dict[str, Any]:
    return {"doc_ids": (np.arange(T) >= cut).astype(np.int32)}


LAWS = {
    "padding": Law(documents(29) | {"doc_ids": np.where(np.arange(T) < 29, 0, -1)}, *[slice(29, T)],
                   slice(0, 29), slice(0, 29), slice(29, T)),
    "the next document": Law(documents(21), slice(21, T), slice(0, 21), slice(0, 21)),
    "the document before": Law(documents(21), slice(0, 21), slice(21, T), slice(21, T)),
    "another branch": Law({"subtree_end": np.repeat([T, 33, T], [21, 12, 12])}, slice(21, 33), slice(33, T),
                          slice(33, T)),
    "the future": Law({}, slice(37, T), slice(0, 37), slice(0, 0)),
}  # fmt: skip


def drawn(dtype: Any) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    shapes = {"q": 2, "k": 1, "v": 1, "d_out": 2}
    return {name: jnp.asarray(generator.standard_normal((1, T, h, 8)), dtype) for name, h in shapes.items()}


def function_of(route: str, law: Law, softcap: float) -> Any:
    *clustered, backend = route.split()
    sizes = {"block_sizes": (16, 16)} if backend == "pallas" else {}

    @jax.jit
    def results(q: Any, k: Any, v: Any, d_out: Any) -> dict[str, Any]:
        mask = kij.MaskContract(**{name: jnp.asarray(x) for name, x in law.mask.items()})

        def call(q: Any, k: Any, v: Any, sink: Any) -> Any:
            if clustered:
                return kij.clustered_sparse_attention_with_lse(
                    q, k, v, config=CONFIG, mask=mask, softcap=softcap, backend=backend
                )
            return kij.attention_with_lse(q, k, v, mask, softcap=softcap, sink=sink, backend=backend, **sizes)

        (out, lse), pull = jax.vjp(call, q, k, v, jnp.asarray([0.5, -1.0], q.dtype))
        d_q, d_k, d_v, d_sink = pull(kij.AttentionOutput(d_out, jnp.ones_like(lse)))
        return {"out": out, "lse": lse.swapaxes(1, 2), "d_q": d_q, "d_k": d_k, "d_v": d_v, "d_sink": d_sink}

    return results


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize(("route", "dtype", "softcap"), [
    *((route, jnp.float32, 0.0) for route in ROUTES), *((route, jnp.bfloat16, 2.0) for route in ROUTES[:2])
])  # fmt: skip
@pytest.mark.thorough_if(when=lambda name, **_: name != "padding")
def test_rows_that_may_not_see_it_keep_their_bits(name, route, dtype, softcap):
    law, tensors = LAWS[name], drawn(dtype)
    if "subtree_end" in law.mask and "clustered" in route:
        pytest.skip("clustered attention takes no tree")
    results = function_of(route, law, softcap)
    clean = results(**tensors)
    for value, names in (*((math.nan, (name,)) for name in NAMES), (math.inf, NAMES)):
        got = results(**{n: x.at[:, law.bad, :, 3].set(value) if n in names else x for n, x in tensors.items()})
        d_sink = got.pop("d_sink")
        if law.empty != slice(0, 0):
            assert np.array_equal(d_sink, clean["d_sink"]), (names, value)
        for what, x in got.items():
            rows = law.keys if what in ("d_k", "d_v") else law.queries
            assert np.array_equal(x[:, rows], clean[what][:, rows]), (what, names, value)
            assert (x[:, law.empty] == (-math.inf if what == "lse" else 0.0)).all(), (what, names, value)
        if law.empty == slice(0, 0):  # those who see it do not hide it
            spoilt = "d_q" if names == ("d_out",) else "out"
            assert not jnp.isfinite(got[spoilt][:, law.bad]).all(-1).any(), (names, value)


def test_long_rows_in_chunks_keep_the_law(monkeypatch):
    from kernel_index.jax import reference
    from kernel_index.jax.attention_compiled import KERNELS

    monkeypatch.setattr(reference, "SCORES_AT_ONCE", 2 * T * 7)
    KERNELS.cache.clear()
    test_rows_that_may_not_see_it_keep_their_bits("the document before", "xla", jnp.float32, 0.0)
    KERNELS.cache.clear()

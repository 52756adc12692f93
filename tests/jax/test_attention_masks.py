"""Attention in JAX under the masks that torch and JAX share: outputs and gradients are torch's."""

import numpy as np
import pytest
import torch

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

import kernel_index as ki  # noqa: E402
import kernel_index.jax as kij  # noqa: E402
from kernel_index.jax.mask import as_contract  # noqa: E402
from kernel_index.masks.doc_window_mask.cases import CASES  # noqa: E402
from tests.jax.arrays import draw, to_jax, with_gradients, within_budget  # noqa: E402

CASE = {case.name: case for case in CASES}
NEW = ("row_offsets", "prefix_lm", "whole_prefix", "tree", "tree_window", "tree_all")
OFTEN = {"xla": ("row_offsets", "whole_prefix", "tree_all"), "pallas": ("prefix_lm", "tree_all")}
SIZES = {"xla": (13, 29), "pallas": (29, 29)}
HOW = {"xla": {"backend": "xla"}, "pallas": {"backend": "pallas", "block_sizes": (8, 8)}}
# As in test_attention: two dot products of D = 8 terms, each rounded by 1 + log2(D) units.
UNITS = 2.0 * (1 + 3)


def both(out, lse, where):
    """Output and log-sum-exp as one tensor: its gradient has a part of each.  A query without keys has no second."""
    return out + where(lse == -float("inf"), 0.0, lse).swapaxes(1, 2)[..., None]


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("backend", HOW)
@pytest.mark.thorough_if(when=lambda name, backend: name not in OFTEN[backend])
def test_outputs_and_gradients_are_torchs(name, backend):
    queries, keys = SIZES[backend]
    mask = CASE[name].build(queries, keys)
    ours = as_contract(mask)
    shapes = (2, queries, 4, 8), (2, keys, 2, 8), (2, keys, 2, 8), (4,), (2, queries, 4, 8)
    *inputs, upstream = draw(5, "float32", *shapes)

    def attend(q, k, v, sink):
        return both(*ki.attention_with_lse(q, k, v, mask, sink=sink, softcap=3.0, backend="reference"), torch.where)

    def attend_jax(q, k, v, sink, ours):
        return both(*kij.attention_with_lse(q, k, v, ours, sink=sink, softcap=3.0, **HOW[backend]), jnp.where)

    @jax.jit
    def all_of_them(g, mask, *x):
        out, pull = jax.vjp(lambda *x: attend_jax(*x, mask), *x)
        return out, *pull(g)

    found = all_of_them(to_jax(upstream), ours, *map(to_jax, inputs))
    truth = with_gradients(attend, inputs, upstream, torch.float64)
    within_budget(found, with_gradients(attend, inputs, upstream), truth, torch.float32, UNITS)


@pytest.mark.parametrize("backend", HOW)
def test_a_row_without_tokens_has_no_output(backend):
    x = jnp.ones((1, 0, 1, 8))
    mask = kij.MaskContract(window=(2, 0), subtree_end=jnp.zeros(0, int))
    assert kij.attention(x, x, x, mask, backend=backend).shape == x.shape


def test_long_rows_of_a_tree_are_taken_in_chunks(monkeypatch):
    from kernel_index.jax import reference
    from kernel_index.jax.attention_compiled import KERNELS

    q, k, v = map(to_jax, draw(3, "float32", (2, 29, 2, 4), (2, 29, 1, 4), (2, 29, 1, 4)))
    mask = CASE["tree_all"].build(29, 29)
    whole = kij.attention(q, k, v, mask)
    monkeypatch.setattr(reference, "SCORES_AT_ONCE", 2 * 2 * 29 * 5)
    KERNELS.cache.clear()
    assert np.allclose(kij.attention(q, k, v, mask), whole, rtol=1e-6, atol=1e-6)
    KERNELS.cache.clear()


@pytest.mark.parametrize("backend", HOW)
@pytest.mark.thorough_if(when=lambda backend: backend == "pallas")
def test_chains_are_documents(backend):
    """XLA may fuse the two programs differently: sums of at most 24 terms are rounded in another order."""
    lengths = [9, 1, 14]
    tree = ki.pack_tree([-1] * 3, lengths)
    q, k, v = map(to_jax, draw(3, "float32", (1, 24, 2, 8), (1, 24, 1, 8), (1, 24, 1, 8)))
    documents = ki.MaskContract(window=(5, 0), doc_ids=torch.repeat_interleave(torch.tensor(lengths)))
    chains = ki.MaskContract(window=(5, 0), subtree_end=tree.subtree_end, positions=tree.positions)

    @jax.jit
    def results(mask):
        out, pull = jax.vjp(lambda *x: kij.attention(*x, mask, **HOW[backend]), q, k, v)
        return out, *pull(q)

    for a, b in zip(*(results(as_contract(mask)) for mask in (documents, chains)), strict=True):
        assert np.allclose(a, b, rtol=0, atol=24 * np.finfo(np.float32).eps * np.abs(a).max())

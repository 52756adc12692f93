"""Clustered attention in JAX: the blocks that torch selects, exactly; outputs and gradients within derived budgets."""

import numpy as np
import pytest
import torch

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

import kernel_index as ki  # noqa: E402
import kernel_index.jax as kij  # noqa: E402
from kernel_index.jax import block_selection_pallas, routing  # noqa: E402
from kernel_index.jax.block_selection import select  # noqa: E402
from kernel_index.jax.clustered_pallas import attend_selected  # noqa: E402
from kernel_index.jax.mask import as_contract  # noqa: E402
from tests.jax.arrays import docs, draw, to_jax, with_gradients, within_budget  # noqa: E402

T = 45
SELECT = jax.jit(select, static_argnums=(2, 4, 5))
UNION = jax.jit(kij.union_selection, static_argnames=("query_tile_size", "num_blocks"))
CONFIG = ki.ClusteredSparseConfig(block_size=8, topk=3, query_tile_size=16)
PACKED = ki.MaskContract(
    window=(40, 0),
    doc_ids=torch.from_numpy(docs(T)),
    validity=ki.attention_validity(valid_token_counts=[T, 30]),
)


def small_integers(*shape: int) -> torch.Tensor:
    """Values whose means and products are exact in float32 in any order, with many ties."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(len(shape))).float()


@pytest.mark.parametrize("mask", [ki.MaskContract(), PACKED], ids=["causal", "packed"])
def test_selected_blocks_and_unions_are_torchs(mask):
    q, k = small_integers(2, T, 4, 8), small_integers(2, T, 2, 8)
    expected = ki.clustered_route(q, k, config=CONFIG, mask=mask).indices
    ours = as_contract(mask)
    found = kij.clustered_route(to_jax(q), to_jax(k), config=CONFIG, mask=ours)
    assert np.array_equal(found, expected.numpy())
    fused = SELECT(to_jax(q), to_jax(k), CONFIG, ours, "pallas", True)
    assert np.array_equal(fused, expected.numpy())
    maps = ki.union_selection(expected, query_tile_size=16, num_blocks=6)
    ours = UNION(found, query_tile_size=16, num_blocks=6)
    for name, theirs in maps._asdict().items():
        same = getattr(ours, name)
        assert np.array_equal(same, theirs.numpy()), name


def test_hierarchical_selection_is_torchs():
    config = ki.ClusteredSparseConfig(block_size=4, topk=3, query_tile_size=16, hierarchy=(2, 2))
    q, k = small_integers(2, T, 4, 8), small_integers(2, T, 2, 8)
    expected = ki.clustered_route(q, k, config=config, mask=PACKED).indices
    found = SELECT(to_jax(q), to_jax(k), config, as_contract(PACKED), "pallas", True)
    assert np.array_equal(found, expected.numpy())


def test_no_future_token_changes_a_selection():
    q, k = draw(0, "float32", (1, T, 2, 8), (1, T, 1, 8))
    before = kij.clustered_route(to_jax(q), to_jax(k), config=CONFIG)
    q[:, 20:], k[:, 20:] = 9.0, -9.0
    after = kij.clustered_route(to_jax(q), to_jax(k), config=CONFIG)
    assert np.array_equal(before[:, :20], after[:, :20])


def test_scoring_stops_at_the_future_and_starts_at_the_window():
    @jax.jit
    def plan(mask):
        ends = block_selection_pallas.tile_ends(mask, 4096, 4096)
        return ends, block_selection_pallas.active_tiles(routing.legal_blocks(mask, 1, 4096, 4096, 8), ends, 8, 4)

    ends, (spans,) = plan(kij.MaskContract(window=(1023, 0)))
    assert spans[1].tolist() == [-(-(end + 1) // 1024) for end in ends.tolist()]
    assert spans[0].tolist() == [max(0, i * 256 - 1023) // 1024 for i in range(16)]


def test_pallas_is_right_forward_and_backward():
    q, k, v, upstream = draw(0, "float32", (2, T, 4, 8), (2, T, 2, 8), (2, T, 2, 8), (2, T, 4, 8))
    selected = ki.clustered_route(q, k, config=CONFIG, mask=PACKED).indices
    bounds = as_contract(PACKED).intervals(2, T, T)

    def attend(q, k, v):
        from kernel_index.kernels.sparse.block_sparse_attention.api import block_sparse_attention

        return block_sparse_attention(
            q, k, v, selected, block_size=8, mask=PACKED, softcap=3.0, backend="reference"
        ).out

    truth = with_gradients(attend, [q, k, v], upstream, torch.float64)
    plain = with_gradients(attend, [q, k, v], upstream)
    unselected = sorted(set(range(6)) - set(selected[1].flatten().tolist()))
    assert unselected, "some block of the short row is in no union"
    for block in unselected:  # what no list holds is not fetched
        k[1, 8 * block : 8 * block + 8] = v[1, 8 * block : 8 * block + 8] = torch.nan

    @jax.jit
    def all_of_them(q, k, v, g, selected):
        how = {"block_size": 8, "tile_size": 16, "scale": None, "softcap": 3.0, "interpret": True}
        out, pull = jax.vjp(lambda *x: attend_selected(*x, selected, bounds, **how)[0], q, k, v)
        return out, *pull(g)

    arrays = [to_jax(x) for x in (q, k, v, upstream, selected)]
    once = all_of_them(*arrays)
    within_budget(once, plain, truth, torch.float32, 2.0 * (1 + 3))
    assert all(np.array_equal(a, b) for a, b in zip(once, all_of_them(*arrays), strict=True)), "bit-identical"


def test_a_query_gains_no_block_of_its_neighbours():
    q, k = draw(1, "bfloat16", (1, 16, 2, 8), (1, 32, 1, 8))
    v = torch.arange(4.0).repeat_interleave(8).view(1, 32, 1, 1).expand(1, 32, 1, 8).bfloat16()
    selected = jnp.asarray(np.arange(16) % 4).reshape(1, 16, 1, 1)  # neighbours always select different blocks
    bounds = kij.MaskContract(causal=False).intervals(1, 16, 32)
    how = {"block_size": 8, "tile_size": 16, "scale": None, "softcap": 0.0, "interpret": True}
    out, _ = jax.jit(lambda *x: attend_selected(*x, selected, bounds, **how))(*map(to_jax, (q, k, v)))
    assert np.array_equal(out[0, :, 0, 0].astype(np.float32), np.arange(16) % 4)


def test_all_blocks_are_dense_attention_and_the_receipt_says_so():
    q, k = map(to_jax, draw(2, "float32", (1, T, 2, 8), (1, T, 1, 8)))
    config = ki.ClusteredSparseConfig(block_size=16, topk=3)
    with ki.receipts() as log:
        out = kij.clustered_sparse_attention(q, k, k, config=config)
        kij.clustered_sparse_attention(q, k, k, config=CONFIG)
    assert np.array_equal(out, kij.attention(q, k, k))
    assert log[0].details["path"] == "reroute_to_dense"
    assert log[0].details["reason"] == "topk_covers_all_blocks"
    assert log[1].details["path"] == "clustered"
    assert log[1].details["phase_order"] == ("scoring", "union", "attention")
    assert log[1].details["routing_is_stop_gradient"]


def test_routing_has_no_gradient_and_bad_calls_are_refused():
    q, k = map(to_jax, draw(3, "float32", (1, T, 2, 8), (1, T, 1, 8)))
    v = jnp.ones_like(k)  # the output is 1 whatever is selected
    grads = jax.grad(lambda q, k: kij.clustered_sparse_attention(q, k, v, config=CONFIG).sum(), (0, 1))(q, k)
    assert all(float(jnp.abs(g).max()) < 1e-6 for g in grads)
    with pytest.raises(ValueError, match="mask must be causal"):
        kij.clustered_sparse_attention(q, k, v, config=CONFIG, mask=kij.MaskContract(causal=False))
    with pytest.raises(TypeError, match="config must be a ClusteredSparseConfig, got dict"):
        kij.clustered_sparse_attention(q, k, v, config={})
    odd = ki.ClusteredSparseConfig(block_size=12, topk=2)
    with pytest.raises(ki.Ineligible, match="multiples of 8"):
        kij.clustered_sparse_attention(q, k, v, config=odd, backend="pallas")


REFUSED = [
    (
        {"subtree_end": np.full(16, 16)},
        "subtree_end must be None: a router selects blocks of one interval of keys, got a prefix tree",
    ),
    (
        {"positions": np.arange(16)},
        "positions must be None: a router selects blocks of one interval of keys, got a prefix tree",
    ),
    ({"prefix": 2}, "prefix must be None: a router takes past blocks and the current one, got a prefix"),
    (
        {"q_offset": np.array([0])},
        "q_offset must be one number for all rows where blocks are selected, got shape (1,)",
    ),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=lambda x: next(iter(x)) if isinstance(x, dict) else "")
@pytest.mark.parametrize("topk", [2, 8])
def test_masks_that_have_no_past_blocks_are_refused(fields, message, topk):
    """Also where every block is selected: the answer must not depend on the length of the rows."""
    x = jnp.ones((1, 16, 1, 8))
    config = ki.ClusteredSparseConfig(block_size=4, topk=topk)
    calls = kij.clustered_sparse_attention, kij.clustered_sparse_attention_with_lse
    for call in (*calls, lambda q, k, v, **how: kij.clustered_route(q, k, **how)):
        with pytest.raises(ValueError) as refusal:
            call(x, x, x, config=config, mask=kij.MaskContract(**fields))
        assert str(refusal.value) == message

"""The windowing predicate against positions counted one by one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernel_index as ki

PLANS = st.fixed_dictionaries(
    {
        "num_blocks": st.integers(0, 40),
        "tile_size": st.integers(1, 9),
        "block_stride": st.integers(1, 7),
        "q_chunk_start": st.integers(0, 200),
        "q_chunk_size": st.integers(1, 60),
        "left_window": st.one_of(st.none(), st.integers(-2, 80)),
    }
)


def tokens_of(tile: int, plan: dict) -> range:
    """The tokens that the blocks of a tile stand for."""
    first, last = tile * plan["tile_size"], min((tile + 1) * plan["tile_size"], plan["num_blocks"])
    return range(first * plan["block_stride"], last * plan["block_stride"])


def is_seen(token: int, plan: dict) -> bool:
    """Whether some query of the chunk may look at the token, said query by query."""
    window = plan["left_window"]
    queries = range(plan["q_chunk_start"], plan["q_chunk_start"] + plan["q_chunk_size"])
    return any(token <= q and (window is None or window < 0 or token >= q - window) for q in queries)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(PLANS)
def test_a_tile_is_active_exactly_if_some_query_sees_one_of_its_tokens(arguments):
    plan = ki.causal_windowing_plan(**arguments)
    tiles = -(-arguments["num_blocks"] // arguments["tile_size"])
    seen = tuple(j for j in range(tiles) if any(is_seen(t, arguments) for t in tokens_of(j, arguments)))
    assert plan.active_tiles == seen
    assert plan.skipped_past_tiles + len(seen) + plan.skipped_future_tiles == tiles
    assert plan.q_chunk_end == arguments["q_chunk_start"] + arguments["q_chunk_size"] - 1


def test_a_long_sequence_is_not_four_tiles():
    """The public sample answers "4 active, none skipped" for this call."""
    plan = ki.causal_windowing_plan(
        num_blocks=256, tile_size=8, block_stride=16, q_chunk_start=0, q_chunk_size=256, left_window=None
    )
    assert plan.active_tiles == (0, 1)
    assert plan.skipped_future_tiles == 30


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(-3, 300))
def test_monotone_and_the_end_is_inclusive(stride, end):
    answers = [ki.can_score_tile(i, stride, end) for i in range(50)]
    assert answers == sorted(answers, reverse=True)
    assert all(type(a) is bool for a in answers)
    assert ki.can_score_tile(7, stride, 7 * stride)
    assert not ki.can_score_tile(7, stride, 7 * stride - 1)


def test_arrays_of_torch_and_jax_answer_as_integers_do():
    starts = torch.arange(0, 64, 8)
    expected = [ki.can_score_tile(int(s), 4, 100) for s in starts]
    assert ki.can_score_tile(starts, 4, 100).tolist() == expected
    assert ki.can_score_tile(starts, torch.tensor(4), torch.full((8,), 100)).tolist() == expected
    assert ki.can_score_tile(starts.to("meta"), 4, 100).dtype == torch.bool
    numpy = pytest.importorskip("numpy")
    assert ki.can_score_tile(starts.numpy(), 4, numpy.int64(100)).tolist() == expected


def test_jax_under_jit():
    jax = pytest.importorskip("jax")
    starts = jax.numpy.arange(0, 64, 8)
    answers = jax.jit(ki.can_score_tile)(starts, 4, 100)
    assert answers.tolist() == [ki.can_score_tile(int(s), 4, 100) for s in starts]


def test_no_graph_break():
    compiled = torch.compile(ki.can_score_tile, fullgraph=True, backend="eager")
    assert compiled(torch.arange(0, 12, 4), 16, 100).tolist() == [True, True, False]


GOOD = {"num_blocks": 8, "tile_size": 2, "block_stride": 16, "q_chunk_start": 0, "q_chunk_size": 4}


@pytest.mark.parametrize(
    ("name", "value", "kind", "message"),
    [
        ("block_stride", 0, ValueError, "block_stride must be at least 1, got 0"),
        ("tile_size", 0, ValueError, "tile_size must be at least 1, got 0"),
        ("q_chunk_size", -1, ValueError, "q_chunk_size must be at least 1, got -1"),
        ("q_chunk_start", -1, ValueError, "q_chunk_start must be at least 0, got -1"),
        ("num_blocks", -1, ValueError, "num_blocks must be at least 0, got -1"),
        ("num_blocks", 4.0, TypeError, "num_blocks must be an integer, got float"),
        ("tile_size", True, TypeError, "tile_size must be an integer, got bool"),
        ("left_window", 1.5, TypeError, "left_window must be an integer, got float"),
    ],
)
def test_a_plan_refuses(name, value, kind, message):
    with pytest.raises(kind) as error:
        ki.causal_windowing_plan(**(GOOD | {name: value}))
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        ((0, 0, 3), ValueError, "block_stride must be at least 1, got 0"),
        ((-1, 2, 3), ValueError, "tile_start must be at least 0, got -1"),
        ((0, 2.0, 3), TypeError, "block_stride must be an integer, got float"),
        ((torch.ones(2), 2, 3), TypeError, "tile_start must be an integer tensor, got torch.float32"),
        ((0, 2, torch.tensor(True)), TypeError, "q_chunk_end must be an integer tensor, got torch.bool"),
    ],
)
def test_the_predicate_refuses(call, kind, message):
    with pytest.raises(kind) as error:
        ki.can_score_tile(*call)
    assert str(error.value) == message

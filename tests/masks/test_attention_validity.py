"""Prefix metadata: the three states, what is refused, and what is never read."""

import copy
import dataclasses
import types

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kernel_index as ki
from kernel_index.masks.attention_validity_prefix.validity import AttentionValidity


def test_absent_zero_and_present_are_three_states():
    absent = ki.attention_validity()
    zero = ki.attention_validity(valid_token_counts=torch.zeros(2, dtype=torch.int64))
    present = ki.attention_validity(valid_token_counts=torch.tensor([3, 4]))
    assert [v.mode for v in (absent, zero, present)] == ["none", "token_prefix", "token_prefix"]
    assert absent.token_prefix is None
    assert absent.token_counts(4) is None
    assert absent.key_padding(4) is None
    assert absent.batch_size is None
    assert zero.token_counts(4).tolist() == [0, 0]
    assert not zero.key_padding(4).any()
    assert present.key_padding(4).tolist() == [[True, True, True, False], [True] * 4]
    assert [v.is_full(4) for v in (absent, zero, present)] == [True, False, False]
    assert ki.attention_validity(valid_slot_counts=[0], base_block_tokens=4).token_counts(9).tolist() == [0]
    assert len({absent, zero, present}) == 3


def test_a_keyword_wins_over_the_mapping_field_by_field():
    meta = types.MappingProxyType(
        {"row_valid_token_counts": [1, 2], "row_valid_slot_counts": [5, 6], "base_block_tokens": 8, "other": object()}
    )
    valid = ki.attention_validity(attention_meta=meta, valid_token_counts=[40, 41], base_block_tokens=16)
    assert valid.mode == "slot_prefix"
    assert valid.token_prefix.tolist() == [40, 41]
    assert valid.slot_counts.tolist() == [5, 6]
    assert valid.base_block_tokens == 16
    # A keyword of zeros is present, and wins; None is absent, and does not.
    assert ki.attention_validity(attention_meta=meta, valid_token_counts=[0, 0]).token_prefix.tolist() == [0, 0]
    assert ki.attention_validity(attention_meta={"row_valid_token_counts": None}).mode == "none"
    assert ki.attention_validity(attention_meta={}).mode == "none"


def test_slot_counts_make_tokens_and_the_token_prefix_trims_the_last_slot():
    valid = ki.attention_validity(valid_slot_counts=[2, 1, 3], valid_token_counts=[7, 9, 12], base_block_tokens=4)
    assert valid.token_counts(100).tolist() == [7, 4, 12]
    assert valid.token_counts(5).tolist() == [5, 4, 5]
    assert valid.tokens.tolist() == [7, 4, 12]
    assert valid.is_full(4)
    assert not valid.is_full(5)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8])
def test_every_integer_dtype_becomes_int64(dtype):
    valid = ki.attention_validity(valid_token_counts=torch.tensor([1, 2], dtype=dtype))
    assert valid.token_prefix.dtype == torch.int64
    assert valid.token_prefix.tolist() == [1, 2]


def test_scalars_lists_and_numpy_are_batches():
    for one in (3, np.int32(3), torch.tensor(3), [3], np.array([3]), np.array(3)):
        assert ki.attention_validity(valid_token_counts=one).token_prefix.tolist() == [3]
    for base in (4, np.int64(4), torch.tensor(4), torch.tensor([4])):
        assert ki.attention_validity(valid_slot_counts=[1], base_block_tokens=base).base_block_tokens == 4
    assert ki.attention_validity(valid_token_counts=[]).token_prefix.shape == (0,)


def test_an_int64_tensor_is_kept_so_that_a_change_in_place_is_seen():
    counts = torch.tensor([1, 2])
    valid = ki.attention_validity(valid_token_counts=counts)
    counts[0] = 5
    assert valid.token_counts(8).tolist() == [5, 2]


BAD = [
    ({"valid_token_counts": [[1, 2]]}, TypeError, "valid_token_counts must be an integer, got list"),
    ({"valid_token_counts": torch.ones(2, 1, dtype=torch.int64)}, ValueError, "shape [B], got shape (2, 1)"),
    ({"valid_token_counts": torch.tensor([1.0])}, TypeError, "must be an integer tensor, got torch.float32"),
    ({"valid_token_counts": [1.0]}, TypeError, "must be an integer, got float"),
    ({"valid_token_counts": 1.5}, TypeError, "must be an integer, got float"),
    ({"valid_token_counts": "12"}, TypeError, "must be an integer, got str"),
    ({"valid_token_counts": np.array([1.0])}, TypeError, "must be an integer tensor, got torch.float64"),
    ({"valid_token_counts": torch.tensor([True])}, TypeError, "must be an integer tensor, got torch.bool"),
    ({"valid_token_counts": [True]}, TypeError, "must be an integer, got bool"),
    ({"valid_token_counts": torch.tensor([3, -1])}, ValueError, "valid_token_counts must be at least 0, got -1"),
    ({"valid_slot_counts": [-2], "base_block_tokens": 4}, ValueError, "valid_slot_counts must be at least 0, got -2"),
    ({"valid_slot_counts": [1]}, ValueError, "base_block_tokens must be a positive integer"),
    ({"valid_slot_counts": [1], "base_block_tokens": 0}, ValueError, "base_block_tokens must be at least 1, got 0"),
    ({"valid_slot_counts": [1], "base_block_tokens": -4}, ValueError, "base_block_tokens must be at least 1, got -4"),
    (
        {"valid_slot_counts": [1], "base_block_tokens": 4.0},
        TypeError,
        "base_block_tokens must be an integer, got float",
    ),
    (
        {"valid_slot_counts": [1], "base_block_tokens": True},
        TypeError,
        "base_block_tokens must be an integer, got bool",
    ),
    (
        {"valid_slot_counts": [1], "base_block_tokens": torch.tensor([4, 4])},
        ValueError,
        "base_block_tokens must be one integer on the host, got shape (2,) on cpu",
    ),
    (
        {"valid_slot_counts": [1], "base_block_tokens": torch.tensor(4.0)},
        TypeError,
        "base_block_tokens must be an integer tensor",
    ),
    (
        {"valid_slot_counts": [1], "valid_token_counts": [4, 5], "base_block_tokens": 4},
        ValueError,
        "valid_slot_counts must be one count for each of the 2 rows of valid_token_counts, got 1",
    ),
    (
        {"valid_slot_counts": [1, 2], "valid_token_counts": torch.tensor(4), "base_block_tokens": 4},
        ValueError,
        "valid_slot_counts must be one count for each of the 1 rows of valid_token_counts, got 2",
    ),
    ({"attention_meta": [1]}, TypeError, "attention_meta must be a mapping, got list"),
    ({"attention_meta": {"row_valid_token_counts": [0.5]}}, TypeError, "valid_token_counts must be an integer"),
]


@pytest.mark.parametrize(("keywords", "kind", "message"), BAD, ids=[m for _, _, m in BAD])
def test_what_is_refused(keywords, kind, message):
    with pytest.raises(kind) as refusal:
        ki.attention_validity(**keywords)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_single_count_is_not_spread_over_a_batch():
    one = ki.MaskContract(validity=ki.attention_validity(valid_token_counts=3))
    with pytest.raises(ValueError, match="batch_size must be 1"):
        one.dense(4, 8)
    with pytest.raises(ValueError, match="batch_size must be 1"):
        ki.doc_window_mask(4, 8, device="cpu", valid_token_counts=torch.tensor(3))


def test_counts_off_the_host_are_never_read():
    """The meta device has no values: reading one raises."""
    counts = torch.empty(2, dtype=torch.int32, device="meta")
    valid = ki.attention_validity(valid_token_counts=counts, valid_slot_counts=counts, base_block_tokens=4)
    assert valid.token_counts(8).shape == (2,)
    assert valid.key_padding(8).shape == (2, 8)
    assert valid.is_full(8) is False
    assert valid.resolve(8).mode == "token_prefix"
    assert isinstance(hash(valid), int)
    assert valid == valid
    with FakeTensorMode():
        assert ki.attention_validity(valid_token_counts=torch.tensor([1, 2])).is_full(1) is False
    with pytest.raises(ValueError, match="must be on the device"):
        ki.attention_validity(valid_token_counts=counts, valid_slot_counts=[1, 2], base_block_tokens=4)
    with pytest.raises(ValueError, match="one integer on the host"):
        ki.attention_validity(valid_slot_counts=[1], base_block_tokens=torch.ones(1, dtype=torch.int32, device="meta"))


def test_a_negative_count_that_could_not_be_read_acts_as_zero():
    counts = torch.tensor([2, 2])
    valid = ki.attention_validity(valid_token_counts=counts)
    counts[0] = -3
    assert valid.token_counts(8).tolist() == [0, 2]


def test_resolve():
    slots = ki.attention_validity(valid_slot_counts=[2, 1], base_block_tokens=16)
    both = ki.attention_validity(valid_slot_counts=[2, 1], valid_token_counts=[30, 16], base_block_tokens=16)
    tokens = ki.attention_validity(valid_token_counts=[30, 16])
    none = ki.attention_validity()
    assert slots.resolve(16) is slots
    assert both.resolve(16) is both
    assert (slots.resolve(16).reason, slots.resolve(16).mode) == ("", "slot_prefix")
    degraded = slots.resolve(32)
    assert (degraded.mode, degraded.reason) == ("none", "slot_tile_mismatch")
    assert degraded.token_prefix is None
    assert degraded.slot_counts is None
    assert degraded.base_block_tokens is None
    partly = both.resolve(8)
    assert (partly.mode, partly.reason) == ("token_prefix", "slot_tile_mismatch")
    assert partly.token_prefix is both.token_prefix
    assert tokens.resolve(8) is tokens
    assert none.resolve(8) is none
    with pytest.raises(ValueError, match="tile_size must be at least 1, got 0"):
        slots.resolve(0)


def test_equality_is_by_content_and_the_hash_agrees():
    def make(tokens):
        return ki.attention_validity(valid_token_counts=torch.tensor(tokens))

    a, b, other = make([1, 2]), make([1, 2]), make([1, 3])
    assert a == b
    assert hash(a) == hash(b)
    assert a != other
    assert a != "token_prefix"
    assert a != make([1, 2, 3])
    assert len({a, b, other}) == 2
    slots = ki.attention_validity(valid_slot_counts=[1, 2], base_block_tokens=4)
    assert slots != ki.attention_validity(valid_slot_counts=[1, 2], base_block_tokens=8)
    assert slots != ki.attention_validity(valid_slot_counts=[1, 2], base_block_tokens=4, valid_token_counts=[1, 2])
    assert slots.resolve(8) == ki.attention_validity(), "the reason is no part of what is said"
    assert a != AttentionValidity("token_prefix", torch.empty(2, dtype=torch.int64, device="meta"))
    assert copy.deepcopy(a) == a
    before = hash(a)
    a.token_prefix[0] = 7
    assert hash(a) == before
    assert a != b


def test_immutable():
    valid = ki.attention_validity(valid_token_counts=[1])
    with pytest.raises(dataclasses.FrozenInstanceError):
        valid.mode = "none"


def test_to_another_device_and_back():
    valid = ki.attention_validity(valid_slot_counts=[2], valid_token_counts=[7], base_block_tokens=4)
    assert valid.to("cpu") is valid
    moved = valid.to("meta")
    assert (moved.mode, moved.base_block_tokens) == ("slot_prefix", 4)
    assert moved.token_prefix.device.type == moved.slot_counts.device.type == "meta"
    assert ki.attention_validity().to("meta").mode == "none"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("rows",), "mode must be one of"),
        (("token_prefix",), "token_prefix must be given"),
        (("none", torch.tensor([1])), "token_prefix must be given for mode 'token_prefix', got mode 'none'"),
        (("token_prefix", torch.tensor([1]), torch.tensor([1]), 4), "slot_counts must be given for mode 'slot_prefix'"),
        (("slot_prefix", None, torch.tensor([1])), "base_block_tokens must be a positive integer"),
        (("token_prefix", torch.tensor([1], dtype=torch.int32)), "token_prefix must be torch.int64"),
        (("token_prefix", torch.tensor([[1]])), "token_prefix must be one count for each row"),
    ],
)
def test_the_type_itself_refuses_what_makes_no_sense(fields, message):
    with pytest.raises((TypeError, ValueError), match=message):
        AttentionValidity(*fields)


def test_traces_in_one_graph_over_several_batches():
    def padding(counts, length):
        valid = ki.attention_validity(valid_token_counts=counts, valid_slot_counts=counts, base_block_tokens=2)
        return valid.resolve(4).key_padding(length), valid.key_padding(length)

    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(padding, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, length in ((2, 5), (3, 9), (5, 7)):
        counts = torch.arange(rows)
        for actual, expected in zip(compiled(counts, length), padding(counts, length), strict=True):
            assert torch.equal(actual, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1

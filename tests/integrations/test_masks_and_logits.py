"""The two places where a mistake would be silent: the mask that is handed on, and the logits that are put off."""

import copy
import io
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch

pytest.importorskip("transformers")

from transformers import masking_utils as hf

from kernel_index.integrations.hugging_face.implementation import Implementation
from kernel_index.integrations.hugging_face.logits import Factors, LazyLogits
from kernel_index.integrations.hugging_face.masks import LazyMask, contract_for

B, T = 2, 11
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2], [0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]])
PACKED = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]])
LEFT = torch.ones(B, T, dtype=torch.bool).index_put((torch.tensor(0), torch.arange(4)), torch.tensor(False))


def packed(function):
    return hf.packed_sequence_compatibility_function(function, POSITIONS, PACKED)


CALLS = {
    "causal": {"mask_function": hf.causal_mask_function},
    "padded": {"mask_function": hf.causal_mask_function, "attention_mask": LEFT},
    "padded right": {"mask_function": hf.causal_mask_function, "attention_mask": LEFT.flip(1)},
    "window": {"mask_function": hf.sliding_window_causal_mask_function(4), "local_size": 4},
    "window, padded": {
        "mask_function": hf.sliding_window_causal_mask_function(4), "local_size": 4, "attention_mask": LEFT,
    },
    "window of one": {"mask_function": hf.sliding_window_causal_mask_function(1), "local_size": 1},
    "packed": {"mask_function": packed(hf.causal_mask_function)},
    "packed window": {"mask_function": packed(hf.sliding_window_causal_mask_function(3)), "local_size": 3},
    "both ways": {"mask_function": hf.bidirectional_mask_function, "attention_mask": LEFT.flip(1)},
    "a padded source": {
        "mask_function": hf.bidirectional_mask_function, "attention_mask": LEFT.flip(1), "q_length": T - 3,
    },
    "packed, padded right": {"mask_function": packed(hf.causal_mask_function), "attention_mask": LEFT.flip(1)},
    "window both ways": {"mask_function": hf.sliding_window_bidirectional_mask_function(3), "local_size": 3},
    "chunks": {
        "mask_function": hf.chunked_causal_mask_function(4, torch.zeros(B, dtype=torch.int64)), "local_size": 4,
    },
    "decode": {"mask_function": hf.causal_mask_function, "attention_mask": LEFT, "q_length": 1, "q_offset": T - 1},
    "decode in a window's cache": {
        "mask_function": hf.sliding_window_causal_mask_function(5), "local_size": 5,
        "q_length": 1, "q_offset": T - 1, "kv_length": 5, "kv_offset": T - 5,
    },
}  # fmt: skip
INEXPRESSIBLE = {
    "an image among the words": {
        "mask_function": hf.or_masks(
            hf.causal_mask_function, hf.blockwise_overlay(torch.tensor([[-1, -1, 0, 0, 0, 0, -1, -1, 1, 1, -1]] * B))
        )
    },
    "a window that is not the configured one": {"mask_function": hf.sliding_window_causal_mask_function(4)},
    "a hole": {
        "mask_function": hf.causal_mask_function,
        "attention_mask": LEFT.index_put((torch.tensor(1), torch.tensor(5)), torch.tensor(False)),
    },
    "a hole, both ways": {
        "mask_function": hf.bidirectional_mask_function,
        "attention_mask": LEFT.flip(1).index_put((torch.tensor(1), torch.tensor(5)), torch.tensor(False)),
    },
    "padding on the left, both ways": {"mask_function": hf.bidirectional_mask_function, "attention_mask": LEFT},
    "a static cache": {"mask_function": hf.causal_mask_function, "kv_length": T + 5},
    "the user's own": {"mask_function": lambda b, h, q, k: k <= q, "use_vmap": True},
}


def sizes(call):
    return {"batch_size": B, "q_length": T, "kv_length": T, **call}


@pytest.mark.parametrize("name", CALLS)
def test_the_contract_says_what_the_function_says(name):
    call = sizes(CALLS[name])
    found = contract_for(**call)
    assert isinstance(found, LazyMask)
    expected = hf.sdpa_mask(**call, allow_is_causal_skip=False)
    dense = found.contract.dense(B, call["q_length"], call["kv_length"])
    assert torch.equal(dense, expected.expand(B, 1, -1, -1))


@pytest.mark.parametrize("name", INEXPRESSIBLE)
def test_what_no_contract_can_say_stays_a_dense_mask(name):
    call = sizes(INEXPRESSIBLE[name])
    found = contract_for(**call, allow_is_causal_skip=False)
    assert not isinstance(found, LazyMask)  # whose values would be equal, whatever its contract says
    assert torch.equal(found, hf.sdpa_mask(**call, allow_is_causal_skip=False))


@pytest.mark.parametrize("own", ["sdpa", "eager"])
def test_a_model_that_reads_its_mask_reads_the_one_it_had(own):
    call = {**sizes(CALLS["packed window"]), "config": Config(own), "dtype": torch.float64}
    expected = {"sdpa": hf.sdpa_mask, "eager": hf.eager_mask}[own](**call)
    mask = contract_for(**call)
    assert (mask.shape, mask.dtype, mask.ndim) == (expected.shape, expected.dtype, 4)
    assert not mask.made
    assert torch.equal(mask[:, :, 2:5, :-1], expected[:, :, 2:5, :-1])
    assert torch.equal(torch.where(mask.values().bool(), 1.0, 2.0), torch.where(expected.bool(), 1.0, 2.0))


class Config:
    """As much of a configuration as a mask reads."""

    def __init__(self, own):
        self._attn_implementation = Implementation.over(own)


def test_a_mask_is_handed_on():
    mask = contract_for(**sizes(CALLS["packed"]))
    call = sizes({"mask_function": hf.causal_mask_function, "attention_mask": mask.contiguous()})
    assert contract_for(**call) is mask
    assert mask[:, :, :, :T] is mask
    assert mask.detach() is mask
    assert mask.to("cpu").contract == mask.contract
    assert not mask.made


def lazy(bias: bool = True):
    make = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 4, generator=make).requires_grad_() for n in (3, 5))
    b = torch.randn(5, generator=make).requires_grad_() if bias else None
    return LazyLogits.of(hidden, weight, b), torch.nn.functional.linear(hidden, weight, b)


@pytest.mark.parametrize(
    ("steps", "factors"),
    [
        (lambda z: z, Factors(1.0, None)),
        (lambda z: z * 0.5, Factors(0.5, None)),
        (lambda z: z.float() / 4, Factors(0.25, None)),
        (lambda z: z.to(torch.float64), Factors(1.0, None)),
        (lambda z: torch.tanh(z / 8) * 8, Factors(1.0, 8.0)),
        (lambda z: (2 * z / 8).tanh() * 4, Factors(1.0, 4.0)),
        (lambda z: torch.tanh(z), Factors(1.0, 1.0)),
        (lambda z: z.tanh().tanh(), None),
        (lambda z: z.tanh() * 2 * 2, None),
        (lambda z: z.tanh() * -2, None),
        (lambda z: z.bfloat16().float(), "values"),
        (lambda z: z.to(torch.bfloat16).float(), None),
    ],
)
def test_steps_are_written_down_or_made(steps, factors):
    put_off, plain = lazy()
    found = steps(put_off)
    if factors == "values":
        assert type(found) is torch.Tensor
    else:
        assert not found.made
        assert found.factors() == factors
    assert found.dtype == steps(plain).dtype
    assert torch.equal(found + 0, steps(plain))


def test_what_is_known_needs_no_values():
    put_off, plain = lazy()
    assert (put_off.shape, put_off.dtype, put_off.size(-1), put_off.dim()) == ((3, 5), torch.float32, 5, 2)
    assert (len(put_off), put_off.numel(), put_off.device, put_off.is_floating_point()) == (3, 15, plain.device, True)
    assert not put_off.made


def test_reading_gives_the_values_their_gradients_and_keeps_them():
    put_off, plain = lazy()
    ours = torch.autograd.grad(put_off.logsumexp(-1).sum(), (put_off.hidden, put_off.weight, put_off.bias))
    leaves = plain.grad_fn.next_functions
    assert len(leaves) == 3
    theirs = torch.autograd.grad(plain.logsumexp(-1).sum(), (put_off.hidden, put_off.weight, put_off.bias))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert put_off.values() is put_off.values()


def by_data(logits):
    logits.weight.data.mul_(1.5)


def in_place(logits):
    with torch.no_grad():
        logits.weight.add_(1.0)


def of_hidden(logits):
    with torch.no_grad():
        logits.hidden.zero_()


def of_bias(logits):
    logits.bias.data[0] = 7.0


@pytest.mark.parametrize("change", [by_data, in_place, of_hidden, of_bias])
def test_operands_that_have_changed_are_not_used(change):
    put_off, _ = lazy()
    steps = put_off * 2
    change(put_off)
    for logits in (put_off, steps):
        with pytest.raises(RuntimeError, match="before the weights change"):
            logits.argmax()


def test_logits_that_were_read_stay_as_they_are():
    put_off, plain = lazy()
    assert torch.equal(put_off + 0, plain)
    in_place(put_off)
    assert torch.equal(put_off + 0, plain)


def test_what_is_written_into_logits_counts():
    put_off, plain = lazy()
    plain = plain.detach().clone()
    before = put_off * 3
    with torch.no_grad():
        for logits in (put_off, plain):
            logits[..., 3:] = -7.0
            logits.mul_(2)
    assert torch.equal(put_off + 0, plain)
    assert torch.equal(put_off * 3, plain * 3)
    assert torch.equal(put_off.float(), plain)
    assert torch.equal(before, torch.nn.functional.linear(put_off.hidden, put_off.weight, put_off.bias) * 3)


def test_a_cast_that_changes_nothing_is_the_same_tensor():
    put_off, plain = lazy()
    same = put_off.float()
    with torch.no_grad():
        same[0] = 5.0
    plain = plain.detach().clone()
    plain[0] = 5.0
    assert torch.equal(put_off.detach(), plain)


def test_logits_are_pickled_copied_and_sent_as_their_values():
    put_off, plain = lazy()
    put_off, plain = put_off.detach(), plain.detach()
    fresh = LazyLogits.of(*(x.detach() for x in (lazy()[0].hidden, lazy()[0].weight, lazy()[0].bias)))
    for copied in (pickle.loads(pickle.dumps(fresh)), copy.copy(fresh), copy.deepcopy(fresh), fresh.numpy()):
        assert not isinstance(copied, LazyLogits)
        assert torch.equal(torch.as_tensor(copied), plain)
    buffer = io.BytesIO()
    torch.save(fresh, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer), plain)
    buffer = io.BytesIO()
    ForkingPickler(buffer).dump(fresh)
    assert torch.equal(pickle.loads(buffer.getvalue()), plain)
    assert put_off.equal(plain)


def test_under_autocast_logits_have_its_dtype_whatever_the_operands_have():
    make = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3, 4, generator=make), torch.randn(5, 4, generator=make)
    for x in (hidden, hidden.bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            put_off, plain = LazyLogits.of(x, weight, None), torch.nn.functional.linear(x, weight)
            assert put_off.dtype == plain.dtype == torch.bfloat16
            assert torch.equal(put_off + 0, plain)

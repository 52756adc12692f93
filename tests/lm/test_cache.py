"""A model's cache refuses a step that it has no room for, and serves every mode that PyTorch computes in."""

import contextlib
import itertools

import pytest
import torch

import kernel_index as ki
from kernel_index.lm.config import Latent, Sparse
from tests.lm.test_generate import CONTEXT, KINDS
from tests.lm.test_rollout_check import drawn_model

CACHED = {"A": {}, "L": {"latent": Latent(16, 8)}, "S": {"sparse": Sparse(("moba",), 16, 3)}}

MODES = {"gradients": torch.enable_grad, "none": torch.no_grad, "inference": torch.inference_mode}
MIXED = {"off": contextlib.nullcontext, "on": lambda: torch.autocast("cpu", torch.bfloat16)}


def prompt(tokens=8):
    return torch.randint(0, 256, (tokens,), generator=torch.Generator().manual_seed(0))


def step(model, cache, sequence, tokens):
    """Logits after these tokens of one sequence."""
    start = cache.length(sequence)
    cache.begin([sequence], len(tokens))
    logits = model.decode(tokens[None], start, cache)
    cache.advance()
    return logits[0]


@pytest.mark.parametrize("modes", list(itertools.product(MODES, MODES, MODES)), ids="-".join)
@pytest.mark.parametrize("kind", ["MASLSSE", "AE", "M"])
def test_a_cache_made_in_one_mode_is_used_in_any_other(kind, modes):
    """Made, filled and shared, then read from, each in a mode of its own."""
    model, tokens = KINDS[kind], prompt()
    with torch.no_grad():
        expected = model.next_logits(tokens)
    with MODES[modes[0]]():
        cache = model.new_cache(2 * CONTEXT, page_size=4)
        first = cache.allocate()
    with MODES[modes[1]]():
        step(model, cache, first, tokens[:5])
        second = cache.share(first)
    for sequence in (first, second):
        with MODES[modes[2]]():
            logits = step(model, cache, sequence, tokens[5:])
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["M", "MASLSSE"])
def test_a_step_begun_in_inference_mode_is_decoded_outside(kind):
    model, tokens = KINDS[kind], prompt()
    cache = model.new_cache(CONTEXT, page_size=4)
    sequence = cache.allocate()
    with torch.no_grad():
        expected = model.next_logits(tokens)
    with torch.inference_mode():
        cache.begin([sequence], 8, [8])
    logits = model.decode(tokens[None], 0, cache)[0]
    cache.advance()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("made", MIXED)
@pytest.mark.parametrize("read", MIXED)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_under_autocast(kind, made, read):
    """A cache serves the other kind too: what it holds is rounded to the precision that it was made in."""
    model, tokens = KINDS[kind], prompt()
    with torch.no_grad():
        exact = model.next_logits(tokens)
        with MIXED[made]():
            cache = model.new_cache(CONTEXT, page_size=4)
        with MIXED[read]():
            anew = model.next_logits(tokens)
            sequence = cache.allocate()
            for part in (tokens[:6], tokens[6:7], tokens[7:]):
                logits = step(model, cache, sequence, part)
    assert logits.dtype == anew.dtype
    rounding = 1e-4 if made == read == "off" else 0.04 * float(exact.abs().max())
    torch.testing.assert_close(logits, anew, rtol=0, atol=rounding)


def test_pages_have_the_precision_of_autocast():
    """So that kernels of that precision can read them, and memory is half."""
    with MIXED["on"]():
        cache = KINDS["MASLSSE"].new_cache(CONTEXT)
    assert set(cache.pools) == {"attention", "latent", "sparse", "tokens", "index"}
    assert {pool.k.dtype for pool in cache.pools.values()} == {torch.bfloat16}


def filled_outside_and_inside(model, inside_first):
    """A step of a sequence in one mode of numerics, and what another step does in the other mode."""
    modes = (contextlib.nullcontext, lambda: ki.numerics("invariant"))[:: -1 if inside_first else 1]
    cache = model.new_cache(CONTEXT, page_size=4)
    sequence = cache.allocate()
    with torch.no_grad():
        with modes[0]():
            step(model, cache, sequence, prompt()[:5])
        with modes[1](), pytest.raises(ki.Ineligible) as error:
            step(model, cache, sequence, prompt()[5:])
    return str(error.value)


@pytest.mark.native
def test_a_state_of_the_other_numerics_is_refused():
    """In invariant numerics it is that of the last whole chunk: going on with it as if it were the last is wrong."""
    model = KINDS["M"]
    assert "cannot go on with a state of numerics('invariant')" in filled_outside_and_inside(model, True)
    assert "the tokens of its state were not computed so" in filled_outside_and_inside(model, False)


@pytest.mark.native
def test_a_sequence_from_outside_without_a_token_joins_others_inside():
    model = KINDS["M"]
    cache = model.new_cache(2 * CONTEXT, page_size=4)
    late = cache.allocate()
    with torch.no_grad(), ki.numerics("invariant"):
        first = cache.allocate()
        step(model, cache, first, prompt()[:5])
        cache.begin([first, late], 3)
        logits = model.decode(torch.stack((prompt()[5:], prompt()[:3])), torch.tensor([5, 0]), cache)
        cache.advance()
        assert torch.equal(logits[0], model.next_logits(prompt()))
        assert torch.equal(logits[1], model.next_logits(prompt()[:3]))


@pytest.mark.native
@pytest.mark.parametrize("kind", ["A", "L", "S"])
def test_a_cache_of_another_autocast_is_refused_in_invariant_numerics(kind):
    """Its pages have another precision than the keys of training."""
    model = drawn_model(kind, **CACHED[kind])
    for made, used in (("on", "off"), ("off", "on")):
        with MIXED[made]():
            cache = model.new_cache(CONTEXT, page_size=4)
        refused = pytest.raises(ki.Ineligible, match="the cache must have the dtype of the keys here")
        with torch.no_grad(), ki.numerics("invariant"), MIXED[used](), refused:
            step(model, cache, cache.allocate(), prompt())


BEGINS = {
    "none": (([], 1), "sequences must be at least one, got none"),
    "unknown": (([5], 1), r"sequences must be allocated and not freed, got 5"),
    "twice": (([0, 0], 1), r"sequences must be different from each other, got \[0, 0\]"),
    "no tokens": (([0], 0), "tokens must be at least 1, got 0"),
    "negative": (([0], 2, [-1]), r"counts must be 1 numbers from 0 to 2, got \[-1\]"),
    "above": (([0], 2, [3]), r"counts must be 1 numbers from 0 to 2, got \[3\]"),
    "too few": (([0, 1], 2, [1]), r"counts must be 2 numbers from 0 to 2, got \[1\]"),
    "fraction": (([0], 2, [0.5]), r"counts must be 1 numbers from 0 to 2, got \[0.5\]"),
    "no room": (([0], 1000), "tokens must "),
}


@pytest.mark.parametrize("bad", BEGINS)
@pytest.mark.parametrize("kind", ["M", "AE", "MALEM"])
def test_a_step_that_cannot_be_is_refused_and_changes_nothing(kind, bad):
    model, tokens = KINDS[kind], prompt()
    cache = model.new_cache(CONTEXT, page_size=4)
    first, _ = cache.allocate(), cache.allocate()
    arguments, message = BEGINS[bad]
    if kind == "M" and bad == "no room":
        pytest.skip("states have no limit")
    with torch.no_grad():
        step(model, cache, first, tokens[:5])
        with pytest.raises(ValueError, match=message):
            cache.begin(*arguments)
        with pytest.raises(ValueError, match="begin must be called"):
            model.decode(tokens[None, :1], 5, cache)
        expected = model.next_logits(tokens)
        torch.testing.assert_close(step(model, cache, first, tokens[5:]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["M", "AE", "MALEM"])
def test_the_order_of_a_step(kind):
    model, tokens = KINDS[kind], prompt()[None]
    cache = model.new_cache(CONTEXT, page_size=4)
    sequence = cache.allocate()
    with pytest.raises(ValueError, match="begin must be called before a step's layers, got no step under way"):
        model.decode(tokens, 0, cache)
    with pytest.raises(ValueError, match="begin must be called before"):
        cache.advance()
    cache.begin([sequence], 2)
    with pytest.raises(ValueError, match=r"advance must be called after every block of the step, got none for \[0"):
        cache.advance()
    for wrong in (tokens, tokens[:, :1], tokens[:, :2].expand(2, -1), tokens[0, :2]):
        with pytest.raises(ValueError, match=r"tokens must be \[B, T\] of the step \(1, 2\), got shape"):
            model.decode(wrong, 0, cache)
    with torch.no_grad():
        model.decode(tokens[:, :2], 0, cache)
        with pytest.raises(ValueError, match="block must be one that has not taken its cache in this step, got 0"):
            model.decode(tokens[:, :2], 0, cache)
    cache.advance()
    assert cache.length(sequence) == 2
    with pytest.raises(ValueError, match="begin must be called before"):
        cache.advance()


@pytest.mark.parametrize("kind", ["M", "AE"])
def test_sequences_that_are_gone(kind):
    cache = KINDS[kind].new_cache(CONTEXT, page_size=4)
    sequence = cache.allocate()
    cache.begin([sequence], 1)
    cache.free(sequence)
    with pytest.raises(ValueError, match="begin must be called before"):
        KINDS[kind].decode(prompt(1)[None], 0, cache)
    for call in (cache.free, cache.share, cache.length):
        for gone in (sequence, -1, None):
            with pytest.raises(ValueError, match=f"sequence must be one that was allocated and not freed, got {gone}"):
                call(gone)
    assert cache.allocate() == sequence + 1


@pytest.mark.parametrize("kind", ["M", "AE"])
@pytest.mark.parametrize(("sizes", "message"), [((0, 4), "tokens must be at"), ((5, 0), "page_size must be at")])
def test_the_sizes_of_a_cache(kind, sizes, message):
    with pytest.raises(ValueError, match=f"{message} least 1, got 0"):
        KINDS[kind].new_cache(*sizes)
    with pytest.raises(TypeError, match="tokens must be an integer, got float"):
        KINDS[kind].new_cache(2.5)


def test_states_alone_have_no_limit():
    cache = KINDS["M"].new_cache(8, page_size=4)
    row = cache.allocate()
    with torch.no_grad():
        for _ in range(3):
            step(KINDS["M"], cache, row, prompt(5))
    assert cache.length(row) == 15


def test_lengths_are_those_of_the_sequences_that_are_left():
    cache = KINDS["M"].new_cache(8, page_size=4)
    rows = [cache.allocate(), cache.allocate()]
    with torch.no_grad():
        cache.begin(rows, 2)
        KINDS["M"].decode(torch.zeros(2, 2, dtype=torch.int64), 0, cache)
        cache.advance()
    cache.free(rows[0])
    assert cache.lengths() == [2]

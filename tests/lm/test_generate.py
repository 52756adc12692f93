"""Generation through the paged cache gives the tokens that computing everything anew gives."""

from dataclasses import replace

import pytest
import torch

import kernel_index as ki
from kernel_index.core import native
from kernel_index.lm.config import PRESETS, ExpertLayer, Latent, Sparse, StateSpace
from kernel_index.lm.generate import Sampling, generate, generate_batch, window_start
from kernel_index.lm.model import LanguageModel

CONTEXT = 24


def make(pattern, windows, **changes):
    """A model whose every weight matters, none of them zero."""
    torch.manual_seed(3)
    config = replace(PRESETS["nano"].model, pattern=pattern, windows=windows, context=CONTEXT, dropout=0.0, **changes)
    model = LanguageModel(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not name.endswith(("log_decay", "step_bias", "h_res_logits")):
                weight.copy_(torch.randn_like(weight) * (weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.3))
    return model


@pytest.fixture(scope="module")
def model():
    """A narrow and a wide window."""
    return make("AAA", (5, None, 11))


SIZES = {
    "latent": Latent(latent=16, rope=8),
    "state_space": StateSpace(heads=4, head_dim=16, state=8, chunk=8),
    "experts": ExpertLayer(count=4, topk=2, hidden=64, shared=32),
}
SPARSE = {"block": 4, "topk": 2, "tokens": 5, "index_heads": 2, "index_dim": 8}
KINDS = {
    **{
        kind: make("AS", (None, w), sparse=Sparse((kind,), **SPARSE))
        for kind, w in (("moba", 9), ("exact_token", None), ("clustered", None))
    },
    "L": make("L", (None,), **SIZES),
    "M": make("M", (None,), **SIZES),
    "AE": make("AE", (7, None), **SIZES),
    "S by groups": make("AS", (None, 9), sparse=Sparse(("clustered",), **SPARSE, hierarchy=(2, 1))),
    "MASLSSE": make(
        "MASLSSE", (None, 9, *5 * (None,)), residual="mhc", **SIZES,
        sparse=Sparse(("exact_token", "moba", "clustered"), **SPARSE, hierarchy=(2, 1)),
    ),
    "MALEM": make("MALEM", (None, 9, None, None, None), residual="mhc", **SIZES),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_block_generates_what_computing_anew_gives(kind):
    runs = ["".join(generate(KINDS[kind], "def f(x):", 2 * CONTEXT, seed=6, use_cache=c)) for c in (True, False)]
    assert runs[0] == runs[1]
    assert len(runs[0]) > CONTEXT // 2


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_rows_of_different_lengths(kind):
    """Prompts of 1, 7 and 4 tokens in one padded step, then one token each."""
    model, tokens = KINDS[kind], torch.randint(0, 256, (3, 8))
    counts = torch.tensor([1, 7, 4])
    cache = model.new_cache(3 * CONTEXT, page_size=4)
    rows = [cache.allocate() for _ in counts]
    with torch.no_grad():
        cache.begin(rows, 7, counts.tolist())
        first = model.decode(tokens[:, :7], 0, cache, counts)
        cache.advance()
        assert cache.lengths() == [1, 7, 4]
        cache.begin(rows, 1)
        second = model.decode(tokens.gather(1, counts[:, None]), counts, cache)
        cache.advance()
        for row, n in enumerate(counts.tolist()):
            for logits, seen in ((first[row], n), (second[row], n + 1)):
                torch.testing.assert_close(logits, model.next_logits(tokens[row, :seen]), rtol=1e-4, atol=1e-4)


def test_a_batch_gives_each_prompt_what_it_gets_alone():
    model, prompts = KINDS["MALEM"], ["", "def f(x):", "a prompt that is longer than the whole context"]
    together = ["".join(t) for t in zip(*generate_batch(model, prompts, CONTEXT + 5, seed=7), strict=True)]
    for row, prompt in enumerate(prompts):
        assert together[row] == "".join(generate(model, prompt, CONTEXT + 5, seed=7 + row))


def decoded(model, cache, prompt):
    """Logits after a new sequence of a cache: its prompt, then one token."""
    row = cache.allocate()
    for start, tokens in ((0, prompt[:-1]), (len(prompt) - 1, prompt[-1:])):
        cache.begin([row], len(tokens))
        logits = model.decode(tokens[None], start, cache)
        cache.advance()
    return logits[0]


def test_a_cache_that_outlives_a_change_of_the_weights_serves_new_sequences_with_the_new_ones():
    """Streams mix by a matrix of weights alone, which a step takes from the cache: it must be that of the prompt."""
    model, prompt = make("MAA", (None, None, 9), residual="mhc", **SIZES), torch.randint(0, 256, (6,))
    cache = model.new_cache(2 * CONTEXT, page_size=4)
    with torch.no_grad():
        before = decoded(model, cache, prompt)
        for layer in model.blocks.layers:
            layer.h_res_logits.normal_()
        after = decoded(model, cache, prompt)
        torch.testing.assert_close(after, model.next_logits(prompt), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, after, rtol=1e-2)


def test_decoding_has_no_gradient_rather_than_a_part_of_it():
    model, tokens = KINDS["MASLSSE"], torch.randint(0, 256, (1, 6))
    cache = model.new_cache(CONTEXT, page_size=4)
    cache.begin([cache.allocate()], 6)
    assert not model.decode(tokens, 0, cache).requires_grad


def test_a_shared_sequence_parts_ways_with_its_states():
    model, prompt = KINDS["MALEM"], torch.randint(0, 256, (1, 6))
    cache = model.new_cache(2 * CONTEXT, page_size=4)
    first = cache.allocate()
    with torch.no_grad():
        cache.begin([first], 6)
        model.decode(prompt, 0, cache)
        cache.advance()
        second = cache.share(first)
        cache.begin([first, second], 1)
        logits = model.decode(torch.tensor([[7], [9]]), 6, cache)
        cache.advance()
        for row, token in enumerate((7, 9)):
            expected = model.next_logits(torch.cat([prompt[0], torch.tensor([token])]))
            torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-4)
        cache.free(first)
        cache.begin([second], 1)
        model.decode(torch.tensor([[1]]), 7, cache)


def test_sampling_keeps_what_it_is_told_to():
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0]).log_softmax(-1)

    def draws(**options):
        sampling = Sampling(1.0, **options)
        return {sampling.draw(logits, torch.Generator().manual_seed(seed)) for seed in range(60)}

    assert draws(top_k=4) == {0, 1, 2, 3}
    assert draws(top_k=2) == {0, 1}
    assert draws(top_k=4, top_p=0.65) == {0, 1}  # the first holds 0.64
    assert draws(top_k=4, top_p=0.6) == {0}
    for bad in ({"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
            Sampling(**bad)


@pytest.mark.parametrize("prompt", ["", "def f(x):", "a prompt that is longer than the model's whole context"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_with_and_without_cache_token_for_token(model, prompt, temperature):
    """Over more than three contexts, so that the window moves several times."""
    runs = [
        "".join(generate(model, prompt, 3 * CONTEXT + 5, temperature=temperature, seed=5, use_cache=use_cache))
        for use_cache in (True, False)
    ]
    assert runs[0] == runs[1]
    assert len(runs[0]) > CONTEXT


def test_logits_agree_at_every_position(model):
    tokens = torch.randint(0, 256, (1, CONTEXT))
    cache = model.new_cache(CONTEXT, page_size=4)
    row = cache.allocate()
    with torch.no_grad():
        for count in range(CONTEXT):
            cache.begin([row], 1)
            logits = model.decode(tokens[:, count : count + 1], count, cache)[0]
            cache.advance()
            expected = model.next_logits(tokens[0, : count + 1])
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert cache.pools["attention"].counters.advances == CONTEXT
    assert cache.pools["attention"].counters.writes == CONTEXT * 3


def test_a_step_feeds_one_token_and_every_layer_decodes(model):
    with ki.receipts() as log:
        "".join(generate(model, "abc", 4))
    decodes = [r for r in log if r.op == "fa4_kvcache_decode"]
    assert len(decodes) == 4 * 3
    assert {r.ran for r in decodes} == {"native" if native.machine_why_not() is None else "sdpa"}
    assert dict(decodes[0].declined)["fa4"] == "dense_fa4_kvcache_no_sliding_window"
    assert dict(decodes[1].declined)["fa4"] == "dense_fa4_kvcache_cuda_only"
    assert not [r for r in log if r.op == "attention"]


def test_text_streams_token_by_token(model):
    """Each piece of text is yielded before the next token is computed, and never half a character."""
    stream = generate(model, "abc", 6)
    for seen in (1, 2, 3):
        with ki.receipts() as log:
            next(stream)
        assert len([r for r in log if r.op == "fa4_kvcache_decode"]) == 3, f"one step for token {seen}"


def test_bytes_of_one_character_wait_for_one_another(model, monkeypatch):
    written = iter("é€x".encode())
    monkeypatch.setattr(Sampling, "draw", lambda *_: next(written))
    assert list(generate(model, "", 6)) == ["", "é", "", "", "€", "x", ""]


def test_rows_share_their_prompt_and_part_ways(model):
    """Two continuations of one prompt in one batch: shared pages, copied when the first token is written."""
    prompt = torch.randint(0, 256, (1, 6))
    cache = model.new_cache(2 * CONTEXT, page_size=4)
    first = cache.allocate()
    with torch.no_grad():
        cache.begin([first], 6)
        model.decode(prompt, 0, cache)
        cache.advance()
        second = cache.share(first)
        new = torch.tensor([[7], [9]])
        cache.begin([first, second], 1)
        logits = model.decode(new, 6, cache)
        cache.advance()
    assert cache.pools["attention"].counters.copied == 1
    for row, token in enumerate((7, 9)):
        expected = model.next_logits(torch.cat([prompt[0], torch.tensor([token])]))
        torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("count", "start"), [(1, 0), (24, 0), (25, 12), (36, 12), (37, 24), (49, 36)])
def test_the_window_moves_by_half_a_context(count, start):
    assert window_start(count, 24) == start
    assert count - start <= 24

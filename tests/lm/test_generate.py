"""Generation through the paged cache gives the tokens that computing everything anew gives."""

from dataclasses import replace

import pytest
import torch

import kernel_index as ki
from kernel_index.lm.config import PRESETS
from kernel_index.lm.generate import generate, window_start
from kernel_index.lm.model import LanguageModel

CONTEXT = 24


@pytest.fixture(scope="module")
def model():
    """A model with a narrow and a wide window whose every weight matters, none of them zero."""
    torch.manual_seed(3)
    config = replace(PRESETS["nano"].model, pattern="AAA", windows=(5, None, 11), context=CONTEXT, dropout=0.0)
    model = LanguageModel(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * (weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.3))
    return model


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
    assert cache.counters.advances == CONTEXT
    assert cache.counters.writes == CONTEXT * 3


def test_a_step_feeds_one_token_and_every_layer_decodes(model):
    with ki.receipts() as log:
        "".join(generate(model, "abc", 4))
    decodes = [r for r in log if r.op == "fa4_kvcache_decode"]
    assert len(decodes) == 4 * 3
    assert {r.ran for r in decodes} == {"sdpa"}
    assert dict(decodes[0].declined)["fa4"] == "dense_fa4_kvcache_no_sliding_window"
    assert dict(decodes[1].declined)["fa4"] == "dense_fa4_kvcache_cuda_only"
    assert not [r for r in log if r.op == "attention"]


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
    assert cache.counters.copied == 1
    for row, token in enumerate((7, 9)):
        expected = model.next_logits(torch.cat([prompt[0], torch.tensor([token])]))
        torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("count", "start"), [(1, 0), (24, 0), (25, 12), (36, 12), (37, 24), (49, 36)])
def test_the_window_moves_by_half_a_context(count, start):
    assert window_start(count, 24) == start
    assert count - start <= 24

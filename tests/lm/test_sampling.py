"""What generating asks of its arguments, and what it leaves as it was: the model's modes and the random state."""

import contextlib

import pytest
import torch

from kernel_index.lm.generate import Sampling, generate, generate_batch
from tests.lm.test_generate import CONTEXT, KINDS, SIZES, make

BAD = [
    ({"temperature": -1.0}, "temperature must be at least 0, got -1.0"),
    ({"temperature": float("nan")}, "temperature must be finite, got nan"),
    ({"temperature": float("inf")}, "temperature must be finite, got inf"),
    ({"temperature": "1"}, "temperature must be a number, got str"),
    ({"top_k": 0}, "top_k must be at least 1, got 0"),
    ({"top_k": 2.5}, "top_k must be an integer, got float"),
    ({"top_k": True}, "top_k must be an integer, got bool"),
    ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
    ({"top_p": 1.1}, "top_p must be above 0 and at most 1, got 1.1"),
    ({"top_p": float("nan")}, "top_p must be finite, got nan"),
    ({"top_p": None}, "top_p must be a number, got NoneType"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_sampling_names_what_it_cannot_do(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Sampling(**options)


@pytest.mark.parametrize("temperature", [1e-5, 1e-40, 5e-324])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_temperature_next_to_nothing_takes_the_likeliest(temperature, dtype):
    logits = torch.linspace(-40, 40, 100, dtype=torch.float64)[torch.randperm(100)].to(dtype)
    drawn = {Sampling(temperature).draw(logits, torch.Generator().manual_seed(seed)) for seed in range(9)}
    assert drawn <= set((logits == logits.max()).nonzero().flatten().tolist())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: generate(m, "a", -1), "tokens must be at least 0, got -1"),
        (lambda m: generate(m, "a", 2.5), "tokens must be an integer, got float"),
        (lambda m: generate(m, "a", 1, top_k=0), "top_k must be at least 1, got 0"),
        (lambda m: generate(m, ["a"], 1), r"prompts must be texts, got one of type list"),
        (lambda m: generate(m, "a", 1, seed=0.5), "seed must be an integer, got float"),
        (lambda m: generate_batch(m, [], 1), "prompts must hold at least one text, got none"),
        (lambda m: generate_batch(m, "abc", 1), "prompts must be a sequence of texts, got one text"),
        (lambda m: generate_batch(m, ["a", b"b"], 1), "prompts must be texts, got one of type bytes"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_asked_for(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(KINDS["AE"])


def in_training():
    """Dropout, and a router that notes its load; one module does not train."""
    model = make("AE", (7, None), **SIZES)
    model.train()
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.5
    model.hybrid_blocks()[0].mlp.eval()
    return model


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_model_in_training_generates_as_one_that_is_not(use_cache):
    model = in_training()
    modes = {name: m.training for name, m in model.named_modules()}
    load, state = model.routers()[0].load.clone(), torch.get_rng_state()
    stream = generate(model, "def f(x):", 12, temperature=0, use_cache=use_cache)
    texts = [next(stream)]
    assert {name: m.training for name, m in model.named_modules()} == modes, "between two tokens too"
    texts += stream
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert "".join(texts) == "".join(generate(model.eval(), "def f(x):", 12, temperature=0, use_cache=use_cache))
    assert torch.equal(load, model.routers()[0].load)
    assert torch.equal(state, torch.get_rng_state())


def test_a_failing_step_leaves_a_model_in_training(monkeypatch):
    model = in_training()
    monkeypatch.setattr(type(model), "cached_hidden", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(generate(model, "a", 1))
    assert model.training
    assert model.hybrid_blocks()[1].mlp.router.training


@pytest.mark.parametrize("kind", KINDS)
def test_generating_under_autocast(kind):
    with torch.autocast("cpu", torch.bfloat16):
        for use_cache in (True, False):
            assert list(generate_batch(KINDS[kind], ["def f(x):", "a"], 4, use_cache=use_cache))


def test_autocast_that_ends_between_two_tokens():
    stream = generate(KINDS["MASLSSE"], "def f(x):", CONTEXT)
    for on in (True, False, True, False):
        with torch.autocast("cpu", torch.bfloat16) if on else contextlib.nullcontext():
            next(stream)

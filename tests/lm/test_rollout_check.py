"""Training and rollout have the same bits: every axis × what has the form, and that the check can fail."""

import functools

import pytest
import torch

import kernel_index as ki
from kernel_index.core import native
from kernel_index.core.numerics import needs_ordinary_numerics
from kernel_index.lm import rollout_check
from kernel_index.lm.config import ExpertLayer, Latent, ModelConfig, Sparse, StateSpace
from kernel_index.lm.data import Batch
from kernel_index.lm.generate import Rollout, Sampling, rollout
from kernel_index.lm.model import LanguageModel
from kernel_index.lm.rollout_axes import AXES, decoded, packed, trained
from kernel_index.nn import Attention
from tests.threads import with_threads

DTYPES = (torch.float32, torch.bfloat16)
TOKENS = 300
COMPILE = "compile on or off"
PROMPTS = ("hello world, this is", "a", "some other prompt, of some length")


def config(pattern: str, **changes) -> ModelConfig:
    windows = tuple(20 if i == 1 and letter in "AS" else None for i, letter in enumerate(pattern))
    sizes = {"dim": 48, "heads": 4, "kv_heads": 2, "head_dim": 12, "hidden": 72, "context": 300}
    return ModelConfig(**({"pattern": pattern, "windows": windows} | sizes | changes))


def drawn_model(pattern: str = "AA", dtype: torch.dtype = torch.float32, **changes) -> LanguageModel:
    """With weights that give every layer a say; a new model's branches end at zero."""
    torch.manual_seed(0)
    model = LanguageModel(config(pattern, **changes))
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(0.2 * torch.randn_like(weight) + (weight.ndim == 1) * weight)
    return model.to(dtype).eval()


def forms() -> dict[str, LanguageModel]:
    """The models whose letters have an invariant form."""
    return {
        "A, fp32 stream, SwiGLU": functools.partial(drawn_model, "AA", activation="swiglu"),
        "A, plain stream, squared ReLU": functools.partial(drawn_model, "AA", residual="plain"),
        "A, hyper-connections": functools.partial(drawn_model, "AA", residual="mhc"),
        "M": functools.partial(drawn_model, "MM", state_space=StateSpace(4, 12, 8, chunk=16)),
        "M, chunks": functools.partial(drawn_model, "MA", state_space=StateSpace(2, 8, 24, chunk=64)),
        "S, MoBA": functools.partial(drawn_model, "SS", sparse=Sparse(("moba",), 16, 3)),
        "S, clustered": functools.partial(drawn_model, "SS", sparse=Sparse(("clustered",), 16, 3)),
        "S, hierarchy": functools.partial(
            drawn_model, "SS", sparse=Sparse(("clustered",), 8, 4, hierarchy=(3, 2), report_unions=True)
        ),
        "S, exact tokens": functools.partial(drawn_model, "SS", sparse=Sparse(("exact_token",), tokens=24)),
        "L": functools.partial(drawn_model, "LL", latent=Latent(16, 8)),
        "L, fused": functools.partial(drawn_model, "LA", residual="plain", latent=Latent(16, 8, fused=True)),
        "E, sigmoid, shared": functools.partial(drawn_model, "AE", experts=ExpertLayer(4, 2, 40, shared=24)),
        "E, softmax, SwiGLU": functools.partial(
            drawn_model, "EAE", activation="swiglu", residual="plain", experts=ExpertLayer(5, 3, 24, scores="softmax")
        ),
    }


FORMS = forms()


QUICK = ("A, fp32 stream, SwiGLU", "A, hyper-connections", "M", "S, MoBA", "S, exact tokens", "L", "E, sigmoid, shared")
"""One form of each letter, kind of selection and residual."""


def repeats_a_form(form, dtype=torch.float32) -> bool:
    """``make test`` has every letter in float32, and a dense decoder in bfloat16."""
    return form not in QUICK or (dtype != torch.float32 and form != QUICK[0])


@pytest.mark.native
@pytest.mark.thorough_if(when=repeats_a_form)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_every_axis_is_exactly_zero(form, dtype):
    axes = [name for name in AXES if name != COMPILE]
    found = rollout_check.check(FORMS[form](dtype=dtype), TOKENS, axes=axes)
    assert list(found) == axes
    for name, finding in found.items():
        assert finding.refused == "", name
        assert finding.compared > 0, name
        assert (finding.largest, finding.differing) == (0.0, 0), name


@pytest.mark.native
@pytest.mark.thorough_if(when=lambda form: form != QUICK[0])
@pytest.mark.parametrize("form", FORMS)
def test_under_autocast_too(form):
    axes = ("packed or alone", "cached decoding", "prefix reuse")
    with torch.autocast("cpu", torch.bfloat16):
        found = rollout_check.check(FORMS[form](), 200, axes=axes)
    assert {name: (f.differing, f.refused) for name, f in found.items()} == dict.fromkeys(axes, (0, ""))


@pytest.mark.native
@pytest.mark.compiled
@pytest.mark.thorough_if(when=lambda form, compiler: form != next(iter(FORMS)) or compiler == "inductor")
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("form", FORMS)
def test_compilation_changes_nothing(form, compiler):
    assert rollout_check.check(FORMS[form](), 300, axes=[COMPILE], compiler=compiler)[COMPILE].is_exact


@pytest.mark.native
@pytest.mark.compiled
@pytest.mark.thorough
def test_inductor_rounds_a_model_of_bfloat16_as_it_is_written():
    """The mean of the streams is a chain of roundings, which Inductor by itself would leave out."""
    model = FORMS["A, hyper-connections"](dtype=torch.bfloat16)
    assert rollout_check.check(model, 100, axes=[COMPILE], compiler="inductor")[COMPILE].is_exact


@pytest.mark.native
def test_the_check_sees_what_ordinary_numerics_do():
    found = rollout_check.check(drawn_model(), 300, axes=["cached decoding", "batch size"], mode="ordinary")
    assert found["cached decoding"].differing > 0
    assert not found["cached decoding"].is_exact
    assert 0 < found["cached decoding"].largest < 1e-3


@pytest.mark.native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(4))
def test_drawn_packings_chunks_and_pages(seed, dtype):
    """Whatever batch, order, packing, chunk and page is drawn."""
    model, generator = drawn_model(dtype=dtype), torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    sequences = rollout_check.drawn(model.config, 400, generator)
    order = torch.randperm(len(sequences), generator=generator).tolist()
    with ki.numerics("invariant"):
        expected = trained(model, [[i] for i in range(len(sequences))], sequences)
        rows = packed(sequences, draw(300, 600), order)
        others = trained(model, rows, sequences, length=draw(600, 700))
        read = decoded(model, sequences, page=draw(1, 40), chunk=lambda: draw(1, 70), scattered=seed % 2 == 1)
    for i, log_probs in enumerate(expected):
        assert torch.equal(others[i], log_probs)
        assert torch.equal(read[i], log_probs)


def of_training(model: LanguageModel, found: Rollout) -> list[torch.Tensor]:
    """The trainer's log-probabilities of what a rollout drew."""
    sequences = [
        torch.tensor([256, *prompt.encode(), *drawn]) for prompt, drawn in zip(PROMPTS, found.tokens, strict=True)
    ]
    log_probs = model.log_probs(Batch.of_documents([sequences]))[0]
    starts = [sum(map(len, sequences[:i])) for i in range(len(sequences))]
    ends = [start + len(s) - 1 for start, s in zip(starts, sequences, strict=True)]
    return [log_probs[end - len(drawn) : end] for end, drawn in zip(ends, found.tokens, strict=True)]


@pytest.mark.native
@pytest.mark.thorough_if(when=repeats_a_form)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_a_rollout_has_the_trainers_log_probabilities(form, dtype):
    model = FORMS[form](dtype=dtype)
    with ki.numerics("invariant"):
        found = rollout(model, PROMPTS, 12, Sampling(top_p=0.9), seed=3)
        expected = of_training(model, found)
        alone = rollout(model, PROMPTS[1:2], 12, Sampling(top_p=0.9), seed=4)
    for i, log_probs in enumerate(expected):
        assert torch.equal(found.log_probs[i], log_probs)
    assert torch.equal(alone.tokens[0], found.tokens[1])
    assert torch.equal(alone.sampled_log_probs[0], found.sampled_log_probs[1])


def test_what_a_rollout_returns():
    model = drawn_model()
    found = rollout(model, PROMPTS, 12, Sampling(temperature=0.7, top_k=5))
    for tokens, text, own, sampled in zip(*found, strict=True):
        assert (tokens.dtype, own.dtype, sampled.dtype) == (torch.int64, torch.float32, torch.float32)
        assert len(tokens) == len(own) == len(sampled) <= 12
        assert text == bytes(t for t in tokens.tolist() if t < 256).decode(errors="replace")
        assert (sampled <= 0).all()
        assert (own <= 0).all()
    greedy = rollout(model, PROMPTS, 3, Sampling(temperature=0.0))
    assert all((s == 0).all() for s in greedy.sampled_log_probs), "a draw without a choice is certain"
    first = rollout(model, PROMPTS, 12, Sampling(temperature=0.7, top_k=1))
    for drawn in first.sampled_log_probs:
        assert (drawn <= 0).all(), "no draw has a probability above 1"
        torch.testing.assert_close(drawn, torch.zeros_like(drawn), rtol=0, atol=1e-5)
    again = rollout(model, PROMPTS, 12, Sampling(temperature=0.7, top_k=5))
    assert all(torch.equal(one, other) for one, other in zip(found.tokens, again.tokens, strict=True))


def test_sampled_log_probabilities_are_of_what_was_sampled():
    """Within rounding, those of the truncated and renormalised distribution."""
    model, sampling = drawn_model(), Sampling(temperature=0.7, top_k=5, top_p=0.8)
    found = rollout(model, PROMPTS[:1], 8, sampling)
    history = [256, *PROMPTS[0].encode()]
    for token, log_prob in zip(found.tokens[0].tolist(), found.sampled_log_probs[0], strict=True):
        tokens, p = sampling.kept(model.next_logits(torch.tensor(history)).detach())
        p = p / p.sum()
        torch.testing.assert_close(log_prob.exp(), p[tokens == token][0], rtol=1e-4, atol=1e-5)
        history.append(token)


def test_a_rollout_that_outgrows_the_context_is_refused():
    with pytest.raises(ValueError, match=r"tokens must be at most 266: START, the longest prompt .* got 267"):
        rollout(drawn_model(), PROMPTS, 267)


def test_log_probs_of_a_batch():
    model = drawn_model()
    sequences = [torch.tensor([256, 3, 7, 9]), torch.tensor([256, 5])]
    batch = Batch.of_documents([sequences])
    found = model.log_probs(batch)
    assert (found.shape, found.dtype) == ((1, 6), torch.float32)
    logits = model.logits(model.hidden(batch)).log_softmax(-1)
    for place, target in ((0, 3), (1, 7), (2, 9), (4, 5)):
        torch.testing.assert_close(found[0, place], logits[0, place, target])
    assert found[0, 3] == found[0, 5] == 0


@pytest.mark.native
def test_a_letter_without_the_form_is_refused_and_the_others_are_still_checked(monkeypatch):
    """As a letter of tomorrow would be."""
    forward = Attention.forward

    def refused(self, *args):
        needs_ordinary_numerics("nn.Attention", "not yet")
        return forward(self, *args)

    monkeypatch.setattr(Attention, "forward", refused)
    report = rollout_check.check_by_letter(drawn_model("AE", experts=ExpertLayer(4, 2, 40)), 60, axes=["batch size"])
    assert report.findings["E"]["batch size"].is_exact
    for name in ("A", "AE"):
        assert report.findings[name]["batch size"].refused.startswith("nn.Attention: numerics('invariant') cannot run")
    assert not report.is_exact
    assert len(report.refusals()) == 1


@pytest.mark.skipif(native.machine_why_not() is not None, reason=str(native.machine_why_not()))
def test_dropout_is_refused_in_training():
    model = drawn_model(dropout=0.1).train()
    with ki.numerics("invariant"), pytest.raises(ki.Ineligible, match="the mask follows an element's place"):
        model.log_probs(Batch.of_documents([[torch.tensor([256, 1, 2])]]))


@pytest.mark.native
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_training_step_has_the_same_bits_for_any_number_of_threads(dtype):
    """The loss with the token after the next, and the gradients of all weights, of every letter."""
    options = {"experts": ExpertLayer(4, 2, 40, shared=24), "sparse": Sparse(("moba",), 16, 3), "latent": Latent(16, 8)}
    state_space = StateSpace(4, 12, 8, chunk=16)
    model = drawn_model("MASLE", dtype, residual="mhc", ahead=0.3, state_space=state_space, **options).train()
    generator = torch.Generator().manual_seed(0)
    batch = Batch.of_documents([rollout_check.drawn(model.config, 80, generator) for _ in range(2)])

    def step():
        model.zero_grad()
        with ki.numerics("invariant"):
            loss = model.loss(batch)
            loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    loss, gradients = step()
    for threads in (1, 3):
        again, found = with_threads(threads, step)
        assert torch.equal(again, loss)
        assert len(found) == len(gradients)
        assert all(torch.equal(one, other) for one, other in zip(found, gradients, strict=True))

"""A model that ``apply(…, numerics="invariant")`` has patched, under ``torch.compile``: as a whole, and its layers."""

import contextlib

import pytest
import torch

pytest.importorskip("transformers")

from torch import nn

import kernel_index as ki
from kernel_index.core.numerics import Ineligible
from tests.integrations.models import config_of, model_of

pytestmark = pytest.mark.native


def patched(name: str = "llama", dtype: torch.dtype = torch.float32):
    model = model_of(name).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3 if p.ndim > 1 else 1)
    ki.transformers.apply(model, numerics="invariant")
    return model


def batch(form: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 60, (3, 21), generator=torch.Generator().manual_seed(1))
    real = torch.ones_like(ids)
    real[0, :5] = real[1, -4:] = 0
    restarting = torch.cat((torch.arange(9), torch.arange(12))).expand(3, -1)
    labels = ids.masked_fill(real == 0, -100)
    labels[:, 1:] = labels[:, 1:].masked_fill(real[:, :-1] == 0, -100)  # nothing is predicted from padding
    return {
        "plain": {"input_ids": ids, "labels": ids},
        "padded": {"input_ids": ids, "attention_mask": real, "labels": labels},
        "packed": {"input_ids": ids, "position_ids": restarting, "labels": ids},
        "without labels": {"input_ids": ids},
    }[form]


def step(call, model, form: str) -> list[torch.Tensor]:
    """Logits, loss and gradients."""
    model.zero_grad()
    out = call(**batch(form))
    loss = out.logits.square().mean() if out.loss is None else out.loss
    loss.backward()
    return [out.logits.detach().clone(), loss.detach(), *(p.grad.clone() for p in model.parameters())]


def compiled(model, backend: str = "eager"):
    torch._dynamo.reset()
    graphs = []
    if backend == "eager":
        return torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph.forward), graphs
    return torch.compile(model, backend=backend), graphs


FORMS = ("plain", "padded", "packed", "without labels")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("training", [True, False])
def test_a_whole_model_has_the_bits_of_eager_code(training, form):
    """Of logits, loss and all gradients; and one graph serves all layers of a training step."""
    model = patched().train(training)
    expected = step(model, model, form)
    whole, graphs = compiled(model)
    for block in (contextlib.nullcontext(), ki.numerics("invariant"), contextlib.nullcontext()):
        with block:
            found = step(whole, model, form)
        assert all(map(torch.equal, found, expected))
    assert len(graphs) == (1 if training else 0)  # Transformers makes a cache in evaluation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductor(dtype):
    """Whose backward passes are compiled after the forward of the model has left the mode."""
    model = patched("qwen3", dtype).train()
    expected = step(model, model, "packed")
    whole, _ = compiled(model, "inductor")
    assert all(map(torch.equal, step(whole, model, "packed"), expected))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant):
    model = patched().train()
    expected = step(model, model, "packed")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    whole, _ = compiled(model)
    assert all(map(torch.equal, step(whole, model, "packed"), expected))


def test_decoding():
    model = patched()
    ids = batch("plain")["input_ids"]
    whole, graphs = compiled(model)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        assert torch.equal(whole(ids, use_cache=False).logits, expected)
        assert len(graphs) == 1
        first = whole(ids[:, :11], use_cache=True)
        rest = whole(ids[:, 11:], past_key_values=first.past_key_values, use_cache=True)
    assert torch.equal(torch.cat((first.logits, rest.logits), 1), expected)
    assert len(graphs) == 1  # a call with a cache runs as it is written


def test_order_and_packing_do_not_matter_to_a_whole_model_either():
    model = patched().train()
    whole, _ = compiled(model)
    ids = batch("plain")["input_ids"]
    found = []
    for rows in (ids, ids.flip(0)):
        model.zero_grad()
        whole(rows, labels=rows).loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(map(torch.equal, *found))


def test_layers_that_are_compiled_by_themselves():
    """As one graph each."""
    model = patched().train()
    expected = step(model, model, "packed")
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(backend="eager", fullgraph=True)
    assert all(map(torch.equal, step(model, model, "packed"), expected))


def test_one_graph_of_the_whole_model_is_refused_with_the_reason():
    model = patched()
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="reads a batch's documents on the host"):
        torch.compile(model, backend="eager", fullgraph=True)(**batch("plain"))


def test_a_refusal_inside_a_compiled_layer_is_the_callers():
    model = patched()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    whole, _ = compiled(model.train())
    with pytest.raises((Ineligible, torch._dynamo.exc.Unsupported), match="attention_dropout is not 0"):
        whole(**batch("plain"))
    model.eval()
    assert torch.equal(whole(**batch("plain")).logits, model(**batch("plain")).logits)


def test_a_failing_call_leaves_the_compiler_as_it_was():
    model = patched()
    whole, graphs = compiled(model)

    @torch.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)
    def after(x):
        return x + 1

    with pytest.raises(ValueError):
        whole()
    after(torch.ones(2))
    assert len(graphs) == 1
    assert isinstance(nn.Linear(2, 2)(torch.ones(1, 2)), torch.Tensor)


@pytest.mark.parametrize("training", [True, False])
def test_attention_dropout_is_judged_where_it_is_active(training):
    import transformers as hf

    config = config_of("llama")
    config.attention_dropout = 0.1
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(config).train(training)
    report = ki.transformers.apply(model, numerics="invariant")
    assert model.training is training
    assert not [c for c in report.left if c.kind == "attention"]
    with pytest.raises(Ineligible, match=r"attention of LlamaAttention 0: .*attention_dropout is not 0"):
        model.train()(**batch("plain"))
    model.eval()
    ids = batch("plain")["input_ids"]
    together = model(ids, use_cache=False).logits
    assert torch.equal(model(ids[1:2], use_cache=False).logits, together[1:2])
    model(ids, use_cache=False, labels=ids).loss.backward()
    assert not report.calls_unordered  # the decoder was tried without dropout
    report.undo()

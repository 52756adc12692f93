"""Which training calls of a patched model are put in one order, and that no other call is changed by it."""

import pytest
import torch

pytest.importorskip("transformers")

import transformers as hf
from torch import Tensor, nn

import kernel_index as ki
from kernel_index.integrations.hugging_face import invariant, one_order
from tests.integrations.models import config_of
from tests.integrations.test_invariant_gradients import gradients, training_batch
from tests.integrations.test_invariant_model import patched, same, sequences

pytestmark = pytest.mark.native


def padded(*lengths: int) -> dict[str, Tensor]:
    """A batch that is padded on the left, without labels."""
    batch = training_batch(sequences(*lengths), "left")
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def without_gradients(model: nn.Module, **call):
    with torch.no_grad():
        return model(**call, use_cache=False)


class Pair(hf.LlamaPreTrainedModel):
    """A model that calls its decoder for two batches, as a model of preferences does."""

    def __init__(self, config):
        super().__init__(config)
        self.model, self.score = hf.LlamaModel(config), nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, rejected=None, rejected_mask=None, use_cache=None):
        found = []
        for ids, mask in ((input_ids, attention_mask), (rejected, rejected_mask)):
            if ids is not None:
                found.append(self.score(self.model(ids, attention_mask=mask, use_cache=False)[0])[..., 0])
        return tuple(found)


@pytest.mark.parametrize("lengths", [((9, 5), (4, 9)), ((9, 9), (9, 9))])
def test_a_model_that_calls_its_decoder_twice(lengths):
    torch.manual_seed(0)
    model = Pair(config_of("llama"))
    ki.transformers.apply(model, numerics="invariant")
    batches = [padded(*lengths[0]), padded(*lengths[1])]
    call = batches[0] | {"rejected": batches[1]["input_ids"], "rejected_mask": batches[1]["attention_mask"]}
    expected = without_gradients(model, **call)
    for found, wanted, batch in zip(model(**call), expected, batches, strict=True):
        real = batch["attention_mask"].bool()
        assert torch.equal(found[real], wanted[real])


class Own(hf.LlamaModel):
    """A decoder that returns something else than a value for each token."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, last=False, use_cache=None):
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": False}
        hidden = super().forward(input_ids, **given)[0]
        return (hidden, hidden[:, -1]) if last else (hidden,)


@pytest.mark.parametrize("call", [{}, {"last": True}])
def test_a_decoder_that_returns_more_than_values_of_tokens(call):
    torch.manual_seed(0)
    model = Own(config_of("llama"))
    report = ki.transformers.apply(model, numerics="invariant")
    ids = sequences(9)[0].expand(2, -1).contiguous()
    ids[0] = ids[0].flip(0)
    expected = without_gradients(model, input_ids=ids, **call)
    for found, wanted in zip(model(ids, use_cache=False, **call), expected, strict=True):
        assert torch.equal(found, wanted)
    assert bool(report.calls_unordered) == bool(call)


def test_hooks_see_the_callers_rows():
    model, batch = patched("llama"), padded(20, 9, 3)
    report = ki.transformers.Report(model, (), [])
    shift = torch.tensor([0.0, 5.0, 1.0])[:, None, None]
    handle = model.model.layers[0].register_forward_hook(lambda module, given, out: out + shift)
    expected = without_gradients(model, **batch).logits
    assert torch.equal(model(**batch, use_cache=False).logits, expected)
    assert list(report.calls_unordered.values()) == [1]
    assert "numerics: model: 1 calls kept the caller's rows" in str(report)
    assert "layers.0 has a hook" in str(report)
    handle.remove()


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_of_padding_count_as_they_do_without_gradients(side):
    """The usual labels: those of padding are ignored, but the first token has the padding before it."""
    model, batch = patched("llama"), training_batch(sequences(20, 9), side)
    real = batch["attention_mask"]
    labels = batch["input_ids"].masked_fill(real == 0, -100)
    if side == "right":
        labels[1, 12] = 7
    call = {"input_ids": batch["input_ids"], "attention_mask": real, "labels": labels}
    assert torch.equal(model(**call, use_cache=False).loss.detach(), without_gradients(model, **call).loss)


def of_loss_and_logits(model, batch: dict[str, Tensor]) -> list[Tensor]:
    """As a distillation has it: the loss of the labels, and one of the logits."""
    model.zero_grad()
    out = model(**batch, use_cache=False)
    real = batch["attention_mask"].bool()
    terms = torch.where(real, out.logits.square().mean(-1), 0.0)
    (out.loss + terms.double().sum().float()).backward()  # in float64 the order of the sum does not show
    return [p.grad.clone() for p in model.parameters()]


def test_gradients_of_a_loss_and_of_logits_beside_it():
    model, rows = patched("llama"), sequences(40, 7, 25)
    expected = of_loss_and_logits(model, training_batch(rows, "left"))
    same(of_loss_and_logits(model, training_batch(rows[::-1], "right")), expected)


@pytest.mark.parametrize("items", [40, torch.tensor(40)])
def test_gradients_as_a_trainer_asks_for_them(items):
    """``Trainer`` gives the number of targets of all micro-batches."""
    model, rows = patched("llama").train(), sequences(40, 7, 25)
    found = []
    for moved, side in ((rows, "left"), (rows[::-1], "right")):
        model.zero_grad()
        model(**training_batch(moved, side), num_items_in_batch=items).loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    same(*found)


def test_documents_that_differ_in_their_labels_alone():
    model, row = patched("llama"), sequences(12)[0]
    ids, real = row.expand(2, -1), torch.ones(2, 12, dtype=torch.int64)
    labels = torch.stack([torch.where(torch.arange(12) < 4, -100, row), torch.where(torch.arange(12) < 9, -100, row)])
    one, other = (
        gradients(model, {"input_ids": ids, "attention_mask": real, "labels": given}, "loss")
        for given in (labels, labels.flip(0))
    )
    same(one, other)


@pytest.mark.parametrize("kept", [5, 100])
def test_logits_that_are_kept_stand_where_they_do_without_gradients(kept):
    model, batch = patched("llama"), padded(20, 9)
    found = model(**batch, logits_to_keep=kept, use_cache=False).logits
    expected = without_gradients(model, **batch, logits_to_keep=kept).logits
    real = batch["attention_mask"].bool()[:, -kept:]
    assert found.shape == expected.shape
    assert torch.equal(found[real], expected[real])


def test_a_model_without_a_cache_trains_in_order_in_evaluation_too():
    model, rows = patched("llama"), sequences(20, 3)
    model.config.use_cache = False
    batch = training_batch(rows, "packed")
    del batch["labels"]
    assert one_order._trains(model.model, batch)
    model.config.use_cache = True
    assert not one_order._trains(model.model, batch)


def test_windows_and_long_rows():
    """Masks of packed rows are checked at some queries."""
    model, batch = patched("mistral"), padded(150, 70, 60, 20)
    expected, found = without_gradients(model, **batch).logits, model(**batch, use_cache=False).logits
    real = batch["attention_mask"].bool()
    assert torch.equal(found[real], expected[real])


class Scaled(nn.Embedding):
    def forward(self, input):
        return super().forward(input) * 3


@pytest.mark.parametrize("padding", [None, 0, -1])
def test_an_embedding_by_gathered_rows(padding):
    """What a GPU runs, on a CPU: an embedding of a class of its own keeps the rest of its forward."""
    layer = Scaled(5, 3, padding_idx=padding)
    for input in (torch.tensor([[4, 0, 4], [1, 1, 0]]), torch.zeros(2, 0, dtype=torch.int64)):
        expected = layer(input)
        with invariant._SteadyEmbedding():
            found = layer(input)
        assert torch.equal(found, expected)
        grads = [torch.autograd.grad(out.square().sum(), layer.weight)[0] for out in (found, expected)]
        torch.testing.assert_close(*grads)

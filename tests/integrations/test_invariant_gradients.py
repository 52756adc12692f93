"""``apply(model, numerics="invariant")``: gradients do not follow the order, the padding or the packing of a batch."""

import pytest
import torch

pytest.importorskip("transformers")

from torch import Tensor, nn

from kernel_index.integrations.hugging_face import one_order
from tests.integrations.test_invariant_model import DTYPES, NAMES, patched, same, sequences

pytestmark = pytest.mark.native


def training_batch(rows: list[Tensor], kind: str) -> dict[str, Tensor]:
    """A batch of these sequences: padded on a side, or packed into one row; the last third of each has labels."""
    spans = [torch.where(torch.arange(len(r)) >= len(r) - max(1, len(r) // 3), r, -100) for r in rows]
    if kind == "packed":
        positions = torch.cat([torch.arange(len(r)) for r in rows])
        labels = torch.cat([nn.functional.pad(s[1:], (1, 0), value=-100) for s in spans])
        return {"input_ids": torch.cat(rows)[None], "position_ids": positions[None], "labels": labels[None]}
    longest = max(map(len, rows)) + 3
    widths = [(longest - len(r), 0) if kind == "left" else (0, longest - len(r)) for r in rows]
    ids, real, labels = (
        torch.stack([nn.functional.pad(t, width, value=value) for t, width in zip(tensors, widths, strict=True)])
        for tensors, value in ((rows, 0), ([torch.ones_like(r) for r in rows], 0), (spans, -100))
    )
    labels[real == 0] = -100
    first = (real.cumsum(-1) == 1) & (real == 1)  # a first token has no token before it that predicts it
    return {"input_ids": ids, "attention_mask": real, "labels": torch.where(first, -100, labels)}


def gradients(model, batch: dict[str, Tensor], by: str) -> list[Tensor]:
    """The loss, and the gradients of all weights."""
    model.zero_grad()
    if by == "loss":
        loss = model(**batch, use_cache=False).loss
    else:
        labels = batch.pop("labels")
        kept = {"logits_to_keep": labels.shape[1] - 1} if by == "the last logits" else {}
        logits = model(**batch, use_cache=False, **kept).logits
        labels = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:][:, -logits.shape[1] :]
        log_probs = logits.float().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        loss = -(torch.where(labels >= 0, log_probs, 0.0) / 64).sum()
    loss.backward()
    found = [p.grad.clone() for p in model.parameters()]
    return [loss.detach(), *found] if by == "loss" else found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("by", ["loss", "logits"])
def test_gradients_do_not_follow_order_padding_or_packing(name, by, dtype):
    model, rows = patched(name, dtype), sequences(70, 3, 33, 2)
    expected = gradients(model, training_batch(rows, "packed"), by)
    for order in ([2, 0, 3, 1], [3, 2, 1, 0]):
        for kind in ("packed", "left", "right"):
            moved = training_batch([rows[i] for i in order], kind)
            same(gradients(model, moved, by), expected)


def test_gradients_of_logits_that_are_kept():
    """``logits_to_keep``, as trainers by reinforcement ask for the logits of an answer alone."""
    model, rows = patched("llama"), sequences(40, 40, 40)
    expected = gradients(model, training_batch(rows, "left"), "the last logits")
    same(gradients(model, training_batch(rows[::-1], "left"), "the last logits"), expected)
    same(gradients(model, training_batch(rows, "left"), "logits"), expected)


def test_a_batch_that_keeps_its_rows_has_other_gradients(monkeypatch):
    monkeypatch.setattr(one_order, "run_in_order", lambda *call: None)
    model, rows = patched("llama"), sequences(70, 3, 33, 2)
    expected = gradients(model, training_batch(rows, "packed"), "loss")
    found = gradients(model, training_batch(rows[::-1], "left"), "loss")
    assert not all(map(torch.equal, found, expected))


def test_which_calls_are_put_in_order():
    """Values stand where the caller's tokens do either way; a call that returns a cache keeps its rows."""
    model, rows = patched("llama"), sequences(20, 3, 9)
    batch = training_batch(rows, "left")
    del batch["labels"]
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**batch, output_hidden_states=True)
    assert model(**batch).past_key_values is not None
    ordered = model(**batch, output_hidden_states=True, use_cache=False)
    training = model.train()(**batch, output_hidden_states=True)
    for found in (ordered, training):
        assert found.past_key_values is None
        assert found.logits.shape == expected.logits.shape
        assert torch.equal(found.logits[real], expected.logits[real])
        assert not found.logits[~real].any()
        assert len(found.hidden_states) == len(expected.hidden_states)
        for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
            assert torch.equal(one[real], other[real])
    inner = model.model(**batch, return_dict=False)[0]
    assert torch.equal(inner[real], expected.hidden_states[-1][real])


def test_positions_that_do_not_count_from_zero_keep_their_rows():
    model, row = patched("llama").train(), sequences(12)[0][None]
    for positions in (torch.arange(12)[None] + 5, torch.tensor([[0, 1, 2, 7, 8, 9, 0, 1, 2, 3, 4, 5]])):
        found = model(input_ids=row, position_ids=positions).logits
        with torch.no_grad():
            assert torch.equal(found, model(input_ids=row, position_ids=positions).logits)


def test_a_decoder_that_does_not_know_packed_documents_keeps_its_rows(monkeypatch):
    monkeypatch.setattr(one_order, "_returned", lambda found, order: found)  # its values are then elsewhere
    model = patched("llama")
    assert one_order.KEEPS_ROWS in vars(model.model)

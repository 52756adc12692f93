"""Ways in which people call models of Transformers, and what must be equal afterwards."""

import contextlib
import io
import math
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernel_index.integrations.hugging_face.change import RAISED
from tests.integrations.tiny_models import Known, V, quiet

ROWS, TOKENS = 2, 11


def ids(tokens: int = TOKENS, seed: int = 5) -> Tensor:
    return torch.randint(3, V - 9, (ROWS, tokens), generator=torch.Generator().manual_seed(seed))


def padding(kind: str, tokens: int = TOKENS) -> Tensor:
    real = torch.ones(ROWS, tokens, dtype=torch.int64)
    if kind == "right":
        real[0, -3:] = 0
    elif kind == "left":
        real[0, :3] = 0
    elif kind == "hole":
        real[0, 3:5] = 0
    elif kind == "both":
        real[0, :2] = 0
        real[1, -3:] = 0
    return real


Outcome = dict[str, Tensor]


def outputs(found: Any, real: Tensor | None = None) -> Outcome:
    """Tensors of a model's output by name; where a token is padding, nothing is compared."""
    named: Outcome = {}
    for name in ("loss", "logits", "hidden_states", "attentions", "encoder_last_hidden_state"):
        value = getattr(found, name, None)
        values = value if isinstance(value, tuple | list) else (value,)
        for i, tensor in enumerate(values):
            if isinstance(tensor, Tensor):
                tensor = tensor.detach() + 0
                if real is not None and name in ("logits", "hidden_states") and tensor.shape[:2] == real.shape:
                    tensor = tensor[real.bool()]
                if not (real is not None and name == "attentions"):
                    named[f"{name}.{i}"] = tensor
    return named


def difference(ours: Outcome, stock: Outcome) -> tuple[float, str]:
    """The largest relative difference and where it is; a gradient that is nearly 0 is held against the others'."""
    if ours.keys() != stock.keys():
        return math.inf, f"names differ: {sorted(ours.keys() ^ stock.keys())[:3]}"
    gradients = [z.double().norm().item() for n, z in stock.items() if z.is_floating_point() and "." in n]
    least = 1e-3 * max(gradients, default=0.0) if "loss" in stock else 0.0
    worst = (0.0, "")
    for name, expected in stock.items():
        actual = ours[name]
        if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
            return math.inf, f"{name}: {actual.shape} of {actual.dtype}, stock {expected.shape} of {expected.dtype}"
        finite = expected.isfinite()
        if not torch.equal(actual.isfinite(), finite):
            return math.inf, f"{name}: other elements are finite"
        a, b = (torch.where(finite, x, 0).double() for x in (actual, expected))
        error = ((a - b).norm() / max(b.norm().item(), least, 1e-30)).item()
        worst = max(worst, (error, name))
    return worst


def base(known: Known, tokens: int = TOKENS) -> dict[str, Any]:
    call: dict[str, Any] = {"input_ids": ids(tokens)}
    if known.kind == "encoder-decoder":
        call["decoder_input_ids"] = ids(tokens - 2, seed=6)
    return call


def run(model: Any, real: Tensor | None = None, **call: Any) -> Outcome:
    with torch.no_grad():
        return outputs(model(**call), real)


def trained(model: Any, call: dict[str, Any], real: Tensor | None = None) -> Outcome:
    model.zero_grad()
    labels = call.get("decoder_input_ids", call["input_ids"]).clone()
    if real is not None and labels.shape == real.shape:
        labels[real == 0] = -100
        labels[:, 1:][real[:, :-1] == 0] = -100  # what padding predicts
    found = model(**call, labels=labels)
    found.loss.backward()
    named = {"loss": found.loss.detach() + 0}
    return named | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def masked(kind: str) -> Callable[[Any, Known], Outcome]:
    def way(model: Any, known: Known) -> Outcome:
        real = padding(kind)
        return run(model, real if known.kind != "encoder-decoder" else None, **base(known), attention_mask=real)

    return way


def trained_masked(model: Any, known: Known) -> Outcome:
    real = padding("right")
    return trained(model, {**base(known), "attention_mask": real}, None if known.kind == "encoder-decoder" else real)


def four_dimensional(model: Any, known: Known) -> Outcome:
    allowed = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()[None, None].expand(ROWS, 1, -1, -1)
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    return run(model, **base(known), attention_mask=additive)


def four_dimensional_bool(model: Any, known: Known) -> Outcome:
    allowed = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()[None, None].expand(ROWS, 1, -1, -1)
    return run(model, **base(known), attention_mask=allowed)


def packed(model: Any, known: Known) -> Outcome:
    positions = torch.cat([torch.arange(4), torch.arange(1), torch.arange(TOKENS - 5)]).expand(ROWS, -1)
    return run(model, **base(known), position_ids=positions, use_cache=False)


def packed_trained(model: Any, known: Known) -> Outcome:
    positions = torch.cat([torch.arange(4), torch.arange(TOKENS - 4)]).expand(ROWS, -1)
    return trained(model, {**base(known), "position_ids": positions, "use_cache": False})


def embedded(model: Any, known: Known) -> Outcome:
    call = base(known)
    call["inputs_embeds"] = model.get_input_embeddings()(call.pop("input_ids"))
    return run(model, **call)


def with_hidden_states(model: Any, known: Known) -> Outcome:
    return run(model, **base(known), output_hidden_states=True)


def with_attentions(model: Any, known: Known) -> Outcome:
    return run(model, **base(known), output_attentions=True)


def continued(new: int) -> Callable[[Any, Known], Outcome]:
    def way(model: Any, known: Known) -> Outcome:
        call = base(known)
        name = "decoder_input_ids" if known.kind == "encoder-decoder" else "input_ids"
        tokens = call[name]
        with torch.no_grad():
            first = model(**{**call, name: tokens[:, :-new]}, use_cache=True)
            found = model(**{**call, name: tokens[:, -new:]}, past_key_values=first.past_key_values, use_cache=True)
        return outputs(found)

    return way


def half(model: Any, known: Known) -> Outcome:
    return run(model.bfloat16(), **base(known))


def autocast(model: Any, known: Known) -> Outcome:
    with torch.autocast("cpu", torch.bfloat16):
        return run(model, **base(known))


def autocast_trained(model: Any, known: Known) -> Outcome:
    with torch.autocast("cpu", torch.bfloat16):
        return trained(model, base(known))


def checkpointed(model: Any, known: Known) -> Outcome:
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return trained(model, base(known))


def checkpointed_reentrant(model: Any, known: Known) -> Outcome:
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    return trained(model, {**base(known), "attention_mask": padding("right")})


def last_logits(model: Any, known: Known) -> Outcome:
    return run(model, **base(known), logits_to_keep=2)


def compiled(model: Any, known: Known) -> Outcome:
    torch._dynamo.reset()
    try:
        return run(torch.compile(model, backend="eager"), **base(known), use_cache=False)
    finally:
        torch._dynamo.reset()


def by_trainer(model: Any, known: Known) -> Outcome:
    """Two steps of ``Trainer`` in bfloat16: what it trained with, and where it came to."""
    import transformers as hf

    name = "labels" if known.kind != "encoder-decoder" else "decoder_input_ids"
    rows = [{"input_ids": row, "labels": row, name: row} for row in ids().repeat(2, 1)]
    with tempfile.TemporaryDirectory() as folder:
        options = hf.TrainingArguments(
            folder, max_steps=2, bf16=True, use_cpu=True, per_device_train_batch_size=2, report_to=[], seed=1,
            learning_rate=1e-3, logging_steps=1, save_strategy="no", disable_tqdm=True, optim="sgd", max_grad_norm=1.0,
        )  # fmt: skip
        trainer = hf.Trainer(model, options, train_dataset=rows)
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": torch.tensor(losses, dtype=torch.float64)}


def generated(**options: Any) -> Callable[[Any, Known], Outcome]:
    def way(model: Any, known: Known) -> Outcome:
        real = padding(options.get("padding", ""), 8)
        call = {"input_ids": ids(8)[: options.get("rows", ROWS)], "attention_mask": real[: options.get("rows", ROWS)]}
        rest = {n: v for n, v in options.items() if n not in ("padding", "rows")}
        torch.manual_seed(3)
        with quiet(), torch.no_grad():
            tokens = model.generate(
                **call, max_new_tokens=5, eos_token_id=V - 1, output_logits=True, return_dict_in_generate=True, **rest
            )
        return {"tokens": tokens.sequences} | {f"logits.{i}": z for i, z in enumerate(tokens.logits or ())}

    return way


CALLS: dict[str, Callable[[Any, Known], Outcome]] = {
    "plain": lambda model, known: run(model, **base(known)),
    "padded right": masked("right"),
    "padded left": masked("left"),
    "padded on both sides": masked("both"),
    "a hole in the padding": masked("hole"),
    "a mask of four dimensions": four_dimensional,
    "a bool mask of four dimensions": four_dimensional_bool,
    "packed": packed,
    "packed, trained": packed_trained,
    "embeddings": embedded,
    "hidden states": with_hidden_states,
    "attentions": with_attentions,
    "trained": lambda model, known: trained(model, base(known)),
    "trained with padding": trained_masked,
    "one more token": continued(1),
    "three more tokens": continued(3),
    "bfloat16": half,
    "autocast": autocast,
    "trained under autocast": autocast_trained,
    "checkpointed": checkpointed,
    "checkpointed, reentrant": checkpointed_reentrant,
    "two logits": last_logits,
}
GENERATING: dict[str, Callable[[Any, Known], Outcome]] = {
    "greedy": generated(do_sample=False),
    "sampled": generated(do_sample=True),
    "beams": generated(num_beams=3, do_sample=False),
    "padded left, greedy": generated(padding="left", do_sample=False),
    "a static cache": generated(cache_implementation="static", disable_compile=True, do_sample=False),
    "no cache": generated(use_cache=False, do_sample=False),
    "prompt lookup": generated(prompt_lookup_num_tokens=2, do_sample=False, rows=1),
}
SLOW = {"compiled": compiled, "Trainer": by_trainer}
EVERY = {**CALLS, **GENERATING, **SLOW}
EXACT = {"bfloat16": "plain", "autocast": "plain", "trained under autocast": "trained", "Trainer": ""}
"""Ways that round to bfloat16, with the way that gives the same in float32."""


def outcome_of(way: Callable[[Any, Known], Outcome], model: Any, known: Known) -> Outcome | str:
    """What the way gives, or the name of the exception that it raises."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet())
        try:
            return way(model, known)
        except RAISED as error:  # the stock model may refuse any way, and the patched one must then too
            return type(error).__name__

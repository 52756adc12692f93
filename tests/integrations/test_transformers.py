"""A patched model computes what it computed before, and says what has changed."""

import copy
import statistics

import pytest
import torch

pytest.importorskip("transformers")

import transformers as hf

import kernel_index as ki
from kernel_index.proofs.errors import floor, relative_error
from tests.integrations.models import batch_of, model_of, results_of, truth_of

NAMES = ("llama", "qwen3", "gemma", "gemma2", "mixtral", "qwen3_moe", "deepseek_v3", "nemotron", "granite")
EXPECTED = {  # what must be replaced somewhere in each model; everything else is left
    "nemotron": {"rope", "loss", "experts", "attention"},  # its norms are layer norms
    "mixtral": {"norms", "rope", "loss", "attention"},  # all their feed-forward layers are stacked experts
    "qwen3_moe": {"norms", "rope", "loss", "attention"},
    None: {"norms", "rope", "loss", "experts", "attention"},
}


@pytest.mark.parametrize("kind", ["plain", "padded", "packed"])
@pytest.mark.parametrize("name", NAMES)
def test_same_logits_loss_and_gradients(name, kind):
    """Error against the model's own formula in float64 ≤ 2 × the unpatched model's + what rounding a result costs.

    The unpatched model's error is that of the same tensor or, where that one is small by luck, of its median tensor.
    """
    model, batch = model_of(name), batch_of(kind)
    truth = truth_of(model, batch)
    before = results_of(model, batch)
    report = ki.transformers.apply(model)
    with ki.receipts() as log:
        after = results_of(model, batch)
    kinds = {c.kind for c in report.replaced}
    assert kinds == EXPECTED.get(name, EXPECTED[None])
    assert {"attention", "fused_rope_qk", "fused_linear_cross_entropy"} <= {r.op for r in log if r.ran}
    assert before.keys() == after.keys() == truth.keys()
    errors = {part: relative_error(before[part], exact) for part, exact in truth.items()}
    usual = statistics.median(errors.values())
    for part, exact in truth.items():
        budget = 2 * max(errors[part], usual) + floor(torch.float32)
        assert relative_error(after[part], exact) <= budget, part


def test_the_truth_is_not_the_float32_model():
    """``InFloat64`` really lifts the casts: otherwise the budgets above would compare float32 with itself."""
    model, batch = model_of("llama"), batch_of("plain")
    lowered = results_of(copy.deepcopy(model).double(), batch)["logits"]
    assert 1e-12 < relative_error(lowered, truth_of(model, batch)["logits"]) < 1e-4


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_bfloat16_and_autocast(name):
    """Rounding to bfloat16 happens at other places, so the errors are compared, not the values."""
    model, batch = model_of(name), batch_of("padded")
    truth = truth_of(copy.deepcopy(model).bfloat16(), batch)
    for setting in ("weights", "autocast"):
        chosen = copy.deepcopy(model).bfloat16()
        if setting == "autocast":
            chosen = chosen.float()  # the same values, cast back by autocast
        with torch.autocast("cpu", torch.bfloat16, enabled=setting == "autocast"):
            before = results_of(chosen, batch)
            report = ki.transformers.apply(chosen)
            after = results_of(chosen, batch)
        report.undo()
        assert after["logits"].dtype == before["logits"].dtype
        for part in ("logits", "loss"):
            budget = 2 * relative_error(before[part], truth[part]) + floor(torch.bfloat16)
            assert relative_error(after[part], truth[part]) <= budget, (setting, part)


@pytest.mark.parametrize("name", ["llama", "mixtral", "deepseek_v3", "gemma2"])
def test_generate_continues_with_the_same_tokens(name):
    model, batch = model_of(name), batch_of("padded", length=9)
    call = {"input_ids": batch["input_ids"][:1], "attention_mask": batch["attention_mask"][:1]}
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1}
    before = model.generate(**call, **options)
    ki.transformers.apply(model)
    with ki.receipts() as log:
        after = model.generate(**call, **options)
    assert torch.equal(before, after)
    assert "attention" in {r.op for r in log}


def test_a_static_cache_works_and_is_served_by_the_dense_mask():
    model, batch = model_of("llama"), batch_of("padded", length=9)
    call = {"input_ids": batch["input_ids"][:1], "attention_mask": batch["attention_mask"][:1]}
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    before = model.generate(**call, **options)
    ki.transformers.apply(model)
    assert torch.equal(before, model.generate(**call, **options))


def test_trainer_takes_the_same_steps(tmp_path):
    def train(folder, patched):
        model = model_of("llama").train()
        if patched:
            ki.transformers.apply(model)
        arguments = hf.TrainingArguments(
            str(tmp_path / folder), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, eval_strategy="steps", eval_steps=3,
            disable_tqdm=True,
        )  # fmt: skip
        rows = [{"input_ids": r, "labels": r} for r in batch_of("plain")["input_ids"].repeat(4, 1)]
        trainer = hf.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:2])
        trainer.train()
        return [h["loss"] for h in trainer.state.log_history if "loss" in h], model, trainer.evaluate()["eval_loss"]

    plain, before, eval_before = train("plain", False)
    ours, after, eval_after = train("ours", True)
    assert len(ours) == 3
    assert ours == pytest.approx(plain, rel=1e-4)  # Trainer rounds what it logs to four digits
    assert eval_after == pytest.approx(eval_before, rel=64 * floor(torch.float32))
    for name, parameter in before.named_parameters():
        # Three AdamW steps of 5e-5: where a gradient is near zero its sign decides, so a weight may differ by them.
        assert (parameter - after.get_parameter(name)).abs().max() <= 2 * 3 * 5e-5, name


def test_undo_restores_everything():
    model, batch = model_of("deepseek_v3"), batch_of("packed")
    state = {n: set(vars(m)) for n, m in model.named_modules()}
    config, implementation = model.config, model.config._attn_implementation
    classes = {n: type(m) for n, m in model.named_modules()}
    before = results_of(model, batch)
    report = ki.transformers.apply(model)
    with pytest.raises(ValueError, match="not patched"):
        ki.transformers.apply(model)
    report.undo()
    report.undo()
    assert {n: set(vars(m)) for n, m in model.named_modules()} == state
    assert model.config is config
    assert model.config._attn_implementation == implementation
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    with ki.receipts() as log:
        after = results_of(model, batch)
    assert log == []
    assert all(torch.equal(before[k], after[k]) for k in before)
    ki.transformers.apply(model)


def test_each_option_leaves_the_others():
    for kind in ("norms", "rope", "loss", "experts", "attention"):
        options = {k: k == kind for k in ("norms", "rope", "loss", "experts", "attention")}
        report = ki.transformers.apply(model_of("nemotron"), **options)
        assert {c.kind for c in report.changes} == {kind}


def test_the_report_names_every_module_and_why_it_was_left():
    report = ki.transformers.apply(model_of("nemotron"))
    left = {c.module: c.why for c in report.left}
    assert left["model.norm"] == "is not a norm with one weight per channel and no bias"
    assert {c.module for c in report.replaced if c.kind == "experts"} == {
        f"model.layers.{i}.mlp.act_fn" for i in (0, 1)
    }
    assert "experts: model.layers.*.mlp.act_fn (2): fused_relu_squared" in str(report)


def test_a_deep_copy_is_patched_and_has_its_own_weights():
    model, batch = model_of("llama"), batch_of("plain")
    ki.transformers.apply(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert results_of(other, batch)["logits"].abs().max() > 0


@pytest.mark.thorough
def test_a_patched_model_can_be_compiled():
    """Dynamo finds the names of a rebound forward, and the lazy logits are not in its way."""
    model, batch = model_of("llama"), batch_of("plain")
    ki.transformers.apply(model)
    expected = model(**batch, use_cache=False).loss
    torch._dynamo.reset()
    with ki.receipts() as log:
        loss = torch.compile(model, backend="eager")(**batch, use_cache=False).loss
    torch._dynamo.reset()
    assert {"fused_rope_qk", "fused_residual_add_rms_norm"} <= {r.op for r in log}
    assert relative_error(loss.detach(), expected.detach()) <= floor(torch.float32)


def test_gradient_checkpointing_recomputes_the_same():
    model, batch = model_of("llama"), batch_of("padded")
    ki.transformers.apply(model)
    before = results_of(model, batch)
    model.train()
    model.gradient_checkpointing_enable()
    after = results_of(model, batch)
    assert before.keys() == after.keys()
    assert all(relative_error(after[k], before[k]) <= 8 * floor(torch.float32) for k in before)


def test_a_forward_that_somebody_replaced_is_left():
    model = model_of("llama")
    head, norm = model.lm_head, model.model.norm
    head.forward, norm.forward = head.forward, norm.forward
    left = {(c.kind, c.module): c.why for c in ki.transformers.apply(model).left}
    assert "replaced by something else" in left["loss", ""]
    assert "replaced by something else" in left["norms", "model.norm"]


def test_dropout_in_attention_is_left():
    model = model_of("llama")
    model.config.attention_dropout = 0.1
    report = ki.transformers.apply(model)
    assert {c.why for c in report.left if c.kind == "attention"} == {
        "attention_dropout is not 0, and the index's attention has no dropout"
    }
    assert model.config._attn_implementation == "sdpa"


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"model must be a transformers.PreTrainedModel, got Linear"):
        ki.transformers.apply(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="norms must be True or False, got int"):
        ki.transformers.apply(model_of("llama"), norms=1)
    with pytest.raises(AttributeError, match="no attribute 'transformer'"):
        _ = ki.transformer


def test_a_missing_package_is_a_typed_error_with_the_command(monkeypatch):
    from kernel_index.integrations import extras

    monkeypatch.setattr(extras, "has_package", lambda name: False)
    with pytest.raises(extras.MissingExtra, match=r"pip install 'kernel-index\[hf\]'") as caught:
        ki.transformers.apply(model_of("llama"))
    assert isinstance(caught.value, ImportError)
    assert caught.value.extra == "hf"

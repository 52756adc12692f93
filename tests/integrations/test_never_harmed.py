"""The faults that ``apply`` once did to models of other people, each as the kind that it is."""

import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("transformers")

import transformers as hf

import kernel_index as ki
from kernel_index.integrations.hugging_face import attention as module
from kernel_index.proofs.errors import floor, relative_error
from tests.integrations import tiny_models


def tiny(model_type, kind="decoder"):
    return tiny_models.model_of(tiny_models.Known(kind, model_type))


def test_a_shared_configuration_is_not_written_into():
    config = tiny_models.config_of(tiny_models.Known("decoder", "llama"))
    first, second = (hf.LlamaForCausalLM(config) for _ in range(2))
    before = dict(vars(config))
    report = ki.transformers.apply(first)
    assert vars(config) == before
    assert second.config is config
    with ki.receipts() as log:
        second(torch.randint(3, 80, (1, 5)))
    assert log == []
    first.config.use_cache = False
    report.undo()
    assert first.config is config
    assert config.use_cache is False  # what a user set on the patched model is not lost


def test_two_threads_cannot_patch_one_model():
    model = tiny("llama")
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(ki.transformers.apply, model) for _ in range(8)]
    errors = [f.exception() for f in futures]
    assert errors.count(None) == 1
    assert all(isinstance(e, ValueError) for e in errors if e is not None)


LOADED = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
import kernel_index as ki
call = torch.load(sys.argv[2])
with ki.receipts() as log:
    found = model(**call)
found.loss.backward()
torch.save((found.loss.detach(), sorted({r.op for r in log})), sys.argv[3])
"""


@pytest.mark.thorough
def test_a_patched_model_can_be_saved_and_loaded_by_another_process(tmp_path):
    model = tiny("qwen3")
    ki.transformers.apply(model)
    ids = torch.randint(3, 80, (1, 7))
    with ki.receipts() as log:
        expected = model(input_ids=ids, labels=ids).loss
    torch.save(model, tmp_path / "model")
    torch.save({"input_ids": ids, "labels": ids}, tmp_path / "call")
    paths = [str(tmp_path / name) for name in ("model", "call", "result")]
    subprocess.run([sys.executable, "-c", LOADED, *paths], check=True, timeout=300)
    loss, ops = torch.load(paths[2])
    assert torch.equal(loss, expected.detach())
    assert ops == sorted({r.op for r in log})


def test_norms_of_heads_and_gated_layers_run_in_one_pass_each():
    model = tiny("qwen3")
    report = ki.transformers.apply(model)
    by = {c.module: c.by for c in report.replaced}
    assert by["model.layers.0.self_attn.q_norm"] == "fused_rope_qk"
    assert by["model.layers.0.mlp"] == "fused_gated_activation"
    ids = torch.randint(3, 80, (1, 7))
    with ki.receipts() as log:
        model(input_ids=ids, labels=ids)
    counts = Counter(r.op for r in log if r.ran)
    assert counts["fused_rope_qk"] == counts["fused_gated_activation"] == counts["attention"] == 2
    assert counts["fused_residual_add_rms_norm"] == 2 * 2 + 1  # none for q and k
    assert counts["fused_linear_cross_entropy"] == 1


def test_a_call_with_an_argument_nobody_knows_goes_to_the_models_own_attention():
    model, ids = tiny("llama"), torch.randint(3, 80, (1, 7))
    expected = model(ids).logits
    report = ki.transformers.apply(model)
    assert report.calls_left == {}
    with ki.receipts() as log:
        found = model(ids, block_indices=torch.zeros(1)).logits
    assert "attention" not in {r.op for r in log}
    assert relative_error(found.detach(), expected.detach()) <= 8 * floor(torch.float32)
    assert report.calls_left == {(f"model.layers.{i}.self_attn", "is called with block_indices"): 1 for i in range(2)}
    assert "attention: model.layers.*.self_attn: 2 calls went to the model's own: is called with" in str(report)


def test_eager_attention_that_computes_something_else_is_kept(monkeypatch):
    from transformers.models.gpt_oss import modeling_gpt_oss as home

    own = home.eager_attention_forward

    def doubled(*args, **kwargs):
        out, weights = own(*args, **kwargs)
        return 2 * out, weights

    monkeypatch.setattr(home, "eager_attention_forward", doubled)
    model, ids = tiny("gpt_oss"), torch.randint(3, 80, (1, 7))
    expected = model(ids).logits
    report = ki.transformers.apply(model)
    assert relative_error(model(ids).logits.detach(), expected.detach()) <= 8 * floor(torch.float32)
    assert {why for _, why in report.calls_left} == {"its eager attention computes something else"}


def test_eager_weights_are_there_when_they_are_read():
    model, ids = tiny("gpt_oss"), torch.randint(3, 80, (1, 7))
    model.config.output_attentions = True
    expected = model(ids).attentions
    report = ki.transformers.apply(model)
    found = model(ids).attentions
    assert report.calls_left == {}
    assert len(found) == len(expected) == 2
    assert all(
        relative_error(a.detach(), b.detach()) <= 8 * floor(torch.float32) for a, b in zip(found, expected, strict=True)
    )


def test_a_trial_that_raises_leaves_the_module_and_no_other():
    model = tiny("llama")

    class OddNorm(hf.models.llama.modeling_llama.LlamaRMSNorm):
        def forward(self, hidden_states):
            raise KeyError("not today")

    model.model.norm.__class__ = OddNorm
    report = ki.transformers.apply(model)
    left = {c.module: c.why for c in report.left}
    assert left == {"model.norm": "could not be tried: KeyError: 'not today'"}
    assert len(report.replaced) > 5


def test_an_error_while_patching_leaves_the_model_as_it_was(monkeypatch):
    model = tiny("llama")
    classes = {n: type(m) for n, m in model.named_modules()}

    def breaks(*args):
        raise OSError("disk")

    monkeypatch.setattr(module, "_replace", breaks)
    with pytest.raises(OSError, match="disk"):
        ki.transformers.apply(model)
    assert {n: type(m) for n, m in model.named_modules()} == classes
    monkeypatch.undo()
    ki.transformers.apply(model)


def test_the_name_of_our_attention_is_enough():
    model = tiny("gpt_oss")
    ids = torch.randint(3, 80, (1, 7))
    expected = model(ids).logits
    model.set_attn_implementation("kernel_index")
    with ki.receipts() as log:
        found = model(ids).logits
    assert {r.op for r in log} == {"attention"}
    assert relative_error(found.detach(), expected.detach()) <= 8 * floor(torch.float32)
    mask = torch.ones(7, 7).tril().bool()[None, None]  # no contract: the eager attention, since it has sinks
    found = model(ids, attention_mask=mask).logits
    model.set_attn_implementation("eager")
    expected = model(ids, attention_mask=torch.zeros(mask.shape).masked_fill(~mask, torch.finfo().min)).logits
    assert relative_error(found.detach(), expected.detach()) <= 8 * floor(torch.float32)


def test_data_parallel_replicas_use_their_own_weights():
    """A replica is a copy of a module's ``__dict__``: a forward bound to the original would use its weights."""
    model = tiny("llama")
    ki.transformers.apply(model)
    norm = model.model.norm
    replica = norm._replicate_for_data_parallel()
    replica.weight = torch.zeros_like(norm.weight)
    assert replica(torch.randn(1, 3, 32)).abs().max() == 0


def test_report_of_a_head_that_was_replaced_since():
    model = tiny("llama")
    report = ki.transformers.apply(model)
    assert "loss: the model: fused_linear_cross_entropy, in calls with labels" in str(report)
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    assert "its forward was replaced since by tests.integrations.test_never_harmed" in str(report)

"""PEFT and TRL around a patched model: the same losses and weights, and what is saved can be loaded.

They come with the extra ``hf-train``.
"""

import copy
import warnings

import pytest
import torch

pytest.importorskip("peft", reason="needs the extra hf-train")
pytest.importorskip("trl", reason="needs the extra hf-train")
pytest.importorskip("datasets", reason="needs the extra hf-train")

import datasets
import peft
import transformers as hf
import trl
from tokenizers import Tokenizer, models, pre_tokenizers

import kernel_index as ki
from kernel_index.proofs.errors import floor, relative_error
from tests.integrations.tiny_models import Known, model_of, quiet

LORA = peft.LoraConfig(target_modules=["q_proj", "v_proj", "gate_proj"], r=2, task_type="CAUSAL_LM", lora_dropout=0.0)
TEXTS = ["the cat sat on the mat", "a dog ran in the park today", "the bird sang", "on the mat a cat ran"]
CLOSE = 8 * floor(torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    words = sorted({word for text in TEXTS for word in text.split()})
    vocabulary = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<pad>"}
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, **special)


def options(folder, kind, **more):
    return kind(
        str(folder), max_steps=3, per_device_train_batch_size=2, logging_steps=1, report_to=[], seed=3, use_cpu=True,
        save_strategy="no", disable_tqdm=True, learning_rate=1e-3, bf16=False, **more,
    )  # fmt: skip


def losses_of(trainer):
    with quiet(), warnings.catch_warnings(), ki.receipts() as log:
        warnings.simplefilter("ignore")
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    return losses, {r.op for r in log if r.ran}


def adapted(model, patch):
    torch.manual_seed(5)
    found = peft.get_peft_model(copy.deepcopy(model), LORA)
    for name, parameter in found.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    return found, ki.transformers.apply(found) if patch else None


def test_lora_trains_with_the_fused_loss_and_the_same_gradients():
    stock, ids = model_of(Known("decoder", "qwen3")), torch.randint(3, 80, (2, 9))
    results = []
    for patch in (False, True):
        model, _ = adapted(stock, patch)
        with ki.receipts() as log:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert all("lora" in n for n in grads)
        results.append((loss.detach(), grads, {r.op for r in log if r.ran}))
    (loss, grads, none), (ours, our_grads, ops) = results
    assert none == set()
    assert {"fused_linear_cross_entropy", "attention", "fused_rope_qk", "fused_gated_activation"} <= ops
    assert relative_error(ours, loss) <= CLOSE
    largest = max(g.abs().max() for g in grads.values())
    assert all((our_grads[n] - g).abs().max() <= CLOSE * largest for n, g in grads.items())


@pytest.mark.parametrize("first", ["adapter", "patch"])
def test_an_adapter_merges_saves_and_loads(first, tmp_path):
    stock, ids = model_of(Known("decoder", "llama")), torch.randint(3, 80, (2, 9))
    if first == "adapter":
        model, _ = adapted(stock, True)
    else:
        base = copy.deepcopy(stock)
        ki.transformers.apply(base)
        torch.manual_seed(5)
        model = peft.get_peft_model(base, LORA)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_()
    expected = model(input_ids=ids).logits.detach()
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(stock), tmp_path / "adapter")
    assert relative_error(again(input_ids=ids).logits.detach(), expected) <= CLOSE
    torch.save(model, tmp_path / "whole")
    whole = torch.load(tmp_path / "whole", weights_only=False)
    assert torch.equal(whole(input_ids=ids).logits.detach(), expected)
    merged = model.merge_and_unload()
    assert relative_error(merged(input_ids=ids).logits.detach(), expected) <= 4 * CLOSE


def test_trainer_with_lora(tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 80, (6, 9))]
    stock, found = model_of(Known("decoder", "llama")), []
    for patch in (False, True):
        model, _ = adapted(stock, patch)
        trainer = hf.Trainer(model, options(tmp_path, hf.TrainingArguments), train_dataset=rows)
        found.append(losses_of(trainer))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4)  # Trainer rounds what it logs
    assert "fused_linear_cross_entropy" in found[1][1]


@pytest.mark.parametrize("packing", [False, True])
def test_sft(packing, tokenizer, tmp_path):
    data, stock, found = datasets.Dataset.from_dict({"text": TEXTS * 3}), model_of(Known("decoder", "llama")), []
    for patch in (False, True):
        model = copy.deepcopy(stock)
        report = ki.transformers.apply(model) if patch else None
        more = {"packing": packing, "max_length": 16, "dataset_text_field": "text"}
        args = options(tmp_path, trl.SFTConfig, **more)
        with quiet():
            trainer = trl.SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer)
        found.append(losses_of(trainer))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-3)
    assert {"attention", "fused_rope_qk", "fused_gated_activation"} <= found[1][1]
    uses_ours = "fused_linear_cross_entropy" in found[1][1]
    assert uses_ours or "its forward was replaced since by trl" in str(report)


def test_dpo(tokenizer, tmp_path):
    rows = {"prompt": TEXTS, "chosen": [" the cat"] * 4, "rejected": [" a dog"] * 4}
    stock, found = model_of(Known("decoder", "llama")), []
    for patch in (False, True):
        model, reference = copy.deepcopy(stock), copy.deepcopy(stock)
        reports = [ki.transformers.apply(m) for m in (model, reference)] if patch else []
        args = options(tmp_path, trl.DPOConfig, max_length=16)
        with quiet():
            trainer = trl.DPOTrainer(
                model, reference, args, train_dataset=datasets.Dataset.from_dict(rows), processing_class=tokenizer
            )
        found.append(losses_of(trainer))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-3)
    assert {"attention", "fused_rope_qk"} <= found[1][1]
    uses_ours = {"fused_linear_cross_entropy", "token_log_probs"} & found[1][1]
    assert uses_ours or all("its forward was replaced since by trl" in str(r) for r in reports)

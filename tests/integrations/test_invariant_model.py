"""``apply(model, numerics="invariant")``: logits of a token have the same bits however its sequence is computed."""

import copy
import functools
import pickle

import pytest
import torch

pytest.importorskip("transformers")

import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import kernel_index as ki
from kernel_index.integrations.hugging_face import exact_ops, invariant
from tests.integrations.models import V, config_of, model_of
from tests.threads import with_threads

pytestmark = pytest.mark.native
NAMES = ("llama", "qwen3")
DTYPES = (torch.float32, torch.bfloat16)
LENGTHS = (1, 150, 37, 261, 2)  # two of them longer than a segment of keys


def patched(name: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa"):
    model = model_of(name).to(dtype)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3 if p.ndim > 1 else 1)
    ki.transformers.apply(model, numerics="invariant")
    return model


def sequences(*lengths: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(7)
    return [torch.randint(3, V, (n,), generator=draw) for n in lengths or LENGTHS]


@torch.no_grad()
def alone(model, rows: list[Tensor]) -> list[Tensor]:
    """The full forward of each sequence by itself: what everything else is compared with."""
    return [model(input_ids=row[None], use_cache=False).logits[0] for row in rows]


@torch.no_grad()
def padded(model, rows: list[Tensor], left: bool) -> list[Tensor]:
    longest = max(map(len, rows))
    ids, real = (torch.zeros(len(rows), longest, dtype=torch.int64) for _ in range(2))
    spans = [slice(longest - len(row), longest) if left else slice(0, len(row)) for row in rows]
    for i, (row, span) in enumerate(zip(rows, spans, strict=True)):
        ids[i, span], real[i, span] = row, 1
    positions = (real.cumsum(-1) - 1).clamp(min=0)  # as generate makes them
    logits = model(input_ids=ids, attention_mask=real, position_ids=positions, use_cache=False).logits
    return [logits[i, span] for i, span in enumerate(spans)]


@torch.no_grad()
def packed(model, rows: list[Tensor]) -> list[Tensor]:
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    logits = model(input_ids=torch.cat(rows)[None], position_ids=positions[None], use_cache=False).logits[0]
    return list(logits.split([len(row) for row in rows]))


@torch.no_grad()
def cached(model, rows: list[Tensor], chunks: list[int]) -> list[Tensor]:
    """Sequence by sequence, in chunks of these sizes in turn."""
    found = []
    for row in rows:
        cache, parts, first, turn = hf.DynamicCache(), [], 0, 0
        while first < len(row):
            step = row[first : first + chunks[turn % len(chunks)]]
            parts.append(model(input_ids=step[None], past_key_values=cache, use_cache=True).logits[0])
            first, turn = first + len(step), turn + 1
        found.append(torch.cat(parts))
    return found


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one, other), f"sequence {i}: {int((one != other).sum())} of {one.numel()} differ"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_batches_orders_packings_chunks_and_threads(name, dtype):
    model, rows = patched(name, dtype), sequences()
    expected = alone(model, rows)
    same(padded(model, rows, left=False), expected)
    same(padded(model, rows, left=True), expected)
    same(padded(model, rows[::-1], left=True)[::-1], expected)
    same(packed(model, rows), expected)
    same(packed(model, rows[::-1])[::-1], expected)
    same(cached(model, rows, [1000]), expected)
    same(cached(model, rows, [100, 1, 33]), expected)
    same(cached(model, [rows[1]], [1]), [expected[1]])
    same(with_threads(3, packed, model, rows), expected)


llama = functools.cache(lambda: patched("llama"))


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_drawn_batches(data):
    """Any order, packing and chunks of any sequences."""
    model = llama()
    rows = sequences(*data.draw(st.lists(st.integers(1, 200), min_size=1, max_size=4)))
    expected = alone(model, rows)
    order = data.draw(st.permutations(range(len(rows))))
    moved = [rows[i] for i in order]
    wanted = [expected[i] for i in order]
    same(packed(model, moved), wanted)
    same(padded(model, moved, left=data.draw(st.booleans())), wanted)
    same(cached(model, moved, data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=3))), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_generate_and_the_training_forward(name, dtype):
    """What ``generate`` has seen of a batch that is padded on the left, and the trainer's log-probabilities of it."""
    model, prompts = patched(name, dtype), sequences(140, 3, 60)
    longest = max(map(len, prompts))
    ids = torch.stack([nn.functional.pad(p, (longest - len(p), 0)) for p in prompts])
    real = torch.stack([nn.functional.pad(torch.ones_like(p), (longest - len(p), 0)) for p in prompts])
    torch.manual_seed(0)
    drawn = model.generate(
        input_ids=ids, attention_mask=real, max_new_tokens=12, do_sample=True, eos_token_id=-1,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    answers = drawn.sequences[:, longest:]
    rollout = torch.stack(drawn.logits, 1).float().log_softmax(-1).gather(-1, answers[..., None])[..., 0]
    rows = [torch.cat((p, a)) for p, a in zip(prompts, answers, strict=True)]
    for logits in (packed(model, rows), padded(model, rows[::-1], left=False)[::-1]):
        for i, (row, prompt) in enumerate(zip(logits, prompts, strict=True)):
            of_answer = row[len(prompt) - 1 : -1].float().log_softmax(-1)
            assert torch.equal(of_answer.gather(-1, answers[i][:, None])[:, 0], rollout[i])


@pytest.mark.parametrize("name", NAMES)
def test_eager_attention_and_autocast(name):
    model, rows = patched(name, attention="eager"), sequences()
    same(cached(model, rows, [70, 1]), alone(model, rows))
    with torch.autocast("cpu", torch.bfloat16):
        expected = alone(model, rows)
        assert expected[0].dtype == torch.bfloat16
        same(packed(model, rows), expected)
        same(cached(model, rows, [70, 1]), expected)


def test_gradients_with_checkpointing_and_another_number_of_threads():
    model, rows = patched("llama"), sequences(150, 37)
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    ids = torch.cat(rows)[None]

    def gradients(recompute: bool) -> list[Tensor]:
        model.train()
        model.activation_checkpointing_enable() if recompute else model.activation_checkpointing_disable()
        model.zero_grad()
        out = model(input_ids=ids, position_ids=positions, labels=ids, use_cache=False)
        out.loss.backward()
        return [out.loss.detach(), *(p.grad.clone() for p in model.parameters())]

    expected = gradients(False)
    same(gradients(True), expected)
    same(with_threads(3, gradients, True), expected)


def test_a_reentrant_checkpoint_recomputes_in_the_mode():
    """It calls a layer in backward, outside of the model's forward."""
    model, (row,) = patched("llama"), sequences(70)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(input_ids=row[None], labels=row[None], use_cache=False).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    model.train()
    expected = gradients()
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    same(gradients(), expected)


def test_labels_change_no_logits_and_the_loss_has_a_recipe():
    model, (row,) = patched("qwen3"), sequences(50)
    with ki.receipts() as log, torch.no_grad():
        out = model(input_ids=row[None], labels=row[None])
    assert torch.equal(out.logits[0] + 0, alone(model, [row])[0])
    assert all(r.numerics for r in log)
    assert {"linear", "attention", "fused_rope_qk", "fused_linear_cross_entropy"} <= {r.op for r in log}


@pytest.mark.parametrize("broken", ["products", "angles", "attention"])
def test_the_comparison_can_fail(monkeypatch, broken):
    """With one recipe taken away, some axis has other bits."""
    model, rows = patched("llama"), sequences()
    if broken == "products":
        monkeypatch.setattr(ki, "linear", product_by_rows)
    elif broken == "angles":
        monkeypatch.setattr(
            invariant, "ANGLES", {Tensor.cos: lambda x: x.cos() * (1 + 1e-6 * (x.shape[1] == 1))}
        )  # fmt: skip
    else:
        monkeypatch.setattr(ki, "attention", lambda q, k, v, mask, **_: ki_attention_of_float64(q, k, v, mask))
    with pytest.raises(AssertionError, match="differ"):
        same(cached(model, [rows[1]], [1]), alone(model, [rows[1]]))


def product_by_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Another sum for one row than for several."""
    return x @ weight.T if x.shape[-2] == 1 else (x.double() @ weight.double().T).float()


def ki_attention_of_float64(q: Tensor, k: Tensor, v: Tensor, mask: ki.MaskContract) -> Tensor:
    with ki.numerics("ordinary"):
        wide = (x.double() if q.shape[1] == 1 else x for x in (q, k, v))
        return ki.attention_with_lse(*wide, mask, backend="reference").out.float()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gemma2", r"the model \(Gemma2ForCausalLM\): .* \(aten.tanh.default of PyTorch has no invariant form\)"),
        ("qwen3_moe", r"model.layers.0.mlp.gate \(Qwen3MoeTopKRouter\): .* \(aten.mm.default of PyTorch"),
        ("nemotron", r"model.layers.0.input_layernorm \(NemotronLayerNorm1P\): .*aten.native_layer_norm"),
    ],
)
def test_what_has_no_form_is_refused_by_name_and_undone(name, why):
    model = model_of(name)
    classes = {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(ki.Ineligible, match=why):
        ki.transformers.apply(model, numerics="invariant")
    assert {n: type(m) for n, m in model.named_modules()} == classes
    ki.transformers.apply(model)


def test_lengths_that_decide_rotations_are_refused():
    config = config_of("llama")
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ki.Ineligible, match=r"model.rotary_emb: .*dynamic rotations depend on the longest row"):
        ki.transformers.apply(hf.AutoModelForCausalLM.from_config(config), numerics="invariant")


def test_calls_without_the_form_are_refused():
    model, (row,) = patched("llama"), sequences(9)
    with pytest.raises(ki.Ineligible, match=r"attention of LlamaAttention 0: .*no MaskContract expresses"):
        model.generate(input_ids=row[None], max_new_tokens=2, cache_implementation="static", disable_compile=True)
    with pytest.raises(ki.Ineligible, match=r"dropout: .*p=0.1 in training"):
        invariant.dropout_forward(nn.Dropout)(nn.Dropout(0.1).train(), torch.ones(2))
    with pytest.raises(ki.Ineligible, match="its weights are on the meta device"):
        exact_ops.check(copy.deepcopy(model).to("meta"))
    with pytest.raises(ValueError, match="numerics must be 'invariant' or 'ordinary', got 'exact'"):
        ki.transformers.apply(model_of("llama"), numerics="exact")


def test_a_window_that_a_cache_cuts_is_refused_and_a_whole_cache_is_not():
    config = hf.MistralConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=20,
    )  # fmt: skip
    torch.manual_seed(0)
    model, rows = hf.AutoModelForCausalLM.from_config(config).eval(), sequences(150, 31)
    ki.transformers.apply(model, numerics="invariant")
    same(cached(model, rows, [40, 1]), alone(model, rows))
    cut = hf.DynamicCache(config=model.config)
    with pytest.raises(ki.Ineligible, match=r"pass a DynamicCache\(\)"):
        token_by_token(model, rows[0], cut)
    static = {"cache_implementation": "static", "max_new_tokens": 3, "disable_compile": True}  # masks made in generate
    with pytest.raises(ki.Ineligible, match=r"pass a DynamicCache\(\)"):
        model.generate(input_ids=rows[1][None], **static)


@torch.no_grad()
def token_by_token(model, row: Tensor, cache) -> None:
    for token in row:
        model(input_ids=token[None, None], past_key_values=cache, use_cache=True)


def test_positions_that_are_not_given_count_from_the_first_token():
    """As ``generate`` counts them: trainers call a model with ids and a mask alone."""
    model, rows = patched("llama"), sequences(9, 70)
    ids, real = torch.zeros(2, 2, 70, dtype=torch.int64)
    ids[0, 61:], ids[1], real[0, 61:], real[1] = rows[0], rows[1], 1, 1
    with torch.no_grad():
        for inside in (model.model, model):
            wanted = [inside(input_ids=row[None], use_cache=False)[0][0] for row in rows]
            found = inside(ids, real, use_cache=False)[0]
            same([found[0, 61:], found[1]], wanted)
        cache, parts = hf.DynamicCache(), []
        for span in (slice(0, 66), slice(66, 70)):
            parts.append(model(ids[:, span], real[:, : span.stop], past_key_values=cache, use_cache=True).logits)
    expected, found = alone(model, rows), torch.cat(parts, 1)
    same([found[0, 61:], found[1]], expected)


def test_a_linear_layer_that_comes_later_is_refused():
    peft = pytest.importorskip("peft")
    model, (row,) = patched("llama"), sequences(9)
    model.resize_token_embeddings(V + 3, mean_resizing=False)
    with pytest.raises(ki.Ineligible, match=r"lm_head: .*was put there after apply"):
        model(input_ids=row[None])
    adapted = peft.get_peft_model(patched("llama"), peft.LoraConfig(target_modules=["q_proj"], r=4))
    with pytest.raises(ki.Ineligible, match=r"q_proj.lora_A.default: .*was put there after apply"):
        adapted(input_ids=row[None])


def test_copies_have_the_mode_and_undo_ends_it():
    model, (row,) = model_of("llama"), sequences(40)
    with torch.no_grad():
        before = model(input_ids=row[None]).logits
    report = ki.transformers.apply(model, numerics="invariant")
    assert "numerics: model.layers.*.mlp.down_proj (2): linear" in str(report)
    expected = alone(model, [row])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with ki.receipts() as log:
            same(alone(other, [row]), expected)
        assert all(r.numerics for r in log)
    report.undo()
    with torch.no_grad(), ki.receipts() as log:
        assert torch.equal(model(input_ids=row[None]).logits, before)
    assert log == []


@pytest.mark.parametrize(
    ("call", "exact"),
    [
        (lambda: torch.arange(0, 8, dtype=torch.float32), True),
        (lambda: torch.arange(0, 1, 0.1), False),
        (lambda: torch.eye(3), True),
        (lambda: torch.view_as_real(torch.ones(3, dtype=torch.complex64)), True),
        (lambda: torch.ones(3).sub_(2), True),
        (lambda: torch.ones(3).sub_(torch.ones(3), alpha=0.3), False),
        (lambda: torch.ones(3).sum(), False),
        (lambda: torch.ones(3).exp(), False),
    ],
)
def test_operators_that_move_values_or_round_once_are_exact(call, exact):
    with exact_ops._Looking({}), ki.numerics("invariant"):
        if exact:
            call()
        else:
            with pytest.raises(ki.Ineligible, match="of PyTorch has no invariant form"):
                call()

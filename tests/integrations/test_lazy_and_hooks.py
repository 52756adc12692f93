"""What stands between our code and the model's: tensors that are computed late, hooks, and modules changed since."""

import copy
import pickle

import pytest
import torch

pytest.importorskip("transformers")

import transformers as hf
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import kernel_index as ki
from kernel_index.integrations.hugging_face import norms
from kernel_index.proofs.errors import floor, relative_error
from tests.integrations.tiny_models import Known, model_of

CLOSE = 32 * floor(torch.float32)


class Doubled(torch.autograd.Function):
    """An operation that sees its tensor below Python, with a backward pass of its own."""

    @staticmethod
    def forward(ctx, x):
        return x * 2.0

    @staticmethod
    def backward(ctx, grad):
        return 3.0 * grad


def pair(name="qwen3"):
    stock = model_of(Known("decoder", name))
    patched = copy.deepcopy(stock)
    return stock, patched, ki.transformers.apply(patched)


def ids(tokens=9):
    return torch.randint(3, 80, (2, tokens), generator=torch.Generator().manual_seed(1))


def assert_same_gradients(stock, patched):
    expected = {n: p.grad for n, p in stock.named_parameters() if p.grad is not None}
    actual = {n: p.grad for n, p in patched.named_parameters() if p.grad is not None}
    assert actual.keys() == expected.keys()
    largest = max(g.norm() for g in expected.values())
    for name, grad in expected.items():
        assert (actual[name] - grad).norm() <= CLOSE * largest, name


@pytest.mark.parametrize(
    "term",
    [
        lambda logits: Doubled.apply(logits).square().mean(),
        lambda logits: Doubled.apply(logits * 0.5).logsumexp(-1).mean(),
        lambda logits: checkpoint(lambda z: z.logsumexp(-1).mean(), logits, use_reentrant=True),
        lambda logits: torch.stack([logits.mean(), Doubled.apply(logits).sin().mean()]).sum(),
    ],
)
def test_logits_have_their_gradient_below_python(term):
    stock, patched, _ = pair("llama")
    for model in (stock, patched):
        out = model(input_ids=ids(), labels=ids())
        (out.loss + term(out.logits)).backward()
    assert_same_gradients(stock, patched)


def test_hooks_on_norms_of_heads_and_on_the_head_see_ordinary_tensors():
    stock, patched, _ = pair()
    for model in (stock, patched):
        seen = []
        layer = model.model.layers[0].self_attn
        layer.q_norm.register_forward_hook(lambda m, i, o: Doubled.apply(o))
        layer.k_norm.register_full_backward_hook(lambda m, i, o, seen=seen: seen.append("k_norm"))
        model.lm_head.register_full_backward_hook(lambda m, i, o, seen=seen: seen.append("lm_head"))
        model(input_ids=ids(), labels=ids()).loss.backward()
        assert seen == ["lm_head", "k_norm"]
    assert_same_gradients(stock, patched)


def test_an_input_changed_in_place_is_refused_and_never_used():
    _, patched, _ = pair("llama")

    class Overwriting(type(patched)):
        def forward(self, input_ids, labels):
            hidden = self.model(input_ids=input_ids).last_hidden_state
            logits = self.lm_head(hidden)
            hidden.mul_(0)
            return self.loss_function(logits, labels, self.config.vocab_size)

    fresh = model_of(Known("decoder", "llama"))
    fresh.__class__ = Overwriting
    report = ki.transformers.apply(fresh)
    assert "loss" in {c.kind for c in report.replaced}
    with torch.no_grad(), pytest.raises(RuntimeError, match="before the weights change"):
        fresh(input_ids=ids(), labels=ids())


def test_a_weight_that_was_freed_is_an_error_and_no_crash():
    _, patched, _ = pair("llama")
    out = patched(input_ids=ids(), labels=ids())
    patched.lm_head.weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="before its operands are freed"):
        out.logits.sum()


def gated(bound=None, act=None):
    """A feed-forward layer as other people write it."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(32, 48), nn.Linear(32, 48)
            self.down_proj, self.act_fn = nn.Linear(48, 32), act or nn.SiLU()

        def forward(self, x):
            gate, up = self.act_fn(self.gate_proj(x)), self.up_proj(x)
            if bound is not None:
                gate, up = gate.clamp(max=bound), up.clamp(-bound, bound)
            return self.down_proj(gate * up)

    return Layer()


def test_a_bound_that_small_values_do_not_reach_is_seen():
    for bound, by in ((None, "fused_gated_activation"), (7.0, ""), (200.0, "")):
        model = model_of(Known("decoder", "llama"))
        model.model.layers[0].mlp = gated(bound)
        changes = {c.module: c.by for c in ki.transformers.apply(model).changes}
        assert changes["model.layers.0.mlp"] == by, bound


@pytest.mark.parametrize(
    "change",
    [
        lambda mlp: setattr(mlp, "act_fn", nn.ReLU()),
        lambda mlp: mlp.act_fn.register_forward_hook(lambda m, i, o: torch.zeros_like(o)),
        lambda mlp: setattr(mlp.act_fn, "forward", torch.sin),
        lambda mlp: mlp.up_proj.register_forward_hook(lambda m, i, o: o * 3),
    ],
)
def test_what_is_put_into_a_gated_layer_afterwards_counts(change):
    stock, patched, report = pair("llama")
    assert any(c.by == "fused_gated_activation" for c in report.replaced)
    with torch.no_grad():
        before = patched(ids()).logits
        for model in (stock, patched):
            change(model.model.layers[1].mlp)
        expected, actual = stock(ids()).logits, patched(ids()).logits
    assert relative_error(actual, expected) <= CLOSE
    assert relative_error(before, expected) > 1e-3


def test_an_epsilon_set_afterwards_counts():
    stock, patched, _ = pair()
    for model in (stock, patched):
        model.model.norm.variance_epsilon = 0.5
        model.model.layers[0].self_attn.q_norm.variance_epsilon = 0.7
    with torch.no_grad():
        assert relative_error(patched(ids()).logits, stock(ids()).logits) <= CLOSE


def test_global_names_of_the_models_module_are_those_of_the_latest_apply(monkeypatch):
    from transformers.models.llama import modeling_llama as home

    _, patched, report = pair("llama")
    report.undo()
    right = home.ALL_ATTENTION_FUNCTIONS
    monkeypatch.setattr(home, "ALL_ATTENTION_FUNCTIONS", copy.copy(right))
    ki.transformers.apply(patched)
    ours = type(patched.model.layers[0].self_attn).forward.__wrapped__.__globals__
    assert ours["ALL_ATTENTION_FUNCTIONS"] is home.ALL_ATTENTION_FUNCTIONS is not right


def test_apply_draws_nothing_and_works_under_another_default_device():
    model = model_of(Known("decoder", "qwen3"))
    state = torch.get_rng_state()
    with torch.device("meta"):
        report = ki.transformers.apply(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert not report.left


def test_parts_of_a_patched_model_are_patched():
    for first, second in ((lambda m: m.model, lambda m: m), (lambda m: m, lambda m: m.model)):
        model = model_of(Known("decoder", "llama"))
        report = ki.transformers.apply(first(model))
        with pytest.raises(ValueError, match="not patched"):
            ki.transformers.apply(second(model))
        report.undo()
        ki.transformers.apply(second(model)).undo()
        assert model.config._attn_implementation == "sdpa"


def test_a_loss_that_the_user_set_is_kept():
    _, patched, report = pair("llama")

    def constant(*args, **kwargs):
        return torch.tensor(42.0)

    patched.loss_function = constant
    report.undo()
    assert patched(input_ids=ids(), labels=ids()).loss == 42.0


def test_a_report_is_copied_as_its_text():
    _, patched, report = pair("llama")
    for other in (copy.deepcopy(report), pickle.loads(pickle.dumps(report))):
        assert str(other) == str(report)
        other.undo()
    with ki.receipts() as log:
        patched(ids())
    assert log


def test_a_bound_forward_that_somebody_kept_is_undone_too():
    _, patched, report = pair("llama")
    norm = patched.model.norm
    kept = norm.forward  # as wrappers keep it
    report.undo()
    with ki.receipts() as log:
        kept(torch.randn(1, 2, 32))
    assert log == []


def test_a_layer_that_asks_for_its_mask_gets_none_where_stock_gives_none():
    model, seen = model_of(Known("decoder", "llama")), []
    model.set_attn_implementation("sdpa")
    ki.transformers.apply(model)
    layer = model.model.layers[0].self_attn
    layer.register_forward_pre_hook(lambda m, a, k: seen.append(k["attention_mask"]), with_kwargs=True)
    model(ids())
    model(ids(), attention_mask=torch.tensor([[0] * 2 + [1] * 7, [1] * 9]))
    assert seen[0] is None
    assert seen[1].shape == (2, 1, 9, 9)


def test_calls_in_another_form_go_to_the_models_rotary_function():
    _, patched, _ = pair("llama")
    rotate = type(patched.model.layers[0].self_attn).forward.__wrapped__.__globals__["apply_rotary_pos_emb"]
    right = hf.models.llama.modeling_llama.apply_rotary_pos_emb
    q, k, table = torch.randn(1, 3, 2, 8), torch.randn(1, 3, 1, 8), torch.randn(1, 3, 8)
    for rest, named in (((2,), {}), ((), {"unsqueeze_dim": 2})):
        for a, b in zip(rotate(q, k, table, table, *rest, **named), right(q, k, table, table, 2), strict=True):
            assert torch.equal(a, b)


def test_norms_of_heads_in_a_layer_that_rotates_nothing_are_recomputed_alike():
    stock, patched, report = pair("flint")
    assert {c.by for c in report.replaced if "q_norm" in c.module} == {"fused_rope_qk"}
    for model in (stock, patched):
        model.train()
        model.activation_checkpointing_enable({"use_reentrant": False})
        model(input_ids=ids(), labels=ids()).loss.backward()
    assert_same_gradients(stock, patched)


class Casts(TorchDispatchMode):
    """Counts casts of [B, T, C] with so many channels from float32 to bfloat16."""

    def __init__(self, channels):
        super().__init__()
        self.channels, self.count = channels, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16:
            x = args[0]
            self.count += x.ndim == 3 and x.shape[-1] == self.channels and x.dtype == torch.float32
        return func(*args, **kwargs)


def under_autocast(model):
    with torch.autocast("cpu", torch.bfloat16), Casts(model.config.hidden_size) as casts:
        loss = model(input_ids=ids(), labels=ids(), use_cache=False).loss
    loss.backward()
    return loss, casts.count


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_under_autocast_a_norm_is_cast_once_for_all_linear_layers_that_read_it(name):
    stock, patched, _ = pair(name)
    (expected, before), (loss, after) = under_autocast(stock), under_autocast(patched)
    assert before >= 5 * 2  # q, k, v, gate, up in each of two layers
    assert after <= before - 3 * 2
    assert relative_error(loss.detach(), expected.detach()) <= 8 * floor(torch.bfloat16)
    wide = copy.deepcopy(stock).double()
    wide.zero_grad()
    wide(input_ids=ids(), labels=ids(), use_cache=False).loss.backward()
    for (n, p), q, exact in zip(patched.named_parameters(), stock.parameters(), wide.parameters(), strict=True):
        # Both round the same values to bfloat16, in another order: neither is far from the other's error.
        allowed = 2 * relative_error(q.grad, exact.grad) + 8 * floor(torch.bfloat16)
        assert relative_error(p.grad, exact.grad) <= allowed, n


def test_a_norm_that_others_than_linear_layers_read_is_an_ordinary_float32_tensor():
    _, patched, _ = pair("llama")
    layer, x = patched.model.layers[0], torch.randn(1, 3, patched.config.hidden_size, requires_grad=True)
    expected = layer.input_layernorm(x)
    with torch.autocast("cpu", torch.bfloat16):
        late = layer.input_layernorm(x)
        assert late.dtype == torch.float32
        assert torch.equal(late + 0.0, expected)
        narrow = torch.nn.functional.linear(late, torch.eye(x.shape[-1]))
    assert torch.equal(narrow, expected.to(torch.bfloat16))
    x.data.add_(1.0)
    x = x.detach()
    with torch.autocast("cpu", torch.bfloat16):
        late = layer.input_layernorm(x)
        x.add_(1.0)
        with pytest.raises(RuntimeError, match="must not change in place"):
            torch.nn.functional.linear(late, torch.eye(x.shape[-1]))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_norms_as_a_gpu_makes_them_are_those_of_the_model(name, monkeypatch):
    monkeypatch.setattr(norms, "_is_alone", lambda weight: True)
    stock, patched, _ = pair(name)
    with ki.receipts() as log:
        patched(input_ids=ids(), labels=ids()).loss.backward()
    assert {"gated_rms_norm"} == {r.op for r in log if "norm" in r.op}
    stock(input_ids=ids(), labels=ids()).loss.backward()
    assert_same_gradients(stock, patched)

"""Logits that wait for backward, in memory of their own or in the weight's gradient's: the same loss and gradients."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import kernel_index as ki
from kernel_index.core.triton.launch import interpreting
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked import slices
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.contract import rows_per_chunk
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.slices import Plan, plan_of

pytestmark = pytest.mark.skipif(not interpreting(), reason="runs Triton's interpreter")

OPTIONS = {"softcap": 15.0, "logit_scale": 0.5, "label_smoothing": 0.1, "z_loss": 1e-2, "valid_vocab": 75}
PLANS = {
    "nothing": Plan(80, 16),
    "some, in the gradient's memory": Plan(80, 16, 12, 16),
    "as many as fit there, and a short last slice": Plan(80, 32, 16, 16),
    "all, in memory of their own": Plan(80, 80, 21, 21),
    "held tokens first": Plan(80, 16, 12, 16, held_first=True),
    "held tokens first, a short last slice of three blocks": Plan(80, 48, 16, 16, held_first=True),
    "held tokens first, two slices of them at once": Plan(80, 16, 10, 16, held_first=True),
}


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randn(n, 16, generator=generator).to(dtype) for n in (21, 83))
    targets = torch.randint(0, 75, (21,), generator=generator)
    targets[::2] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets


@pytest.fixture
def planned(monkeypatch):
    """Every call gets this plan; without one, backward forms the logits again."""

    def use(plan):
        given = lambda hidden, weight, vocab, chunk_size, needs, **_: plan if any(needs) else plan._replace(held=0)  # noqa: E731
        monkeypatch.setattr(slices, "plan_of", given)

    return use


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_plan_gives_the_gradients_of_the_reference(planned, name, bias, dtype):
    planned(PLANS[name])
    h, w, t = inputs(dtype)
    leaves = [h, w, *([torch.linspace(-1, 1, 83).to(dtype).requires_grad_()] if bias else [])]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    found = []
    for tensors, backend in ((leaves, "triton"), (exact, "reference")):
        more = {"bias": tensors[2]} if bias else {}
        loss = ki.fused_linear_cross_entropy(*tensors[:2], t, **OPTIONS, **more, backend=backend)
        found.append((loss, *torch.autograd.grad(loss, tensors)))
    rtol = 1e-4 if dtype == torch.float32 else 2e-2
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()))
    assert not found[0][2][75:].any(), "padding has no gradient"


@pytest.mark.parametrize("name", PLANS)
def test_padding_may_hold_nan(planned, name):
    planned(PLANS[name])
    h, w, t = inputs()
    w = w.detach()
    w[75:] = torch.nan
    loss = ki.fused_linear_cross_entropy(h, w, t, **OPTIONS, backend="triton")
    (d,) = torch.autograd.grad(loss, h)
    assert loss.isfinite()
    assert d.isfinite().all()


@pytest.mark.parametrize("name", PLANS)
def test_a_second_backward_forms_the_logits_again(planned, name):
    planned(PLANS[name])
    h, w, t = inputs()
    loss = ki.fused_linear_cross_entropy(h, w, t, **OPTIONS, backend="triton")
    first = [g.clone() for g in torch.autograd.grad(loss, (h, w), retain_graph=True)]
    second = torch.autograd.grad(loss, (h, w), torch.tensor(2.0))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(2 * a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PLANS)
def test_in_a_checkpoint(planned, name, monkeypatch):
    planned(PLANS[name])
    h, w, t = inputs()
    call = lambda h, w: ki.fused_linear_cross_entropy(h, w, t, **OPTIONS, backend="triton")  # noqa: E731
    plain = torch.autograd.grad(call(h, w), (h, w))
    monkeypatch.setattr(slices, "hold", None)  # a checkpoint is there to keep nothing
    kept = torch.autograd.grad(checkpoint(call, h, w, use_reentrant=False), (h, w))
    for a, b in zip(plain, kept, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_what_is_held_follows_from_sizes_and_the_callers_limit():
    def plan(tokens, channels, vocab, chunk_size=0, needs=(True, True, False), dtype=torch.bfloat16):
        hidden, weight = (torch.empty(n, channels, dtype=dtype, device="meta") for n in (tokens, vocab))
        return plan_of(hidden, weight, vocab, chunk_size, list(needs))

    half = Plan(128256, 5120, 4096, 4096, held_first=True)
    assert plan(8192, 4096, 128256) == half, "half of the tokens, in the gradient's memory"
    assert plan(8193, 4096, 128256) == Plan(128256, 8192, 4096, 4096), "less than half"
    assert plan(8192, 4096, 128256, needs=(False, True, False)) == Plan(128256, 8192, 4096, 4096), "no sum to save"
    assert plan(16384, 2048, 128256) == Plan(128256, 4096, 2048, 2048), "an eighth"
    assert plan(2048, 4096, 128256) == Plan(128256, 16384, 2048, 4096), "all of them"
    assert plan(8192, 4096, 128256, 8192) == Plan(128256, 128256, 8192, 8192), "the caller allows all logits"
    assert plan(8192, 4096, 128256, 1023).held == 0, "the caller allows too few"
    assert plan(8192, 4096, 128256, 2048) == Plan(128256, 8192, 2048, 4096, limit=2048), "fewer, in the same memory"
    assert plan(8192, 4096, 128256, 6144) == Plan(128256, 8192, 5620, 5620, limit=6144), "and a slice beside them"
    assert plan(8192, 4096, 128256, 6144, needs=(True, False, False)).held == 5620, "in memory of their own"
    assert plan(8192, 4096, 128256, 6144, dtype=torch.float32).held == 0, "its slices would round otherwise"
    assert plan(8192, 4096, 128256, needs=(True, False, False)).held == 0, "there is no such memory"
    assert plan(65536, 4096, 128256).held == 0, "a sixteenth is not worth it"
    assert plan(32768, 512, 320) == Plan(320, 320, 32768, 32768), "no larger than a chunk"
    assert plan(8192, 4096, 128256, needs=(False, False, False)).held == 0, "without gradients"


def test_the_default_of_8192_tokens_holds_less_than_a_gigabyte_and_a_quarter():
    tokens, channels, vocab = 8192, 4096, 128256
    hidden, weight = (torch.empty(n, channels, dtype=torch.bfloat16, device="meta") for n in (tokens, vocab))
    plan = plan_of(hidden, weight, vocab, 0, [True, True, False])
    others = tokens - plan.held
    of_sums = 2 * plan.held * channels + 4 * others * channels  # the first ones rounded, the others in float32
    backward = max(2 * plan.held * plan.step * (tokens // plan.held), 2 * tokens * plan.step)
    forward = 2 * vocab * rows_per_chunk(hidden[plan.held :], vocab, slices.CHUNK_BYTES // (2 * vocab))
    assert 2 * vocab * channels + max(of_sums + backward, forward) < 1.25e9


@pytest.mark.parametrize("tokens", [3000, 8192])
def test_more_memory_never_costs_more_products_and_less_is_never_exceeded(tokens):
    channels, vocab = 2048, 50304
    hidden, weight = (torch.empty(n, channels, dtype=torch.bfloat16, device="meta") for n in (tokens, vocab))
    before = 0
    for limit in (*range(64, tokens, 97), tokens, 2 * tokens):
        plan = plan_of(hidden, weight, vocab, limit, [True, True, False])
        assert plan.held >= before, "held tokens cost three products, the others four"
        before = plan.held
        own = 0 if plan.room == channels else plan.room
        in_place = plan.held == tokens and plan.room != channels
        of_slices = 0 if in_place else tokens * min(plan.step, vocab) / vocab
        assert own + of_slices <= limit + 1
    assert before == tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("chunk_size", [3, 8, 15, 17, 20, 21])
def test_every_budget_gives_the_gradients_of_the_reference(chunk_size, dtype):
    h, w, t = inputs(dtype)
    exact = [x.detach().double().requires_grad_() for x in (h, w)]
    found = []
    for tensors, backend in (((h, w), "triton"), (exact, "reference")):
        loss = ki.fused_linear_cross_entropy(*tensors, t, **OPTIONS, chunk_size=chunk_size, backend=backend)
        found.append((loss, *torch.autograd.grad(loss, tensors)))
    rtol = 1e-4 if dtype == torch.float32 else 2e-2
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()))

"""What the entry promises beyond the conformance test; each pitfall of the sample and of peers is a test."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernel_index as ki
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked import torch_op
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.contract import CHUNK_BYTES, rows_per_chunk

BACKENDS = ("triton", "inductor", "chunked", "reference")
CHUNKED = BACKENDS[:3]


def inputs(tokens=23, width=16, vocab=40, dtype=torch.float32):
    hidden = torch.randn(tokens, width, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, width, dtype=dtype).requires_grad_()
    return hidden, weight, torch.randint(0, vocab, (tokens,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_pytorch(backend):
    h, w, t = inputs()
    t[3] = -100
    ours = ki.fused_linear_cross_entropy(h, w, t, chunk_size=7, backend=backend)
    plain = F.cross_entropy(F.linear(h, w), t)
    torch.testing.assert_close(ours, plain)
    for a, b in zip(torch.autograd.grad(ours, (h, w)), torch.autograd.grad(plain, (h, w)), strict=True):
        torch.testing.assert_close(a, b)


OPERATORS = {torch_op._losses_op.op: torch_op._all_losses, torch_op._gradients_op.op: torch_op._gradients}


class Largest(TorchDispatchMode):
    """The most elements that any tensor made inside the block has."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inside = OPERATORS.get(func)
        if inside is None:
            out = func(*args, **(kwargs or {}))
        else:  # look into our own operators too: a mode is off while its handler runs
            with self:
                out = inside(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return out


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_never_holds_more_than_a_chunk_of_logits(reduction):
    """Row 3: chunking that autograd undoes.  The weight's own gradient is the largest tensor, not the logits."""
    h, w, t = inputs(tokens=256, width=8, vocab=4000)
    with Largest() as seen:
        loss = ki.fused_linear_cross_entropy(h, w, t, reduction=reduction, chunk_size=32, backend="chunked")
        torch.autograd.grad(loss, (h, w), torch.ones_like(loss))
    assert seen.elements == 32 * 4000
    with Largest() as full:
        ki.fused_linear_cross_entropy(h, w, t, reduction=reduction, backend="reference")
    assert full.elements == 256 * 4000, "the probe sees full logits where they are"


def test_compiled_model_keeps_the_bound():
    """The chunk loop is one operator of the graph: no compiler widens it."""
    graphs = []

    def keep(module, _):
        graphs.append(module)
        return module.forward

    h, w, t = inputs()
    torch.compile(ki.fused_linear_cross_entropy, backend=keep, fullgraph=True)(h.detach(), w.detach(), t)
    names = {str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"}
    assert any("linear_cross_entropy" in name for name in names)
    assert not any("linear." in name or "matmul" in name or "mm." in name for name in names)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.thorough_if(when=lambda backend, dtype: dtype == torch.float16)
@pytest.mark.thorough_if(when=lambda backend, dtype: backend == "triton")
def test_low_precision_sums_in_float32(backend, dtype):
    """Row 4: the loss is float32 and the weight's gradient does not lose small terms over many chunks."""
    h, w, t = inputs(tokens=512, width=4, vocab=6, dtype=dtype)
    loss = ki.fused_linear_cross_entropy(h, w, t, reduction="sum", chunk_size=8, backend=backend)
    assert loss.dtype == torch.float32
    dw = torch.autograd.grad(loss, w)[0].double()
    h64, w64 = (x.detach().double().requires_grad_() for x in (h, w))
    exact = torch.autograd.grad(F.cross_entropy(F.linear(h64, w64), t, reduction="sum"), w64)[0]
    assert (dw - exact).abs().max() / exact.abs().max() < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("backend", BACKENDS)
def test_per_token_keeps_shape_and_takes_uneven_gradients(backend):
    """Row 6: none keeps [B, T]; upstream gradients differ by token."""
    h = torch.randn(3, 5, 8, requires_grad=True)
    w = torch.randn(11, 8, requires_grad=True)
    t = torch.randint(0, 11, (3, 5))
    t[1, 2] = -100
    loss = ki.fused_linear_cross_entropy(h, w, t, reduction="none", chunk_size=4, backend=backend)
    assert loss.shape == t.shape
    assert loss[1, 2] == 0
    g = torch.randn(3, 5)
    plain = F.cross_entropy(F.linear(h, w).flatten(0, 1), t.flatten(), reduction="none").view(3, 5)
    for a, b in zip(torch.autograd.grad(loss, (h, w), g), torch.autograd.grad(plain, (h, w), g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_ignored_and_no_tokens_give_zero(backend, reduction):
    for tokens in (4, 0):
        h, w, _ = inputs(tokens=tokens)
        t = torch.full((tokens,), -100)
        loss = ki.fused_linear_cross_entropy(h, w, t, reduction=reduction, backend=backend)
        assert loss == 0
        assert loss.requires_grad
        for gradient in torch.autograd.grad(loss, (h, w)):
            assert not gradient.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_do_not_leak_infinities(backend):
    h, w, t = inputs(tokens=5)
    with torch.no_grad():
        h[2] = float("inf")
    t[2] = -100
    loss = ki.fused_linear_cross_entropy(h, w, t, backend=backend)
    assert torch.isfinite(loss)


@pytest.mark.parametrize("backend", CHUNKED)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_backward_with_another_gradient(backend, reduction):
    """A peer scales its saved gradients in place: the second backward comes out scaled twice."""
    h, w, t = inputs()
    loss = ki.fused_linear_cross_entropy(h, w, t, reduction=reduction, backend=backend).sum()
    once = torch.autograd.grad(loss, (h, w), retain_graph=True)
    twice = torch.autograd.grad(loss, (h, w), torch.tensor(2.0), retain_graph=True)
    again = torch.autograd.grad(loss, (h, w))
    for a, b, c in zip(once, twice, again, strict=True):
        torch.testing.assert_close(2 * a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("backend", CHUNKED)
def test_frozen_hidden_or_weight_skips_its_product(backend):
    """A peer returns no weight gradient when the hidden states are frozen."""
    h, w, t = inputs()
    expected = torch.autograd.grad(ki.fused_linear_cross_entropy(h, w, t, backend="reference"), (h, w))
    for frozen, live, gradient in ((h.detach(), w, expected[1]), (w.detach(), h, expected[0])):
        args = (frozen, live) if live is w else (live, frozen)
        loss = ki.fused_linear_cross_entropy(*args, t, backend=backend)
        torch.testing.assert_close(torch.autograd.grad(loss, live)[0], gradient)


@pytest.mark.parametrize("backend", CHUNKED)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_is_refused(backend, reduction):
    h, w, t = inputs()
    loss = ki.fused_linear_cross_entropy(h, w, t, reduction=reduction, backend=backend).sum()
    with pytest.raises(RuntimeError, match="no double backward"):
        torch.autograd.grad(loss, h, create_graph=True)


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_gradient_of_a_confident_target_keeps_its_digits(backend):
    """p − 1 in float32 loses everything as p → 1; the sum over the other classes does not."""
    margin = 14.0
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[margin], [0.0], [0.0]])
    loss = ki.fused_linear_cross_entropy(hidden, weight, torch.tensor([0]), backend=backend)
    others = 2 * math.exp(-margin)
    assert float(loss.detach()) == pytest.approx(math.log1p(others), rel=1e-5)
    gradient = torch.autograd.grad(loss, hidden)[0]
    assert float(gradient) == pytest.approx(-margin * others / (1 + others), rel=1e-5)


def test_compile_with_ignored_targets():
    """A peer's compiled loss is wrong as soon as a target is ignored."""
    h, w, t = inputs()
    t[::3] = -100
    compiled = torch.compile(ki.fused_linear_cross_entropy, fullgraph=True)
    torch.testing.assert_close(compiled(h, w, t), ki.fused_linear_cross_entropy(h, w, t, backend="reference"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_padded_vocabulary_takes_no_part(backend):
    h, w, t = inputs(vocab=40)
    t = t % 33
    with torch.no_grad():
        w[33:] = 100.0
    loss = ki.fused_linear_cross_entropy(h, w, t, valid_vocab=33, label_smoothing=0.1, backend=backend)
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(h, w[:33]), t, label_smoothing=0.1))
    gradient = torch.autograd.grad(loss, w)[0]
    assert not gradient[33:].any()
    assert gradient[:33].any()


def test_autocast_casts_like_linear():
    h, w, t = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        loss = ki.fused_linear_cross_entropy(h, w, t, backend="chunked")
        plain = F.cross_entropy(F.linear(h, w).float(), t)
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-5)
    assert torch.autograd.grad(loss, w)[0].dtype == torch.float32


def test_mean_is_the_sum_over_the_tokens_that_count():
    h, w, t = inputs()
    t[::2] = -1
    mean = ki.fused_linear_cross_entropy(h, w, t, ignore_index=-1)
    total = ki.fused_linear_cross_entropy(h, w, t, ignore_index=-1, reduction="sum")
    torch.testing.assert_close(mean, total / (t != -1).sum())


def test_token_log_probs_are_log_softmax():
    h, w, t = inputs()
    t[0] = -100
    ours = ki.token_log_probs(h, w, t, logit_scale=0.5, chunk_size=6)
    plain = (0.5 * F.linear(h, w)).log_softmax(-1)
    torch.testing.assert_close(ours[1:], plain[1:].gather(1, t[1:, None])[:, 0])
    assert ours[0] == 0
    with ki.receipts() as log:
        ki.token_log_probs(h, w, t)
    assert log[0].op == "token_log_probs"


def test_chunks_are_even_and_within_budget():
    def rows_of(tokens, width, vocab, dtype, chunk_size=0):
        return rows_per_chunk(torch.empty(tokens, width, dtype=dtype, device="meta"), vocab, chunk_size)

    assert rows_of(4096, 1024, 50304, torch.float32) == math.ceil(4096 / 7)
    for tokens, width, vocab, dtype in (
        (1, 8, 10**6, torch.float32),
        (4096, 1024, 50304, torch.bfloat16),
        (8192, 4096, 128256, torch.bfloat16),
        (100, 8, 32, torch.float32),
    ):
        rows = rows_of(tokens, width, vocab, dtype)
        budget = max(CHUNK_BYTES, vocab * width * dtype.itemsize // 2)
        assert rows == 1 or rows * vocab * dtype.itemsize <= budget
        chunks = math.ceil(tokens / rows)
        assert chunks * rows - tokens < chunks, "chunks differ by less than a row on average"
    assert rows_of(100, 8, 32, torch.float32, 30) == 25
    assert math.ceil(8192 / rows_of(8192, 4096, 128256, torch.bfloat16)) == 4, "a large weight is read few times"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": torch.zeros(3, 4, dtype=torch.int64)}, TypeError, "hidden must be a floating-point tensor"),
        ({"hidden": torch.zeros(3, 5)}, ValueError, r"weight must be \[V, C\] with C = 5"),
        ({"weight": torch.zeros(4)}, ValueError, r"weight must be \[V, C\]"),
        ({"weight": torch.zeros(8, 4).bfloat16()}, TypeError, "weight must be torch.float32 like hidden"),
        ({"targets": torch.zeros(2, dtype=torch.int64)}, ValueError, "targets must be shaped like hidden"),
        ({"targets": torch.zeros(3)}, TypeError, "targets must be int64 or int32"),
        ({"targets": torch.tensor([0, 8, 1])}, ValueError, r"targets must be in \[0, 8\).*got 8"),
        ({"targets": torch.tensor([0, -1, 1])}, ValueError, r"targets must be in \[0, 8\).*got -1"),
        ({"bias": torch.zeros(7)}, ValueError, "bias must be"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
        ({"chunk_size": -5}, ValueError, "chunk_size must be at least 1, got -5"),
        ({"softcap": -1.0}, ValueError, "softcap must be positive or None, got -1.0"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be between 0 and 1"),
        ({"z_loss": -1.0}, ValueError, "z_loss must be at least 0"),
        ({"reduction": "average"}, ValueError, "reduction must be one of"),
        ({"valid_vocab": 9}, ValueError, "valid_vocab must be at most the 8 rows"),
        ({"logit_scale": float("nan")}, ValueError, "logit_scale must be finite"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    call = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(8, 4), "targets": torch.tensor([0, 7, -100]), **changes}
    with pytest.raises(error, match=message):
        ki.fused_linear_cross_entropy(**call)


@pytest.mark.parametrize("backend", CHUNKED)
def test_float16_weight_gradient_does_not_overflow_on_its_way(backend):
    """The sum over 512 equal tokens passes 65504 before the mean divides it."""
    hidden = torch.full((512, 2), 300.0, dtype=torch.float16)
    weight = torch.zeros(4, 2, dtype=torch.float16, requires_grad=True)
    loss = ki.fused_linear_cross_entropy(hidden, weight, torch.zeros(512, dtype=torch.int64), backend=backend)
    gradient = torch.autograd.grad(loss, weight)[0]
    torch.testing.assert_close(gradient[:, 0].float(), torch.tensor([-225.0, 75.0, 75.0, 75.0]), rtol=2e-3, atol=0)


def test_ignored_log_probability_is_positive_zero():
    h, w, _ = inputs(tokens=1)
    assert math.copysign(1, ki.token_log_probs(h, w, torch.tensor([-100])).item()) == 1

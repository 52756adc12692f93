"""What ``token_stats`` promises beyond the conformance test: the sampler's support, bounds on memory, and its edges."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernel_index as ki
from kernel_index.core.triton.launch import interpreting
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked import contract, products, slices, torch_op_stats
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked.slices import Plan
from kernel_index.lm.generate import Sampling

BACKENDS = ("chunked", "reference")


def inputs(tokens=21, width=16, vocab=40, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randn(n, width, generator=generator).to(dtype) for n in (tokens, vocab))
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    targets[::4] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def supports(logits, sampling, backend):
    """For each row and class, whether it is kept: log_support is the mass of the support, its gradient tells which."""
    rows = len(logits)
    hidden = torch.eye(rows)
    weight = logits.T.contiguous().requires_grad_()
    call = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    found = ki.token_stats(hidden, weight, torch.zeros(rows, dtype=torch.int64), **call, backend=backend)
    (d,) = torch.autograd.grad(found.log_support.sum(), weight)
    return d.T > 0, found.log_support


@pytest.mark.parametrize("equal", [1, 4], ids=["distinct", "ties"])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(1, 1.0), (7, 1.0), (7, 0.6), (30, 0.6), (64, 0.3), (64, 0.85), (64, 0.999), (64, 1e-9)]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_support_is_the_samplers(backend, top_k, top_p, equal):
    generator = torch.Generator().manual_seed(top_k)
    logits = torch.stack([torch.randperm(64, generator=generator) for _ in range(9)]) // equal / 4.0
    sampling = Sampling(0.9, top_k, top_p)
    kept, log_support = supports(logits, sampling, backend)
    p = torch.softmax(logits.double() / 0.9, -1)
    for row in range(len(logits)):
        tokens, weights = sampling.kept(logits[row])
        expected = torch.zeros(64, dtype=torch.bool)
        expected[tokens] = True
        assert torch.equal(kept[row], expected)
        assert len(tokens) == len(weights)
        mass = p[row][tokens].sum().log()
        torch.testing.assert_close(log_support[row].double(), mass, rtol=1e-5, atol=1e-6)


def test_the_sampler_keeps_the_smallest_of_equal_tokens():
    logits = torch.zeros(300)
    logits[250] = 1.0
    tokens, _ = Sampling(1.0, 4).kept(logits)
    assert tokens.tolist() == [250, 0, 1, 2]
    tokens, _ = Sampling(1.0, 300, 0.02).kept(torch.zeros(300))
    assert tokens.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("backend", BACKENDS)
def test_predicted_is_the_first_of_equal_logits_and_needs_no_target(backend):
    weight = torch.tensor([[0.0], [2.0], [2.0], [-0.0]])
    found = ki.token_stats(torch.tensor([[1.0], [0.0], [-1.0]]), weight, torch.tensor([1, -100, 2]), backend=backend)
    assert found.predicted.tolist() == [1, 0, 0]


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_the_other_functions(backend, softcap):
    h, w, t = inputs()
    stats = ki.token_stats(h, w, t, softcap=softcap, backend=backend)
    torch.testing.assert_close(stats.log_prob, ki.token_log_probs(h, w, t, softcap=softcap))
    assert not stats.log_support.any()
    logits = ki.token_stats(h, w, t, temperature=0.5, backend=backend).log_prob
    torch.testing.assert_close(logits, ki.token_log_probs(h, w, t, logit_scale=2.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_truncated_log_probability_sums_to_one(backend):
    h, w, _ = inputs(tokens=1)
    every = torch.arange(40)
    found = ki.token_stats(h.detach().expand(40, -1), w.detach(), every, top_k=9, top_p=0.8, backend=backend)
    log_p = found.log_prob - found.log_support
    kept = log_p.sort(descending=True).values.exp()
    count = int((kept.cumsum(0) < 1 - 1e-5).sum()) + 1
    assert count <= 9
    torch.testing.assert_close(kept[:count].sum(), torch.tensor(1.0))


@pytest.mark.parametrize("call", [{}, {"top_k": 5, "top_p": 0.7}, {"top_p": 0.7}], ids=["all", "top_k", "top_p"])
def test_chunks_and_blocks_change_nothing(call, monkeypatch):
    h, w, t = inputs()

    def run():
        found = ki.token_stats(h, w, t, **call, backend="chunked")
        g = torch.linspace(-1, 1, len(t))
        loss = (found.log_prob * g).sum() + (found.entropy * g.cos()).sum() + (found.log_support * g.exp()).sum()
        return *(x.detach() for x in found), *torch.autograd.grad(loss, (h, w))

    whole = run()
    monkeypatch.setattr(contract, "CHUNK_BYTES", 1)
    monkeypatch.setattr(products, "BLOCK_BYTES", 4 * 40 * 3)
    for a, b in zip(run(), whole, strict=True):
        torch.testing.assert_close(a, b)


class Largest(TorchDispatchMode):
    """The most elements that any tensor made inside the block has."""

    INSIDE = {  # noqa: RUF012  a mode is off while its handler runs: our operators are looked into
        torch_op_stats._statistics_op.op: torch_op_stats._statistics,
        torch_op_stats._gradients_op.op: torch_op_stats._gradients,
    }

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.INSIDE:
            with self:
                out = self.INSIDE[func](*args, **(kwargs or {}))
        else:
            out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


@pytest.mark.parametrize("call", [{}, {"top_k": 5, "top_p": 0.7}, {"top_p": 0.7}], ids=["all", "top_k", "top_p"])
def test_never_holds_more_than_a_chunk_of_logits(call, monkeypatch):
    monkeypatch.setattr(contract, "CHUNK_BYTES", 32 * 4000 * 4)
    h, w, t = inputs(tokens=256, width=8, vocab=4000)
    with Largest() as seen:
        found = ki.token_stats(h, w, t, **call, backend="chunked")
        torch.autograd.grad(found.log_prob.sum() + found.entropy.sum() + found.log_support.sum(), (h, w))
    assert 32 * 4000 <= seen.elements <= 2 * 32 * 4000, "a chunk, or two stacked values of its blocks"


@pytest.mark.parametrize("call", [{}, {"top_k": 5, "top_p": 0.7}, {"top_p": 0.7}], ids=["all", "top_k", "top_p"])
def test_an_ignored_row_may_hold_nan(call):
    h, w, t = inputs()
    dirty = torch.where((t == -100)[:, None], torch.nan, h.detach()).requires_grad_()
    found = []
    for hidden in (h, dirty):
        stats = ki.token_stats(hidden, w, t, **call, backend="chunked")[:3]
        assert all((x[t == -100] == 0).all() for x in stats)
        found.append((*(x.detach() for x in stats), *torch.autograd.grad(sum(x.sum() for x in stats), (hidden, w))))
    for a, b in zip(*found, strict=True):
        if a.shape == w.shape:  # 0 · NaN in the product over tokens
            continue
        assert torch.equal(a, b)


def test_near_certainty_keeps_its_digits():
    """p of the largest rounds to 1 in float32: what is left over keeps its digits."""
    logits = (30.0, 0.0, 1.0, -2.0)
    weight = torch.tensor(logits)[:, None].requires_grad_()
    found = ki.token_stats(torch.ones(1, 1), weight, torch.tensor([0]), top_k=2, backend="chunked")
    below = [math.exp(x - 30) for x in logits[1:]]
    log_prob, total = -math.log1p(sum(below)), 1 + sum(below)
    entropy = -log_prob + sum(e * (30 - x) for e, x in zip(below, logits[1:], strict=True)) / total
    dropped = (below[0] + below[2]) / total  # kept are 30 and 1
    for actual, exact in zip(found[:3], (log_prob, entropy, math.log1p(-dropped)), strict=True):
        assert math.isclose(actual.item(), exact, rel_tol=1e-5)
    (d,) = torch.autograd.grad(found.log_prob, weight)
    assert math.isclose(d[0].item(), sum(below) / total, rel_tol=1e-5)


@pytest.mark.parametrize("temperature", [1e-300, 1e-38, 1e-3, 1e30])
@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_temperatures_stay_finite(backend, temperature):
    h, w, t = inputs()
    for x in ki.token_stats(h, w, t, temperature=temperature, top_p=0.9, backend=backend)[1:3]:
        assert x.isfinite().all()
    entropy = ki.token_stats(h, w, t, temperature=temperature, backend=backend).entropy[t != -100]
    limit = {1e30: math.log(40)}.get(temperature, 0.0)
    torch.testing.assert_close(entropy, torch.full_like(entropy, limit), rtol=1e-4, atol=1e-2)


def test_classes_of_minus_infinity_have_no_part():
    h, w, t = inputs()
    bias = torch.zeros(40)
    bias[25:] = -torch.inf
    t = torch.where(t < 25, t, -100)
    for call in ({}, {"top_k": 30}, {"top_p": 0.9}):
        a = ki.token_stats(h, w, t, bias=bias, **call, backend="chunked")
        b = ki.token_stats(h, w, t, valid_vocab=25, **call, backend="chunked")
        for x, y in zip(a[:3], b[:3], strict=True):
            torch.testing.assert_close(x, y)
            (d,) = torch.autograd.grad(x.sum(), w, allow_unused=True, retain_graph=True)
            assert d.isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"temperature": 0.0}, ValueError, "temperature must be positive, got 0.0"),
        ({"temperature": "1"}, TypeError, "temperature must be a number, got str"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"top_k": 2.0}, TypeError, "top_k must be an integer, got float"),
        ({"top_p": 0.0}, ValueError, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, ValueError, "top_p must be above 0 and at most 1, got 1.5"),
        ({"top_p": float("nan")}, ValueError, "top_p must be finite, got nan"),
        ({"softcap": -1.0}, ValueError, "softcap must be positive or None, got -1.0"),
        ({"valid_vocab": 41}, ValueError, "valid_vocab must be at most the 40 rows of weight, got 41"),
        ({"group": "world"}, TypeError, "group must be a torch.distributed.ProcessGroup or None, got str"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    h, w, t = inputs()
    with pytest.raises(error, match=message.replace(".", r"\.")):
        ki.token_stats(h, w, t, **change)


@pytest.mark.skipif(not interpreting(), reason="runs Triton's interpreter")
@pytest.mark.parametrize(
    "plan",
    [
        Plan(80, 16),
        Plan(80, 16, 12, 16),
        Plan(80, 32, 16, 16),
        Plan(80, 80, 21, 21),
        Plan(80, 48, 16, 16, held_first=True),
    ],
    ids=str,
)
def test_every_plan_of_triton_gives_the_statistics_of_the_reference(monkeypatch, plan):
    """Also of a row whose largest class is certain, of equal logits and of a temperature below 1."""
    plan = Plan(*plan)
    given = lambda hidden, weight, vocab, chunk_size, needs, **_: plan if any(needs) else plan._replace(held=0)  # noqa: E731
    monkeypatch.setattr(slices, "plan_of", given)
    generator = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randn(n, 16, generator=generator) for n in (21, 83))
    hidden[3], weight[7] = 0.0, 40 * hidden[5]
    targets = torch.randint(0, 75, (21,), generator=generator)
    targets[::4], targets[5] = -100, 7
    found = []
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "reference")):
        leaves = [t.to(dtype).requires_grad_() for t in (hidden, weight)]
        stats = ki.token_stats(*leaves, targets, temperature=0.7, softcap=20.0, valid_vocab=75, backend=backend)
        upstream = torch.linspace(-1, 2, 21, dtype=dtype)
        grads = torch.autograd.grad(
            (stats.log_prob, stats.entropy), leaves, (upstream, upstream.flip(0)), retain_graph=True
        )
        again = torch.autograd.grad((stats.log_prob, stats.entropy), leaves, (upstream, upstream.flip(0)))
        for a, b in zip(grads, again, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        found.append((stats.log_prob, stats.entropy, *grads, stats.predicted))
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), wanted.double(), rtol=1e-4, atol=1e-5)
    assert float(found[0][0][5]) > -1e-4, "the certain one"

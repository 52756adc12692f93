"""The Triton forms under ``numerics("invariant")``, interpreted: a row's bits do not depend on its place or the others.

On a GPU ``kernel-index rollout-check`` asks the same of whole models.
"""

import pytest
import torch

pytest.importorskip("triton")

from torch.utils._python_dispatch import TorchDispatchMode

import kernel_index as ki
from kernel_index.core.force import PUBLIC
from kernel_index.core.testing import Maker, suites
from kernel_index.integrations.hugging_face.exact_ops import is_exact
from kernel_index.lm import rollout_check
from kernel_index.proofs.errors import in_float64, relative_error, run
from tests.interpreter import rows_alone
from tests.lm.test_rollout_check import drawn_model
from tests.test_invariant_ops import (
    CALLS,
    drawn,
    statistics_have_the_log_probabilities_of_the_loss,
    targets_of,
    weight_of,
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's order of a sum")
DTYPES = (torch.float32, torch.bfloat16)
SUITES = [s for s in suites() if any(b.name == "triton" and b.invariant for b in s.backends)]
ROUTED = ("moba_attention", "moba_route", "clustered_sparse_attention", "clustered_route")
OPS = tuple(s.op for s in SUITES if s.op in PUBLIC) + ROUTED
ROUNDINGS = 128  # as in test_invariant_cases


@pytest.fixture(autouse=True)
def _triton():
    with rows_alone(), ki.force("triton", *OPS):
        yield


OF_ITS_OWN = (
    "attention", "attention_with_lse", "exact_token_attention", "fa4_kvcache_decode", "fused_linear_cross_entropy",
    "lightning_indexer", "token_stats",
)  # fmt: skip
"""Functions whose kernels in this mode are not those of ordinary mode, which the conformance test runs."""

CASES = [pytest.param(s, c, id=f"{s.op}-{c.name}") for s in SUITES if s.op in OF_ITS_OWN for c in s.cases]


@pytest.mark.native
@pytest.mark.thorough
@pytest.mark.parametrize(("suite", "case"), CASES)
def test_it_is_right_or_refused(suite, case):
    kwargs = case.build(Maker(torch.float32))
    names = [n for n in suite.differentiable if isinstance(kwargs.get(n), torch.Tensor)]
    names = [] if "triton" in suite.without_gradient else names
    leaves = kwargs | {n: kwargs[n].detach().requires_grad_() for n in names}  # a gradient may be what is refused
    with ki.numerics("invariant"):
        if ki.explain(suite.function, **leaves).would_run is None:
            with pytest.raises(ki.Ineligible, match=r"forced by ki\.force"):
                suite.function(**leaves)
            return
        found, gradients = run(suite.function, kwargs, names)
    exact, exact_gradients = run(suite.oracle, in_float64(kwargs), names)
    for one, other in zip(found + gradients, exact + exact_gradients, strict=True):
        assert relative_error(one, other) <= ROUNDINGS * torch.finfo(torch.float32).eps


@pytest.mark.native
@pytest.mark.thorough_if(when=lambda call, dtype: dtype != torch.float32 and call not in ("norm", "log_probs"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", [name for name in CALLS if name != "tables"])
def test_a_row_does_not_depend_on_place_or_rows(call, dtype):
    x, run_call = drawn(dtype), CALLS[call]

    def gradient(rows):
        leaf = x[rows].clone().requires_grad_()
        with ki.numerics("invariant"), ki.receipts() as log:
            out = run_call(leaf, dtype)
        assert {r.ran for r in log} == {"triton"}
        assert all(r.numerics for r in log)
        wide = [o for o in out if o.is_floating_point()]
        return *out, *torch.autograd.grad(wide, leaf, [torch.ones_like(o) for o in wide])

    together, order = gradient(slice(None)), torch.randperm(70)[:23]
    for rows in (slice(69, 70), order):
        for found, expected in zip(gradient(rows), together, strict=True):
            assert torch.equal(found, expected[rows]), rows


ELSEWHERE = ("cos", "sin", "exp", "log", "log1p", "sigmoid", "tanh", "pow", "arange", "linspace")
"""A GPU computes every element of these by one kernel; arange counts; the last makes weights."""

CALLS_OF_A_BATCH = {name: run for name, run in CALLS.items() if name != "tables"} | {
    "mean of losses": lambda x, dtype: ki.fused_linear_cross_entropy(x, weight_of(dtype), targets_of(x), z_loss=1e-3),
    "linear": lambda x, dtype: ki.linear(x, weight_of(dtype)),
}


class _NothingInexact(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        assert func.overloadpacket.__name__ in ELSEWHERE or is_exact(func, args, kwargs or {}, found), func
        return found


@pytest.mark.parametrize("call", CALLS_OF_A_BATCH)
def test_no_operator_of_pytorch_is_inexact(call):
    """Between our kernels, as ``apply`` asks of a model: it would refuse the model for what we run."""
    x = drawn(torch.bfloat16)
    with ki.numerics("invariant"), _NothingInexact():
        CALLS_OF_A_BATCH[call](x, torch.bfloat16)


MASKS = {
    "causal": {},
    "window": {"window": (9, 0)},
    "both sides": {"causal": False},
    "both sides, window": {"causal": False, "window": (6, 4)},
}
DOCUMENTS = torch.tensor([[0] * 19 + [1] * 22 + [2] * 4, [0] * 3 + [1] * 37 + [-1] * 5])


def heads(dtype, tokens=45):
    torch.manual_seed(0)
    return [torch.randn(2, tokens, n, 24).to(dtype) for n in (4, 2, 2, 4)]  # q, k, v and an upstream gradient


def attended(q, k, v, upstream, mask, **options):
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    with ki.numerics("invariant"):
        out, lse = ki.attention_with_lse(*leaves, mask, **options)
    return out.detach(), lse.detach().transpose(1, 2), *torch.autograd.grad((out * upstream).sum() + lse.sum(), leaves)


@pytest.mark.thorough_if(when=lambda kind, dtype: kind != "window")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MASKS)
def test_a_document_has_the_bits_that_it_has_alone(kind, dtype):
    """Output, lse and the gradients of q, k and v, packed with others or not."""
    tensors = heads(dtype)
    packed = attended(*tensors, ki.MaskContract(doc_ids=DOCUMENTS, **MASKS[kind]))
    for b, first, end in ((0, 0, 19), (0, 19, 41), (0, 41, 45), (1, 3, 40)):
        alone = attended(*(x[b : b + 1, first:end] for x in tensors), ki.MaskContract(**MASKS[kind]))
        for name, one, other in zip(("out", "lse", "dq", "dk", "dv"), alone, packed, strict=True):
            assert torch.equal(one, other[b : b + 1, first:end]), (name, b, first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 7])
def test_decoding_is_the_training_form(window, dtype):
    """Any chunk of new tokens over pages of any size, with what others have left in the cache."""
    q, k, v, _ = (x[:1] for x in heads(dtype))
    with ki.numerics("invariant"):
        training = ki.attention(q, k, v, ki.MaskContract(window=(window, 0)))
        for first, count, page in ((0, 45, 16), (0, 1, 5), (44, 1, 1), (17, 9, 7), (30, 15, 64)):
            end = first + count
            pages = -(-end // page)
            caches = torch.full((2, pages + 3, page, 2, 24), torch.nan, dtype=dtype)
            table = torch.randperm(pages + 3)[None, :pages].to(torch.int32)
            for t in range(first):
                caches[:, table[0, t // page], t % page] = torch.stack((k[0, t], v[0, t]))
            out = ki.fa4_kvcache_decode(
                q[:, first:end], *caches, cache_seqlens=first, k=k[:, first:end], v=v[:, first:end],
                block_table=table, window_size=(-1 if window is None else window, 0),
            )  # fmt: skip
            assert torch.equal(out, training[:, first:end]), (first, count, page)


def test_what_a_row_does_not_see_may_be_anything():
    q, k, v, g = heads(torch.float32)
    mask = ki.MaskContract(doc_ids=DOCUMENTS)
    expected = attended(q, k, v, g, mask)
    k, v = k.clone(), v.clone()
    k[:, 39:], v[:, 39:] = torch.nan, torch.inf
    for one, other in zip(attended(q, k, v, g, mask)[:3], expected, strict=False):
        assert torch.equal(one[:, :39], other[:, :39])


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda q, k, v: ki.attention(q, k, v, scale=-1.0), "needs a positive scale"),
        (lambda q, k, v: ki.attention(q.requires_grad_(), k[:, :3], v[:, :3], ki.MaskContract()), "the last keys"),
        (lambda q, k, v: ki.fused_bias_dropout_add(q, q, p=0.5, seed=1), "has no dropout"),
    ],
)
def test_what_has_no_form_is_refused(call, why):
    with ki.numerics("invariant"), pytest.raises(ki.Ineligible, match=why):
        call(*heads(torch.float32)[:3])


@pytest.mark.native
@pytest.mark.thorough
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dense_model(dtype):
    """Every axis that is not one of the host."""
    model = drawn_model("AA", dtype, context=40, activation="swiglu")
    axes = [name for name in rollout_check.AXES if name not in ("compile on or off", "prefix tree", "thread count")]
    found = rollout_check.check(model, 50, axes=axes)
    assert {name for name, f in found.items() if not f.is_exact} == set()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_an_expert_does_not_depend_on_its_load(dtype):
    """Outputs and the gradient of x; a group's gradient of its weight does not depend on the other groups."""
    torch.manual_seed(0)
    x, weight, g = torch.randn(90, 20).to(dtype), torch.randn(3, 24, 20).to(dtype), torch.randn(90, 24).to(dtype)

    def product(rows, ends):
        leaves = x[rows].clone().requires_grad_(), weight.clone().requires_grad_()
        with ki.numerics("invariant"):
            y = ki.grouped_product(*leaves, torch.tensor(ends, dtype=torch.int32))
        return y, *torch.autograd.grad(y, leaves, g[rows])

    together = product(slice(0, 90), [70, 70, 90])
    alone = product(slice(40, 80), [30, 30, 40])
    for one, other in zip(alone[:2], together, strict=False):
        assert torch.equal(one, other[40:80])
    assert torch.equal(product(slice(70, 90), [0, 0, 20])[2][2], together[2][2])
    with ki.numerics("invariant"):
        row = ki.linear(x[80:81], weight[2])
    assert torch.equal(row, together[0][80:81])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_of_experts_does_not_depend_on_the_others(dtype):
    """Its experts, their weights and its sum; and the gradient of x: among others, in another order, or alone."""
    torch.manual_seed(0)
    x, g = torch.randn(75, 24).to(dtype), torch.randn(75, 24).to(dtype)
    router, bias, weight = torch.randn(5, 24).to(dtype), torch.randn(5), torch.randn(5, 24, 24).to(dtype)

    def layer(rows):
        leaf = x[rows].clone().requires_grad_()
        with ki.numerics("invariant"), ki.receipts() as log:
            routing = ki.expert_route(leaf, router, bias, 2)
            plan = ki.expert_plan(routing.experts, 5)
            done = ki.grouped_product(ki.expert_dispatch(leaf, plan.slots), weight, plan.offsets)
            y = ki.expert_combine(done, routing.weights, plan.slots, base=leaf)
        assert {r.ran for r in log} == {"triton"}
        assert all(r.numerics for r in log)
        return routing.experts, routing.weights.detach(), y.detach(), *torch.autograd.grad(y, leaf, g[rows])

    together = layer(torch.arange(75))
    for rows in (torch.randperm(75), torch.tensor([70]), torch.arange(33, 60)):
        for found, expected in zip(layer(rows), together, strict=True):
            assert torch.equal(found, expected[rows])


@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_of_a_whole_layer_of_experts_does_not_depend_on_the_others(dtype, activation):
    """The sum, which has the bits of the parts one by one, and the gradients of what belongs to a token."""
    torch.manual_seed(0)
    (x, base, g), weights = torch.randn(3, 75, 16).to(dtype), torch.rand(75, 2)
    up = torch.randn(5, 24 if activation == "relu2" else 48, 16).to(dtype)
    down, experts = torch.randn(5, 16, 24).to(dtype), torch.stack([torch.randperm(5)[:2] for _ in range(75)])

    def layer(rows, by):
        leaves = [t[rows].clone().requires_grad_() for t in (x, base, weights)]
        plan = ki.expert_plan(experts[rows], 5)
        with ki.numerics("invariant"):
            options = {"activation": activation, "backend": by}
            y = ki.expert_mlp(leaves[0], up, down, leaves[2], *plan, leaves[1], **options)
        return y.detach(), *torch.autograd.grad(y, leaves, g[rows])

    together = layer(torch.arange(75), "triton")
    with ki.force("triton", *(op for op in OPS if op != "expert_mlp")):
        assert torch.equal(layer(torch.arange(75), "parts")[0], together[0])
    for rows in (torch.randperm(75), torch.tensor([70]), torch.arange(33, 60)):
        for found, expected in zip(layer(rows, "triton"), together, strict=True):
            assert torch.equal(found, expected[rows])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_statistics_have_the_log_probabilities_of_the_loss(temperature):
    statistics_have_the_log_probabilities_of_the_loss(temperature, torch.bfloat16)


def test_rows_that_are_moved():
    from kernel_index.core.device_rows import rows_at

    x, index = torch.randn(9, 5, 7), torch.tensor([[3, -1, 0], [8, 8, -1]])
    expected = torch.where((index < 0)[..., None, None], 0.0, x[index.clamp(min=0)])
    assert torch.equal(rows_at(x, index), expected)


def test_sums_of_rows():
    from kernel_index.core.stable import device_row_sum

    x = torch.randn(40, 1500)
    together = device_row_sum(x)
    torch.testing.assert_close(together.double(), x.double().sum(-1), rtol=0, atol=1e-3)
    assert torch.equal(torch.cat([device_row_sum(x[i : i + 1]) for i in range(40)]), together)


def test_parts_are_added_in_order():
    from kernel_index.core.triton.sums import sum_in_order

    parts = torch.randn(7, 2500)
    expected = parts[0]
    for part in parts[1:]:
        expected = expected + part
    assert torch.equal(sum_in_order(parts, torch.empty(2500)), expected)


def test_an_address_that_is_not_aligned_is_copied_in_this_mode_alone():
    from kernel_index.core.triton.launch import dense

    x = torch.randn(9)[1:]
    assert dense((x, None))[0] is x
    with ki.numerics("invariant"):
        (copied,) = dense((x,))
    assert copied.data_ptr() % 16 == 0
    assert torch.equal(copied, x)

"""Under ``numerics("invariant")`` a row's bits do not depend on its place, the other rows, threads or gradients.

Widths leave tails of vectors, and rows are moved so that every element stands at the end of a tensor once.
"""

import functools

import pytest
import torch

import kernel_index as ki
from kernel_index.core import native, stable
from tests.threads import with_threads

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(native.machine_why_not() is not None, reason="native kernels do not run here"),
]

DTYPES = (torch.float32, torch.bfloat16)
ROWS, WIDTH, CLASSES = 70, 37, 83


def norm(x, dtype):
    weight = torch.linspace(0.5, 2, WIDTH)
    return (*ki.fused_residual_add_rms_norm(x.float(), x, weight), ki.fused_residual_add_rms_norm(x, x, weight).normed)


def bias(x, dtype):
    return (ki.fused_bias_dropout_add(x, x.float(), bias=torch.linspace(-1, 1, WIDTH).to(dtype)),)


def squared(x, dtype):
    return (ki.fused_relu_squared(x),)


def gated(kind, x, dtype):
    return (ki.fused_gated_activation(x, x.flip(-1), kind=kind),)


def rope(interleaved, x, dtype):
    """Each row is a batch of one token, at a position of its own."""
    heads = x[:, None, None, :36].expand(-1, 1, 3, -1)
    positions = (1000 * x[:, :1].float().abs()).long()
    return ki.fused_rope_qk(heads, heads[:, :, :1], ki.rope_tables(positions, 34), interleaved=interleaved)


def tables(x, dtype):
    return ki.rope_tables((1e6 * x[:, :1].float()).long(), 34)


def targets_of(x):
    return (1000 * x[:, 0].float().abs()).long() % CLASSES


def weight_of(dtype):
    return torch.linspace(-1, 1, CLASSES * WIDTH).cos().view(CLASSES, WIDTH).to(dtype)


def losses(options, x, dtype):
    return (ki.fused_linear_cross_entropy(x, weight_of(dtype), targets_of(x), reduction="none", **options),)


def log_probs(x, dtype):
    return (ki.token_log_probs(x, weight_of(dtype), targets_of(x)),)


def stats(options, x, dtype):
    return ki.token_stats(x, weight_of(dtype), targets_of(x), temperature=0.7, **options)


CALLS = {
    "norm": norm,
    "bias": bias,
    "squared": squared,
    **{kind: functools.partial(gated, kind) for kind in ("silu", "gelu", "gelu_tanh", "relu", "relu2")},
    "rope": functools.partial(rope, False),
    "rope, neighbours": functools.partial(rope, True),
    "tables": tables,
    "loss": functools.partial(losses, {"softcap": 5.0, "label_smoothing": 0.1, "z_loss": 1e-3}),
    "log_probs": log_probs,
    "stats": functools.partial(stats, {}),
    "stats, top-k": functools.partial(stats, {"top_k": 9, "top_p": 0.7, "softcap": 4.0}),
    "stats, top-p": functools.partial(stats, {"top_p": 0.7}),
}


def drawn(dtype, rows=ROWS):
    torch.manual_seed(0)
    return (2 * torch.randn(rows, WIDTH)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", CALLS)
def test_a_row_does_not_depend_on_place_rows_or_threads(call, dtype):
    run, x = CALLS[call], drawn(dtype)
    with ki.numerics("invariant"):
        together = run(x, dtype)
        parts = [slice(i, j) for i, j in ((0, 1), (69, 70), (3, 20), (1, 70), (0, 69), (33, 50))]
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
        for rows in (*parts, order, order[:13]):
            for found, expected in zip(run(x[rows], dtype), together, strict=True):
                assert torch.equal(found, expected[rows]), rows
        for found, expected in zip(with_threads(3, run, x.repeat(40, 1), dtype), together, strict=True):
            assert torch.equal(found[-ROWS:], expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", [name for name in CALLS if name != "tables"])
def test_gradients_change_no_bit_and_depend_on_no_thread(call, dtype):
    run, x = CALLS[call], drawn(dtype)

    def gradient(x):
        leaf = x.clone().requires_grad_()
        with ki.numerics("invariant"):
            out = run(leaf, dtype)
        wide = [o for o in out if o.is_floating_point()]
        (found,) = torch.autograd.grad(wide, leaf, [torch.ones_like(o) for o in wide])
        return found, out

    found, out = gradient(x)
    with ki.numerics("invariant"), torch.no_grad():
        for one, other in zip(out, run(x, dtype), strict=True):
            assert torch.equal(one, other)
    assert torch.equal(with_threads(3, gradient, x.repeat(40, 1))[0][-ROWS:], found)
    assert torch.equal(gradient(x[5:18])[0], found[5:18])


UNARY = {"exp": -20, "log": 0, "log1p": 0, "tanh": -4, "erf": -3, "sigmoid": -20}
"""Function -> the least argument that is tested."""


@pytest.mark.parametrize("name", [*UNARY, "cos", "sin"])
def test_functions_do_not_depend_on_the_place_and_are_right(name):
    low, dtype = (-1e6, torch.float64) if name in ("cos", "sin") else (UNARY[name], torch.float32)
    x = low + 20 * torch.rand(3001, dtype=dtype)
    function, exact = getattr(stable, name), getattr(torch, name)(x.double())
    together = function(x)
    assert ((together.double() - exact).abs() <= 2 * torch.finfo(dtype).eps * exact.abs().clamp_min(1e-30)).all()
    for size in range(1, 40):
        for first in range(0, 3001 - size, 3):
            assert torch.equal(function(x[first : first + size]), together[first : first + size])
        if size > 3:
            break
    for size in range(5, 3001, 171):
        assert torch.equal(function(x[-size:]), together[-size:])
    assert torch.equal(with_threads(3, function, x.repeat(60))[-3001:], together)


@pytest.mark.parametrize("width", [1, 15, 16, 63, 64, 1000])
def test_sums_have_a_fixed_order_and_are_right(width):
    torch.manual_seed(0)
    x = torch.randn(300, width)
    rows, columns = stable.row_sum(x), stable.column_sum(x)
    for found, exact, size in ((rows, x.double().sum(-1), width), (columns, x.double().sum(0), 300)):
        assert (found - exact).abs().max() <= 1e-6 * size
    assert torch.equal(torch.cat([stable.row_sum(x[i : i + 1]) for i in range(300)]), rows)
    assert torch.equal(with_threads(3, stable.column_sum, x.repeat(1, 40))[-width:], columns)
    assert torch.equal(stable.softmax(x)[7:9], stable.softmax(x[7:9]))


def test_recipes_are_in_every_receipt():
    x = drawn(torch.float32)
    with ki.receipts() as log, ki.numerics("invariant"):
        for run in CALLS.values():
            run(x, torch.float32)
    assert log
    assert all(len(r.numerics) == 12 for r in log)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_statistics_have_the_log_probabilities_of_the_loss(temperature, dtype):
    """So a rollout may take them from one function and training from the other; both say the same recipe."""
    statistics_have_the_log_probabilities_of_the_loss(temperature, dtype)


def statistics_have_the_log_probabilities_of_the_loss(temperature, dtype):
    x, targets = drawn(dtype), targets_of(drawn(dtype))
    with ki.receipts() as log, ki.numerics("invariant"):
        alone = ki.token_log_probs(x, weight_of(dtype), targets, logit_scale=1 / temperature)
        for more in ({}, {"top_k": 5}, {"softcap": 9.0} if temperature == 1 else {}):
            found = ki.token_stats(x, weight_of(dtype), targets, temperature=temperature, **more).log_prob
            same = ki.token_log_probs(x, weight_of(dtype), targets, softcap=9.0) if "softcap" in more else alone
            assert torch.equal(found, same), more
    assert len({receipt.numerics for receipt in log}) == 1


def test_the_loss_of_a_batch_is_that_of_ordinary_numerics_within_rounding():
    x, weight = drawn(torch.float32), weight_of(torch.float32)
    results = []
    for mode in ("ordinary", "invariant"):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        with ki.numerics(mode):
            loss = ki.fused_linear_cross_entropy(*leaves, targets_of(x))
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_a_tree_without_a_token_has_a_result():
    """No batch row, or gaps alone: nothing is attended to, and nothing raises."""
    gaps, tree = ki.MaskContract(subtree_end=torch.arange(4)), ki.MaskContract(subtree_end=torch.tensor([4, 4, 3, 4]))
    mixer = ki.nn.Mamba2(8, 2, 4, state=4)
    with ki.numerics("invariant"):
        none = torch.randn(0, 4, 2, 8)
        assert ki.attention(none, none, none, tree).shape == none.shape
        assert mixer(torch.randn(0, 4, 8), tree)[0].shape == (0, 4, 8)
        assert mixer(torch.randn(1, 4, 8), gaps)[0].tolist() == torch.zeros(1, 4, 8).tolist()

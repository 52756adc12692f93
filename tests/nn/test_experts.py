"""Experts equal the sum over each token's experts, drop nothing, repeat bit for bit, and even out their load."""

import pytest
import torch

import kernel_index as ki
from kernel_index.nn import Experts, SquaredReLUMLP, SwiGLUMLP
from tests.nn.close import assert_as_exact_as_float32


def layer(**changes):
    torch.manual_seed(1)
    return Experts(8, **{"hidden": 16, "experts": 5, "topk": 2, **changes})


def plain(module, x):
    """Every expert for every token, weighted by what its router gives it."""
    rows = x.reshape(-1, x.shape[-1])
    logits = rows @ module.router.weight.T
    scores = logits.sigmoid() if module.router.scores == "sigmoid" else logits.softmax(-1)
    chosen = (scores + module.router.bias).topk(module.router.topk).indices
    weight = torch.zeros_like(scores).scatter(1, chosen, scores.gather(1, chosen))
    if module.router.topk > 1:
        weight = weight / weight.sum(-1, keepdim=True)
    h = torch.einsum("nc,efc->nef", rows, module.up)
    if module.activation == "relu2":
        h = h.relu().square()
    else:
        gate, value = h.chunk(2, -1)
        h = torch.nn.functional.silu(gate) * value
    out = torch.einsum("nef,ecf,ne->nc", h, module.down, weight).view(x.shape)
    return out if module.shared is None else out + module.shared(x)[0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"topk": 1},
        {"activation": "swiglu", "shared": 12},
        {"scores": "softmax", "topk": 5, "shared": 4},
        {"recompute": False},
    ],
)
def test_values_and_gradients(changes):
    module, x = layer(**changes), torch.randn(3, 7, 8, requires_grad=True)
    module.router.bias.copy_(torch.tensor([0.3, -0.2, 0.0, 0.1, 0.0]))
    inputs = [x, *module.parameters()]
    out, bias = module(x)
    assert bias is None
    expected = plain(module, x)
    upstream = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad(y, inputs, upstream, retain_graph=True) for y in (out, expected))
    exact_module, exact_x = layer(**changes).double(), x.detach().double().requires_grad_()
    exact_module.load_state_dict(module.state_dict())
    exact = plain(exact_module, exact_x)
    exact_grads = torch.autograd.grad(exact, [exact_x, *exact_module.parameters()], upstream.double())
    assert_as_exact_as_float32(out, expected, exact)
    for a, b, c in zip(ours, theirs, exact_grads, strict=True):
        assert_as_exact_as_float32(a, b, c)


def test_no_token_is_dropped_when_all_want_one_expert():
    module, x = layer(topk=1), torch.randn(1, 33, 8)
    module.router.bias[3] = 100
    out = module(x)[0]
    assert module.router.load.tolist() == [0, 0, 0, 33, 0]
    torch.testing.assert_close(out, plain(module, x))


def test_equal_scores_go_to_the_smallest_index():
    module = layer(topk=2)
    with torch.no_grad():
        module.router.weight.zero_()
    assert module.router(torch.randn(4, 8)).experts.tolist() == [[0, 1]] * 4


def test_the_router_scores_in_float32_under_autocast():
    module, x = layer(), torch.randn(64, 8)
    with torch.autocast("cpu", torch.bfloat16):
        routing = module.router(x)
        out = module(x.view(4, 16, 8))[0]
    assert out.dtype == torch.bfloat16
    assert routing.weights.dtype == torch.float32
    assert torch.equal(routing.weights, module.router(x).weights)


def test_bits_repeat_and_receipts_name_the_kernels():
    module, x = layer(), torch.randn(2, 40, 8)
    runs = []
    for _ in range(2):
        with ki.receipts() as log:
            out = module(x)[0]
        runs.append([out, *torch.autograd.grad(out.square().sum(), list(module.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert {r.op for r in log} == {
        "expert_route", "expert_plan", "expert_mlp", "expert_dispatch", "grouped_product", "fused_relu_squared",
        "expert_combine",
    }  # fmt: skip


def test_the_bias_evens_out_the_load():
    module, x = layer(topk=1), torch.randn(1, 500, 8) + torch.randn(8)  # tokens that share a direction favour one
    before = module.router(x[0]).load
    for _ in range(200):
        module(x)
        module.router.count()
        module.router.balance(0.01)
    after = module.router(x[0]).load
    assert after.sum() == before.sum() == 500
    assert after.max() - after.min() < (before.max() - before.min()) / 3


def test_a_recomputed_forward_counts_once():
    module, x = layer(), torch.randn(1, 10, 8, requires_grad=True)
    out = torch.utils.checkpoint.checkpoint(lambda t: module(t)[0], x, use_reentrant=False)
    out.sum().backward()
    module.router.count()
    assert module.router.pending.sum() == 10 * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "gelu"}, "activation must be one of 'relu2', 'swiglu', got 'gelu'"),
        ({"hidden": 12}, "dim and hidden must be multiples of 8 for the grouped product, got 8 and 12"),
        ({"scores": "tanh"}, "scores must be one of"),
        ({"topk": 6}, r"topk must be at most the number of experts \(5\), got 6"),
        ({"hidden": 0}, "hidden must be at least 1, got 0"),
        ({"hidden": -8}, "hidden must be at least 1, got -8"),
        ({"shared": -2}, "shared must be at least 0, got -2"),
        ({"experts": 0}, "experts must be at least 1, got 0"),
    ],
)
def test_unknown_choices_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        layer(**changes)


@pytest.mark.parametrize("shared", [0, 4])
def test_no_tokens_are_no_error(shared):
    """As where a process of several has none."""
    module, x = layer(shared=shared), torch.zeros(0, 3, 8, requires_grad=True)
    with torch.no_grad():
        assert module(x)[0].shape == x.shape
    out = module(x)[0]
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert not module.up.grad.any()
    assert not module.down.grad.any()
    assert not module.router.load.any()


def test_what_the_grouped_product_cannot_take_is_named():
    message = "x must be of float32, bfloat16 or float16 for the grouped product, got torch.float64"
    with pytest.raises(TypeError, match=message):
        layer().double()(torch.zeros(1, 3, 8).double())
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., C\] with C = 8, got shape \(1, 3, 24\)"):
        layer()(torch.zeros(1, 3, 24))


def test_one_expert_is_the_dense_layer():
    for activation, dense in (("relu2", SquaredReLUMLP), ("swiglu", SwiGLUMLP)):
        module, x = layer(experts=1, topk=1, activation=activation), torch.randn(2, 3, 8)
        mlp = dense(8, 16)
        with torch.no_grad():
            mlp.up.weight.copy_(module.up[0])
            mlp.down.weight.copy_(module.down[0])
        torch.testing.assert_close(module(x)[0], mlp(x)[0])


def test_it_compiles_into_one_graph():
    module = layer(shared=4)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for n in (6, 9):
        x = torch.randn(1, n, 8)
        torch.testing.assert_close(compiled(x)[0], module(x)[0])


def test_experts_run_inside_torch_func():
    module, x = layer(recompute=False).eval(), torch.randn(2, 3, 8)
    out = module(x)[0]
    torch.testing.assert_close(torch.func.vmap(lambda row: module(row)[0])(x[:, None])[:, 0], out)
    torch.testing.assert_close(torch.func.jvp(lambda t: module(t)[0], (x,), (x,))[0], out)

"""``ki.numerics``: where it is in force, and what it makes of a choice."""

import contextlib
import threading
from typing import ClassVar

import pytest
import torch
import torch._inductor.config as inductor_config
from torch.utils.checkpoint import checkpoint

import kernel_index as ki
from kernel_index.core import ops
from kernel_index.core.dispatch import Backend, always, choose
from kernel_index.core.force import reload_environment
from kernel_index.core.numerics import Recipe, is_invariant

RECIPE = Recipe("doubles")
SLOW = Backend("slow", always, lambda x: 2 * x, lambda x: "too slow", invariant=RECIPE)
FAST = Backend("fast", always, lambda x: x + x)


def doubled(x, backend="auto"):
    return choose("doubled", (FAST, SLOW), backend, x).run(x)


def test_the_mode_takes_the_backend_with_a_recipe_whatever_its_speed():
    with ki.receipts() as log:
        doubled(torch.ones(3))
        with ki.numerics("invariant"):
            doubled(torch.ones(3))
    assert [r.ran for r in log] == ["fast", "slow"]
    assert [r.numerics for r in log] == ["", RECIPE.hash]
    assert log[1].declined == (("fast", "has no invariant form, which numerics('invariant') needs"),)


def test_a_function_without_an_invariant_form_refuses():
    with ki.numerics("invariant"), pytest.raises(ki.Ineligible, match="has no invariant form"):
        choose("doubled", (FAST,), "auto", torch.ones(3))
    with ki.numerics("invariant"), pytest.raises(ki.Ineligible, match="fast: has no invariant form"):
        doubled(torch.ones(3), backend="fast")


def test_a_refusal_names_together_what_broke_one_rule():
    """And last what has no form at all: a caller can change the rest of the reasons."""
    odd = Backend("odd", lambda x: "needs an odd size", lambda x: x, invariant=RECIPE)
    with ki.numerics("invariant"), pytest.raises(ki.Ineligible) as error:
        choose("doubled", (FAST, odd, Backend("other", always, lambda x: x)), "auto", torch.ones(4))
    rules = "(odd: needs an odd size; fast, other: has no invariant form, which numerics('invariant') needs)"
    assert str(error.value).endswith(rules)


def test_blocks_nest():
    assert not is_invariant()
    with ki.numerics("invariant"):
        with ki.numerics("ordinary"):
            assert not is_invariant()
        with ki.force("reference"):
            assert is_invariant()
    assert not is_invariant()


def test_forcing_every_backend_does_not_end_the_mode():
    with ki.numerics("invariant"), ki.force("fast"), pytest.raises(ki.Ineligible, match="no invariant form"):
        doubled(torch.ones(3))


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="mode must be 'invariant' or 'ordinary', got 'exact'"), ki.numerics("exact"):
        pass


def test_the_environment_sets_it_and_a_block_wins(monkeypatch):
    monkeypatch.setenv("KERNEL_INDEX_NUMERICS", "invariant")
    reload_environment()
    assert is_invariant()
    with ki.numerics("ordinary"):
        assert not is_invariant()
    monkeypatch.setenv("KERNEL_INDEX_NUMERICS", "yes")
    with pytest.raises(ValueError, match="KERNEL_INDEX_NUMERICS must be 'invariant' or 'ordinary', got 'yes'"):
        reload_environment()
    monkeypatch.setenv("KERNEL_INDEX_NUMERICS", "")
    reload_environment()
    assert not is_invariant()


def test_other_threads_are_not_touched():
    found = []
    with ki.numerics("invariant"):
        thread = threading.Thread(target=lambda: found.append(is_invariant()))
        thread.start()
        thread.join()
    assert found == [False]


@pytest.mark.parametrize("inside", [True, False])
def test_a_checkpoint_is_recomputed_in_the_mode_of_its_forward(inside):
    x = torch.ones(3, requires_grad=True)
    with ki.receipts() as log:
        with ki.numerics("invariant"):
            out = checkpoint(lambda x: doubled(x).square(), x, use_reentrant=False).sum()
            if inside:
                out.backward()
        if not inside:
            out.backward()
    assert [r.ran for r in log] == ["slow", "slow"]


def test_compiled_code_is_traced_once_for_each_mode():
    compiled = torch.compile(lambda x: doubled(x), backend="eager", fullgraph=True)
    with ki.receipts() as log:
        for _ in range(2):
            compiled(torch.ones(3))
            with ki.numerics("invariant"):
                compiled(torch.ones(3))
    assert [r.ran for r in log] == ["fast", "slow"]


def chain(x, y, z):
    """Several roundings to bfloat16 that Inductor would leave out, around a call of ours."""
    return ki.fused_relu_squared((x + y) * z - x / (y.abs() + 1)) * z + x


@pytest.mark.parametrize("inside", [False, True])
def test_inductor_rounds_as_the_code_is_written(inside):
    """And only in this mode: what it changes in Inductor ends with the block."""
    inputs = [torch.randn(1000).bfloat16() for _ in range(3)]

    def in_block(*args):
        with ki.numerics("invariant"):
            return chain(*args)

    outer = contextlib.nullcontext() if inside else ki.numerics("invariant")
    before = inductor_config.emulate_precision_casts
    with outer:
        assert torch.equal(torch.compile(in_block if inside else chain)(*inputs), in_block(*inputs))
    assert inductor_config.emulate_precision_casts == before
    torch._dynamo.reset()
    inductor_config.emulate_precision_casts = False
    assert not torch.equal(torch.compile(chain)(*inputs), chain(*inputs))


@pytest.mark.parametrize("inside", [False, True])
def test_inductor_rounds_a_backward_pass_that_it_compiles_after_the_block(inside):
    inputs = [torch.randn(1000).bfloat16().requires_grad_() for _ in range(3)]

    def in_block(*args):
        with ki.numerics("invariant"):
            return chain(*args)

    def gradients(function):
        with contextlib.nullcontext() if inside else ki.numerics("invariant"):
            out = function(*inputs)
        return torch.autograd.grad(out.sum(), inputs)

    torch._dynamo.reset()
    before = inductor_config.emulate_precision_casts
    expected = gradients(chain)
    assert all(map(torch.equal, gradients(torch.compile(in_block if inside else chain)), expected))
    assert inductor_config.emulate_precision_casts == before
    torch._dynamo.reset()
    ordinary = torch.autograd.grad(torch.compile(chain)(*inputs).sum(), inputs)  # its backward is compiled without
    assert not all(map(torch.equal, ordinary, expected))


LAUNCHED: list[tuple[str, bool]] = []


def launched(what):
    def launch(x):
        LAUNCHED.append((what, is_invariant()))
        return x * 2

    return launch


_FORWARD = ops.register("test_launched(Tensor x) -> Tensor", launched("forward"), torch.empty_like)
_BACKWARD = ops.register("test_launched_backward(Tensor x) -> Tensor", launched("backward"), torch.empty_like)


class _Launched(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return _FORWARD(x)

    @staticmethod
    def backward(ctx, g):
        return _BACKWARD(g)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("inside", [False, True])
def test_what_a_graph_launches_has_the_mode_of_its_trace(backend, inside):
    """Kernels ask for it to choose a geometry, and neither a traced block nor a backward pass is in a block."""

    def in_block(x):
        with ki.numerics("invariant"):
            return ops.apply(_Launched, x)

    def ordinary(x):
        return ops.apply(_Launched, x)

    torch._dynamo.reset()
    LAUNCHED.clear()
    x = torch.ones(3, requires_grad=True)
    with contextlib.nullcontext() if inside else ki.numerics("invariant"):
        out = torch.compile(in_block if inside else ordinary, backend=backend, fullgraph=True)(x)
    out.sum().backward()
    torch.compile(ordinary, backend=backend, fullgraph=True)(x).sum().backward()
    assert LAUNCHED == [("forward", True), ("backward", True), ("forward", False), ("backward", False)]


@pytest.mark.native
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("op", ["linear", "attention"])
def test_a_differentiable_backward_is_refused(op, inside):
    """It is made of PyTorch's products, so its bits would be those of ordinary numerics."""
    x = torch.randn(3, 4, 2, 8, requires_grad=True)
    with ki.numerics("invariant"):
        out = ki.linear(x, torch.ones(5, 8)) if op == "linear" else ki.attention(x, x, x)
        again = ki.linear(x, torch.ones(5, 8)) if op == "linear" else ki.attention(x, x, x)
    with ki.numerics("invariant") if inside else contextlib.nullcontext():
        with pytest.raises(ki.Ineligible, match=r"create_graph=True has no invariant form"):
            torch.autograd.grad(out.sum(), x, create_graph=True)
        torch.autograd.grad(again.sum(), x)


def test_a_product_that_has_no_recipe_is_refused():
    gate, weight = torch.randn(4, 8), torch.randn(3, 8)
    with ki.numerics("invariant"), pytest.raises(ki.Ineligible, match=r"give the result to ki\.linear"):
        ki.fused_gated_activation(gate, gate, linear=(weight, None))


class _Asks(torch.autograd.Function):
    """Notes the mode that each pass finds."""

    found: ClassVar[list[bool]] = []

    @staticmethod
    def forward(ctx, x):
        _Asks.found.append(is_invariant())
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        _Asks.found.append(is_invariant())
        return g


@pytest.mark.parametrize("outside", ["ordinary", "invariant"])
def test_a_backward_pass_has_the_mode_of_its_call(outside):
    """Wherever ``backward()`` is called: kernels ask for it."""
    _Asks.found.clear()
    with ki.numerics("invariant"):
        out = ops.apply(_Asks, torch.ones(3, requires_grad=True))
    with ki.numerics(outside):
        out.sum().backward()
        assert is_invariant() == (outside == "invariant")
    assert _Asks.found == [True, True]

"""What the conformance test cannot know about ``fused_bias_dropout_add``."""

import functools
import random

import pytest
import torch
from torch._inductor.utils import run_and_get_code
from torch.utils.checkpoint import checkpoint

import kernel_index as ki
from kernel_index.kernels.boundary.fused_bias_dropout_add import philox
from kernel_index.kernels.boundary.fused_bias_dropout_add.cases import kept
from kernel_index.kernels.boundary.fused_bias_dropout_add.cases import philox as plain_philox

BACKENDS = pytest.mark.parametrize("backend", ["triton", "inductor", "reference"])
BF16 = torch.bfloat16
SHAPES = [(), (1,), (63,), (64,), (65,), (3, 64), (5, 17), (64, 3), (2, 3, 192), (1000,)]


def mask_of(shape, p=0.4, seed=9, bias=False, **options):
    """The mask that a call used, read off its output."""
    x = torch.ones(shape, dtype=options.pop("dtype", torch.float32))
    own_bias = torch.zeros(shape[-1]) if bias else None
    return ki.fused_bias_dropout_add(x, torch.zeros(shape), bias=own_bias, p=p, seed=seed, **options) != 0


def operands(*shape, dtype=torch.float32):
    x, residual, bias = (torch.randn(s, dtype=dtype, requires_grad=True) for s in (shape, shape, shape[-1:]))
    return x, residual, bias


# The mask --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
    ids=["zeros", "ones", "digits of pi"],
)
def test_known_answers(counter, key, words):
    """The vectors that Random123 publishes for philox4x32 with 10 rounds; they hold for the tests' own version too."""
    tensors = [torch.tensor([v]) for v in counter + key]
    assert [int(w) for w in philox.philox_words(tuple(tensors[:4]), tuple(tensors[4:]))] == words
    assert plain_philox(sum(c << 32 * i for i, c in enumerate(counter)), key[0] | key[1] << 32) == words


class Int64(int):
    """An integer whose arithmetic fails where a signed 64-bit integer would overflow: undefined behaviour in C++."""

    def _checked(self, name, *others):
        value = getattr(int, name)(int(self), *map(int, others))
        assert -(2**63) <= value < 2**63, f"{name} overflows"
        return Int64(value)


for _name in ("__add__", "__mul__", "__and__", "__xor__", "__rshift__"):
    setattr(Int64, _name, functools.partialmethod(Int64._checked, _name))


@pytest.mark.parametrize("value", [0, 1, 2**31, 2**32 - 1])
def test_no_step_overflows(value):
    generator = random.Random(value)
    for _ in range(200):
        counter, key = ([Int64(generator.choice((value, generator.getrandbits(32)))) for _ in range(n)] for n in (4, 2))
        expected = plain_philox(
            sum(c << 32 * i for i, c in enumerate(map(int, counter))), int(key[0]) | int(key[1]) << 32
        )
        assert list(philox.philox_words(counter, key)) == expected


def test_the_counter_has_64_bits(monkeypatch):
    """Beyond 2³⁴ elements the call's number no longer fits into the first word of the counter."""
    first, arange = 5 * 2**32 - 16, torch.arange
    monkeypatch.setattr(torch, "arange", lambda n, device=None: arange(n, device=device) + first)
    words = torch.stack(philox.block_words(2, torch.tensor(3)), -1).view(32, 4)
    assert [plain_philox(first + i, 3) for i in range(32)] == words.tolist()


def test_the_threshold_itself_is_kept():
    """An element whose word equals the threshold is kept, in both forms of the mask; one more drops it."""
    seed = torch.tensor(3)
    word = philox.block_words(1, seed)[2][0, 5]  # of element 2·16 + 5
    for threshold, keep in ((word, True), (word + 1, False)):
        assert bool(philox.keep_mask((64,), seed, threshold)[37]) is keep
        assert bool(philox.keep_bits(1, seed, threshold)[0, 5] & 4) is keep


@BACKENDS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, 12345])
def test_the_mask_is_the_defined_one(backend, shape, seed):
    assert torch.equal(mask_of(shape, seed=seed, backend=backend), kept(torch.Size(shape), 0.4, seed))


@pytest.mark.parametrize("shape", [(6, 128), (6, 96), (6, 33)], ids=str)
@pytest.mark.thorough_if(when=lambda shape: shape != (6, 33))
@pytest.mark.thorough
def test_one_mask_for_all_backends_dtypes_and_layouts(shape):
    expected = mask_of(shape, backend="reference")
    for dtype in (torch.float64, BF16, torch.float16):
        for bias in (False, True):
            assert torch.equal(mask_of(shape, dtype=dtype, bias=bias, backend="inductor"), expected)
    transposed = torch.ones(shape[::-1]).t()
    out = ki.fused_bias_dropout_add(transposed, torch.zeros(shape), p=0.4, seed=9, backend="inductor")
    assert torch.equal(out != 0, expected)


def test_backward_uses_the_mask_of_forward():
    for shape in ((8, 128), (8, 33)):
        x, residual, bias = operands(*shape)
        out = ki.fused_bias_dropout_add(x, residual, bias=bias, p=0.4, seed=3, backend="inductor")
        (dx,) = torch.autograd.grad(out.sum(), x)
        assert torch.equal(dx != 0, mask_of(shape, seed=3))
        torch.testing.assert_close(dx[dx != 0], torch.full_like(dx[dx != 0], 1 / 0.6))


@pytest.mark.parametrize("p", [0.02, 0.1, 0.5, 0.9])
def test_keep_rate(p):
    """Within five standard deviations: of the whole, of each of the four words, and of each of the 16 lanes."""
    mask = mask_of((1 << 14, 64), p=p, seed=2024).double()
    for part in (mask, *mask.view(-1, 4, 16).unbind(1), *mask.view(-1, 16).unbind(1)):
        sigma = (p * (1 - p) / part.numel()) ** 0.5
        assert abs(part.mean() - (1 - p)) < 5 * sigma


def test_neighbours_rows_and_seeds_are_independent():
    a, b = (mask_of((1 << 12, 256), p=0.5, seed=s).double() - 0.5 for s in (7, 8))
    pairs = [(a, b), (a[:, :-1], a[:, 1:]), (a[:, :-16], a[:, 16:]), (a[:-1], a[1:])]
    for left, right in pairs:
        assert abs((4 * left * right).mean()) < 5 / left.numel() ** 0.5


def test_threshold_is_an_exact_integer():
    limits = {p: philox.threshold_and_scale(p, torch.device("cpu")) for p in (0.0, 2.0**-32, 0.3, 0.5, 0.75, 1.0)}
    assert [int(t) for t, _ in limits.values()] == [0, 1, round(0.3 * 2**32), 2**31, 3 * 2**30, 2**32]
    assert [float(s) for _, s in limits.values()][2:5] == [1 / 0.7, 2.0, 4.0]
    assert limits[1.0][1].isfinite()


# The seed --------------------------------------------------------------------------------------------------------


@BACKENDS
def test_manual_seed_reproduces(backend):
    x, residual, _ = operands(8, 64)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(ki.fused_bias_dropout_add(x, residual, p=0.5, backend=backend))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[2], ki.fused_bias_dropout_add(x, residual, p=0.5, backend=backend))


@BACKENDS
def test_nothing_is_drawn_without_need(backend):
    """p = 0, evaluation, a given seed, an explanation, and a refused call leave the generator alone."""
    x, residual, _ = operands(8, 64)
    state = torch.get_rng_state()
    ki.fused_bias_dropout_add(x, residual, p=0.0, backend=backend)
    ki.fused_bias_dropout_add(x, residual, p=0.5, training=False, backend=backend)
    ki.fused_bias_dropout_add(x, residual, p=0.5, seed=1, backend=backend)
    ki.explain("fused_bias_dropout_add", x, residual, p=0.5, backend=backend)
    with pytest.raises(ki.Ineligible):
        ki.fused_bias_dropout_add(x, residual, p=0.5, backend="none such")
    assert torch.equal(torch.get_rng_state(), state)


@BACKENDS
def test_seed_tensors(backend):
    expected = mask_of((5, 64), seed=77, backend=backend)
    for seed in (torch.tensor(77), torch.tensor([77]), torch.tensor([[77]])):
        assert torch.equal(mask_of((5, 64), seed=seed, backend=backend), expected)


@BACKENDS
def test_the_seed_may_advance_before_backward(backend):
    x, residual, _ = operands(4, 64)
    seed = torch.tensor(5)
    out = ki.fused_bias_dropout_add(x, residual, p=0.5, seed=seed, backend=backend)
    seed.add_(1)
    (dx,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(dx != 0, mask_of((4, 64), p=0.5, seed=5))


@BACKENDS
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_replays_the_mask(backend, reentrant):
    x, residual, bias = operands(8, 64)

    def block(x, residual, bias):
        return ki.fused_bias_dropout_add(x, residual, bias=bias, p=0.5, backend=backend)

    def run(call):
        torch.manual_seed(11)
        out = call()
        torch.rand(3)  # the generator moves on between forward and the recomputation
        return out, *torch.autograd.grad(out.square().sum(), (x, residual, bias))

    if reentrant:  # it refuses autograd.grad

        def run(call):
            torch.manual_seed(11)
            out = call()
            torch.rand(3)
            for leaf in (x, residual, bias):
                leaf.grad = None
            out.square().sum().backward()
            return out, x.grad, residual.grad, bias.grad

    plain = run(lambda: block(x, residual, bias))
    replayed = run(lambda: checkpoint(block, x, residual, bias, use_reentrant=reentrant))
    for a, b in zip(plain, replayed, strict=True):
        assert torch.equal(a, b)


@pytest.mark.thorough
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_inside_torch_compile(reentrant):
    x, residual, bias = operands(8, 64)

    def block(x, residual, bias):
        return ki.fused_bias_dropout_add(x, residual, bias=bias, p=0.5)

    compiled = torch.compile(lambda *a: checkpoint(block, *a, use_reentrant=reentrant), fullgraph=True)
    out = compiled(x, residual, bias)
    kept_in_forward = out.detach() != residual.detach()
    (dx,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(dx != 0, kept_in_forward)
    assert 0.3 < kept_in_forward.double().mean() < 0.7


@pytest.mark.parametrize("grad", [False, True])
def test_a_seed_drawn_inside_torch_compile_is_drawn_once(grad):
    """And not for each element, which Inductor would do if it could."""
    x, residual, _ = operands(8, 64)
    compiled = torch.compile(lambda: ki.fused_bias_dropout_add(x, residual, p=0.5), fullgraph=True)
    with torch.set_grad_enabled(grad):
        _, (code, *_) = run_and_get_code(compiled)
    assert code.count("= randint64_cpu(") == 1
    lines = code.splitlines()
    draw = next(i for i, line in enumerate(lines) if "= randint64_cpu(" in line)
    assert not any("for(" in line for line in lines[draw - 8 : draw])


def saved_tensors(call):
    stored = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: stored.append(t) or t, lambda t: t):
        call()
    return stored


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_only_the_seed_is_saved(p):
    x, residual, bias = operands(8, 64)
    stored = saved_tensors(lambda: ki.fused_bias_dropout_add(x, residual, bias=bias, p=p, seed=1, backend="inductor"))
    assert sum(t.nbytes for t in stored) == (3 * 8 if p else 0), "the seed, the threshold, and the factor"


@pytest.mark.parametrize("given", [True, False], ids=["tensor seed", "drawn seed"])
@pytest.mark.thorough_if(when=lambda given: given)
@pytest.mark.thorough
def test_only_the_seed_is_saved_inside_torch_compile(given):
    x, residual, bias = operands(16, 128)
    compiled = torch.compile(
        lambda seed: ki.fused_bias_dropout_add(x, residual, bias=bias, p=0.3, seed=seed), fullgraph=True
    )
    out = compiled(torch.tensor(4) if given else None)
    assert sum(t.nbytes for t in out.grad_fn.saved_tensors) <= 24
    (dx,) = torch.autograd.grad(out.sum(), x)
    dropped = out.detach() == residual.detach()
    assert torch.equal(dx == 0, dropped)
    assert 0.1 < dropped.double().mean() < 0.5
    if given:
        torch.testing.assert_close(
            out, ki.fused_bias_dropout_add(x, residual, bias=bias, p=0.3, seed=4, backend="reference")
        )


def test_changing_p_does_not_recompile():
    x, residual, _ = operands(6, 64)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(
        lambda p: ki.fused_bias_dropout_add(x, residual, p=p, seed=1), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for p in (0.1, 0.25, 0.5, 0.75):
        torch.testing.assert_close(
            compiled(p), ki.fused_bias_dropout_add(x, residual, p=p, seed=1, backend="reference")
        )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.thorough
def test_changing_seeds_do_not_recompile():
    x, residual, _ = operands(6, 64)

    def graphs(seeds, **options):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(
            lambda s: ki.fused_bias_dropout_add(x, residual, p=0.5, seed=s),
            fullgraph=True,
            backend="aot_eager",
            **options,
        )
        for seed in seeds:
            expected = ki.fused_bias_dropout_add(x, residual, p=0.5, seed=seed, backend="reference")
            torch.testing.assert_close(compiled(seed), expected)
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    numbers = [2**40 + 7 * i for i in range(6)]
    assert graphs(map(torch.tensor, numbers)) == 1
    assert graphs(numbers, dynamic=True) == 1
    assert graphs(numbers) == 2, "the first call is for one number, the second for any"

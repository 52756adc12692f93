"""What only ``fused_rope_qk`` promises; values, gradients, layouts and graphs are the conformance test's."""

import pytest
import torch

import kernel_index as ki
from kernel_index.core.triton import launch
from kernel_index.kernels.attention.fused_rope_qk import inductor, torch_op

BACKENDS = ("reference", "inductor", "triton")


def call(b=2, t=6, heads=4, kv_heads=2, d=8, r=8, rows=1, dtype=torch.float32):
    angle = torch.rand(rows, t, 1, r // 2) * 6 - 3
    q, k = torch.randn(b, t, heads, d).to(dtype), torch.randn(b, t, kv_heads, d).to(dtype)
    return {"q": q, "k": k, "cos": angle.cos(), "sin": angle.sin()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_it_is_a_complex_product(backend, interleaved):
    """Each pair, read as a complex number, is multiplied by exp(i·angle): positive angles turn x1 towards x2."""
    c = call()
    turn = torch.complex(c["cos"].double(), c["sin"].double())
    out = ki.fused_rope_qk(**c, interleaved=interleaved, backend=backend)
    for x, y in zip((c["q"], c["k"]), out, strict=True):
        x, y = (v.double().unflatten(-1, (4, 2) if interleaved else (2, 4)) for v in (x, y))
        x, y = (torch.complex(*v.unbind(-1 if interleaved else -2)) for v in (x, y))
        torch.testing.assert_close(y, x * turn, rtol=1e-6, atol=1e-6)


def test_it_takes_the_tables_as_they_were_returned():
    c, tables = call(), ki.rope_tables(torch.arange(6), 8)
    expected = ki.fused_rope_qk(c["q"], c["k"], *tables)
    for both in (tables, tuple(tables)):
        for found, rotated in zip(ki.fused_rope_qk(c["q"], c["k"], both), expected, strict=True):
            assert torch.equal(found, rotated)
    with pytest.raises(TypeError, match="sin must be left out where cos holds both tables, got Tensor"):
        ki.fused_rope_qk(c["q"], c["k"], tables, tables.sin)
    with pytest.raises(TypeError, match="cos must be a tensor or the two tables of rope_tables, got 3 values"):
        ki.fused_rope_qk(c["q"], c["k"], (*tables, tables.sin))
    with pytest.raises(TypeError, match=r"sin must be a torch\.Tensor, got NoneType"):
        ki.fused_rope_qk(c["q"], c["k"], tables.cos)


def test_the_tables_as_one_argument_make_one_graph():
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, t: tuple(ki.fused_rope_qk(q, k, t)), fullgraph=True, backend="eager")
    c, tables = call(), ki.rope_tables(torch.arange(6), 8)
    for found, rotated in zip(compiled(c["q"], c["k"], tables), ki.fused_rope_qk(c["q"], c["k"], tables), strict=True):
        assert torch.equal(found, rotated)


@pytest.mark.parametrize("backend", BACKENDS)
def test_minus_sin_undoes_it(backend):
    c = call(d=12, r=8)
    q, k = ki.fused_rope_qk(**c, backend=backend)
    back = ki.fused_rope_qk(q, k, c["cos"], -c["sin"], backend=backend)
    torch.testing.assert_close(back.q, c["q"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(back.k, c["k"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_depend_on_the_distance_alone(backend):
    q, k = torch.randn(1, 1, 1, 16).expand(1, 9, 1, 16), torch.randn(1, 1, 1, 16).expand(1, 9, 1, 16)
    q, k = ki.fused_rope_qk(q, k, *ki.rope_tables(torch.arange(9), 16), backend=backend)
    scores = q[0, :, 0] @ k[0, :, 0].T
    for offset in range(-8, 9):
        diagonal = scores.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_input_dtype_out_and_float32_inside(backend, dtype):
    c = call(dtype=dtype)
    if backend == "triton" and dtype == torch.float64:
        with pytest.raises(ki.Ineligible, match="float64 is the reference's"):
            ki.fused_rope_qk(**c, backend=backend)
        return
    if backend == "triton" and dtype == torch.bfloat16 and launch.interpreting():
        pytest.skip("Triton's interpreter truncates float32 to bfloat16, where a GPU rounds to nearest")
    out = ki.fused_rope_qk(**c, backend=backend)
    exact = ki.fused_rope_qk(**{n: v.double() for n, v in c.items()}, backend="reference")
    for y, e in zip(out, exact, strict=True):
        assert y.dtype == dtype
        # One rounding of a value computed in float32: half a unit in the last place, and float32's own error.
        bound = (torch.finfo(dtype).eps / 2) * e.abs() + 4 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        assert ((y.double() - e).abs() <= bound.clamp_min(torch.finfo(dtype).tiny)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_table_of_one_pair_rotates_one_pair(backend):
    """A width of 1 is R = 2, never a table that broadcasts over every channel."""
    c = call(d=8, r=2)
    q, _ = ki.fused_rope_qk(**c, backend=backend)
    assert torch.equal(q[..., 2:], c["q"][..., 2:])
    cos, sin = c["cos"][..., 0], c["sin"][..., 0]
    torch.testing.assert_close(q[..., 0], c["q"][..., 0] * cos - c["q"][..., 1] * sin)


SHAPES = {
    "one token's table for all": ("cos", (1, 1, 1, 4), r"cos must be \[1 or B, T, 1, R/2\] with q's T=6, got shape"),
    "too long": ("cos", (1, 7, 1, 4), "q's T=6"),
    "another batch": ("cos", (3, 6, 1, 4), "cos must be .* with q's B=2"),
    "a table for each head": ("cos", (1, 6, 4, 4), "the same for every head"),
    "full width": ("cos", (1, 6, 1, 8), "2 <= R <= D=8"),
    "no channel": ("cos", (1, 6, 1, 0), "2 <= R <= D=8"),
    "rank 3": ("cos", (1, 6, 4), r"cos must be \[1 or B, T, 1, R/2\], got shape \(1, 6, 4\)"),
    "sin of width 1": ("sin", (1, 6, 1, 1), r"sin must be of cos's shape \(1, 6, 1, 4\), got shape \(1, 6, 1, 1\)"),
    "sin of length 1": ("sin", (1, 1, 1, 4), "sin must be of cos's shape"),
    "k of one row": ("k", (1, 6, 2, 8), "k must be .* with q's B=2, T=6 and D=8"),
    "k of one token": ("k", (2, 1, 2, 8), "k must be .* with q's B=2, T=6 and D=8"),
    "k of one channel": ("k", (2, 6, 2, 1), "k must be .* with q's B=2, T=6 and D=8"),
    "q of rank 3": ("q", (2, 6, 8), r"q must be \[B, T, H, D\], got shape \(2, 6, 8\)"),
    "k of rank 5": ("k", (2, 6, 2, 8, 1), r"k must be \[B, T, K, D\], got shape"),
}


@pytest.mark.parametrize("what", SHAPES)
def test_nothing_broadcasts_by_accident(what):
    name, shape, message = SHAPES[what]
    with pytest.raises(ValueError, match=message):
        ki.fused_rope_qk(**(call() | {name: torch.ones(shape)}))


def test_both_tables_wrong_alike_are_refused():
    one = torch.ones(1, 1, 1, 4)
    with pytest.raises(ValueError, match="q's T=6"):
        ki.fused_rope_qk(**(call() | {"cos": one, "sin": one}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": [1.0]}, "q must be a torch.Tensor, got list"),
        ({"cos": None}, "cos must be a torch.Tensor, got NoneType"),
        ({"k": torch.ones(2, 6, 2, 8, dtype=torch.int64)}, "k must be a floating-point tensor, got torch.int64"),
        ({"k": torch.ones(2, 6, 2, 8, dtype=torch.bfloat16)}, "k must be torch.float32 like q, got torch.bfloat16"),
        ({"sin": torch.ones(1, 6, 1, 4, dtype=torch.float64)}, "sin must be torch.float32 like cos, got torch.float64"),
        ({"interleaved": 1}, "interleaved must be True or False, got int"),
    ],
)
def test_wrong_types(change, message):
    with pytest.raises(TypeError, match=message):
        ki.fused_rope_qk(**(call() | change))


@pytest.mark.parametrize("name", ["k", "cos", "sin"])
def test_another_device_is_refused(name):
    c = call()
    with pytest.raises(ValueError, match=f"{name} must be on the device of q"):
        ki.fused_rope_qk(**(c | {name: c[name].to("meta")}))


@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_are_new_memory(backend):
    """Also a rotation by nothing copies: writing the output must not write the caller's tensor."""
    c = call()
    c |= {"cos": torch.ones_like(c["cos"]), "sin": torch.zeros_like(c["sin"])}
    out = ki.fused_rope_qk(**c, backend=backend)
    assert torch.equal(out.q, c["q"])
    out.q.zero_()
    assert c["q"].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("used", ["q", "k"])
def test_only_one_output_is_used(backend, used):
    c = call()
    c["q"].requires_grad_()
    c["k"].requires_grad_()
    out = ki.fused_rope_qk(**c, backend=backend)
    getattr(out, used).square().sum().backward()
    other = "k" if used == "q" else "q"
    # A rotation keeps lengths, so the gradient of the summed squares is 2·x.
    torch.testing.assert_close(c[used].grad, 2 * c[used].detach(), rtol=1e-5, atol=1e-5)
    assert c[other].grad is None or not c[other].grad.any()


@pytest.mark.parametrize("used", ["q", "k"])
def test_a_frozen_input_is_not_rotated_back(used, monkeypatch):
    seen = []
    run = inductor.rotate
    counting = lambda q, k, *rest: seen.append((q is None, k is None)) or run(q, k, *rest)  # noqa: E731
    monkeypatch.setitem(torch_op._PASSES, "inductor", counting)
    c = call()
    c[used].requires_grad_()
    out = ki.fused_rope_qk(**c, backend="inductor")
    (out.q.sum() + out.k.sum()).backward()
    assert seen == [(False, False), (used != "q", used != "k")]


def test_only_the_tables_are_saved():
    c = call(t=64, d=32, r=32)
    c["q"].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ki.fused_rope_qk(**c, backend="inductor")
    assert {t.data_ptr() for t in saved} == {c["cos"].data_ptr(), c["sin"].data_ptr()}


def test_tables_get_their_gradient_from_the_reference():
    c = {n: v.double() for n, v in call(t=3).items()}
    leaves = tuple(v.requires_grad_() for v in c.values())
    assert torch.autograd.gradcheck(lambda *v: tuple(ki.fused_rope_qk(*v, backend="reference")), leaves)
    with ki.receipts() as log:
        ki.fused_rope_qk(**c)
    reason = "cos or sin needs a gradient: only the reference computes it"
    assert (log[0].ran, dict(log[0].declined)["inductor"]) == ("reference", reason)
    with pytest.raises(ki.Ineligible, match=reason):
        ki.fused_rope_qk(**c, backend="inductor")
    with torch.no_grad():
        ki.fused_rope_qk(**c, backend="inductor")


def test_a_batch_with_its_own_tables_is_one_variant():
    """B × T tokens are one row, so neither the batch nor the length compiles again, and backward reuses forward's."""
    width = 24  # used by no other test
    before = len(inductor._region.variants)
    for b, t in ((1, 5), (2, 5), (3, 7), (9, 4)):
        c = call(b=b, t=t, d=width, r=width, rows=b)
        c["q"].requires_grad_()
        c["k"].requires_grad_()
        q, k = ki.fused_rope_qk(**c, backend="inductor")
        (q.sum() + k.sum()).backward()
    assert len(inductor._region.variants) == before + 1


def test_auto_takes_the_compiled_pass_for_large_calls():
    large = call(b=1, t=512, heads=2, kv_heads=1, d=64, r=64)
    assert ki.explain("fused_rope_qk", **large).would_run == "inductor"
    assert ki.explain("fused_rope_qk", **call()).would_run == "reference"


@pytest.mark.parametrize("processors", [1, 3, 64])
@pytest.mark.parametrize(("heads", "kv_heads"), [(64, 16), (64, 1), (1, 64), (40, 8)])
def test_few_tokens_are_divided_by_heads_of_q_and_of_k(monkeypatch, processors, heads, kv_heads):
    """However many programs share a token, every head is rotated: with 32 pairs a program does 16 at once."""
    from kernel_index.kernels.attention.fused_rope_qk import triton

    monkeypatch.setattr(triton, "processors", lambda like: processors)
    c = call(b=1, t=5, heads=heads, kv_heads=kv_heads, d=64, r=64)
    expected = ki.fused_rope_qk(**c, backend="reference")
    for found, exact in zip(ki.fused_rope_qk(**c, backend="triton"), expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)


def test_programs_share_a_token_by_their_blocks_of_heads():
    from kernel_index.kernels.attention.fused_rope_qk.triton import sharing

    config = {"Q_HEADS": 8, "K_HEADS": 8}
    assert sharing(32, 8, config, 16) == (4, 1)
    assert sharing(64, 16, config, 16) == (8, 2)
    assert sharing(32, 8, config, 1) == (1, 0)
    assert sharing(32, 8, config, 3) == (2, 1)
    assert (sharing(32, 0, config, 16), sharing(0, 32, config, 2)) == ((4, 0), (0, 2))

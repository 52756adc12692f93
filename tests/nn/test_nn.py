"""The layers add no kernel logic of their own: each equals its plain formula."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernel_index as ki
from kernel_index.nn import (
    MLA,
    Attention,
    HybridBlock,
    HyperConnections,
    Mamba2,
    ResidualRMSNorm,
    SparseAttention,
    SquaredReLUMLP,
    SwiGLUMLP,
    TransformerBlock,
)


def rope(T, D):
    return ki.rope_tables(torch.arange(T), D)


def test_boundary_without_bias_and_dropout_is_one_kernel():
    norm = ResidualRMSNorm(8)
    stream, out = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    with ki.receipts() as log:
        new, normed = norm(stream, (out, None))
    assert [r.op for r in log] == ["fused_residual_add_rms_norm"]
    torch.testing.assert_close(new, stream + out)
    torch.testing.assert_close(normed, torch.nn.functional.rms_norm(stream + out, (8,), norm.weight, 1e-6))


def test_boundary_with_bias_adds_it():
    norm = ResidualRMSNorm(8)
    stream, out, bias = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(8)
    with ki.receipts() as log:
        new, normed = norm(stream, (out, bias))
    assert [r.op for r in log] == ["fused_bias_dropout_add", "gated_rms_norm"]
    torch.testing.assert_close(new, stream + out + bias)
    torch.testing.assert_close(normed, torch.nn.functional.rms_norm(new, (8,), norm.weight, 1e-6))


def test_boundary_keeps_a_float32_stream_under_a_bfloat16_branch():
    for bias in (None, torch.randn(8)):
        new, normed = ResidualRMSNorm(8)(torch.randn(3, 8), (torch.randn(3, 8).bfloat16(), bias))
        assert (new.dtype, normed.dtype) == (torch.float32, torch.bfloat16)


def test_dropout_only_while_training():
    norm = ResidualRMSNorm(64, dropout=0.5).eval()
    stream, out = torch.zeros(4, 64), torch.ones(4, 64)
    assert torch.equal(norm(stream, (out, None))[0], out)
    dropped = norm.train()(stream, (out, None))[0]
    assert set(dropped.unique().tolist()) == {0.0, 2.0}


def test_attention_equals_the_plain_formula():
    layer = Attention(32, heads=4, kv_heads=2, head_dim=8, window=3)
    x = torch.randn(2, 7, 32)
    tables = rope(7, 8)
    out, bias = layer(x, layer.contract(ki.MaskContract()), tables)
    assert bias is layer.bias
    q, k = ki.fused_rope_qk(layer.q(x).view(2, 7, 4, 8), layer.k(x).view(2, 7, 2, 8), *tables, backend="reference")
    k, v = (t.repeat_interleave(2, 2).transpose(1, 2) for t in (k, layer.v(x).view(2, 7, 2, 8)))
    t = torch.arange(7)
    seen = (t[:, None] >= t[None]) & (t[:, None] - t[None] <= 3)
    plain = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=seen)
    torch.testing.assert_close(out, layer.out(plain.transpose(1, 2).reshape(2, 7, 32)))


def test_heads_that_do_not_divide_are_named():
    with pytest.raises(ValueError, match=r"heads must be a multiple of kv_heads \(3\), got 4"):
        Attention(32, heads=4, kv_heads=3, head_dim=8)


def test_mlp_equals_the_plain_formula():
    layer = SquaredReLUMLP(8, 16)
    x = torch.randn(3, 8)
    out, bias = layer(x)
    assert bias is None
    torch.testing.assert_close(out, layer.down(torch.relu(layer.up(x)).square()))


def test_block_does_not_look_ahead():
    """Changing a token changes no earlier output and no earlier gradient."""
    block = TransformerBlock(Attention(16, 2, 1, 8), SquaredReLUMLP(16, 32), 16)
    stream = torch.randn(1, 6, 16)
    changed = stream.clone()
    changed[:, 4] += 1

    def first(s):
        s = s.clone().requires_grad_()
        stream, (out, _) = block(s, None, ki.MaskContract(), rope(6, 8))
        y = (stream + out)[:, :4]
        return y.detach(), torch.autograd.grad(y.square().sum(), s)[0]

    (y, g), (y2, g2) = first(stream), first(changed)
    assert torch.equal(y, y2)
    assert torch.equal(g[:, :4], g2[:, :4])
    assert not g[:, 4:].any()


class Live(TorchDispatchMode):
    """Counts matrix products, and keeps a weak reference to every tensor that comes out of an op."""

    def __init__(self):
        super().__init__()
        self.products, self.made = 0, []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        self.products += op.overloadpacket.__name__ in ("mm", "addmm", "bmm")
        self.made += [weakref.ref(t) for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        return out


def step(mlp, x):
    """Gradients, matrix products of forward and backward, and the storages that outlive forward, by size."""
    with Live() as live:
        out, _ = mlp(x)
    alive = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for r in live.made if (t := r()) is not None}
    with Live() as backward:
        grads = torch.autograd.grad(out.square().sum(), [x, *mlp.parameters()])
    return grads, live.products + backward.products, list(alive.values())


def test_the_squared_activation_is_recomputed_and_the_products_are_not():
    mlp = SquaredReLUMLP(16, 64)
    x = torch.randn(32, 16, requires_grad=True)
    grads, products, alive = step(mlp, x)
    mlp.recompute = False
    plain, plain_products, plain_alive = step(mlp, x)
    for a, b in zip(grads, plain, strict=True):
        assert torch.equal(a, b)
    activation = 32 * 64 * 4
    assert alive.count(activation) == 1, "the pre-activation"
    assert plain_alive.count(activation) > 1
    assert products == plain_products, "recomputing stops before the second product"


def test_explain_says_what_recomputing_saves():
    x = torch.randn(512, 16, requires_grad=True)
    details = ki.explain(SquaredReLUMLP(16, 256), x).details
    assert details["recompute_saves_bytes"] == details["kept_bytes"] == 512 * 256 * 4


SIZES = {
    lambda **c: Attention(**{"dim": 8, "heads": 2, "kv_heads": 1, "head_dim": 4, **c}): ("heads", "kv_heads"),
    lambda **c: SparseAttention(**{"dim": 8, "heads": 2, "kv_heads": 1, "head_dim": 4, "kind": "exact_token", **c}): (
        *("heads", "kv_heads", "block", "topk", "tokens", "index_heads", "index_dim"),
    ),
    lambda **c: MLA(**{"dim": 8, "heads": 2, "head_dim": 4, "rope": 2, "latent": 4, **c}): ("heads", "latent"),
    lambda **c: SquaredReLUMLP(**{"dim": 8, "hidden": 8, **c}): ("hidden",),
    lambda **c: SwiGLUMLP(**{"dim": 8, "hidden": 8, **c}): ("hidden",),
    lambda **c: Mamba2(**{"dim": 8, "heads": 2, "head_dim": 4, "state": 4, **c}): (
        *("heads", "state", "groups", "width", "chunk"),
    ),
    lambda **c: ResidualRMSNorm(**{"dim": 8, **c}): (),
}


@pytest.mark.parametrize("make", SIZES)
def test_a_layer_names_a_size_that_it_cannot_have(make):
    sizes = ("dim", *SIZES[make], *(("head_dim",) if "heads" in SIZES[make] else ()))
    for name in sizes:
        for value in (0, -8):
            with pytest.raises(ValueError, match=f"^{name} must be at least 1, got {value}$"):
                make(**{name: value})
        with pytest.raises(TypeError, match=f"^{name} must be an integer, got float$"):
            make(**{name: 8.0})


@pytest.mark.parametrize("make", [ResidualRMSNorm, lambda dim, **c: HybridBlock(dim, mlp=SwiGLUMLP(dim, 8), **c)])
def test_a_layer_names_a_dropout_that_is_no_probability(make):
    for value in (-0.1, 1.5):
        with pytest.raises(ValueError, match=f"^dropout must be between 0 and 1, got {value}$"):
            make(8, dropout=value)
    with pytest.raises(TypeError, match=r"^dropout must be a number, got str$"):
        make(8, dropout="a tenth")
    make(8, dropout=1)


def test_a_norm_names_an_eps_that_is_negative():
    with pytest.raises(ValueError, match=r"^eps must be at least 0, got -1\.0$"):
        ResidualRMSNorm(8, eps=-1.0)


def test_hyper_connections_name_a_number_that_they_cannot_have():
    for name, least, value in (("streams", 1, 0), ("iters", 0, -1)):
        with pytest.raises(ValueError, match=f"^{name} must be at least {least}, got {value}$"):
            HyperConnections(SwiGLUMLP(8, 8), **{name: value})
    for name in ("streams", "iters", "index"):
        with pytest.raises(TypeError, match=f"^{name} must be an integer, got float$"):
            HyperConnections(SwiGLUMLP(8, 8), **{name: 2.0})
    with pytest.raises(ValueError, match=r"^separation must be finite, got nan$"):
        HyperConnections(SwiGLUMLP(8, 8), separation=float("nan"))

"""Latent attention: fused or not, expanded or absorbed, it is one layer."""

import pytest
import torch

import kernel_index as ki
from kernel_index.nn import MLA, PagedLatentCache
from tests.nn.close import assert_as_exact_as_float32

T, ROPE, LATENT = 9, 4, 12


def layer(**changes):
    torch.manual_seed(2)
    return MLA(16, 3, 6, rope=ROPE, latent=LATENT, **changes)


def rope(dtype=torch.float32):
    return tuple(t.to(dtype) for t in ki.rope_tables(torch.arange(T), ROPE))


def plain(module, x):
    """Latent attention with every head's keys and values written out."""
    B, H, N = x.shape[0], module.heads, module.head_dim
    q = module.q(x).view(B, T, H, ROPE + N)
    latent = torch.nn.functional.rms_norm(module.down(x), (LATENT,), module.norm, module.eps)
    kv = module.up(latent).view(B, T, H, 2 * N)
    turned = ki.fused_rope_qk(q[..., :ROPE], module.k_rope(x)[:, :, None], *rope(x.dtype), backend="reference")
    k = torch.cat([turned[1].expand(B, T, H, ROPE), kv[..., :N]], -1)
    q = torch.cat([turned[0], q[..., ROPE:]], -1)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * (ROPE + N) ** -0.5
    p = scores.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    return module.out(torch.einsum("bhts,bshd->bthd", p, kv[..., N:]).reshape(B, T, H * N))


@pytest.mark.parametrize("fused", [False, True])
def test_values_and_gradients(fused):
    """The A/B test of the fused projection: values and every gradient against one plain formula."""
    module, x = layer(fused=fused), torch.randn(2, T, 16, requires_grad=True)
    exact_module, exact_x = layer().double(), x.detach().double().requires_grad_()
    upstream = torch.randn(2, T, 16)
    ours, theirs = module(x, ki.MaskContract(), rope())[0], plain(module, x)
    exact = plain(exact_module, exact_x)
    assert_as_exact_as_float32(ours, theirs, exact)
    grads = [torch.autograd.grad(y, [x, *module.parameters()], upstream, retain_graph=True) for y in (ours, theirs)]
    exact_grads = torch.autograd.grad(exact, [exact_x, *exact_module.parameters()], upstream.double())
    for a, b, c in zip(*grads, exact_grads, strict=True):
        assert_as_exact_as_float32(a, b, c)


def test_the_fused_projection_is_off_by_default_and_keeps_less():
    x, kept = torch.randn(2, T, 16), {}
    for fused in (False, True):
        module, sizes = layer(fused=fused), []
        with (
            ki.receipts() as log,
            torch.autograd.graph.saved_tensors_hooks(lambda t, to=sizes: to.append(t) or t, lambda t: t),
        ):
            module._project(x)
        owned = {p.untyped_storage().data_ptr() for p in (x, *module.parameters())}
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in sizes}
        kept[fused] = sum(n for p, n in storages.items() if p not in owned)
        assert [r.op for r in log] == (["fused_mla_projection"] if fused else [])
    assert not layer().fused
    assert kept[True] == 2 * T * 4, "1/rms of each row"
    assert kept[False] >= 2 * T * LATENT * 4, "the latent at least"


@pytest.mark.parametrize("steps", [(T,), (5, 1, 1, 2)])
def test_absorbed_decode_equals_expand_then_attend(steps):
    module, x = layer(), torch.randn(2, T, 16)
    whole = module(x, ki.MaskContract(), rope())[0]
    exact = plain(layer().double(), x.double())
    cache, at = PagedLatentCache(1, 8, 4, LATENT + ROPE), 0
    rows = [cache.allocate(), cache.allocate()]
    tables = rope()
    with torch.no_grad():
        for n in steps:
            cache.begin(rows, n)
            part = slice(at, at + n)
            y = module(x[:, part], None, tuple(t[:, part] for t in tables), cache.layer(0))[0]
            cache.advance()
            assert_as_exact_as_float32(y, whole[:, part], exact[:, part])
            at += n
    assert cache.k.shape[-1] == LATENT + ROPE, "numbers per token, for all heads, keys and values together"


def test_odd_rotation_is_named():
    with pytest.raises(ValueError, match="rope must be a positive even number of channels, got 3"):
        MLA(16, 3, 6, rope=3, latent=12)

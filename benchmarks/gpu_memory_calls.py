"""The calls of ``benchmarks.gpu_memory_bound``: ours, the plain formula for ``torch.compile``, other libraries'."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kernel_index as ki
from benchmarks.elementwise import rotate_half

BF16 = torch.bfloat16
Function = Callable[..., Any]


class Calls(NamedTuple):
    """``peers`` are prepared when their turn comes.  ``moved``: compulsory bytes forward and backward."""

    ours: Function
    plain: Function
    peers: dict[str, Callable[[], Function]]
    inputs: Callable[[], tuple[Tensor, ...]]
    moved: tuple[int, int] | None


def leaf(*shape: int, device: str) -> Tensor:
    return torch.randn(shape, dtype=BF16, device=device).requires_grad_()


def backend(device: str) -> dict[str, str]:
    return {"backend": "triton"} if device == "cpu" else {}


def rms(n: int, c: int, device: str) -> Calls:
    options = backend(device)

    def plain(r, d, w):
        new = r + d
        x = new.float()
        return new, (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)).to(d.dtype) * w

    def liger() -> Function:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction as Liger

        return lambda r, d, w: Liger.apply(d, r, w, 1e-6, 0.0, "llama", False)

    def quack() -> Function:
        from quack.rmsnorm import rmsnorm

        return lambda r, d, w: rmsnorm(d, w, residual=r, eps=1e-6, prenorm=True)

    return Calls(
        lambda r, d, w: tuple(ki.fused_residual_add_rms_norm(r, d, w, eps=1e-6, **options)),
        plain,
        {"Liger": liger, "quack": quack},
        lambda: (leaf(n, c, device=device), leaf(n, c, device=device), leaf(c, device=device)),
        (8 * n * c, 8 * n * c),
    )


def relu2(n: int, c: int, device: str) -> Calls:
    options = backend(device)

    def liger() -> Function:
        from liger_kernel.ops.relu_squared import LigerReLUSquaredFunction as Liger

        return Liger.apply

    return Calls(
        lambda x: ki.fused_relu_squared(x, **options),
        lambda x: torch.relu(x).square(),
        {"Liger": liger},
        lambda: (leaf(n, c, device=device),),
        (4 * n * c, 6 * n * c),
    )


def bias(n: int, c: int, device: str, p: float = 0.0) -> Calls:
    options: dict[str, Any] = {"p": p, **({"seed": 7} if p else {}), **backend(device)}
    return Calls(
        lambda x, r, b: ki.fused_bias_dropout_add(x, r, bias=b, **options),
        lambda x, r, b: r + torch.nn.functional.dropout(x + b, p),
        {},
        lambda: (leaf(n, c, device=device), leaf(n, c, device=device), leaf(c, device=device)),
        (6 * n * c, (4 if p else 2) * n * c),
    )


def dropout(n: int, c: int, device: str) -> Calls:
    return bias(n, c, device, 0.1)


def rope(n: int, c: int, device: str) -> Calls:
    size = 16 if device == "cpu" else 128
    heads, kv_heads, options = c // size, max(1, c // size // 4), backend(device)
    cos, sin = (t.to(device) for t in ki.rope_tables(torch.arange(n), size))
    whole = [torch.cat((t, t), -1) for t in (cos, sin)]

    def plain(q, k):
        return tuple((x.float() * whole[0] + rotate_half(x.float()) * whole[1]).to(x.dtype) for x in (q, k))

    def liger() -> Function:
        from liger_kernel.ops.rope import LigerRopeFunction as Liger

        wide = [t[..., 0, :].to(BF16) for t in whole]  # it writes in place: it gets views, as a model gives them

        def run(q, k):
            return tuple(t.transpose(1, 2) for t in Liger.apply(q.transpose(1, 2), k.transpose(1, 2), *wide))

        return run

    def quack() -> Function:
        from quack.rotary import apply_rotary_emb

        mine = [t[0, :, 0].contiguous() for t in (cos, sin)]
        return lambda q, k: tuple(apply_rotary_emb(x, *mine) for x in (q, k))

    moved = 4 * n * (heads + kv_heads) * size
    return Calls(
        lambda q, k: tuple(ki.fused_rope_qk(q, k, cos, sin, **options)),
        plain,
        {"Liger": liger, "quack": quack},
        lambda: (leaf(1, n, heads, size, device=device), leaf(1, n, kv_heads, size, device=device)),
        (moved, moved),
    )


def mhc(n: int, c: int, device: str) -> Calls:
    options = backend(device)

    def plain(x, f, post, res, pre):
        merged = [sum(res[o, i] * x[:, :, i].float() for i in range(4)) + post[o] * f.float() for o in range(4)]
        mixed = torch.stack(merged, 2)
        return mixed.to(BF16), sum(pre[i] * mixed[:, :, i] for i in range(4)).to(BF16)

    def liger() -> Function:
        from liger_kernel.transformers.functional import liger_mhc_post_res, liger_mhc_pre

        def run(x, f, post, res, pre):  # its coefficients are one set for each token
            new = liger_mhc_post_res(x, f, post.expand(1, n, 4), res.expand(1, n, 4, 4))
            return new, liger_mhc_pre(new, pre.expand(1, n, 4))

        return run

    def inputs() -> tuple[Tensor, ...]:
        mixing = (torch.rand(size, device=device).requires_grad_() for size in ((4,), (4, 4), (4,)))
        return leaf(1, n, 4, c, device=device), leaf(1, n, c, device=device), *mixing

    return Calls(
        lambda *given: tuple(ki.mhc_merge_and_branch_input(*given, **options)),
        plain,
        {"Liger": liger},
        inputs,
        (20 * n * c, 30 * n * c),
    )


def mla(n: int, c: int, device: str) -> Calls:
    latent, out = (1536, 24576) if c == 7168 else (c // 4, 3 * c)
    options = backend(device)

    def plain(x, down, up, w):
        y = torch.nn.functional.linear(x, down).float()
        y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * w
        return torch.nn.functional.linear(y, up)

    def inputs() -> tuple[Tensor, ...]:
        sizes = ((latent, c), (out, latent))
        weights = ((torch.randn(s, device=device) * s[1] ** -0.5).to(BF16).requires_grad_() for s in sizes)
        return leaf(n, c, device=device), *weights, leaf(latent, device=device)

    def by_default() -> Function:  # keeps 1/rms alone, and so has one product more
        return lambda x, down, up, w: ki.fused_mla_projection(x, down, up, w, **options)

    return Calls(  # ours keeps as much as the others
        lambda x, down, up, w: ki.fused_mla_projection(x, down, up, w, recompute="none", **options),
        plain,
        {"kernel_index, recompute=latent": by_default},
        inputs,
        None,
    )


MAKERS: dict[str, Callable[[int, int, str], Calls]] = {
    "rms": rms, "rope": rope, "relu2": relu2, "dropout": dropout, "bias_add": bias, "mhc": mhc, "mla": mla
}  # fmt: skip

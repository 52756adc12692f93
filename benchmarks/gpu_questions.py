"""What ``benchmarks.gpu`` compares: our public functions, the plain formulas, and Liger-Kernel's where it has one."""

import functools
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

import kernel_index as ki
from benchmarks.elementwise import plain_bias_dropout_add, plain_residual_rms_norm, plain_rope
from benchmarks.harness import Question
from kernel_index.kernels.sparse.block_sparse_attention.api import block_sparse_attention

BF16 = torch.bfloat16


def questions(dry: bool) -> list[Question]:
    device = "cpu" if dry else "cuda"
    rows, width = (8, 64) if dry else (8192, 4096)
    backend = {"backend": "triton"} if dry else {}
    elements = rows * width

    def leaf(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device).requires_grad_()

    def compiled(function):
        return function if dry else torch.compile(function)

    def streams():
        return leaf(rows, width), leaf(rows, width), leaf(width)

    def rms(r, d, w):
        return tuple(ki.fused_residual_add_rms_norm(r, d, w, **backend))

    def bda(p):
        return (
            {
                "kernel_index": lambda x, r, b: ki.fused_bias_dropout_add(x, r, bias=b, p=p, seed=7, **backend),
                "eager": lambda x, r, b: plain_bias_dropout_add(x, r, b, p),
                "torch.compile": compiled(lambda x, r, b: plain_bias_dropout_add(x, r, b, p)),
            },
            streams,
        )

    found = [
        Question(
            "residual + RMSNorm",
            {
                "kernel_index": rms,
                "eager": plain_residual_rms_norm,
                "torch.compile": compiled(plain_residual_rms_norm),
                **liger_rms(),
            },
            streams,
            (8 * elements, 8 * elements),
        ),
        Question(
            "relu²",
            {
                "kernel_index": lambda x: ki.fused_relu_squared(x, **backend),
                "eager": lambda x: torch.relu(x).square(),
                "torch.compile": compiled(lambda x: torch.relu(x).square()),
                **liger_relu(),
            },
            lambda: (leaf(rows, width),),
            (4 * elements, 6 * elements),
        ),
        Question("bias + dropout 0.1 + add", *bda(0.1), (6 * elements, 4 * elements)),
        Question("bias + add (dropout 0)", *bda(0.0), (6 * elements, 2 * elements)),
    ]
    more = [
        rope_question(dry, device, backend),
        *(*gated_questions(dry, device, backend), *streams_questions(dry, device, backend)),
        *(*attention_questions(dry, device), *sparse_questions(dry, device)),
    ]
    return [*found, *more, cross_entropy(dry, device, backend)]


def gated_questions(dry: bool, device: str, backend: dict) -> list[Question]:
    """SwiGLU and GEGLU, gate and up as two tensors and as the halves of one projection."""
    rows, width = (8, 64) if dry else (8192, 4096)
    plain = {
        "silu": lambda gate, up: F.silu(gate) * up,
        "gelu_tanh": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    }

    def pair() -> tuple[Tensor, ...]:
        return tuple(torch.randn(rows, width, dtype=BF16, device=device).requires_grad_() for _ in range(2))

    def halves() -> tuple[Tensor, ...]:
        joined = torch.randn(rows, 2 * width, dtype=BF16, device=device)
        return tuple(half.detach().requires_grad_() for half in joined.chunk(2, -1))

    return [
        Question(
            f"{name}{suffix}",
            {
                "kernel_index": functools.partial(ki.fused_gated_activation, kind=kind, **backend),
                "eager": plain[kind],
                "torch.compile": plain[kind] if dry else torch.compile(plain[kind]),
                **liger_gated(kind),
            },
            inputs,
            (6 * rows * width, 10 * rows * width),
        )
        for name, kind in (("SwiGLU", "silu"), ("GEGLU", "gelu_tanh"))
        for suffix, inputs in (("", pair), (" of halves", halves))
    ]


def cross_entropy(dry: bool, device: str, backend: dict) -> Question:
    tokens, width, vocab = (16, 32, 64) if dry else (8192, 4096, 128256)

    def full(h, w, t):
        return F.cross_entropy(F.linear(h, w).float(), t)

    contenders = {
        "kernel_index": lambda h, w, t: ki.fused_linear_cross_entropy(h, w, t, **backend),
        "full logits": full,
    }
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        contenders["F.linear_cross_entropy"] = lambda h, w, t: F.linear_cross_entropy(h, w, t, options=options)
    if has_liger() and not dry:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        contenders["Liger"] = lambda h, w, t: liger_fused_linear_cross_entropy(h, w, t)

    def inputs():
        h = torch.randn(tokens, width, dtype=BF16, device=device).requires_grad_()
        w = (torch.randn(vocab, width, device=device) * width**-0.5).to(BF16).requires_grad_()
        return h, w, torch.randint(0, vocab, (tokens,), device=device)

    return Question("linear cross-entropy", contenders, inputs, memory=True, together=True)


def rope_question(dry: bool, device: str, backend: dict) -> Question:
    rows = 8 if dry else 8192
    heads, kv_heads, size = (4, 2, 8) if dry else (32, 8, 128)
    cos, sin = (t.to(device) for t in ki.rope_tables(torch.arange(rows), size))
    moved = 2 * 2 * rows * (heads + kv_heads) * size

    def ours(q, k):
        return tuple(ki.fused_rope_qk(q, k, cos, sin, **backend))

    def plain(q, k):
        return plain_rope(q, k, cos, sin)

    def inputs():
        shapes = (heads, size), (kv_heads, size)
        return tuple(torch.randn(1, rows, *s, dtype=BF16, device=device).requires_grad_() for s in shapes)

    contenders = {"kernel_index": ours, "eager": plain, "torch.compile": plain if dry else torch.compile(plain)}
    return Question("RoPE of Q and K", contenders | liger_rope(cos, sin), inputs, (moved, moved))


def streams_questions(dry: bool, device: str, backend: dict) -> list[Question]:
    rows, width = (8, 64) if dry else (8192, 4096)
    element = 2 * rows * width

    def plain(hidden, branch, post, res, pre):
        merged = torch.einsum("on,btnc->btoc", res, hidden.float()) + post[:, None] * branch.float()[:, :, None]
        return merged.to(BF16), torch.einsum("n,btnc->btc", pre, merged).to(BF16)

    def ours(hidden, branch, post, res, pre):
        return tuple(ki.mhc_merge_and_branch_input(hidden, branch, post, res, pre, **backend))

    def inputs():
        tensors = (torch.randn(1, rows, 4, width), torch.randn(1, rows, width))
        streams = tuple(t.to(device=device, dtype=BF16).requires_grad_() for t in tensors)
        sizes = ((4,), (4, 4), (4,))
        return *streams, *(torch.rand(size, device=device).requires_grad_() for size in sizes)

    contenders = {"kernel_index": ours, "eager": plain}
    if not dry:
        contenders["torch.compile"] = torch.compile(plain)
    return [Question("mHC merge + branch input", contenders, inputs, (10 * element, 15 * element))]


def attention_questions(dry: bool, device: str) -> list[Question]:
    tokens, heads, kv_heads, size, documents = (64, 4, 2, 16, 4) if dry else (32768, 32, 8, 128, 16)
    ids = torch.arange(documents, device=device).repeat_interleave(tokens // documents)[None]
    packed, causal = ki.MaskContract(doc_ids=ids), ki.MaskContract()

    def inputs(length):
        def make():
            counts = (heads, kv_heads, kv_heads)
            return tuple(torch.randn(1, length, n, size, device=device, dtype=BF16).requires_grad_() for n in counts)

        return make

    def ours(mask, backend="triton"):
        return lambda q, k, v: ki.attention(q, k, v, mask, backend=backend)

    def fa4(mask):
        return {"fa4": ours(mask, "fa4")} if has_flash() else {}

    return [
        Question(
            f"attention over {documents} documents in {tokens} tokens",
            {"kernel_index": ours(packed), **fa4(packed), "SDPA over the whole row": flash},
            inputs(tokens),
        ),
        Question(
            f"causal attention over {tokens // 4} tokens",
            {"kernel_index": ours(causal), **fa4(causal), "SDPA": flash},
            inputs(tokens // 4),
        ),
    ]


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


DRIFT = 0.975
"""Correlation of neighbouring queries at which they share 85 % of their selected blocks."""


def sparse_questions(dry: bool, device: str) -> list[Question]:
    """16 blocks of 64 keys for each query of 65536, against flash attention over everything before it.

    *Random*: queries are independent, the worst case for unions.  *Shared*: neighbours share 85 % of their blocks.
    ``kernel_index``, which is clustered, routes, plans and attends, as MoBA does; the attention alone, with the
    selection given, shows what routing costs.
    """
    tokens, heads, kv_heads, size = (32, 4, 2, 16) if dry else (65536, 32, 4, 128)
    config = ki.ClusteredSparseConfig(block_size=8, topk=3) if dry else ki.ClusteredSparseConfig(block_size=64, topk=16)

    def inputs(shared):
        def make():
            q, k, v = (torch.randn(1, tokens, n, size) for n in (heads, kv_heads, kv_heads))
            for t in range(1, tokens if shared else 0):
                q[:, t] = DRIFT * q[:, t - 1] + (1 - DRIFT**2) ** 0.5 * q[:, t]
            return tuple(x.to(device=device, dtype=BF16).requires_grad_() for x in (q, k, v))

        return make

    def clustered(q, k, v):
        return ki.clustered_sparse_attention(q, k, v, config=config, backend="triton")

    def moba(per, backend="triton"):
        def attend(q, k, v):
            size, topk = config.block_size, config.topk
            return ki.moba_attention(q, k, v, block_size=size, topk=topk, route_per=per, backend=backend)

        return attend

    def attend_only(routed):
        def attend(q, k, v):
            if not routed:  # the inputs of every contender's first call
                routed.append(ki.clustered_route(q, k, config=config))
            selected, valid = routed[0]
            return block_sparse_attention(
                q, k, v, selected, selected_valid=valid, block_size=config.block_size, backend="triton"
            ).out

        return attend

    return [
        Question(
            f"{config.topk} of {tokens // config.block_size} blocks, {name}, T = {tokens}",
            {
                "kernel_index": clustered,
                "picks given": attend_only([]),
                "MoBA": moba("query_head"),
                "MoBA, kv_group": moba("kv_group"),
                **({"MoBA, kv_group, flash": moba("kv_group", "flash")} if has_flash() else {}),
                "SDPA over all": flash,
            },
            inputs(name == "shared"),
            memory=True,
        )
        for name in ("random", "shared")
    ]


def has_flash() -> bool:
    return importlib.util.find_spec("flash_attn") is not None and torch.cuda.is_available()


def has_liger() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None and torch.cuda.is_available()


def liger_rms() -> dict:
    if not has_liger():
        return {}
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction as Function

    def run(r, d, w):
        normed, new = Function.apply(d, r, w, 1e-8, 0.0, "llama", False)
        return new, normed

    return {"Liger": run}


def liger_relu() -> dict:
    if not has_liger():
        return {}
    from liger_kernel.ops.relu_squared import LigerReLUSquaredFunction as Function

    return {"Liger": lambda x: Function.apply(x)}


def liger_gated(kind: str) -> dict:
    if not has_liger():
        return {}
    from liger_kernel.ops.geglu import LigerGELUMulFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    function = {"silu": LigerSiLUMulFunction, "gelu_tanh": LigerGELUMulFunction}[kind]
    return {"Liger": lambda gate, up: function.apply(gate, up)}


def liger_rope(cos: Tensor, sin: Tensor) -> dict:
    if not has_liger():
        return {}
    from liger_kernel.ops.rope import LigerRopeFunction as Function

    full_cos, full_sin = (torch.cat((t, t), -1)[..., 0, :].to(BF16) for t in (cos, sin))

    def run(q, k):  # Liger takes [B, heads, T, D] views and writes in place: it gets copies, as a model gives it
        turned = Function.apply(q.transpose(1, 2), k.transpose(1, 2), full_cos, full_sin)
        return tuple(t.transpose(1, 2) for t in turned)

    return {"Liger": run}

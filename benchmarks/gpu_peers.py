"""Other libraries' attention and decoding, called directly: what a user would take instead."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_session import LeftOut
from kernel_index.proofs.tune.attention_cells import AttentionInputs
from kernel_index.proofs.tune.decode_cells import DecodeInputs

Attend = Callable[[], Tensor]
Step = Callable[[int], Tensor]


def attention_peers(inputs: AttentionInputs) -> dict[str, Callable[[], Attend]]:
    """Contenders by name; each is prepared when its turn comes."""
    if inputs.q.is_cuda:
        cudnn, flash = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
        sdpas = {"SDPA flash": lambda: sdpa(inputs, flash), "SDPA cuDNN": lambda: sdpa(inputs, cudnn)}
    else:
        sdpas = {"SDPA math": lambda: sdpa(inputs, SDPBackend.MATH)}
    if inputs.cell.documents:
        return {"FA4 varlen": lambda: fa4_varlen(inputs), "Flex": lambda: flex(inputs)}
    if inputs.cell.prefix or inputs.cell.trees:
        return {"Flex": lambda: flex(inputs)}
    rest = {"FA4": lambda: fa4(inputs), "Flex": lambda: flex(inputs)}
    return rest if inputs.cell.kinds else sdpas | rest


def sdpa(inputs: AttentionInputs, which: SDPBackend) -> Attend:
    def attend() -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in inputs.leaves)
        with sdpa_kernel(which):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    return attend


def fa4(inputs: AttentionInputs) -> Attend:
    from flash_attn.cute import flash_attn_func

    return lambda: _first(flash_attn_func(*inputs.leaves, **_fa4_options(inputs)))


def fa4_varlen(inputs: AttentionInputs) -> Attend:
    from flash_attn.cute import flash_attn_varlen_func

    starts, longest = inputs.starts, inputs.longest
    lengths = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": longest, "max_seqlen_k": longest}
    options = lengths | _fa4_options(inputs)
    return lambda: _first(flash_attn_varlen_func(*(x[0] for x in inputs.leaves), **options))[None]


def _fa4_options(inputs: AttentionInputs) -> dict[str, Any]:
    cell = inputs.cell
    window = (None, None) if cell.left is None else (cell.left, 0)
    return {"causal": True, "softcap": cell.softcap, "learnable_sink": inputs.sink, "window_size": window}


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def flex(inputs: AttentionInputs) -> Attend:
    if not inputs.q.is_cuda:
        raise LeftOut("FlexAttention has no backward on a CPU")
    if inputs.sink is not None:
        raise LeftOut("FlexAttention has no sink")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    cell, ids = inputs.cell, inputs.ids
    left, softcap, tokens, prefix = cell.left, cell.softcap, cell.tokens, cell.prefix
    tree, answer = inputs.tree_and_answer() if cell.trees else (ids, ids)

    def seen(b, h, i, j):
        allowed = i >= j
        allowed = allowed if left is None else allowed & (i - j <= left)
        if cell.trees:
            return allowed & (tree[i] == tree[j]) & ((answer[j] < 0) | (answer[i] == answer[j]))
        if prefix:
            return allowed | ((i < prefix) & (j < prefix))
        return allowed & (ids[i] == ids[j]) if cell.documents else allowed

    def capped(score, b, h, i, j):
        return softcap * torch.tanh(score / softcap)

    torch._dynamo.reset()
    mask = torch.compile(create_block_mask)(seen, None, None, tokens, tokens, device="cuda")
    attend = torch.compile(flex_attention, dynamic=False)
    options = {"block_mask": mask, "enable_gqa": True, "score_mod": capped if softcap else None}
    return lambda: attend(*(x.transpose(1, 2) for x in inputs.leaves), **options).transpose(1, 2)


def decode_peers(inputs: DecodeInputs) -> dict[str, Callable[[], Step]]:
    """Contenders by name.  FlashInfer appends the new token and attends; the others attend to a cache that holds it."""
    found: dict[str, Callable[[], Step]] = {
        "FA4 paged": lambda: fa4_paged(inputs, splits=1),
        "FA4 paged, split": lambda: fa4_paged(inputs, splits=0),  # as many as its own rule says
    }
    if inputs.cell.page in (16, 64):  # the pages do not matter: once for each number of rows and tokens, and in a test
        found["SDPA contiguous"] = lambda: sdpa_contiguous(inputs)
    return found | {"FlashInfer": lambda: flashinfer_paged(inputs)}


def fa4_paged(inputs: DecodeInputs, splits: int) -> Step:
    from flash_attn.cute import flash_attn_varlen_func

    pages, options = (inputs.k_pages, inputs.v_pages), {"seqused_k": inputs.after, "causal": True, "num_splits": splits}
    return lambda i: _first(flash_attn_varlen_func(inputs.q[i], *pages, page_table=inputs.tables[i], **options))


def sdpa_contiguous(inputs: DecodeInputs) -> Step:
    pairs = [inputs.contiguous(i) for i in range(inputs.sets)]
    queries = [q.transpose(1, 2) for q in inputs.q]
    return lambda i: F.scaled_dot_product_attention(queries[i], *pairs[i], enable_gqa=True).transpose(1, 2)


def flashinfer_paged(inputs: DecodeInputs) -> Step:
    """``append_paged_kv_cache``, then the decode wrapper on tensor cores; planned outside of what is timed."""
    import flashinfer

    if not inputs.q[0].is_cuda:
        raise LeftOut("FlashInfer needs a CUDA device")
    cell, device = inputs.cell, inputs.q[0].device
    workspace = torch.zeros(128 << 20, dtype=torch.uint8, device=device)
    starts = torch.arange(cell.rows + 1, dtype=torch.int32, device=device) * (cell.tokens // cell.page)
    last = torch.full((cell.rows,), cell.page, dtype=torch.int32, device=device)
    rows = torch.arange(cell.rows, dtype=torch.int32, device=device)
    sizes = (cell.heads, cell.kv_heads, cell.head_size, cell.page)
    pages, k, v = (inputs.k_pages, inputs.v_pages), inputs.k[:, 0], inputs.v[:, 0]
    wrappers = []
    for table in inputs.tables:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        wrapper.plan(starts, table.flatten(), last, *sizes, q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16)
        wrappers.append(wrapper)

    def step(i: int) -> Tensor:
        indices = inputs.tables[i].view(-1)
        flashinfer.append_paged_kv_cache(k, v, rows, inputs.before, pages, indices, starts, last)
        return wrappers[i].run(inputs.q[i][:, 0], pages)[:, None]

    return step

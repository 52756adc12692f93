"""Offsets beyond 2³¹ elements, without such tensors: a late program of a kernel, interpreted.

Loads give zeros and stores go nowhere; what is compared is where they point.
"""

import math

import numpy as np
import pytest
import torch
import triton.runtime.interpreter as interpreter

from kernel_index.core.triton import launch
from kernel_index.kernels.attention.fused_rope_qk import triton as rope
from kernel_index.kernels.boundary.fused_bias_dropout_add import triton as dropout
from kernel_index.kernels.boundary.fused_residual_add_rms_norm import triton as norm
from kernel_index.kernels.experts.expert_dispatch import triton as dispatch
from kernel_index.kernels.experts.expert_router import triton as router
from kernel_index.kernels.experts.fused_gated_activation import triton as gated
from kernel_index.kernels.experts.fused_relu_squared import triton as relu
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked import triton as loss
from kernel_index.kernels.loss.fused_linear_cross_entropy_chunked import triton_rows as loss_rows
from kernel_index.kernels.sparse.block_sparse_attention import triton as block_sparse
from kernel_index.kernels.sparse.block_sparse_attention import triton_backward as block_sparse_backward
from kernel_index.kernels.state_space.causal_conv1d import triton as conv
from kernel_index.kernels.state_space.gated_rms_norm import triton as gated_norm
from kernel_index.kernels.state_space.ssd_scan import triton_backward as scan_backward
from kernel_index.kernels.state_space.ssd_scan import triton_forward as scan
from kernel_index.kernels.state_space.ssd_scan import triton_states as scan_states

pytestmark = pytest.mark.skipif(not launch.interpreting(), reason="records addresses in Triton's interpreter")

WIDTH = 4096
ROWS = 3 * 2**31 // WIDTH  # 6.4 billion elements: also past the range of an unsigned 32-bit offset
LAST = ROWS - 1


@pytest.fixture
def late(monkeypatch):
    """Run ``kernel`` as program ``index`` and return, for each tensor, the first and last element touched."""
    builder = interpreter.InterpreterBuilder
    touched = []

    def note(pointers, mask):
        addresses = np.asarray(pointers.data).astype(np.int64)
        chosen = np.broadcast_to(np.asarray(mask.data).astype(bool), addresses.shape)
        touched.append(addresses[chosen])

    def load(self, pointers, mask, *rest, **more):
        note(pointers, mask)
        kind = pointers.get_element_ty()
        return interpreter.TensorHandle(np.zeros(pointers.data.shape, interpreter._get_np_dtype(kind)), kind)

    def run(kernel, index, *args, **options):
        indices = (*index, 0, 0)[:3] if isinstance(index, tuple) else (index, 0, 0)

        def program_id(self, axis):
            return interpreter.TensorHandle(np.array([indices[axis]], dtype=np.int32), interpreter.tl.int32)

        touched.clear()
        with monkeypatch.context() as patch:
            patch.setattr(builder, "create_masked_load", load)
            patch.setattr(builder, "create_masked_store", lambda self, p, value, mask, *r, **k: note(p, mask))
            patch.setattr(builder, "create_get_program_id", program_id)
            kernel[(1,)](*args, **options)
        return np.unique(np.concatenate(touched))

    return run


def tensors(count, dtype=torch.bfloat16):
    """Far enough apart that what lies beside one is not part of another."""
    return [torch.zeros(1 << 22, dtype=dtype) for _ in range(count)]


def holds(addresses, tensor, first, last):
    """The tensor's elements ``first`` … ``last`` were touched and nothing right beside them."""
    start, size = tensor.data_ptr(), tensor.element_size()
    for element in (first, (first + last) // 2, last):
        assert start + element * size in addresses, f"element {element}"
    for element in (first - 1, last + 1):
        assert start + element * size not in addresses, f"element {element}"


def test_relu_squared(late):
    x, y, g = tensors(3)
    size = ROWS * WIDTH - 5
    index = math.ceil(size / relu.BLOCK) - 1
    first = index * relu.BLOCK
    holds(late(relu._relu_squared_kernel, index, x, y, size, BLOCK=relu.BLOCK), y, first, size - 1)
    seen = late(relu._relu_squared_backward_kernel, index, x, g, y, size, BLOCK=relu.BLOCK)
    for tensor in (x, g, y):
        holds(seen, tensor, first, size - 1)


@pytest.mark.parametrize("rows", [1, ROWS], ids=["one long row", "rows of halves"])
def test_gated_activation(late, rows):
    gate, up, g, y, z = tensors(5)
    size, width = ROWS * WIDTH, ROWS * WIDTH // rows
    blocks, stride = width // gated.BLOCK, 2 * width if rows > 1 else 0
    first, last = size - gated.BLOCK, size - 1
    read = last + (rows - 1) * (stride - width) if rows > 1 else last  # the last element of a strided input
    shape = {"KIND": "silu", "BLOCK": gated.BLOCK}
    seen = late(gated._gated_kernel, size // gated.BLOCK - 1, gate, up, y, width, blocks, stride, stride, **shape)
    holds(seen, y, first, last)
    for tensor in (gate, up):
        holds(seen, tensor, read - gated.BLOCK + 1, read)
    index, strides = size // gated.BLOCK - 1, (stride, stride, 0 if rows == 1 else width)
    seen = late(gated._gated_backward_kernel, index, gate, up, g, y, z, None, width, blocks, *strides, **shape)
    for tensor in (g, y, z):
        holds(seen, tensor, first, last)


def test_expert_dispatch(late):
    """The last token; its slot is read as 0."""
    x, rows, out, g = tensors(4)
    weights, slots = tensors(2, torch.float32)
    block = dispatch._moves(WIDTH)["BLOCK"]
    first = LAST * WIDTH, LAST * WIDTH + block - 1
    shape = {"K": 2, "BLOCK": block}
    holds(late(dispatch._dispatch_kernel, LAST, x, slots, rows, WIDTH, **shape), x, *first)
    seen = late(dispatch._combine_kernel, LAST, rows, weights, slots, x, out, WIDTH, WEIGHTED=True, BASE=True, **shape)
    for tensor in (x, out):
        holds(seen, tensor, *first)
    seen = late(dispatch._combine_backward_kernel, LAST, g, rows, weights, slots, out, weights, WIDTH, **shape)
    holds(seen, g, LAST * WIDTH, ROWS * WIDTH - 1)


def test_expert_route(late):
    """The last tile of tokens."""
    x, weight, d_x = tensors(3)
    scores, weights, parts = tensors(3, torch.float32)
    (experts,) = tensors(1, torch.int64)
    shape = {"SOFTMAX": False, "PRECISION": "ieee", "TILE": 16, "EXPERTS": 16, "BLOCK": router.BLOCK}
    call = (x, weight, None, experts, weights, parts, scores, ROWS, WIDTH, 16, 1e-20)
    seen = late(router._forward_kernel, ROWS // 16 - 1, *call, TOPK=2, CHOICES=2, BIAS=False, UPCAST=True, **shape)
    holds(seen, x, (ROWS - 16) * WIDTH, ROWS * WIDTH - 1)
    index, call = (ROWS // 16 - 1, 0), (scores, x, weight, d_x, parts, ROWS, WIDTH, 16, ROWS // 16)
    shape.pop("SOFTMAX")
    seen = late(router._backward_kernel, index, *call, STAGES=3, UPCAST=True, **shape)
    for tensor in (x, d_x):
        touches(seen, tensor, LAST * WIDTH, LAST * WIDTH + router.BLOCK - 1)


@pytest.mark.parametrize("width", [WIDTH, 3 * norm.WHOLE], ids=["one block", "looped"])
def test_rms_norm(late, width):
    residual, delta, weight, new, normed = tensors(5)
    (rstd,) = tensors(1, torch.float32)
    whole = norm.is_whole(width, residual)
    block = norm.pick_config(width, whole)["BLOCK"]
    seen = late(
        norm._forward_kernel, LAST, residual, delta, weight, None, new, normed, rstd, width, 1e-6, 0.0,
        SCALE=0, ONE_BLOCK=whole, EARLY=whole, BLOCK=block,
    )  # fmt: skip
    for tensor in (residual, delta, new, normed):
        holds(seen, tensor, LAST * width, ROWS * width - 1)
    kernel = norm._backward_kernel if whole else norm._backward_wide_kernel
    (parts,) = tensors(1, torch.float32)
    d_new, d_normed, dx = tensors(3)
    seen = late(
        kernel, LAST // 8, d_new, d_normed, new, rstd, weight, None, None, dx, None, parts, None, ROWS, width, 0.0, 8,
        HAS_NEW=True, HAS_NORMED=True, SCALE=0, RESIDUAL=True, DELTA=False, WEIGHT=True, D_SCALE=False,
        STAGES=1, ROWS=1, BLOCK=norm.pick_backward_config(width, ROWS, whole)["BLOCK"],
    )  # fmt: skip
    first = LAST // 8 * 8 * width
    for tensor in (d_new, d_normed, new, dx):
        holds(seen, tensor, first, ROWS * width - 1)


def test_dropout(late):
    x, residual, bias, out = tensors(4)
    seed = torch.zeros((), dtype=torch.int64)
    size = ROWS * WIDTH - 5
    index = math.ceil(size / dropout.BLOCK) - 1
    seen = late(
        dropout._flat_kernel, index, x, residual, bias, out, seed, 2**31, 2.0, size, WIDTH,
        RESIDUAL=True, BIAS=True, DROP=True, WHOLE_BLOCKS=WIDTH % dropout.BLOCK == 0, BLOCK=dropout.BLOCK,
        INVERTED=False,
    )  # fmt: skip
    for tensor in (x, residual, out):
        holds(seen, tensor, index * dropout.BLOCK, size - 1)
    (parts,) = tensors(1, torch.float32)
    runs = ROWS // dropout.ROWS
    seen = late(
        dropout._column_kernel, runs - 1, x, out, parts, seed, 2**31, 2.0, ROWS, WIDTH, dropout.ROWS, DX=True,
        DROP=True, INVERTED=True, WHOLE_GROUPS=True, ROWS=dropout.ROWS, COLUMNS=dropout.COLUMNS, STAGES=1,
        DEPENDENT=False,
    )  # fmt: skip
    for tensor in (x, out):
        holds(seen, tensor, LAST * WIDTH, LAST * WIDTH + dropout.COLUMNS - 1)


def test_rope(late):
    q, k, q_out, k_out = tensors(4)
    cos, sin = tensors(2, torch.float32)
    heads, size = 32, 128
    token = 3 * 2**31 // (heads * size) - 1
    seen = late(
        rope._rope_kernel, token, q, k, cos, sin, q_out, k_out, token + 1, heads, 8, size, size // 2, 1.0, 1,
        BATCHED=True, INTERLEAVED=False, HAS_Q=True, HAS_K=True, REST=0, Q_HEADS=8, K_HEADS=8, PAIRS=64,
    )  # fmt: skip
    for tensor in (q, q_out):
        holds(seen, tensor, token * heads * size, (token + 1) * heads * size - 1)
    holds(seen, cos, token * 64, token * 64 + 63)


def test_rope_after_a_norm(late):
    q, k, q_out, k_out, gq, gk = tensors(6)
    cos, sin, weight, parts = tensors(4, torch.float32)
    heads, size = 32, 128
    token = 3 * 2**31 // (heads * size) - 1
    sizes = (token + 1, heads, 8, size, size // 2, size // 2, 1e-6, 0.0)
    flags = {"BATCHED": True, "STEP": 1, "NORM_Q": True, "NORM_K": True, "Q_HEADS": 8, "K_HEADS": 8, "PAIRS": 64}
    tables = (cos, sin, weight, weight)
    forward = late(rope._norm_rope_kernel, token, q, k, *tables, q_out, k_out, *sizes, **flags, REST=1)
    backward = late(
        rope._norm_rope_backward_kernel, token // 4, gq, gk, q, k, *tables, q_out, k_out, parts, parts,
        token + 1, 4, *sizes, **flags, HAS_Q=True, HAS_K=True, REST=1,
    )  # fmt: skip
    for seen, first, of in ((forward, token, (q, q_out)), (backward, token // 4 * 4, (gq, q, q_out))):
        for tensor in of:
            holds(seen, tensor, first * heads * size, (token + 1) * heads * size - 1)
        holds(seen, cos, first * 64, token * 64 + 63)


def test_loss(late):
    (z,) = tensors(1)
    losses, row_max, log_sum, missing, rows = tensors(5, torch.float32)
    targets = torch.zeros(64, dtype=torch.int64)
    vocab, row = 10000, 3 * 2**31 // 10000
    flags = {"CAP": False, "SMOOTH": False, "Z_LOSS": False, "BLOCK": loss_rows.BLOCK}
    call = (z, targets, losses, row_max, log_sum, missing, 0, vocab, vocab, vocab, 0.0, 1.0, 0.0, 0.0)
    holds(late(loss._losses_kernel, row, *call, **flags, BLOCKS=2, STAGES=1), z, row * vocab, (row + 1) * vocab - 1)
    call = (z, z, targets, rows, row_max, log_sum, missing, rows, vocab, vocab, 0, vocab, vocab, 0.0, 1.0, 0.0, 0.0)
    seen = late(loss._gradient_kernel, row, *call, **flags, LSE=True)
    holds(seen, z, row * vocab, row * vocab + loss_rows.BLOCK - 1)


def test_loss_of_slices(late):
    """The last class of many, each of which takes the room of 2¹⁷ elements."""
    (z,) = tensors(1)
    losses, row_max, log_sum, missing = tensors(4, torch.float32)
    targets, room, slice_width, row = torch.zeros(64, dtype=torch.int64), 2**17, 2 * loss_rows.BLOCK, 7
    vocab = 16 * slice_width
    call = (z, targets, losses, row_max, log_sum, missing, room, vocab, slice_width, vocab, 0.0, 1.0, 0.0, 0.0)
    flags = {"CAP": False, "SMOOTH": False, "Z_LOSS": False, "BLOCK": loss_rows.BLOCK}
    seen = late(loss._losses_kernel, row, *call, **flags, BLOCKS=4, STAGES=1)
    first = 15 * slice_width * room + row * slice_width
    holds(seen, z, first, first + slice_width - 1)


SPARSE = {
    "D": 16, "DV": 16, "BLOCK_D": 16, "BLOCK_DV": 16, "BM": 16, "BN": 16, "BLOCK": 16, "QUERIES": 16, "HEADS": 1,
    "GROUP": 1, "GROUPS": 1, "CAPPED": False, "UPCAST": True,
}  # fmt: skip
SPARSE_HEADS = WIDTH // 16
SPARSE_STRIDES = (0, WIDTH, 16)
SPARSE_TILE = ROWS // 16 - 1
SPARSE_ENDS = LAST * WIDTH + WIDTH - 16, LAST * WIDTH + WIDTH - 1  # the last head of the last token


def test_block_sparse_attention_by_queries(late):
    """The last tile of queries, forward and for dQ; a grid of one program counts down from 0."""
    q, k, v, out, d_out, dq = tensors(6)
    lse, delta = tensors(2, torch.float32)
    blocks, sizes, start, end = tensors(4, torch.int32)
    index, lists = (-SPARSE_TILE, SPARSE_HEADS - 1), (ROWS, ROWS, SPARSE_HEADS, ROWS // 16, 1)
    call = (q, k, v, blocks, blocks, sizes, start, end, out, lse, *SPARSE_STRIDES * 3, 0, *lists, 0.0, 1.0)
    seen = late(block_sparse._forward_kernel, index, *call, **SPARSE)
    for tensor in (q, out):
        touches(seen, tensor, *SPARSE_ENDS)
    touches(seen, lse, ROWS * SPARSE_HEADS - 1)
    call = (d_out, None, q, k, v, out, lse, blocks, blocks, sizes, start, end, dq, delta, *SPARSE_STRIDES, 0, 0, 0)
    call = (*call, *SPARSE_STRIDES * 3, 0, *lists, 1.0, 0.0, 1.0)
    seen = late(block_sparse_backward._queries_kernel, index, *call, HAS_D_LSE=False, **SPARSE)
    for tensor in (d_out, q, out, dq):
        touches(seen, tensor, *SPARSE_ENDS)
    touches(seen, delta, ROWS * SPARSE_HEADS - 1)


def test_block_sparse_attention_by_keys(late):
    """The last block of keys of the last head."""
    d_out, q, k, v, dk, dv = tensors(6)
    lse, delta = tensors(2, torch.float32)
    lists, bounds, start, end = tensors(4, torch.int32)
    call = (d_out, q, k, v, lse, delta, lists, bounds, start, end, dk, dv, *SPARSE_STRIDES * 4, 0)
    call = (*call, ROWS, ROWS, SPARSE_HEADS, ROWS // 16, 1.0, 0.0, 1.0)
    index = (SPARSE_TILE, SPARSE_HEADS - 1)
    seen = late(block_sparse_backward._keys_kernel, index, *call, WIDE=True, **SPARSE)
    for tensor in (k, v, dk, dv):
        touches(seen, tensor, *SPARSE_ENDS)


def touches(addresses, tensor, *elements):
    for element in elements:
        assert tensor.data_ptr() + element * tensor.element_size() in addresses, f"element {element}"


def test_gated_rms_norm(late):
    x, gate, weight, d_y, out, d_gate = tensors(6)
    rstd, parts = tensors(2, torch.float32)
    seen = late(
        gated_norm.forward_kernel, LAST, x, gate, weight, out, rstd, WIDTH, WIDTH, 1, WIDTH, 1e-6, GATED=True,
        BLOCK=WIDTH,
    )  # fmt: skip
    for tensor in (x, gate, out):
        holds(seen, tensor, LAST * WIDTH, ROWS * WIDTH - 1)
    index = (LAST, 0)  # a program for each row
    strides = WIDTH, WIDTH, WIDTH
    seen = late(
        gated_norm.backward_kernel, index, d_y, x, gate, weight, rstd, out, d_gate, parts, *strides, ROWS, 1, WIDTH,
        GATED=True, ROWS=1, BLOCK=WIDTH, STAGES=1,
    )  # fmt: skip
    for tensor in (d_y, x, gate, out, d_gate):
        holds(seen, tensor, LAST * WIDTH, ROWS * WIDTH - 1)


def test_causal_conv1d(late):
    """The last run of the last channels."""
    x, weight, d_y, out = tensors(4)
    (parts,) = tensors(1, torch.float32)
    runs, block = ROWS // 16, WIDTH // 256 - 1
    flags = {"BIAS": False, "SILU": True, "STATE": False, "SEGMENTS": False, "UPCAST": True, "W": 4}
    shape = flags | {"RUN": 16, "BC": 256}
    none, sizes = (None, None, None), (ROWS, WIDTH, runs)
    seen = late(
        conv.forward_kernel, (runs - 1, block), x, weight, *none, out, 0, WIDTH, 4, 1, 0, *sizes, **shape
    )  # fmt: skip
    for tensor in (x, out):
        holds(seen, tensor, ROWS * WIDTH - 256, ROWS * WIDTH - 1)
    strides = 0, WIDTH, 0, WIDTH, 4, 1, 0
    given = d_y, x, weight, *none, out, None, parts
    seen = late(conv.backward_kernel, (runs - 1, block), *given, *strides, *sizes, runs, **shape)
    for tensor in (d_y, x, out):
        holds(seen, tensor, ROWS * WIDTH - 256, ROWS * WIDTH - 1)


def test_scan(late):
    """The last chunk of one long row, and the states of all chunks."""
    heads, columns, chunks = 4, 16, ROWS // 16
    channels = WIDTH // heads
    x, d_y, states, d_states, out = tensors(5)
    b, c = tensors(2)
    steps, bc, db, dc, ds, ends, d_steps = tensors(7, torch.float32)
    shared = ROWS * columns, columns, columns
    flags = {"SEGMENTS": False, "UPCAST": True, "P": channels, "N": columns, "Q": 16}
    shape = flags | {"SKIP": False, "BLOCK_P": channels, "BLOCK_N": columns}
    strides = (ROWS * WIDTH, WIDTH, channels, *shared, *shared)
    seen = late(
        scan.scan_kernel, (chunks - 1, 0), x, b, c, steps, None, states, None, out, *strides, 0, 1, ROWS, heads, heads,
        chunks, heads, **shape,
    )  # fmt: skip
    first, state = (ROWS - 16) * WIDTH, WIDTH * columns
    for tensor in (x, out):
        holds(seen, tensor, first, ROWS * WIDTH - 1)
    holds(seen, states, (chunks - 1) * state, chunks * state - 1)
    of_heads, blocks = (ROWS * WIDTH, WIDTH, channels), {"BLOCK_P": channels, "BLOCK_N": columns}
    rest = (*of_heads, 0, 1, ROWS, heads, 1, chunks, heads)
    seen = late(
        scan_backward.through_states_kernel, (chunks - 1, 0), x, b, c, d_y, steps, None, states, d_states, ends, db, dc,
        *strides, *rest, **flags, **blocks,
    )  # fmt: skip
    for tensor in (x, d_y):
        holds(seen, tensor, first, ROWS * WIDTH - 1)
    for tensor in (states, d_states):
        holds(seen, tensor, (chunks - 1) * state, chunks * state - 1)
    seen = late(
        scan_backward.within_chunk_kernel, (chunks - 1, 0), x, b, d_y, steps, None, d_states, bc, None, ends, out,
        d_steps, ds, *of_heads, *shared, *rest, **shape,
    )  # fmt: skip
    for tensor in (x, d_y, out):
        holds(seen, tensor, first, ROWS * WIDTH - 1)
    holds(seen, d_states, (chunks - 1) * state, chunks * state - 1)


def test_states_of_a_late_batch_row(late):
    heads, chunks = 4, 2
    rows = ROWS // 32
    left, right, states, last = tensors(4)
    (steps,) = tensors(1, torch.float32)
    channels, columns = WIDTH // heads, 16
    strides = 32 * WIDTH, WIDTH, channels, 32 * columns, columns, columns
    seen = late(
        scan_states.states_kernel, (rows * heads - 1, 0, 0), left, right, steps, None, None, states, last, *strides, 0,
        rows, 32, heads, heads, chunks, FIRST=False, LAST=True, SEGMENTS=False, REVERSE=False, UPCAST=True,
        P=channels, N=columns, Q=16, BP=channels, BN=columns,
    )  # fmt: skip
    holds(seen, left, ROWS * WIDTH - channels, ROWS * WIDTH - 1)
    size = channels * columns
    holds(seen, states, (rows * chunks * heads - 1) * size, rows * chunks * heads * size - 1)

"""Under ``numerics("invariant")`` a row of attention has the same bits in every batch, packing, cache and chunk."""

import pytest
import torch

import kernel_index as ki
from kernel_index.core import native
from tests.threads import with_threads

DTYPES = (torch.float32, torch.bfloat16)
LENGTHS = (5, 130, 1, 300, 64, 17)
WIDTH = 24


class Sequences:
    """Documents of q, k and v, each a batch of one."""

    def __init__(self, dtype, lengths=LENGTHS, heads=4, kv_heads=2):
        torch.manual_seed(0)
        shapes = [(n, (heads, kv_heads, kv_heads)) for n in lengths]
        self.qkv = [tuple(torch.randn(1, n, h, WIDTH).to(dtype) for h in hs) for n, hs in shapes]

    def packed(self, order):
        rows = [torch.cat([self.qkv[i][x] for i in order], 1) for x in range(3)]
        ids = torch.cat([torch.full((self.qkv[i][0].shape[1],), i) for i in order])
        return *rows, ki.MaskContract(doc_ids=ids)

    def alone(self, **options):
        return [ki.attention(*x, **options) for x in self.qkv]


def parts(out, sequences, order):
    return dict(zip(order, out.split([sequences.qkv[i][0].shape[1] for i in order], 1), strict=True))


@pytest.mark.parametrize("options", [{}, {"window": 40}, {"softcap": 5.0}, {"sink": True}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_is_alone(dtype, options):
    sequences, options = Sequences(dtype), dict(options)
    window = options.pop("window", None)
    if options.get("sink"):
        options["sink"] = torch.linspace(-1, 1, 4)
    with ki.numerics("invariant"), ki.receipts() as log:
        expected = sequences.alone(mask=ki.MaskContract(window=(window, 0)), **options)
        for order in ((0, 1, 2, 3, 4, 5), (5, 3, 1, 0, 2, 4), (3, 1)):
            *qkv, mask = sequences.packed(order)
            mask = ki.MaskContract(doc_ids=mask.doc_ids, window=(window, 0))
            for i, found in parts(ki.attention(*qkv, mask, **options), sequences, order).items():
                assert torch.equal(found, expected[i]), (order, i)
    assert {r.ran for r in log} == {"native"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_batch_rows_change_nothing(dtype):
    *qkv, mask = Sequences(dtype).packed((3, 0, 4))
    with ki.numerics("invariant"):
        expected = ki.attention_with_lse(*qkv, mask)
        several = [x.expand(3, -1, -1, -1) for x in qkv]
        for found in (with_threads(3, ki.attention_with_lse, *qkv, mask), ki.attention_with_lse(*several, mask)):
            assert torch.equal(found.out[-1:], expected.out)
            assert torch.equal(found.lse[-1:], expected.lse)


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_on_either_side_changes_nothing(dtype):
    q, k, v = Sequences(dtype, (150,)).qkv[0]
    with ki.numerics("invariant"):
        expected = ki.attention(q, k, v)
        for left, right in ((0, 7), (9, 0), (70, 133)):
            padded = [torch.nn.functional.pad(x, (0, 0, 0, 0, left, right), value=3.0) for x in (q, k, v)]
            ids = torch.tensor([[-1] * left + [0] * 150 + [-1] * right])
            found = ki.attention(*padded, ki.MaskContract(doc_ids=ids))
            assert torch.equal(found[:, left : left + 150], expected)


@pytest.mark.parametrize("window", [None, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_has_the_bits_of_training(dtype, window):
    """Chunks of any sizes, over contiguous rows and over pages in any order, rows of different lengths together."""
    sequences = Sequences(dtype, (300, 190))
    mask = ki.MaskContract(window=(window, 0))
    with ki.numerics("invariant"), ki.receipts() as log:
        expected = sequences.alone(mask=mask)
        for page, chunks in ((16, (128, 1, 1, 60)), (7, (1, 189)), (64, (190,))):
            pages = -(-300 // page)
            table = torch.randperm(2 * pages, dtype=torch.int32).view(2, pages)
            caches = [torch.full((2 * pages, page, 2, WIDTH), torch.nan, dtype=dtype) for _ in "kv"]
            rows = [torch.full((2, 300, 2, WIDTH), torch.nan, dtype=dtype) for _ in "kv"]
            first = 0
            for count in chunks:
                new = slice(first, first + count)
                q, k, v = (torch.cat([s[x][:, new] for s in sequences.qkv]) for x in range(3))
                options = {"cache_seqlens": first, "k": k, "v": v, "window_size": (window, 0)}
                paged = ki.fa4_kvcache_decode(q, *caches, block_table=table, **options)
                plain = ki.fa4_kvcache_decode(q, *rows, **options)
                for row in range(2):
                    assert torch.equal(paged[row], expected[row][0, new]), (page, first)
                    assert torch.equal(plain[row], expected[row][0, new]), first
                first += count
    assert len({r.numerics for r in log}) == 1, "attention and decoding have one recipe"


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_do_not_depend_on_packing_or_threads(dtype):
    sequences = Sequences(dtype)
    upstream = [torch.randn_like(x[0]) for x in sequences.qkv]

    def gradients(qkv, g, mask):
        leaves = [x.clone().requires_grad_() for x in qkv]
        with ki.numerics("invariant"):
            out, lse = ki.attention_with_lse(*leaves, mask)
        return torch.autograd.grad((out, lse), leaves, (g, g[..., 0].transpose(1, 2).float()))

    expected = [gradients(x, g, ki.MaskContract()) for x, g in zip(sequences.qkv, upstream, strict=True)]
    order = (4, 1, 3, 0, 2, 5)
    *qkv, mask = sequences.packed(order)
    g = torch.cat([upstream[i] for i in order], 1)
    for found in (gradients(qkv, g, mask), with_threads(3, gradients, qkv, g, mask)):
        for which, whole in enumerate(found):
            for i, part in parts(whole, sequences, order).items():
                assert torch.equal(part, expected[i][which]), (which, i)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients_are_right(dtype):
    """Within the error of the ordinary kernel against float64, twice."""
    *qkv, mask = Sequences(dtype).packed((1, 3, 0))
    g = torch.randn_like(qkv[0])

    def run(qkv, backend, mode):
        leaves = [x.clone().requires_grad_() for x in qkv]
        with ki.numerics(mode):
            out = ki.attention(*leaves, mask, softcap=8.0, backend=backend)
        return out, *torch.autograd.grad(out, leaves, g.to(out.dtype))

    exact = run([x.double() for x in qkv], "reference", "ordinary")
    ordinary = run(qkv, "native", "ordinary")
    for truth, plain, found in zip(exact, ordinary, run(qkv, "native", "invariant"), strict=True):
        error = (plain.double() - truth).abs().max()
        assert (found.double() - truth).abs().max() <= 2 * error + 4 * torch.finfo(dtype).eps


def test_what_the_mask_excludes_has_no_influence():
    q, k, v = Sequences(torch.float32, (200,)).qkv[0]
    with ki.numerics("invariant"):
        expected = ki.attention(q, k, v)
        k[:, 150:], v[:, 150:] = torch.nan, torch.inf
        found = ki.attention(q, k, v)
    assert torch.equal(found[:, :150], expected[:, :150])
    assert found[:, 150:].isnan().all()


@pytest.mark.parametrize("window", [None, 60])
@pytest.mark.parametrize("align", [1, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_path_of_a_tree_is_the_path_alone(dtype, align, window):
    """Also where a run begins in the middle of a segment of keys, and whatever stands in the gaps."""
    parents, lengths = [-1, 0, 0, 2, 2, -1, 5], [70, 33, 150, 1, 90, 20, 8]
    sequences, tree = Sequences(dtype, lengths), ki.pack_tree(parents, lengths, align=align)
    row = [torch.full((1, len(tree.positions), h, WIDTH), torch.nan, dtype=dtype) for h in (4, 2, 2)]
    places, at = {}, tree.is_token.nonzero().flatten()
    for run in tree.order.tolist():
        places[run], at = at[: lengths[run]], at[lengths[run] :]
        for x in range(3):
            row[x][:, places[run]] = sequences.qkv[run][x]
    mask = ki.MaskContract(subtree_end=tree.subtree_end, positions=tree.positions, window=(window, 0))
    with ki.numerics("invariant"):
        found = ki.attention(*row, mask)
        for run in range(len(parents)):
            path, above = [run], parents[run]
            while above >= 0:
                path, above = [above, *path], parents[above]
            qkv = (torch.cat([sequences.qkv[i][x] for i in path], 1) for x in range(3))
            alone = ki.attention(*qkv, ki.MaskContract(window=(window, 0)))
            assert torch.equal(found[:, places[run]], alone[:, -lengths[run] :]), run


def test_gradients_of_a_tree_are_right():
    tree = ki.pack_tree([-1, 0, 0], [20, 7, 9], align=16)
    mask = ki.MaskContract(subtree_end=tree.subtree_end, positions=tree.positions)
    torch.manual_seed(0)
    qkv = [torch.randn(2, len(tree.positions), h, 8) for h in (4, 2, 2)]
    upstream = torch.randn_like(qkv[0]) * tree.is_token[None, :, None, None]

    def gradients(mode, backend, dtype=torch.float32):
        leaves = [x.to(dtype).requires_grad_() for x in qkv]
        with ki.numerics(mode):
            return torch.autograd.grad(ki.attention(*leaves, mask, backend=backend), leaves, upstream.to(dtype))

    exact = gradients("ordinary", "reference", torch.float64)
    for truth, plain, found in zip(
        exact, gradients("ordinary", "native"), gradients("invariant", "native"), strict=True
    ):
        error = (plain - truth).abs().max()
        assert (found - truth).abs().max() <= 2 * error + 4 * torch.finfo(torch.float32).eps


@pytest.mark.skipif(native.machine_why_not() is not None, reason=str(native.machine_why_not()))
def test_a_compiled_call_has_the_same_bits():
    *qkv, mask = Sequences(torch.float32).packed((0, 1))
    compiled = torch.compile(lambda *x: ki.attention(*x, mask), fullgraph=True, backend="aot_eager")
    with ki.numerics("invariant"):
        assert torch.equal(compiled(*qkv), ki.attention(*qkv, mask))

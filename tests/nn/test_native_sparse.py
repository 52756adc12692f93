"""Native sparse attention against its formula, written out for one query at a time."""

import pytest
import torch

import kernel_index as ki
from kernel_index.nn import SparseAttention, native_sparse
from tests.nn.test_sparse_attention import BLOCK, C, D, H, K, T, blocks_of_nsa, layer, mean_of, rope, run, stream

DOCUMENTS = {
    "one document": ki.MaskContract(),
    "documents that begin inside blocks": ki.MaskContract(doc_ids=(torch.arange(T) >= 22).long()),
    "short documents": ki.MaskContract(doc_ids=torch.arange(T) // 3),
    "padding": ki.MaskContract(
        doc_ids=torch.arange(T) // 30, validity=ki.attention_validity(valid_token_counts=[T, 37])
    ),
}


def written_out(mixer, x, mask):
    """The layer, query by query and head by head."""
    q, k, v = (p(x).unflatten(2, (-1, D)) for p in (mixer.q, mixer.k, mixer.v))
    cos, sin = rope(torch.arange(x.shape[1])[None])
    q, k = ki.fused_rope_qk(q, k, cos.to(x.dtype), sin.to(x.dtype), backend="reference")
    gates = mixer.gates(x).sigmoid().unflatten(-1, (H, 3))
    start, end = mask.intervals(*x.shape[:2])
    blocks = blocks_of_nsa(q.detach(), k.detach(), mask)
    rows = []
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            low, seen = int(start[b, t]), start[b, t] < end[b, t]
            for h in range(H):
                g, zero = h * K // H, q[b, t, h] * 0
                if not seen:
                    rows.append(zero)
                    continue

                def attend(keys, values, b=b, t=t, h=h):
                    return (keys @ q[b, t, h] * D**-0.5).softmax(0) @ values

                past = range(low // BLOCK, t // BLOCK)
                means = [torch.stack([mean_of(y[b, :, g], j, start[b]) for j in past]) for y in (k, v) if past]
                picked = set(blocks[b, t, g].tolist())
                chosen = [s for s in range(low, t + 1) if s // BLOCK in picked]
                near = slice(max(low, t - mixer.tokens + 1), t + 1)
                branches = (
                    attend(*means) if past else zero,
                    attend(k[b, chosen, g], v[b, chosen, g]),
                    attend(k[b, near, g], v[b, near, g]),
                )
                rows.append(sum(y * gates[b, t, h, i] for i, y in enumerate(branches)))
    return mixer.out(torch.stack(rows).view(*x.shape[:2], H * D))


def run_double(mixer, x, mask):
    cos, sin = rope(torch.arange(x.shape[1])[None])
    return mixer(x, mask, (cos.to(x.dtype), sin.to(x.dtype)))[0]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_values_and_gradients_are_those_of_the_formula(name):
    mixer, mask = layer("nsa").double(), DOCUMENTS[name]
    x = stream().double()
    parameters = list(mixer.parameters())
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).double()
    found = []
    for function in (run_double, written_out):
        leaf = x.clone().requires_grad_()
        out = function(mixer, leaf, mask)
        found.append([out, *torch.autograd.grad((out * weight).sum(), [leaf, *parameters])])
    names = ["out", "x", *(n for n, _ in mixer.named_parameters())]
    assert {"gates.weight", "q.weight", "k.weight", "v.weight", "out.weight"} <= set(names)
    for what, actual, expected in zip(names, *found, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11, msg=what)


def test_compressed_blocks_have_a_part_in_the_result():
    """A token that is neither in a selected block nor in the window still has an influence: its block's mean."""
    mixer, x = layer("nsa", tokens=2), stream()
    changed = x.clone()
    changed[:, 9] += 1.0
    table = torch.zeros(T, dtype=torch.bool)
    q, k = (p(x).unflatten(2, (-1, D)) for p in (mixer.q, mixer.k))
    blocks = blocks_of_nsa(*ki.fused_rope_qk(q, k, *rope(torch.arange(T)[None])), ki.MaskContract())
    table = (blocks == 9 // BLOCK).any(-1).any(-1).any(0)
    late = (~table).nonzero().flatten()
    late = late[late >= 12]
    assert len(late)
    assert not torch.equal(run(mixer, changed)[:, late], run(mixer, x)[:, late])


def test_what_a_mask_excludes_has_no_influence_though_it_is_nan():
    """NaN in padding and in another document: the bits of every other row, and of all gradients there, are the same."""
    mixer, x = layer("nsa"), stream()
    mask = ki.MaskContract(
        doc_ids=(torch.arange(T) >= 22).long(), validity=ki.attention_validity(valid_token_counts=[T, 37])
    )
    kept = torch.zeros(x.shape[:2], dtype=torch.bool)
    kept[0, 22:], kept[1, 22:37] = True, True
    found = []
    for fill in (0.25, torch.nan):
        leaf = torch.where(kept[..., None], x, fill).requires_grad_()
        out = run(mixer, leaf, mask)
        assert out[kept].isfinite().all()
        (grad,) = torch.autograd.grad(out[kept].square().sum(), leaf)
        found.append((out[kept], grad[kept]))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_queries_at_an_offset_keep_the_documents_of_their_keys():
    """An offset says where the queries stand, and nothing about documents: so a cache of one row may hold several."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, T, heads, D).double() for heads in (H, K, K))
    documents = (torch.arange(T) >= 10).long()

    def branches(q, **fields):
        mask = ki.MaskContract(doc_ids=documents, **fields)
        return native_sparse.attend_to_branches(q, k, v, mask, block=BLOCK, topk=3, window=5)

    whole = branches(q)
    for first, count in ((0, T), (T - 5, 5), (4, 17)):
        for part, expected in zip(branches(q[:, first : first + count], q_offset=first), whole, strict=True):
            torch.testing.assert_close(part, expected[:, first : first + count], rtol=1e-12, atol=1e-12)
    for offset in (-1, T - 4, torch.tensor([0, 0])):
        with pytest.raises(ValueError, match="q_offset must be one number"):
            branches(q[:, :5], q_offset=offset)


@pytest.mark.parametrize(
    "fields",
    [
        {"validity": ki.attention_validity(valid_token_counts=[T, 9])},
        {"doc_ids": torch.where(torch.arange(T) < 9, 0, -1)},
    ],
    ids=["validity", "doc_ids"],
)
def test_padding_that_is_nan_gives_zeros(fields):
    mixer, mask = layer("nsa"), ki.MaskContract(**fields)
    sees = mask.dense(2, T, T)[:, 0].any(-1)
    leaf = torch.where(sees[..., None], stream(), torch.nan).requires_grad_()
    out = run(mixer, leaf, mask)
    assert torch.equal(out[~sees], torch.zeros_like(out[~sees]))
    assert out[sees].isfinite().all()
    (grad,) = torch.autograd.grad(out.sum(), leaf)
    assert grad[sees].isfinite().all()


def test_a_batch_of_no_rows_has_no_rows():
    assert run(layer("nsa"), stream()[:0], ki.MaskContract()).shape == (0, T, C)


def test_a_long_prompt_and_its_steps_read_means_that_the_cache_keeps():
    from kernel_index.lm.cache import ModelCache

    mixer, x = layer("nsa").eval(), stream()
    cache = ModelCache([mixer], 240, page_size=6)
    row = cache.allocate()
    cache.begin([row], 40)
    with torch.no_grad():
        mixer(x[:1, :40], None, rope(torch.arange(40)[None]), cache.layer(0))
        cache.advance()
        for at in range(40, 44):
            cache.begin([row], 1)
            out = mixer(x[:1, at : at + 1], None, rope(torch.tensor([[at]])), cache.layer(0))[0]
            cache.advance()
    torch.testing.assert_close(out[:, 0], run(mixer, x[:1])[:, -1], rtol=1e-5, atol=1e-6)
    pool = cache.pools["sparse"]
    assert {pool._means[BLOCK].computed, pool._means[BLOCK, "values"].computed} == {44 // BLOCK}


def test_options_that_do_not_fit_are_refused():
    for options, said in (({"topk": 2}, "topk must be at least 3"), ({"window": 8}, "window must be None")):
        with pytest.raises(ValueError, match=said):
            SparseAttention(C, H, K, D, kind="nsa", **options)
    with pytest.raises(ValueError, match="mask must have no window"):
        run(layer("nsa"), stream(), ki.MaskContract(window=(5, 0)))


def test_everything_is_on_the_device_of_the_input():
    mixer = SparseAttention(64, 4, 2, 16, kind="nsa", block=16, topk=3, tokens=32).to("meta")
    tables = ki.rope_tables(torch.arange(128, device="meta")[None], 16, 1e4)
    with ki.force("reference"):
        assert mixer(torch.randn(1, 128, 64, device="meta"), ki.MaskContract(), tables)[0].is_meta


def test_batch_rows_by_parts(monkeypatch):
    """A block's tokens are heads of the compressed branch, more than a GPU's grid holds at once."""
    torch.manual_seed(0)
    mixer = SparseAttention(16, 2, 1, 8, kind="nsa", block=4, topk=3, tokens=8)
    x, tables = torch.randn(3, 20, 16), ki.rope_tables(torch.arange(20)[None], 8, 1e4)
    mask = ki.MaskContract(doc_ids=torch.tensor([[0] * 20, [0] * 9 + [1] * 11, [0] * 13 + [1] * 7]))
    whole = mixer(x, mask, tables)[0]
    monkeypatch.setattr(native_sparse, "MOST_HEADS_OF_ROWS", 1)
    torch.testing.assert_close(mixer(x, mask, tables)[0], whole)


def test_a_tree_is_its_paths_alone():
    """Documents, a gap and answers that begin inside a block: outputs and gradients, in float64."""
    packing = ki.pack_tree([-1, 0, 0, 2, 2], [19, 6, 3, 7, 2], align=4)
    total = len(packing.positions)
    ids = torch.where(packing.is_token & (packing.positions < 9), 0, 1)
    mixer, x = layer("nsa").double(), torch.randn(1, total, C, dtype=torch.float64, requires_grad=True)
    mask = ki.MaskContract(subtree_end=packing.subtree_end, doc_ids=ids)
    positions = packing.positions[None]
    out = mixer(x, mask, rope(positions))[0]
    seen = ki.MaskContract(subtree_end=packing.subtree_end).dense()[0, 0]
    upstream = torch.randn_like(out) * packing.is_token[None, :, None]
    found = torch.autograd.grad(out, x, upstream, retain_graph=True)[0]
    expected_grad = torch.zeros_like(x)
    for t in packing.is_token.nonzero().flatten().tolist():
        path = seen[t].nonzero().flatten()
        alone = mixer(x[:, path], ki.MaskContract(doc_ids=ids[path]), rope(positions[:, path]))[0]
        torch.testing.assert_close(out[:, t], alone[:, -1])
        (g,) = torch.autograd.grad(alone[:, -1], x, upstream[:, t])
        expected_grad += g
    torch.testing.assert_close(found, expected_grad)

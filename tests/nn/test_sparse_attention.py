"""Sparse attention layers: the future, other documents and tokens outside the window never influence a query."""

import pytest
import torch

import kernel_index as ki
from kernel_index.lm.cache import ModelCache
from kernel_index.nn import SparseAttention

B, T, C, H, K, D, BLOCK = 2, 44, 12, 4, 2, 8, 4
KINDS = ["moba", "clustered", "clustered by groups", "exact_token", "nsa"]
WINDOWS = [(kind, window) for kind in KINDS for window in (None, 13) if kind != "nsa" or window is None]


def layer(kind, **options):
    torch.manual_seed(0)
    options = {"block": BLOCK, "topk": 3, "tokens": 9, "index_heads": 2, "index_dim": 4} | options
    mixer = SparseAttention(C, H, K, D, kind=kind.removesuffix(" by groups"), **options)
    if kind != mixer.kind:
        mixer.hierarchy, mixer.report_unions = (3, 1), True
    return mixer


def stream(seed=1):
    return torch.randn(B, T, C, generator=torch.Generator().manual_seed(seed))


def rope(positions):
    return ki.rope_tables(positions, D, 100.0)


def run(mixer, x, mask=None, positions=None):
    """The output."""
    at = torch.arange(x.shape[1])[None] if positions is None else positions
    return mixer(x, mixer.contract(mask or ki.MaskContract()), rope(at))[0]


def gradient(mixer, x, rows, mask=None, positions=None):
    leaf = x.clone().requires_grad_()
    out = run(mixer, leaf, mask, positions)[:, rows]
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    return torch.autograd.grad((out * weight).sum(), leaf)[0]


def selections(mixer, x, mask=None, positions=None):
    """What the router selects, as sets in a table: bool [B, T, G, blocks or tokens]."""
    at = torch.arange(x.shape[1])[None] if positions is None else positions
    mask = mixer.contract(mask or ki.MaskContract())
    if mixer.kind == "exact_token":
        indices, width = mixer.index.select(x, mixer.index.keys(x), 9, mask).indices[:, :, None], x.shape[1]
    else:
        q, k = (p(x).unflatten(2, (-1, D)) for p in (mixer.q, mixer.k))
        q, k = ki.fused_rope_qk(q, k, *rope(at))
        if mixer.kind == "nsa":
            indices = blocks_of_nsa(q, k, mask)
        elif mixer.kind == "moba":
            indices = ki.moba_route(q, k, block_size=BLOCK, topk=3, mask=mask).indices
        else:
            config = ki.ClusteredSparseConfig(block_size=BLOCK, topk=3, hierarchy=mixer.hierarchy)
            indices = ki.clustered_route(q, k, config=config, mask=mask).indices
        width = -(-x.shape[1] // BLOCK)
    table = torch.zeros((*indices.shape[:3], width + 1), dtype=torch.bool)
    return table.scatter_(-1, torch.where(indices >= 0, indices, width).long(), True)[..., :width]


def blocks_of_nsa(q, k, mask):
    """The blocks by a plain formula: every weight, then a sort."""
    batch, queries, heads, width = q.shape
    groups = heads // k.shape[2]
    start, end = mask.intervals(batch, queries)
    current = torch.arange(queries) // BLOCK
    table = torch.full((batch, queries, k.shape[2], 3), -1)
    for b in range(batch):
        for t in range(queries):
            if start[b, t] == end[b, t]:
                continue
            first, c = int(start[b, t]) // BLOCK, int(current[t])
            past = list(range(first, c))
            forced = {c, *past[:1], *past[-1:]}
            for g in range(k.shape[2]):
                z = torch.stack([mean_of(k[b, :, g], j, start[b]) for j in past]) if past else k.new_zeros(0, width)
                weights = (q[b, t, g * groups : (g + 1) * groups] @ z.T * width**-0.5).softmax(-1).sum(0)
                others = sorted((j for j in past if j not in forced), key=lambda j, w=weights, f=first: (-w[j - f], j))
                chosen = sorted([*forced, *others][:3])
                table[b, t, g, : len(chosen)] = torch.tensor(chosen)
    return table


def mean_of(x_SD, block, start_S):
    """Over the tokens of the block in the document of its last one."""
    at = slice(block * BLOCK, block * BLOCK + BLOCK)
    return x_SD[at][start_S[at] == start_S[at][-1]].mean(0)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "window"), WINDOWS)
def test_a_changed_future_changes_no_output_gradient_or_selection(kind, window):
    mixer, x, cut = layer(kind, window=window), stream(), 22  # inside a block
    changed = torch.cat([x[:, :cut], 5 * stream(2)[:, cut:]], 1)
    early = slice(0, cut)
    assert_same(run(mixer, changed)[:, early], run(mixer, x)[:, early])
    mixer.eval()
    after, before = (gradient(mixer, value, early) for value in (changed, x))
    assert_same(after[:, early], before[:, early])
    assert not before[:, cut:].any()
    assert torch.equal(selections(mixer, changed)[:, early], selections(mixer, x)[:, early])
    assert not torch.equal(run(mixer, changed)[:, cut:], run(mixer, x)[:, cut:])


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_equal_each_alone(kind):
    """Documents that begin at a block, and at a group of three: then alone they have the same blocks and groups."""
    mixer, x, cut = layer(kind), stream(), 6 * BLOCK
    mixer.eval()
    packed = ki.MaskContract(doc_ids=(torch.arange(T) >= cut).long())
    positions = torch.cat([torch.arange(cut), torch.arange(T - cut)])[None]
    together, whole = run(mixer, x, packed, positions), gradient(mixer, x, slice(None), packed, positions)
    for part in (slice(0, cut), slice(cut, T)):
        assert_same(together[:, part], run(mixer, x[:, part]))
        alone = torch.zeros_like(x)
        alone[:, part] = x[:, part]
        assert_same(whole[:, part], gradient(mixer, alone, slice(None), packed, positions)[:, part])


@pytest.mark.parametrize("kind", KINDS)
def test_another_document_and_tokens_outside_a_window_have_no_influence(kind):
    """A document that begins inside a block, and padding after a valid prefix."""
    mixer, x, cut = layer(kind), stream(), 22
    mixer.eval()
    mask = ki.MaskContract(
        doc_ids=(torch.arange(T) >= cut).long(), validity=ki.attention_validity(valid_token_counts=[T, 37])
    )
    other = x.clone()
    other[:, :cut] = 5 * stream(2)[:, :cut]
    other[1, 37:] = 7.0
    late = slice(cut, 37)
    assert_same(run(mixer, other, mask)[:, late], run(mixer, x, mask)[:, late])
    assert torch.equal(selections(mixer, other, mask)[:, late], selections(mixer, x, mask)[:, late])
    assert not run(mixer, other, mask)[1, 37:].any()
    assert not gradient(mixer, x, late, mask)[:, :cut].any()
    if kind == "nsa":  # its compressed branch has no window
        return
    windowed = layer(kind, window=7).eval()
    hidden = gradient(windowed, x, slice(T - 1, T))
    assert not hidden[:, : T - 8].any()
    assert hidden[:, T - 8 :].any(-1).sum() > B


@pytest.mark.parametrize(("kind", "window"), WINDOWS)
def test_decoding_with_a_cache_equals_recomputation(kind, window):
    """A padded prompt, then token by token, each row at its own position, in pages that are no multiple of a block."""
    mixer, x = layer(kind, window=window).eval(), stream()
    expected = run(mixer, x)
    cache = ModelCache([mixer], 240, page_size=6)
    rows, lengths = [cache.allocate(), cache.allocate()], [37, 19]
    cache.begin(rows, 37, lengths)
    first = mixer(x[:, :37], None, rope(torch.arange(37)[None]), cache.layer(0))[0]
    cache.advance()
    for b, n in enumerate(lengths):
        assert_same(first[b, :n], expected[b, :n])
    for step in range(5):
        at = torch.tensor(lengths) + step
        cache.begin(rows, 1)
        out = mixer(x[torch.arange(B), at][:, None], None, rope(at[:, None]), cache.layer(0))[0]
        cache.advance()
        assert_same(out[:, 0], expected[torch.arange(B), at])


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_differentiates_the_tokens_of_its_step(kind):
    """From an empty cache these are all tokens, so that the gradient is that of recomputation."""
    mixer, x = layer(kind).eval(), stream()[:1, :20]
    cache = ModelCache([mixer], 240, page_size=6)
    cache.begin([cache.allocate()], 20)
    leaf = x.clone().requires_grad_()
    out = mixer(leaf, None, rope(torch.arange(20)[None]), cache.layer(0))[0]
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    assert_same(torch.autograd.grad((out * weight).sum(), leaf)[0], gradient(mixer, x, slice(None)))


@pytest.mark.parametrize("kind", ["exact_token", "clustered by groups"])
def test_decoding_writes_receipts(kind):
    mixer, x = layer(kind).eval(), stream()[:1, :20]
    cache = ModelCache([mixer], 240, page_size=6)
    cache.begin([cache.allocate()], 20)
    with torch.no_grad(), ki.receipts() as log:
        mixer(x, None, rope(torch.arange(20)[None]), cache.layer(0))
    (receipt,) = (r for r in log if r.op == "selected_decode")
    expected = (20, 9) if kind == "exact_token" else (5, 3)
    assert (receipt.details["blocks"], receipt.details["selected"]) == expected


def test_groups_are_selected_from_and_unions_are_reported():
    mixer, x = layer("clustered by groups").eval(), stream()
    with ki.receipts() as log:
        by_groups = run(mixer, x)
    details = next(r.details for r in log if r.op == "clustered_sparse_attention")
    assert details["scoring_backend"].startswith("hierarchical")
    assert details["mean_union_over_picks"] >= 1
    mixer.hierarchy = None
    assert not torch.allclose(run(mixer, x), by_groups), "one group of three blocks leaves most blocks out"


def test_a_shared_prompt_shares_what_the_indexer_keeps():
    mixer, x = layer("exact_token").eval(), stream()[:1]
    cache = ModelCache([mixer], 240, page_size=6)
    first = cache.allocate()
    cache.begin([first], 20)
    mixer(x[:, :20], None, rope(torch.arange(20)[None]), cache.layer(0))
    cache.advance()
    second = cache.share(first)
    other = torch.cat([x[:, :20], stream(5)[:1, 20:]], 1)
    for at in range(20, 26):
        cache.begin([first, second], 1)
        new = torch.cat([x[:, at : at + 1], other[:, at : at + 1]])
        out = mixer(new, None, rope(torch.tensor([[at]])), cache.layer(0))[0]
        cache.advance()
    assert_same(out[:, 0], torch.cat([run(mixer, x)[:, 25], run(mixer, other)[:, 25]]))


def test_the_indexer_learns_by_its_own_loss_alone():
    mixer, x = layer("exact_token"), stream()
    grads = {}
    for factor in (0.0, 1.0):
        mixer.index_loss = factor
        mixer.zero_grad()
        run(mixer, x).square().sum().backward()
        grads[factor] = {n: None if p.grad is None else p.grad.clone() for n, p in mixer.named_parameters()}
    for name, grad in grads[1.0].items():
        if name.startswith("index."):
            assert grads[0.0][name] is None
            assert grad.any(), name
        elif grad is not None:
            assert torch.equal(grad, grads[0.0][name]), name


def test_the_indexer_learns_while_attention_is_still_dense():
    """Else the first sparse step would read what a random indexer selects; the result is that of dense attention."""
    mixer, x = layer("exact_token"), stream()
    mixer.dense = True
    out = run(mixer, x)
    out.square().sum().backward()
    assert all(p.grad.any() for p in mixer.index.parameters())
    with torch.no_grad(), ki.receipts() as log:
        assert torch.equal(run(mixer, x), out)
    assert "lightning_indexer" not in {r.op for r in log}


def test_an_unknown_kind_is_refused():
    kinds = "'exact_token', 'moba', 'clustered', 'nsa'"
    with pytest.raises(ValueError, match=f"kind must be one of {kinds}, got 'dense'"):
        layer("dense")

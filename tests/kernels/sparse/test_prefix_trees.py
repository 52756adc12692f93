"""What routes over a prefix tree gives what each root-to-leaf path gives alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernel_index as ki
from kernel_index.core.testing import Maker, suites
from kernel_index.masks.doc_window_mask.cases import alone_on
from kernel_index.masks.prefix_tree.paths import _grouped, branches_of
from tests.masks.trees import batch_of, forests, paths_of

FEW = settings(max_examples=20, deadline=None, derandomize=True)
CONFIG = ki.ClusteredSparseConfig(block_size=3, topk=2)
MOBA = {"block_size": 3, "topk": 2}


def moba(q, k, v, mask, backend):
    return ki.moba_attention(q, k, v, mask=mask, backend=backend, **MOBA)


def by_group(q, k, v, mask, backend):
    return ki.moba_attention(q, k, v, mask=mask, backend=backend, route_per="kv_group", softcap=2.0, **MOBA)


def clustered(q, k, v, mask, backend):
    return ki.clustered_sparse_attention(q, k, v, config=CONFIG, mask=mask, backend=backend)


SINK = torch.tensor([0.3, -1.0, 2.0, 0.0])


def joined(found):
    return torch.cat([found.out, found.lse.transpose(1, 2)[..., None]], -1)


def clustered_with_lse(q, k, v, mask, backend):
    options = {"config": CONFIG, "mask": mask, "sink": SINK, "backend": backend}
    return joined(ki.clustered_sparse_attention_with_lse(q, k, v, **options))


def moba_with_lse(q, k, v, mask, backend):
    return joined(ki.moba_attention_with_lse(q, k, v, mask=mask, sink=SINK, backend=backend, **MOBA))


def exact(q, k, v, mask, backend):
    selected = ki.lightning_indexer(q.detach(), k[:, :, 0].detach(), q[..., 0].detach(), topk=4, mask=mask)
    return ki.exact_token_attention(q, k, v, selected, mask=mask, backend=backend)


def exact_with_lse(q, k, v, mask, backend):
    selected = ki.lightning_indexer(q.detach(), k[:, :, 0].detach(), q[..., 0].detach(), topk=4, mask=mask)
    return joined(ki.exact_token_attention_with_lse(q, k, v, selected, mask=mask, sink=SINK, backend=backend))


OF_TOKENS, WITH_LSE = (exact, exact_with_lse), (moba_with_lse, clustered_with_lse, exact_with_lse)
FUNCTIONS = [moba, by_group, clustered, exact, *WITH_LSE]


def leaves_of(rows: int, length: int, dtype=torch.float64):
    g = torch.Generator().manual_seed(length)
    shapes = ((4, 8), (2, 8), (2, 8))
    return [torch.randn(rows, length, *s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def each_path_alone(function, leaves, row, tree, packing, mask, backend, above):
    """Outputs by place, and the sum of their products with ``above``: each token counts on its first path."""
    seen, found, total = set(), {}, 0.0
    for path in paths_of(*tree, packing):
        one = function(*(x[row : row + 1, path] for x in leaves), alone_on(mask, row, path), backend)
        new = [i for i, place in enumerate(path) if place not in seen]
        seen |= set(path)
        found |= {path[i]: one[0, i].detach() for i in new}
        total = total + sum((one[0, i] * above[row, path[i]]).sum() for i in new)
    return found, total


def assert_law(function, trees, align, window, backend, dtype, more=lambda rows, length: {}, **close):
    """``more`` gives other fields of the contract for so many rows and tokens."""
    packings = [ki.pack_tree(*tree, align=align) for tree in trees]
    fields = batch_of(packings)
    leaves = leaves_of(len(trees), fields["positions"].shape[1], dtype)
    mask = ki.MaskContract(window=window, **fields, **more(*fields["positions"].shape))
    out = function(*leaves, mask, backend)
    above = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    alone = 0.0
    real = fields["subtree_end"] > torch.arange(out.shape[1])
    for row, (tree, packing) in enumerate(zip(trees, packings, strict=True)):
        found, total = each_path_alone(function, leaves, row, tree, packing, mask, backend, above)
        alone = alone + total
        assert real[row].sum() == len(found)
        for place, expected in found.items():
            torch.testing.assert_close(out[row, place], expected, **close)
    together = torch.autograd.grad((out * above)[real].sum(), leaves)
    for a, b in zip(together, torch.autograd.grad(alone, leaves), strict=True):
        torch.testing.assert_close(a, b, **close)
    return out, real


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
@FEW
@given(st.lists(forests(most_runs=5), min_size=1, max_size=2), st.sampled_from([1, 3]), st.sampled_from([None, 4]))
def test_the_law(function, trees, align, left):
    out, real = assert_law(function, trees, align, (left, 0), "reference", torch.float64)
    if function not in (*OF_TOKENS, *WITH_LSE):
        assert (out[~real] == 0).all()


@st.composite
def restrictions(draw):
    """Documents that end anywhere, ids that come again and padding among them, and valid prefixes."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**40)))
    documents, valid = draw(st.sampled_from(["ascending", "any", None])), draw(st.booleans())

    def fields(rows, length):
        found = {}
        if documents:
            ids = torch.randint(-1, 2, (rows, length), generator=g)
            found["doc_ids"] = ids.sort(-1).values if documents == "ascending" else ids
        if valid:
            counts = torch.randint(0, length + 1, (rows,), generator=g)
            found["validity"] = ki.attention_validity(valid_token_counts=counts)
        return found

    return fields


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
@settings(FEW, max_examples=30)
@given(
    st.lists(forests(most_runs=5), min_size=1, max_size=2),
    st.sampled_from([1, 3]),
    st.sampled_from([None, 1, 4]),
    restrictions(),
)
def test_the_law_with_documents_windows_and_valid_prefixes(function, trees, align, left, more):
    assert_law(function, trees, align, (left, 0), "reference", torch.float64, more)


LONG = ([-1, 0, 0, 1, -1], [9, 5, 4, 6, 7])
BACKENDS = ["cpu", pytest.param("native", marks=pytest.mark.native), pytest.param("triton", marks=pytest.mark.thorough)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_every_backend(function, backend):
    if function in OF_TOKENS and backend == "native":
        pytest.skip("exact_token_attention has no native backend")
    with ki.receipts() as log:
        assert_law(function, [LONG], 1, (None, 0), backend, torch.float32, rtol=2e-5, atol=2e-5)
    assert {r.ran for r in log if r.op != "lightning_indexer"} == {backend}


def test_routes_count_blocks_and_tokens_of_the_path():
    packing = ki.pack_tree([-1, 0, 0], [4, 3, 5])
    mask = ki.MaskContract(subtree_end=packing.subtree_end)
    q, k, _ = leaves_of(1, 12)
    for route in (
        lambda q, k, m: ki.moba_route(q, k, block_size=2, topk=3, mask=m),
        lambda q, k, m: ki.clustered_route(q, k, config=ki.ClusteredSparseConfig(block_size=2, topk=3), mask=m),
    ):
        found = route(q, k, mask)
        assert found.indices.shape[-1] == 3
        for path in paths_of([-1, 0, 0], [4, 3, 5], packing):
            alone = route(q[:, path], k[:, path], ki.MaskContract())
            assert torch.equal(found.indices[:, path], alone.indices)
            assert torch.equal(found.valid[:, path], alone.valid)
    tokens = ki.lightning_indexer(q, k[:, :, 0], q[..., 0], topk=4, mask=mask)
    assert not (tokens.indices[:, 7:] // 1 == 5).any(), "the second answer selected a token of the first"
    again = ki.lightning_indexer(q, k[:, :, 0], q[..., 0], topk=4, mask=mask, replay=tokens)
    assert torch.equal(again.indices, tokens.indices)
    torch.testing.assert_close(again.scores, tokens.scores)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(forests(), st.sampled_from([1, 2, 5]))
def test_branches_hold_every_token_once_and_end_their_paths(tree, align):
    packing = ki.pack_tree(*tree, align=align)
    mask = ki.MaskContract(subtree_end=packing.subtree_end)
    sizes = mask.sizes()
    (branches,) = branches_of(mask, sizes)
    assert torch.equal(torch.tensor([t for b in branches for t in b.queries]), packing.is_token.nonzero().flatten())
    dense = mask.dense()[0, 0]
    for branch in branches:
        assert branch.keys[-len(branch.queries) :].tolist() == list(branch.queries)
        assert torch.equal(dense[branch.queries[-1]].nonzero().flatten(), branch.keys)


def test_what_cannot_be_routed_is_refused_by_a_reason():
    packing = ki.pack_tree([-1, 0, 0], [2, 2, 2])
    q, k, v = leaves_of(1, 6)
    mask = ki.MaskContract(subtree_end=packing.subtree_end)
    with pytest.raises(ki.Ineligible, match="routed only where T = S"):
        moba(q[:, 3:], k, v, mask, "auto")
    jumps = ki.MaskContract(window=(2, 0), subtree_end=packing.subtree_end, positions=packing.positions * 2)
    with pytest.raises(ki.Ineligible, match="positions that grow by 1"):
        moba(q, k, v, jumps, "auto")
    with pytest.raises(Exception, match="read on the host"):
        torch.compile(lambda *x: moba(*x, mask, "auto"), fullgraph=True, backend="eager")(q, k, v)
    with pytest.raises(ValueError, match="one number for all rows"):
        moba(q, k, v, ki.MaskContract(q_offset=torch.tensor([0])), "auto")
    with pytest.raises(ValueError, match=r"must be causal: .* got prefix=2"):
        moba(q, k, v, ki.MaskContract(prefix=2), "auto")


REFUSING = ["block_sparse_attention", "block_router", "importance_route", "hierarchical_block_select"]


@pytest.mark.parametrize("op", REFUSING)
def test_what_counts_blocks_in_the_row_refuses_a_tree(op):
    """The Triton kernel of block-sparse attention ran, and counted tokens of other branches."""
    suite = next(s for s in suites() if s.op == op)
    kwargs = suite.cases[0].build(Maker(torch.float32))
    keys = kwargs.get("kv_len") or kwargs["k"].shape[1]
    kwargs["mask"] = ki.MaskContract(subtree_end=ki.pack_tree([-1, 0, 0], [keys - 8, 3, 5]).subtree_end)
    for name in ("auto", *(b.name for b in suite.backends)):
        with pytest.raises((ValueError, ki.Ineligible), match=r"subtree_end or positions|cannot run this call"):
            suite.function(**kwargs, backend=name)


def test_empty_rows_and_batches():
    for rows, length in ((0, 4), (1, 0)):
        q, k, v = leaves_of(rows, length)
        ends = torch.full((rows, length), length)
        assert moba(q, k, v, ki.MaskContract(subtree_end=ends), "auto").shape == q.shape
    q, k, v = leaves_of(1, 3)
    assert (moba(q, k, v, ki.MaskContract(subtree_end=torch.arange(3)), "auto") == 0).all()


@pytest.mark.parametrize(
    ("prompts", "answers", "calls"),
    [((24, 24), [6] * 8, 2), ((24, 24), [6, 5, 4, 3], 2), ((24, 24), [9, 8, 4, 2], 3), ((24, 23), [6, 5], 3)],
    ids=str,
)
@pytest.mark.parametrize("function", [moba, clustered, exact], ids=lambda f: f.__name__)
def test_answers_to_a_prompt_are_one_call(function, prompts, answers, calls):
    """In two rows; a branch of less than half the length of another is apart, and so is one that begins elsewhere."""
    trees = [([-1, *[0] * len(answers)], [prompt, *answers]) for prompt in prompts]
    with ki.receipts() as log:
        assert_law(function, trees, 1, (None, 0), "reference", torch.float64)
    op = "lightning_indexer" if function is exact else log[0].op
    alone = 2 * len(answers)
    assert sum(r.op == op for r in log) - alone == calls, "beside the call of each path alone"


def test_gradients_of_a_shared_prompt_are_summed_in_float32():
    """Two hundred answers: sums in bfloat16 would stop growing."""
    answers, g = 200, torch.Generator().manual_seed(0)
    ends = ki.pack_tree([-1, *[0] * answers], [4, *[1] * answers]).subtree_end
    mask = ki.MaskContract(subtree_end=ends)
    shapes = ((1, len(ends), heads, 8) for heads in (4, 2, 2))
    q, k, v = (torch.randn(shape, generator=g).to(torch.bfloat16).requires_grad_() for shape in shapes)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    found = torch.autograd.grad(moba(q, k, v, mask, "reference").sum(), v)[0][0, :4].double()
    wanted = torch.autograd.grad(moba(*exact, mask, "reference").sum(), exact[2])[0][0, :4]
    assert ((found - wanted).norm() / wanted.norm()) <= torch.finfo(torch.bfloat16).eps


def test_what_pads_a_shorter_answer_costs_nothing():
    """Causality hides the padding from every query; as queries it sees nothing, so that kernels pass over it."""
    ends = ki.pack_tree([-1, 0, 0, 0], [8, 7, 6, 4]).subtree_end  # the first answer goes on where the prompt ends
    mask = ki.MaskContract(subtree_end=ends)
    groups, _ = _grouped(mask, mask.sizes(1, 25, 25, torch.device("cpu")))
    answers = groups[-1]
    assert answers.queries.shape == (2, 6)
    sees = answers.mask.dense(2, 6, 14)[:, 0].any(-1)
    assert sees.tolist() == [[True] * 6, [True] * 4 + [False] * 2]

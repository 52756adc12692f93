"""In invariant numerics a batch trains in one order of its documents, whatever order and rows it comes in."""

import pytest
import torch

import kernel_index as ki
from kernel_index.lm.config import ExpertLayer, Sparse, StateSpace
from kernel_index.lm.data import Batch
from kernel_index.lm.model import LanguageModel
from kernel_index.lm.one_order import Ordered, in_one_order
from kernel_index.lm.trees import TokenTree, TreeBatch
from kernel_index.nn.device_scan import layout_of
from tests.lm.test_rollout_check import drawn_model
from tests.lm.test_trees import random_trees

HYBRID = {
    "pattern": "MSAE",
    "residual": "mhc",
    "sparse": Sparse(("exact_token",), tokens=24),
    "state_space": StateSpace(4, 12, 8, chunk=16),
    "experts": ExpertLayer(4, 2, 40, shared=24),
    "ahead": 0.3,
}


def documents(seed: int, count: int = 7) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 60, (count,), generator=draw).tolist()
    return [torch.randint(0, 256, (size,), generator=draw) for size in sizes]


def rows(found: list[torch.Tensor], seed: int) -> Batch:
    """The documents in a drawn order, in rows of a drawn number of them."""
    draw = torch.Generator().manual_seed(seed)
    order, packed = torch.randperm(len(found), generator=draw).tolist(), []
    while order:
        size = int(torch.randint(1, len(order) + 1, (), generator=draw))
        packed.append([found[i] for i in order[:size]])
        order = order[size:]
    longest = max(sum(map(len, row)) for row in packed)
    return Batch.of_documents(packed, longest + int(torch.randint(0, 9, (), generator=draw)))


@pytest.mark.parametrize("seed", range(5))
def test_any_packing_has_one_order(seed):
    found = documents(seed)
    expected = in_one_order(Batch.of_documents([found])).batch
    assert (expected.doc_ids >= 0).sum() == sum(map(len, found))
    for draw in range(4):
        batch = rows(found, draw)
        known = in_one_order(batch)
        assert all(torch.equal(one, other) for one, other in zip(known.batch, expected, strict=True))
        real = batch.doc_ids >= 0
        for given, ours in ((batch.tokens, known.batch.tokens), (batch.targets, known.batch.targets)):
            assert torch.equal(known.of_tokens(ours), torch.where(real, given, 0))


def test_every_field_of_a_document_counts():
    """Two documents that differ in one token, target or position alone do not change places."""
    a = torch.arange(8)
    base = Batch.of_documents([[a, a]])
    for name in ("tokens", "targets", "positions"):
        changed = getattr(base, name).clone()
        changed[0, 3] += 1
        one = base._replace(**{name: changed})
        other = base._replace(**{name: changed.roll(8, 1)})
        known = [in_one_order(batch).batch for batch in (one, other)]
        assert torch.equal(getattr(known[0], name), getattr(known[1], name)), name


def test_documents_whose_tokens_do_not_follow_each_other():
    a, b = torch.arange(5, 10), torch.arange(20, 24)
    batch = Batch.of_documents([[a, b]])
    mixed = torch.tensor([0, 5, 1, 6, 2, 7, 3, 8, 4])
    known = in_one_order(Batch(*(t[:, mixed] for t in batch[:4]), batch.valid_counts))
    assert torch.equal(known.batch.tokens, in_one_order(batch).batch.tokens)
    assert torch.equal(known.of_tokens(known.batch.tokens), batch.tokens[:, mixed])


def test_documents_that_are_alike_and_rows_of_padding():
    a = torch.arange(4)
    known = in_one_order(Batch.of_documents([[a], [], [a, a]]))
    assert torch.equal(known.batch.tokens, a.repeat(3, 1))
    assert known.batch.doc_ids.tolist() == [[0] * 4, [1] * 4, [2] * 4]
    empty = Batch.of_documents([[], []], 3)
    assert all(torch.equal(one, other) for one, other in zip(in_one_order(empty).batch, empty, strict=True))


def gradients(model: LanguageModel, batch: Batch | TreeBatch) -> list[torch.Tensor]:
    """The loss and the gradients of all weights."""
    model.zero_grad()
    with ki.numerics("invariant"):
        loss = model.loss(batch)
        loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_step_of_a_hybrid_model_in_any_packing(dtype):
    """With the losses of the indexer and of the token after the next."""
    model, found = drawn_model(dtype=dtype, **HYBRID).train(), documents(0)
    expected = gradients(model, Batch.of_documents([found]))
    assert all(p.grad is not None and p.grad.any() for name, p in model.named_parameters() if "index" in name)
    for draw in range(3):
        assert equal(gradients(model, rows(found, draw)), expected)


@pytest.mark.native
@pytest.mark.compiled
def test_compiled_blocks_have_the_same_gradients():
    model, found = drawn_model(activation="swiglu").train(), documents(1)
    expected = gradients(model, Batch.of_documents([found]))
    model.compile_blocks("aot_eager")
    for draw in range(2):
        assert equal(gradients(model, rows(found, draw)), expected)


@pytest.mark.native
@pytest.mark.compiled
def test_a_model_that_is_compiled_as_a_whole_keeps_its_rows_and_its_graph():
    """Sizes inside of a graph cannot follow the content of a batch."""
    model, batch = drawn_model(activation="swiglu"), rows(documents(1), 0)
    with ki.numerics("invariant"):
        expected = model.log_probs(batch)
        found = torch.compile(model.log_probs, backend="aot_eager", fullgraph=True)(batch)
        found.sum().backward()
    assert torch.equal(found, expected)


@pytest.mark.native
def test_hooks_see_the_callers_rows():
    model, batch = drawn_model(), rows(documents(3), 2)
    shapes = []
    with ki.numerics("invariant"):
        expected = model.log_probs(batch).detach()
        handle = model.blocks[0].register_forward_hook(lambda module, given, out: shapes.append(out[0].shape))
        found = model.log_probs(batch)
        handle.remove()
    assert shapes[0][:2] == batch.tokens.shape
    real = batch.targets >= 0
    assert torch.equal(found[real], expected[real])
    handle = model.blocks[0].register_full_backward_hook(lambda module, given, out: shapes.append(out[0].shape))
    with ki.numerics("invariant"):
        model.log_probs(batch).sum().backward()
    handle.remove()
    assert shapes[1][:2] == batch.tokens.shape


@pytest.mark.native
def test_a_mean_of_losses_is_the_same_without_gradients():
    model, found = drawn_model(), documents(4)
    with ki.numerics("invariant"):
        expected = model.loss(rows(found, 0)).detach()
        with torch.no_grad():
            assert torch.equal(model.loss(rows(found, 1)), expected)


@pytest.mark.native
@pytest.mark.parametrize("mode", ["ordinary", "invariant"])
def test_experts_do_not_count_padding(mode):
    """No rows of these documents are without padding, but one that is too long."""
    model, loads = drawn_model(pattern="AE", experts=ExpertLayer(4, 2, 40)).train(), []
    found = [torch.randint(0, 256, (size,)) for size in (*[40] * 6, *[33] * 7)]
    for draw in range(3):
        with ki.numerics(mode):
            model.loss(rows(found, draw)).backward()
        loads.append(model.routers()[0].load.clone())
    assert all(load.sum() == 2 * sum(map(len, found)) for load in loads)
    assert torch.equal(loads[0], loads[1])
    assert torch.equal(loads[0], loads[2])


@pytest.mark.native
def test_values_come_back_to_the_callers_places():
    model, found = drawn_model(), documents(2)
    batch = rows(found, 1)
    with ki.numerics("invariant"):
        hidden, log_probs, losses = model.hidden(batch), model.log_probs(batch), model.loss(batch, reduction="none")
        with torch.no_grad():
            as_given = model.hidden(batch), model.log_probs(batch), model.loss(batch, reduction="none")
    real = batch.doc_ids >= 0
    for one, other in zip((hidden, log_probs, losses), as_given, strict=True):
        assert torch.equal(one[real], other[real])
        assert not one[~real].any()


@pytest.mark.native
def test_trees_in_any_order():
    model, trees = drawn_model(**(HYBRID | {"pattern": "AAEA"})).train(), random_trees(0)
    expected = gradients(model, TreeBatch.of(trees))
    for order in ([2, 0, 1], [1, 2, 0], [2, 1, 0]):
        given = [trees[i] for i in order]
        assert equal(gradients(model, TreeBatch.of(given)), expected)
        batch = TreeBatch.of(given)
        with ki.numerics("invariant"):
            found = model.eval().log_probs(batch)
            with torch.no_grad():
                assert torch.equal(found, model.log_probs(batch))
        model.train()


def test_a_batch_of_trees_without_an_edge():
    tree = TokenTree([-1], [torch.tensor([5])])
    known = in_one_order(TreeBatch.of([tree, tree]))
    assert known.batch.tokens.tolist() == [[5], [5]]
    assert len(known.batch.targets) == 0


@pytest.mark.native
def test_padding_behind_trees_changes_nothing():
    model, trees = drawn_model().train(), random_trees(1)
    expected = gradients(model, TreeBatch.of(trees))
    longer = TreeBatch.of(trees[::-1], length=60)
    assert equal(gradients(model, longer), expected)
    with ki.numerics("invariant"):
        hidden, log_probs = model.hidden(longer), model.log_probs(longer)
        with torch.no_grad():
            plain = model.hidden(longer)
            assert torch.equal(log_probs, model.log_probs(longer))
    real = (longer.mask.subtree_end > torch.arange(60))[..., None]
    assert hidden.shape == plain.shape
    assert torch.equal(torch.where(real, hidden, 0), torch.where(real, plain, 0))


@pytest.mark.parametrize("seed", range(4))
def test_a_batch_in_order_knows_how_long_its_rows_are_in_chunks(seed):
    """So that a step need not read it, which is recorded; as it is when the documents are known to nobody."""
    ordered = in_one_order(rows(documents(seed, 9), seed)).batch
    assert isinstance(ordered, Ordered)
    shape = ordered.tokens.shape
    assert layout_of(ordered.doc_ids, *shape, ordered.tokens.device).tokens.shape == (shape[0], ordered.in_chunks)
    filled = in_one_order(Batch.of_documents([[torch.arange(128), torch.arange(64)], [torch.arange(192)]])).batch
    assert filled.tokens.shape[1] == filled.in_chunks
    assert ordered.each(torch.clone).kind == ordered.kind != filled.kind


def test_a_batch_in_order_is_not_put_in_order_again():
    torch.manual_seed(0)
    model = LanguageModel(drawn_model(**HYBRID).config)
    given = rows(documents(1), 1)
    with ki.numerics("invariant"):
        ordered = model.in_order(given)
        assert isinstance(ordered, Ordered)
        assert model.in_order(ordered) is ordered
        torch.testing.assert_close(model(ordered), model(given), rtol=0, atol=0)
    assert model.in_order(given) is given

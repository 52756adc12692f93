"""A model on packed prefix trees learns what it learns from their root-to-leaf paths, each edge counted once."""

import random
from dataclasses import replace
from functools import partial

import pytest
import torch

import kernel_index as ki
from kernel_index.lm.data import IGNORED, Batch
from kernel_index.lm.model import LanguageModel
from kernel_index.lm.trees import TokenTree, TreeBatch
from kernel_index.nn import SparseAttention
from tests.lm.test_features import HYBRID

SHAPES = [([-1, 0, 0, 1, 1], [5, 4, 3, 6, 2]), ([-1, 0, 1], [4, 3, 5]), ([-1, 0, 0, 0, -1, 4], [7, 2, 3, 1, 3, 4])]


def random_trees(seed: int) -> list[TokenTree]:
    g = torch.Generator().manual_seed(seed)
    return [TokenTree(p, [torch.randint(0, 256, (n,), generator=g) for n in lengths]) for p, lengths in SHAPES]


def any_trees(rng: random.Random) -> list[TokenTree]:
    """One to three forests: chains, stars, deep and ragged trees, several in a row; at least one edge in each."""
    forests = list[TokenTree]()
    for _ in range(rng.randrange(1, 4)):
        parents = [-1, *(rng.randrange(-1, run) for run in range(1, rng.randrange(1, 7)))]
        lengths = [rng.randrange(2, 12), *(rng.randrange(1, 6) for _ in parents[1:])]
        forests.append(TokenTree(parents, [torch.tensor(rng.choices(range(256), k=n)) for n in lengths]))
    return forests


def paths_of(tree: TokenTree) -> list[tuple[torch.Tensor, int]]:
    """The tokens of each root-to-leaf path, and how many of them an earlier path has had."""
    found, seen = [], set()
    for leaf in sorted(set(range(len(tree.parents))) - set(tree.parents)):
        runs, run = [], leaf
        while run >= 0:
            runs, run = [run, *runs], tree.parents[run]
        known = sum(len(tree.runs[r]) for r in runs if r in seen)
        seen |= set(runs)
        found.append((torch.cat([tree.runs[r] for r in runs]), known))
    return found


def loss_of_paths(model: LanguageModel, trees: list[TokenTree]) -> torch.Tensor:
    total = torch.zeros((), dtype=model.head.weight.dtype)
    for tree in trees:
        for tokens, known in paths_of(tree):
            targets = torch.cat([tokens[1:], torch.tensor([IGNORED])])
            targets[: max(known - 1, 0)] = IGNORED
            batch = Batch.of_prompt(tokens, len(tokens))._replace(targets=targets[None])
            total = total + model.loss(batch, reduction="sum")
    return total


def model_of(config, seed=0) -> LanguageModel:
    torch.manual_seed(seed)
    model = LanguageModel(config).to(torch.float32 if "E" in config.pattern else torch.float64)
    for parameter in model.parameters():  # what begins at zero would hide what flows through it
        torch.nn.init.normal_(parameter, std=0.3)
    for mixer in model.mixers():
        if isinstance(mixer, SparseAttention):
            mixer.index_loss = 0.0  # a mean over queries, which rows and trees have in different numbers
    return model


def steps_of(config, loss, batches) -> list[torch.Tensor]:
    """Losses of a step on each batch of trees, and the weights after them."""
    model, losses = model_of(config), []
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for trees in batches:
        optimizer.zero_grad()
        found = loss(model, trees)
        found.backward()
        optimizer.step()
        losses.append(found.detach())
    return [*losses, *(p.detach() for p in model.parameters())]


def loss_of_trees(model: LanguageModel, trees: list[TokenTree], align: int = 1) -> torch.Tensor:
    return model.loss(TreeBatch.of(trees, align=align), reduction="sum")


def assert_same_steps(config, batches, align=1, **close) -> None:
    trees, paths = (
        steps_of(config, partial(loss_of_trees, align=align), batches),
        steps_of(config, loss_of_paths, batches),
    )
    for a, b in zip(trees, paths, strict=True):
        torch.testing.assert_close(a, b, **close)


RESIDUALS = ["plain", "fp32", "mhc", "mhc-plain"]
LETTERS = [
    pytest.param("A", (None,), id="A"), pytest.param("A", (3,), id="A-window"), pytest.param("L", (None,), id="L"),
    pytest.param("M", (None,), id="M"), pytest.param("AE", (None, None), id="E"),
    pytest.param("SSS", (None, None, 5), id="S"),
]  # fmt: skip


WITHOUT_EXPERTS = replace(HYBRID, pattern="MASLSS", windows=(None, 16, None, None, None, 5))
"""In float64, which the grouped product of the experts does not take."""


def with_pattern(pattern, windows, **changes):
    return replace(HYBRID, pattern=pattern, windows=windows, **changes)


@pytest.mark.parametrize(("pattern", "windows"), LETTERS)
def test_every_letter(pattern, windows):
    config = with_pattern(pattern, windows)
    close = {"rtol": 1e-4, "atol": 1e-5} if "E" in pattern else {}
    assert_same_steps(config, [random_trees(0)], **close)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_some_steps_of_a_hybrid_model(residual):
    assert_same_steps(replace(WITHOUT_EXPERTS, residual=residual), [random_trees(step) for step in range(3)])


@pytest.mark.thorough_if(when=lambda pattern, windows, residual, seed: seed > 0)
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize(("pattern", "windows"), LETTERS)
def test_two_steps_on_any_forest(pattern, windows, residual, seed):
    """Every letter with every residual stream, on forests of any shape, aligned or not."""
    rng = random.Random(f"{pattern} {windows} {residual} {seed}")
    batches, align = [any_trees(rng) for _ in range(2)], rng.choice([1, 2, 3, 8])
    close = {"rtol": 1e-4, "atol": 1e-5} if "E" in pattern else {}
    assert_same_steps(with_pattern(pattern, windows, residual=residual), batches, align, **close)


def test_gaps_change_nothing():
    model, trees = model_of(WITHOUT_EXPERTS), random_trees(0)
    torch.testing.assert_close(loss_of_trees(model, trees, align=8), loss_of_trees(model, trees))
    longer = model.loss(TreeBatch.of(trees, length=40), reduction="sum")
    torch.testing.assert_close(longer, loss_of_trees(model, trees))


def test_the_token_after_the_next():
    """Each pair of edges that follow each other is one example."""
    config = with_pattern("A", (None,), ahead=0.5)
    model, tree = model_of(config).train(), TokenTree([-1, 0], [torch.arange(5), torch.arange(5, 9)])
    chain = TreeBatch.of([tree])
    tokens = torch.arange(9)
    targets = torch.cat([tokens[1:], torch.tensor([IGNORED])])
    row = Batch.of_prompt(tokens, 9)._replace(targets=targets[None])
    torch.testing.assert_close(model.loss(chain), model.loss(row))
    assert chain.after_next.tolist() == [[i, i + 1] for i in range(7)]
    branched = TreeBatch.of(random_trees(0)[:1])
    assert len(branched.after_next) == len(branched.sources) - 1, "all edges but the root's first follow another"


def test_a_shared_source_is_summed_in_float32():
    """Many answers to one prompt: a bfloat16 sum of their gradients would lose most of them."""
    from kernel_index.lm.trees import at_sources

    hidden = torch.zeros(1, 2, 4, dtype=torch.bfloat16, requires_grad=True)
    at_sources(hidden, torch.zeros(1000, dtype=torch.int64)).sum().backward()
    assert hidden.grad is not None
    assert (hidden.grad[0, 0] == 1000).all()


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="length must be at least 20, the longest tree, got 10"):
        TreeBatch.of(random_trees(0), length=10)
    empty = TreeBatch.of([])
    assert empty.sources.shape == (0,)
    assert empty.after_next.shape == (0, 2)
    assert TreeBatch.of([TokenTree([-1], [torch.tensor([3])])]).sources.shape == (0,)


def test_documents_do_not_leak_into_a_branch():
    """A state-space branch that begins with its document begins with a state of zeros."""
    from kernel_index.nn import Mamba2

    torch.manual_seed(0)
    mixer = Mamba2(16, 2, 8, state=4, chunk=4).double()
    packing = ki.pack_tree([-1, 0, 0], [4, 3, 5])
    ids = torch.tensor([0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1])
    x = torch.randn(1, 12, 16, dtype=torch.float64)
    out = mixer(x, ki.MaskContract(doc_ids=ids, subtree_end=packing.subtree_end))[0]
    torch.testing.assert_close(out[:, :7], mixer(x[:, :7], ki.MaskContract())[0])
    torch.testing.assert_close(out[:, 7:], mixer(x[:, 7:], ki.MaskContract())[0])

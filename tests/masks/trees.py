"""Random forests of token runs for property tests, and the paths that they hold."""

import torch
from hypothesis import strategies as st

import kernel_index as ki

ALIGN = st.sampled_from([1, 1, 2, 3, 8])


@st.composite
def forests(draw, most_runs: int = 7, longest: int = 4) -> tuple[list[int], list[int]]:
    """Parents and lengths of runs: chains, stars, deep and ragged trees, several trees in a row."""
    runs = draw(st.integers(1, most_runs))
    parents = [draw(st.integers(-1, run - 1)) for run in range(runs)]
    return parents, [draw(st.integers(1, longest)) for _ in range(runs)]


def places_of(parents: list[int], lengths: list[int], packing: ki.TreePacking) -> list[list[int]]:
    """The places of each run's tokens in the row, read off the packing."""
    tokens = packing.is_token.nonzero().flatten().tolist()
    found: list[list[int]] = [[] for _ in parents]
    for run in packing.order.tolist():
        found[run], tokens = tokens[: lengths[run]], tokens[lengths[run] :]
    assert not tokens
    return found


def paths_of(parents: list[int], lengths: list[int], packing: ki.TreePacking) -> list[list[int]]:
    """The places of every path from a root to a leaf."""
    places = places_of(parents, lengths, packing)
    found = []
    for leaf in set(range(len(parents))) - set(parents):
        path, run = list[int](), leaf
        while run >= 0:
            path, run = places[run] + path, parents[run]
        found.append(path)
    return found


def batch_of(packings: list[ki.TreePacking]) -> dict[str, torch.Tensor]:
    """``subtree_end`` and ``positions`` of a batch: shorter rows end in gaps."""
    longest = max(len(p.subtree_end) for p in packings)
    ends, along = torch.arange(longest).repeat(len(packings), 1), torch.zeros(len(packings), longest, dtype=torch.int64)
    for row, packing in enumerate(packings):
        ends[row, : len(packing.subtree_end)] = packing.subtree_end
        along[row, : len(packing.positions)] = packing.positions
    return {"subtree_end": ends, "positions": along}


@st.composite
def tree_calls(draw) -> tuple[ki.MaskContract, int, int, int]:
    """A contract of trees in some rows, with the B, T and S that it is for."""
    packings = [ki.pack_tree(*draw(forests()), align=draw(ALIGN)) for _ in range(draw(st.integers(1, 2)))]
    fields = batch_of(packings)
    keys = fields["subtree_end"].shape[1]
    queries = draw(st.one_of(st.just(keys), st.integers(1, keys)))
    if len(packings) == 1 and draw(st.booleans()):
        fields = {name: x[0] for name, x in fields.items()}
    left = draw(st.one_of(st.none(), st.integers(0, 6)))
    if draw(st.booleans()):  # a window counts indices
        del fields["positions"]
    if draw(st.booleans()):  # documents that begin where trees do, or that cut them
        ids = draw(st.lists(st.integers(-1, 1), min_size=keys, max_size=keys))
        fields["doc_ids"] = torch.tensor(ids).sort().values
    if draw(st.booleans()) and len(packings) == 2:
        counts = draw(st.lists(st.integers(0, keys), min_size=2, max_size=2))
        fields["validity"] = ki.attention_validity(valid_token_counts=counts)
    return ki.MaskContract(window=(left, 0), **fields), len(packings), queries, keys

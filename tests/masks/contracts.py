"""Random mask contracts for property tests."""

import torch
from hypothesis import strategies as st

import kernel_index as ki

LENGTHS = st.integers(0, 14)
SIDES = st.one_of(st.none(), st.integers(-2, 6))


@st.composite
def doc_ids(draw, rows: int, length: int) -> torch.Tensor:
    """Few distinct ids, so that documents come back; negative ids are padding; any integer dtype."""
    ids = draw(st.lists(st.lists(st.integers(-2, 2), min_size=length, max_size=length), min_size=rows, max_size=rows))
    runs = draw(st.integers(1, 3))  # longer documents are rare in independent draws
    dtype = draw(st.sampled_from([torch.int64, torch.int32, torch.int8, torch.uint8]))
    drawn = torch.tensor(ids, dtype=torch.int64).reshape(rows, length).repeat_interleave(runs, 1)[:, :length]
    return (drawn.abs() if dtype == torch.uint8 else drawn).to(dtype)


@st.composite
def validities(draw, rows: int, length: int) -> ki.AttentionValidity:
    counts = st.lists(st.integers(0, length + 2), min_size=rows, max_size=rows)
    tokens = draw(st.one_of(st.none(), counts))
    slots = draw(st.one_of(st.none(), st.lists(st.integers(0, 4), min_size=rows, max_size=rows)))
    return ki.attention_validity(
        valid_token_counts=tokens, valid_slot_counts=slots, base_block_tokens=draw(st.integers(1, 5))
    )


@st.composite
def calls(draw, max_rows: int = 3) -> tuple[ki.MaskContract, int, int, int]:
    """A contract with the B, T and S that it is for."""
    rows, queries = draw(st.integers(1, max_rows)), draw(LENGTHS)
    keys = draw(st.one_of(st.just(queries), LENGTHS))
    ids = draw(st.one_of(st.none(), doc_ids(rows, keys)))
    if ids is not None and draw(st.booleans()):
        ids = ids[0]  # the same documents in every row
    mask = ki.MaskContract(
        causal=draw(st.booleans()),
        window=(draw(SIDES), draw(SIDES)),
        doc_ids=ids,
        validity=draw(st.one_of(st.none(), validities(rows, keys))),
        q_offset=draw(st.one_of(st.none(), st.integers(-5, 16))),
    )
    return mask, rows, queries, keys

"""Lengths that a contract on the host knows: moved with it to a device, and not told where they cannot be known."""

import pytest
import torch

import kernel_index as ki

DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, -1, 2], [4, 4, 4, 4, 5, 5, 5]])


@pytest.mark.parametrize(
    "mask",
    [
        ki.MaskContract(window=(2, 0), doc_ids=DOCUMENTS),
        ki.MaskContract(doc_ids=DOCUMENTS, validity=ki.attention_validity(valid_token_counts=[6, 2])),
        ki.MaskContract.from_cu_seqlens(torch.tensor([0, 3, 3, 7])),
    ],
)
def test_lengths_that_were_on_the_host_stay_known(mask):
    rows = 1 if mask.doc_ids is None else 2
    there = mask.to("meta")
    sizes = there.sizes(rows, 7, 7, torch.device("meta"))
    assert there.lengths_are_known(sizes)
    found, expected = there.varlen(rows, 7, 7), mask.varlen(rows, 7, 7)
    assert found[2:4] == expected[2:4]
    assert found.window == expected.window
    assert found.cu_seqlens_q.shape == expected.cu_seqlens_q.shape
    assert (found.kept is None) == (expected.kept is None)
    source = next(t for t in there.sources() if t is not None)
    source.add_(1)
    assert not there.lengths_are_known(sizes), "written to since"


def test_lengths_that_the_host_cannot_know():
    on_meta = torch.device("meta")
    for mask, rows in (
        (ki.MaskContract(doc_ids=DOCUMENTS.to(on_meta)), 2),
        (ki.MaskContract(doc_ids=DOCUMENTS[0]), 2),  # moved for one row
        (ki.MaskContract.from_cu_seqlens(torch.tensor([0, 3, 5])), 1),  # there may be padding after them
        (ki.MaskContract(doc_ids=DOCUMENTS, prefix=1), 2),
    ):
        there = mask.to(on_meta)
        assert not there.lengths_are_known(there.sizes(rows, 7, 7, on_meta))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_queries_and_keys_of_other_lengths_are_moved(device):
    mask = ki.MaskContract.from_cu_seqlens(torch.tensor([0, 2, 3]), torch.tensor([0, 4, 7]))
    there = mask.to(device)
    assert [x.device.type for x in there.cu_seqlens] == [device, device]
    assert not there.lengths_are_known(there.sizes(1, 3, 7))


def test_to_where_it_is_already_forgets_nothing():
    there = ki.MaskContract(doc_ids=DOCUMENTS).to("meta")
    again = there.to("meta")
    assert again.lengths_are_known(again.sizes(2, 7, 7))


def test_sizes_are_not_those_of_a_tensor_before_it_was_resized():
    ids = torch.zeros(2, 7, dtype=torch.int64)
    mask, device = ki.MaskContract(doc_ids=ids), ids.device
    assert mask.sizes(2, None, None, device).keys == 7
    ids.resize_(3, 5)
    assert mask.sizes(3, None, None, device).keys == 5
    with pytest.raises(ValueError, match="batch_size"):
        mask.sizes(2, None, None, device)

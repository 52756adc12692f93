"""A contract goes through what training code does with its batches: pinned memory and ``torch.load``."""

import pytest
import torch

import kernel_index as ki

IDS = torch.tensor([[0, 0, 1, -1], [0, 0, 0, 0]])
MASKS = {
    "plain": ki.MaskContract(window=(2, 0)),
    "documents": ki.MaskContract(doc_ids=IDS, q_offset=0),
    "validity": ki.MaskContract(validity=ki.attention_validity(valid_token_counts=[3, 4])),
    "keys": ki.MaskContract(False, key_validity=ki.attention_validity(valid_token_counts=[3, 2])),
    "slots": ki.MaskContract(validity=ki.attention_validity(valid_slot_counts=[1, 2], base_block_tokens=2)),
}


@pytest.mark.parametrize("name", MASKS)
def test_it_loads_without_trusting_the_file(tmp_path, name):
    mask = MASKS[name]
    mask.intervals(2, 4, 4)  # what it keeps is not saved
    torch.save({"mask": mask}, tmp_path / "batch.pt")
    assert torch.load(tmp_path / "batch.pt", weights_only=True)["mask"] == mask


@pytest.mark.parametrize("name", MASKS)
def test_pinned_memory(name, monkeypatch):
    """The data loader calls ``pin_memory()`` of what has one."""
    pinned = []

    def pin(tensor):
        pinned.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    mask = MASKS[name]
    again = mask.pin_memory()
    assert again == mask
    assert again is not mask
    expected = [t for t in (mask.doc_ids, mask.counts, mask.key_counts) if t is not None]
    assert len(pinned) == len(expected)
    assert all(a is b for a, b in zip(pinned, expected, strict=True))

"""Packing loses nothing, crops nothing, and the split is stable."""

import hashlib
import os
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_index.lm.data import (
    IGNORED,
    START,
    TEXT,
    Batch,
    DataError,
    PackedRows,
    find_files,
    is_held_out,
    load_documents,
    unigram_bits_per_byte,
)


def documents(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [np.concatenate([[START], rng.integers(0, 256, n)]).astype(np.int16) for n in lengths]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=30), st.integers(2, 32))
def test_every_byte_is_a_target_exactly_once(lengths, row):
    docs = documents(lengths)
    packed = PackedRows(docs, row)
    batch = packed.batch(list(range(len(packed))))
    targets = batch.targets[batch.targets != IGNORED]
    expected = np.sort(np.concatenate([d[1:] for d in docs]))
    assert np.array_equal(np.sort(targets.numpy()), expected)
    # Every target follows its token in one document, and positions and ids restart with each piece.
    for b in range(len(packed)):
        for number in range(int(batch.doc_ids[b].max()) + 1):
            at = (batch.doc_ids[b] == number).nonzero().flatten()
            assert torch.equal(at, torch.arange(int(at[0]), int(at[-1]) + 1)), "a document is one run"
            assert torch.equal(batch.positions[b, at], torch.arange(len(at)))
            assert torch.equal(batch.tokens[b, at][1:], batch.targets[b, at][:-1])
    padding = batch.doc_ids == -1
    assert torch.equal(padding, torch.arange(row) >= batch.valid_counts[:, None])
    assert (batch.targets[padding] == IGNORED).all()


def test_packing_is_tight():
    packed = PackedRows(documents([5] * 12 + [3] * 12), 8)
    assert len(packed) == 12, "each row takes one document of 5 and one of 3"


def test_batches_depend_on_seed_and_step_alone():
    packed = PackedRows(documents(range(1, 60)), 16)
    again = PackedRows(documents(range(1, 60)), 16)
    for step in (0, 3, 40):  # 40 lies in a later epoch
        for a, b in zip(packed.at_step(step, 4, 1), again.at_step(step, 4, 1), strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(packed.at_step(0, 4, 1).tokens, packed.at_step(0, 4, 2).tokens)


def test_an_epoch_serves_every_row_once():
    packed = PackedRows(documents(range(1, 60)), 16)
    assert sorted(packed.order(3, 0).tolist()) == list(range(len(packed)))
    assert packed.order(3, 0).tolist() != packed.order(3, 1).tolist()


def test_standard_library_is_found_and_split_by_name():
    root, paths = find_files(None, "*.py")
    assert (root / "os.py") in paths
    assert not any("site-packages" in p.parts for p in paths)
    share = np.mean([is_held_out(f"{i}.py") for i in range(4000)])
    assert 0.03 < share < 0.07


@pytest.mark.parametrize(
    ("folder", "pattern", "message"),
    [
        ("missing", "*", "--data must be a folder or a file"),
        (".", "*.nothing", "--glob must match"),
        (".", "*.txt", "--data must hold"),
        ("one.txt", TEXT, "--data must hold"),
    ],
)
def test_unusable_data_is_named(tmp_path, folder, pattern, message):
    (tmp_path / "one.txt").write_text("x")
    with pytest.raises(DataError, match=message):
        load_documents(tmp_path / folder, pattern)


def texts(documents):
    assert all(d[0] == START for d in documents)
    return [bytes(d[1:].astype(np.uint8)) for d in documents]


def test_a_folder_of_text_needs_no_pattern(tmp_path):
    """Text of any suffix; what is hidden and what holds a NUL byte is no text."""
    (tmp_path / ".git").mkdir()
    for name, content in ((".git/config", b"hidden"), ("picture.png", b"\x89PNG\0"), ("empty.md", b"")):
        (tmp_path / name).write_bytes(content)
    wanted = {f"{i}.{suffix}": f"text {i}".encode() for i, suffix in enumerate(("md", "txt", "rst") * 20)}
    for name, content in wanted.items():
        (tmp_path / name).write_bytes(content)
    train, held_out = load_documents(tmp_path, TEXT)
    assert sorted(texts(train) + texts(held_out)) == sorted(wanted.values())
    assert texts(held_out) == [content for name, content in sorted(wanted.items()) if is_held_out(name)]


def test_the_tail_of_one_file_is_held_out(tmp_path):
    corpus = bytes(range(32, 127)) * 10
    (tmp_path / "corpus.txt").write_bytes(corpus)
    for data in (tmp_path / "corpus.txt", tmp_path):
        train, held_out = load_documents(data, TEXT)
        (begin,), (tail,) = texts(train), texts(held_out)
        assert begin + tail == corpus
        assert len(tail) == len(corpus) // 20


def test_a_name_that_is_not_utf8(tmp_path):
    for i in range(3):
        (tmp_path / os.fsdecode(b"caf\xe9%d.txt" % i)).write_bytes(b"text" * 20)
    train, held_out = load_documents(tmp_path, None)
    assert len(train) == len(held_out) == 3, "each held out by its tail"
    assert [is_held_out(name) for name in ("a.py", "é.py", "n20.py")] == [
        hashlib.sha256(name.encode()).digest()[0] * 20 < 256 for name in ("a.py", "é.py", "n20.py")
    ], "names in UTF-8 are chosen as ever"


def test_a_folder_of_one_binary_file_holds_no_text(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0" * 20)
    with pytest.raises(DataError, match=f"got 0 files with text in {tmp_path}, where files with a NUL byte are no"):
        load_documents(tmp_path, None)
    train, _ = load_documents(tmp_path / "picture.png", None)
    assert texts(train) == [b"\x89PNG\0" * 19], "a file that is named is taken"


def test_a_pattern_is_the_users_own(tmp_path):
    for name in ("a.bin", ".hidden.bin"):
        (tmp_path / name).write_bytes(b"\0" * 100)
    train, held_out = load_documents(tmp_path, "*.bin")
    assert len(train) == len(held_out) == 2, "each held out by its tail"


def test_unigram_of_uniform_bytes_is_eight_bits():
    docs = [np.concatenate([[START], np.tile(np.arange(256), 50)]).astype(np.int16)]
    packed = PackedRows(docs, 64)
    assert unigram_bits_per_byte(docs, [packed.batch([0, 1])]) == pytest.approx(8.0)


def test_prompt_is_padded_and_its_padding_is_no_document():
    batch = Batch.of_prompt(torch.tensor([1, 2, 3]), 5)
    assert batch.doc_ids.tolist() == [[0, 0, 0, -1, -1]]
    assert batch.valid_counts.tolist() == [3]
    with pytest.raises(ValueError, match="tokens must hold 1 to 5 tokens, got 6"):
        Batch.of_prompt(torch.zeros(6, dtype=torch.int64), 5)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([[torch.randn(3)]], TypeError, "a document must be an integer tensor, got torch.float32"),
        ([[[1, 2]]], TypeError, "a document must be a torch.Tensor, got list"),
        ([[]], ValueError, "rows must hold at least one token, got none"),
        ([], ValueError, "rows must hold at least one token, got none"),
    ],
)
def test_documents_that_are_none(rows, error, message):
    with pytest.raises(error, match=re.escape(message)):
        Batch.of_documents(rows)


def test_rows_without_a_document_beside_a_length():
    assert Batch.of_documents([[], [torch.tensor([3])]]).valid_counts.tolist() == [0, 1]
    assert Batch.of_documents([[]], 4).doc_ids.tolist() == [[-1] * 4]

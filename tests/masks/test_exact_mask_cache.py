"""Keys of compiled mask kernels: static semantics only, and no way to lose a document."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType

import pytest
import torch

import kernel_index as ki

DOCS = torch.tensor([[0, 0, 1, 1]])
TOKENS = ki.attention_validity(valid_token_counts=[3])
SLOTS = ki.attention_validity(valid_slot_counts=[2], valid_token_counts=[3], base_block_tokens=2)


@pytest.mark.parametrize("window", [None, (None, None), (-1, -1), (-1, 0), (None, 7)], ids=str)
def test_every_spelling_of_global_is_one_key(window):
    assert ki.exact_mask_key(ki.MaskContract(window=window)) == ki.exact_mask_key({})
    assert ki.exact_mask_key({"window": window}).window == (None, 0)


DIFFERENT = [
    {},
    {"causal": False},
    {"window": (4, 0)},
    {"window": (0, 0)},
    {"local_window": 0},
    {"local_window": 4},
    {"has_doc_ids": True},
    {"has_valid_counts": True},
    {"has_valid_counts": True, "base_block_tokens": 64},
    {"has_q_offset": True},
    {"has_prefix": True},
    {"has_subtree_end": True},
    {"has_positions": True},
    {"has_cu_seqlens": True},
    {"has_cu_seqlens": True, "has_two_cu_seqlens": True},
    {"block_sizes": 64},
    {"block_sizes": (64, 128)},
    {"dtype": torch.bfloat16},
    {"dtype": torch.float16},
    {"backend": "triton"},
]


def test_what_changes_a_kernel_changes_the_key():
    keys = [ki.exact_mask_key(fields) for fields in DIFFERENT]
    assert len(set(keys)) == len(DIFFERENT)


def test_one_list_of_lengths_is_not_two():
    lengths = torch.tensor([0, 2, 5])
    one, two = (ki.MaskContract.from_cu_seqlens(lengths, keys) for keys in (None, lengths))
    assert ki.exact_mask_key(one) != ki.exact_mask_key(two)
    assert ki.exact_mask_key(two).rebuild(cu_seqlens=(lengths, lengths)).cu_seqlens[1] is lengths
    with pytest.raises(ValueError, match="cu_seqlens must have two lists, as the key says, got one"):
        ki.exact_mask_key(two).rebuild(cu_seqlens=(lengths, None))
    with pytest.raises(ValueError, match="has_two_cu_seqlens must be False without"):
        ki.exact_mask_key({"has_two_cu_seqlens": True})
    with pytest.raises(ValueError, match="has_two_cu_seqlens must be False for the lists"):
        ki.exact_mask_key({"cu_seqlens": (lengths, None), "has_two_cu_seqlens": True})


def test_absent_zero_and_present_are_three_states():
    absent = ki.exact_mask_key(ki.MaskContract())
    zero = ki.exact_mask_key(ki.MaskContract(validity=ki.attention_validity(valid_token_counts=[0]), q_offset=0))
    assert (absent.has_valid_counts, zero.has_valid_counts) == (False, True)
    assert (absent.has_q_offset, zero.has_q_offset) == (False, True)
    assert not ki.exact_mask_key(ki.MaskContract(validity=ki.attention_validity())).has_valid_counts


def test_content_identity_and_size_are_no_part_of_it():
    def key(rows, length, value):
        docs = torch.full((rows, length), value)
        return ki.exact_mask_key(ki.MaskContract(doc_ids=docs, validity=ki.attention_validity(valid_token_counts=[1])))

    assert key(1, 4, 0) == key(1, 9, -1) == ki.exact_mask_key({"doc_ids": DOCS, "validity": TOKENS})
    flat = [part for field in key(1, 4, 0) for part in (field if isinstance(field, tuple) else (field,))]
    assert not any(isinstance(part, torch.Tensor) for part in flat)
    assert hash(key(1, 4, 0)) == hash(key(1, 5, 3))


def test_a_mapping_says_what_a_contract_says():
    mask = ki.MaskContract(window=(4, 0), doc_ids=DOCS, validity=SLOTS, q_offset=2)
    fields = {"window": (4, 9), "doc_ids": DOCS, "validity": SLOTS, "q_offset": 2}
    for mapping in (fields, MappingProxyType(fields)):  # a read-only mapping is a mapping
        assert ki.exact_mask_key(mapping) == ki.exact_mask_key(mask)
    flags = {"window": (4, 0), "has_doc_ids": True, "has_valid_counts": True, "base_block_tokens": 2}
    assert ki.exact_mask_key({**flags, "has_q_offset": True}) == ki.exact_mask_key(mask)
    assert ki.exact_mask_key({"backend": "triton", "dtype": "bfloat16"}, backend="Flex").backend == "flex"
    assert ki.exact_mask_key({}, dtype=torch.bfloat16).dtype == "bfloat16"


def test_counts_may_stand_for_themselves():
    def key(**fields):
        return ki.exact_mask_key(fields)

    tokens, slots = torch.tensor([3]), torch.tensor([0])
    assert key(valid_token_counts=tokens) == key(validity=TOKENS) == key(valid_token_counts=[9], base_block_tokens=2)
    assert key(valid_slot_counts=slots, valid_token_counts=tokens, base_block_tokens=2) == key(validity=SLOTS)
    assert key(valid_token_counts=None) == key()
    for message, fields in {
        "base_block_tokens must be a positive integer": {"valid_slot_counts": slots},
        "has_valid_counts must be True": {"valid_token_counts": tokens, "has_valid_counts": False},
        "validity must be None": {"valid_token_counts": tokens, "validity": TOKENS},
    }.items():
        with pytest.raises(ValueError, match=message):
            key(**fields)


REFUSALS = {
    "contract must be a MaskContract or a mapping of its fields, got NoneType": None,
    "contract must be a MaskContract or a mapping of its fields, got list": [("causal", True)],
    "has_doc_ids must be True for the doc_ids that is given, got False": {"doc_ids": DOCS, "has_doc_ids": False},
    "has_doc_ids must be True or False, got int": {"has_doc_ids": 1},
    "base_block_tokens must be None where there are no counts, got 64": {"base_block_tokens": 64},
    "base_block_tokens must be 2, as in the validity, got 4": {"validity": SLOTS, "base_block_tokens": 4},
    "causal must be True or False, got Tensor": {"causal": torch.tensor(True)},
    "window[0] must be an integer, got Tensor": {"window": (torch.tensor(3), 0)},
    "block_sizes[1] must be at least 1, got 0": {"block_sizes": (64, 0)},
    "prefix must be left out in a tree: its keys are seen along the path alone, got one": {
        "prefix": 2,
        "subtree_end": torch.tensor([[3, 3, 3]]),
    },
    "causal must be True in a tree: a query sees keys of its path, got False": {
        "causal": False,
        "has_positions": True,
    },
    "validity must be an AttentionValidity, got Tensor": {"validity": torch.tensor([3])},
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals(message):
    with pytest.raises((TypeError, ValueError)) as error:
        ki.exact_mask_key(REFUSALS[message])
    assert str(error.value) == message


def test_an_unknown_field_raises():
    with pytest.raises(ValueError, match=r"^contract must be made of the fields causal, .*, got 'windows'$"):
        ki.exact_mask_key({"windows": (4, 0)})


CHAIN = torch.full((1, 3), 3)
RUNTIME = {
    "doc_ids": DOCS,
    "validity": TOKENS,
    "q_offset": 1,
    "key_validity": TOKENS,
    "prefix": 2,
    "subtree_end": CHAIN,
    "positions": CHAIN.cumsum(1),
    "cu_seqlens": (torch.tensor([0, 2, 3]), None),
}


@pytest.mark.parametrize("name", RUNTIME)
def test_rebuilding_with_other_metadata_than_the_key_says_raises(name):
    with_it, without = ki.exact_mask_key({name: RUNTIME[name]}), ki.exact_mask_key({})
    assert with_it.rebuild(**{name: RUNTIME[name]}) == ki.MaskContract(**{name: RUNTIME[name]})
    assert without.rebuild() == ki.MaskContract()
    with pytest.raises(ValueError, match=f"{name} must be given: the key says that it exists"):
        with_it.rebuild()
    with pytest.raises(ValueError, match=f"{name} must be None: the key says that there is none"):
        without.rebuild(**{name: RUNTIME[name]})


def test_rebuilding_with_slots_of_another_size_raises():
    key = ki.exact_mask_key(ki.MaskContract(validity=SLOTS))
    assert key.rebuild(validity=SLOTS).validity is SLOTS
    other = ki.attention_validity(valid_slot_counts=[1], base_block_tokens=4)
    for validity in (other, TOKENS):
        with pytest.raises(ValueError, match="validity must have slots of 2 tokens"):
            key.rebuild(validity=validity)
    with pytest.raises(ValueError, match="validity must be given"):
        key.rebuild(validity=ki.attention_validity())


def test_one_compilation_for_all_batches_and_tensors_stay_arguments():
    cache, built = ki.MaskKernelCache(4), []
    q = torch.randn(1, 4, 2, 8)

    def build(key):
        built.append(key)
        return lambda q, **runtime: ki.attention(q, q, q, key.rebuild(**runtime))

    def attend(docs):
        key = ki.exact_mask_key(ki.MaskContract(doc_ids=docs), dtype=q.dtype)
        return cache.get(key, build)(q, doc_ids=docs)

    docs = DOCS.clone()
    first = attend(docs)
    docs[0, 2] = 0  # in place
    second = attend(docs)
    assert not torch.equal(first, second)
    for ids, out in ((DOCS, first), (docs, second)):
        torch.testing.assert_close(out, ki.attention(q, q, q, ki.MaskContract(doc_ids=ids)))
    assert (len(built), cache.misses, cache.hits) == (1, 1, 1)


def test_the_least_recently_used_goes_first():
    cache = ki.MaskKernelCache(maxsize=2)
    a, b, c = (ki.exact_mask_key({"window": (w, 0)}) for w in (1, 2, 3))
    for key in (a, b, a, c):
        assert cache.get(key, lambda key: key.window[0]) == key.window[0]
    assert (a in cache, b in cache, c in cache, len(cache)) == (True, False, True, 2)
    assert (cache.hits, cache.misses, cache.evictions) == (1, 3, 1)
    cache.clear()
    assert (len(cache), cache.hits, cache.misses, cache.evictions) == (0, 0, 0, 0)


def test_a_build_that_fails_leaves_nothing_behind():
    cache, key = ki.MaskKernelCache(2), ki.exact_mask_key({})
    with pytest.raises(RuntimeError, match="no compiler"):
        cache.get(key, lambda _: (_ for _ in ()).throw(RuntimeError("no compiler")))
    assert key not in cache
    assert cache.get(key, lambda _: "kernel") == "kernel"
    assert (cache.misses, cache.hits) == (2, 0)


def test_threads_build_a_key_once():
    cache, key, built = ki.MaskKernelCache(2), ki.exact_mask_key({}), []
    ready = threading.Barrier(4)

    def work():
        ready.wait()
        cache.get(key, built.append)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(built), cache.misses, cache.hits) == (1, 1, 3)


def test_of_threads_whose_builds_fail_each_tries_and_none_leaves_anything():
    """The first two builds fail: their callers see that, a third builds the kernel, and the rest are served it."""
    cache, key, tries = ki.MaskKernelCache(2), ki.exact_mask_key({}), []
    ready = threading.Barrier(6)

    def build(_):
        tries.append(1)
        if len(tries) <= 2:
            raise RuntimeError("no compiler")
        return "kernel"

    def work():
        ready.wait()
        try:
            return cache.get(key, build)
        except RuntimeError as error:
            return str(error)

    with ThreadPoolExecutor(6) as pool:
        found = sorted(f.result() for f in [pool.submit(work) for _ in range(6)])
    assert found == ["kernel"] * 4 + ["no compiler"] * 2
    assert (len(tries), cache.misses, cache.hits, len(cache)) == (3, 3, 3, 1)


def test_a_build_that_fails_evicts_nobody():
    cache, kept, other = ki.MaskKernelCache(1), ki.exact_mask_key({}), ki.exact_mask_key({"causal": False})
    cache.get(kept, lambda _: "kept")
    with pytest.raises(KeyboardInterrupt):
        cache.get(other, lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    assert (kept in cache, other in cache, cache.evictions) == (True, False, 0)


def test_a_build_may_ask_for_another_kernel_and_itself_fail():
    cache, inner, outer = ki.MaskKernelCache(2), ki.exact_mask_key({}), ki.exact_mask_key({"causal": False})

    def build(_):
        cache.get(inner, lambda _: "inner")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cache.get(outer, build)
    assert (inner in cache, outer in cache, cache.misses) == (True, False, 2)


def test_a_cache_takes_keys_alone_and_at_least_one():
    with pytest.raises(TypeError, match="key must be made by exact_mask_key, got tuple"):
        ki.MaskKernelCache(2).get((1, 2), lambda _: None)
    with pytest.raises(ValueError, match="maxsize must be at least 1, got 0"):
        ki.MaskKernelCache(0)

"""What fuzzing found, one test each: each failed before its fix."""

import pytest
import torch

import kernel_index as ki
from kernel_index.kernels.sparse.block_sparse_attention.api import block_sparse_attention


@pytest.mark.parametrize("backend", ["reference", "chunked", "triton"])
def test_targets_may_be_strided(backend):
    """The Triton kernel read them as if they were contiguous: silently the loss of other classes."""
    hidden, weight = torch.randn(6, 8), torch.randn(5, 8)
    targets = torch.tensor([0, 4, 1, 3, 2, 2])
    strided = torch.stack([targets, 4 - targets], -1)[..., 0]
    expected = ki.token_log_probs(hidden, weight, targets, backend="reference")
    torch.testing.assert_close(ki.token_log_probs(hidden, weight, strided, backend=backend), expected)
    loss = ki.fused_linear_cross_entropy(hidden, weight, strided, backend=backend)
    torch.testing.assert_close(loss, -expected.mean())


def test_sparse_tensors_are_refused():
    """They count as floating point and failed deep inside a backend."""
    with pytest.raises(TypeError, match=r"x must be a dense tensor, got one of layout torch.sparse_coo"):
        ki.fused_relu_squared(torch.eye(3).to_sparse())


def test_numbers_beyond_64_bits_are_refused():
    """They raised OverflowError inside PyTorch."""
    hidden, weight, targets = torch.randn(2, 4), torch.randn(3, 4), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="ignore_index must fit into 64 bits"):
        ki.fused_linear_cross_entropy(hidden, weight, targets, ignore_index=-(10**30))
    with pytest.raises(ValueError, match="logit_scale must fit into 64 bits"):
        ki.fused_linear_cross_entropy(hidden, weight, targets, logit_scale=10**30)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_rows_of_nothing_are_refused_before_anything_is_gathered(backend):
    """PyTorch's RuntimeError named an argument that the caller has not."""
    with pytest.raises(ValueError, match="idx must be empty where src has no rows, got 2 indices"):
        ki.gather_rows(torch.empty(0, 2, 4), torch.tensor([0, 0]), backend=backend)


def test_a_block_larger_than_the_cache_costs_what_the_cache_holds():
    """The places of every token of a block were listed: 96 GB for a block of 10⁹ tokens."""

    def decoded(block_size):
        cache = ki.ContiguousKVCache(1, 1, 8, 1, 4)
        make = torch.Generator().manual_seed(0)
        x = torch.randn(1, 5, 1, 4, generator=make)
        cache.begin(5)
        return ki.moba_decode(x, cache, k=x, v=x, block_size=block_size, topk=1, backend="cpu")

    assert torch.equal(decoded(10**9), decoded(8))


@pytest.mark.parametrize("device", ["no-such-device", "cuda:-3", "cpu:x"])
def test_devices_that_are_not_here_are_refused(device):
    """PyTorch's RuntimeError passed through, and for one of them an AssertionError."""
    with pytest.raises(ValueError, match="device must be a device of this machine, got"):
        ki.doc_window_mask(1, 4, device=device)
    with pytest.raises(ValueError, match="device must be a device of this machine, got"):
        ki.ContiguousKVCache(1, 1, 8, 1, 4, device=device)


def test_ids_without_values_are_refused():
    """NotImplementedError: there is no data to copy."""
    ids = torch.zeros(1, 4, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match="doc_ids must hold values to be used on cpu"):
        ki.doc_window_mask(1, 4, device="cpu", doc_ids=ids)
    assert ki.doc_window_mask(1, 4, device="meta", doc_ids=ids).shape == (1, 1, 4, 4)


def test_a_missing_source_is_a_type_error():
    """None passed the check, as the second source may be absent, and failed with an AttributeError."""
    idx = torch.tensor([0])
    with pytest.raises(TypeError, match=r"src must be a torch\.Tensor, got NoneType"):
        ki.gather_rows(None, idx)
    with pytest.raises(TypeError, match=r"b must be a torch\.Tensor, got NoneType"):
        ki.gather_rows_pair(torch.ones(1, 1, 1), None, idx)


def test_picks_of_keys_that_are_not_there_are_refused():
    """An IndexError from inside."""
    x = torch.ones(1, 3, 1, 2)
    picked = ki.lightning_indexer(x, x[:, :, 0], torch.ones(1, 3, 1), topk=3)
    with pytest.raises(ValueError, match=r"selection\.indices must be below k's 2 keys, got 2"):
        ki.lightning_indexer_loss(picked, x, x[:, :2])


def test_queries_without_heads_are_refused():
    """A ZeroDivisionError from the router."""
    cache = ki.ContiguousKVCache(1, 1, 8, 1, 4)
    cache.begin(1)
    x = torch.ones(1, 1, 1, 4)
    with pytest.raises(ValueError, match="q must be of at least one head"):
        ki.moba_decode(x[:, :, :0], cache, k=x, v=x, block_size=2, topk=1)
    with pytest.raises(ValueError, match="q must be of at least one head"):
        ki.moba_attention(x[:, :, :0], x, x, block_size=2, topk=1)
    with pytest.raises(ValueError, match="q must be of at least one head"):
        ki.clustered_sparse_attention(x[:, :, :0], x, x, config=ki.ClusteredSparseConfig(block_size=2, topk=1))


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_exact_token_attention_of_no_query_heads_has_gradients_of_zero(backend):
    q, k = torch.randn(1, 3, 0, 4, requires_grad=True), torch.randn(1, 5, 2, 4, requires_grad=True)
    out = ki.exact_token_attention(q, k, k, torch.zeros(1, 3, 2, 1, dtype=torch.int64), backend=backend)
    out.sum().backward()
    assert out.shape == q.shape == q.grad.shape
    assert not k.grad.any()


@pytest.mark.parametrize("backend", ["auto", "chunked", "triton", "reference"])
def test_a_loss_over_no_classes_is_refused(backend):
    """Chunks of no logits divided by zero."""
    hidden, weight, targets = torch.randn(2, 4), torch.empty(0, 4), torch.tensor([-100, -100])
    for function in (ki.fused_linear_cross_entropy, ki.token_log_probs):
        with pytest.raises(ValueError, match="weight must have a row for at least one class, got shape \\(0, 4\\)"):
            function(hidden, weight, targets, backend=backend)


def test_block_sparse_attention_over_values_without_channels():
    """A reshape to -1 of no elements, inside the CPU's backend, which says now that it needs some."""
    q, k = torch.randn(1, 4, 2, 3), torch.randn(1, 4, 1, 3)
    selected, empty = torch.zeros(1, 4, 1, 1, dtype=torch.int64), torch.randn(1, 4, 1, 0)
    assert block_sparse_attention(q, k, empty, selected, block_size=2)[0].shape == (1, 4, 2, 0)
    config = ki.ClusteredSparseConfig(block_size=2, topk=1)
    assert ki.clustered_sparse_attention(q, k, empty, config=config).shape == (1, 4, 2, 0)
    assert ki.moba_attention(q, k, empty, block_size=2, topk=1).shape == (1, 4, 2, 0)
    for function, more in ((block_sparse_attention, {"selected": selected, "block_size": 2}),
                           (ki.clustered_sparse_attention, {"config": config})):  # fmt: skip
        with pytest.raises(ki.Ineligible, match="cpu: needs head sizes of at least 1"):
            function(q, k, empty, **more, backend="cpu")


@pytest.mark.parametrize("missing", ["branch_out", "h_post", "h_res", "h_pre"])
def test_a_coefficient_of_none_is_refused(missing):
    """``h_post=None`` meant within that nothing is merged, and an index was out of range."""
    call = {"hidden": torch.randn(1, 2, 4, 3), "branch_out": torch.randn(1, 2, 3)}
    call |= {"h_post": torch.ones(4), "h_res": torch.eye(4), "h_pre": torch.ones(4)}
    for function, names in (
        (ki.mhc_branch_input, ("hidden", "h_pre")),
        (ki.mhc_merge, ("hidden", "branch_out", "h_post", "h_res")),
        (ki.mhc_merge_and_branch_input, tuple(call)),
    ):
        if missing in names:
            with pytest.raises(TypeError, match=f"{missing} must be"):
                function(**{n: None if n == missing else call[n] for n in names})


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantised_rows_are_declined_by_the_kernel():
    """The registered operator has no kernel for them: PyTorch's ``NotImplementedError``."""
    rows = torch.quantize_per_tensor(torch.randn(3, 2, 4), 0.1, 0, torch.qint8)
    for function, sources in ((ki.gather_rows, (rows,)), (ki.gather_rows_pair, (torch.randn(3, 2, 4), rows))):
        with pytest.raises(ki.Ineligible, match="triton: needs numbers that are not quantised"):
            function(*sources, torch.tensor([1]), backend="triton")

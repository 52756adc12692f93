"""The loss with the vocabulary spread over two gloo processes: the same loss and gradients as in one."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import kernel_index as ki

EVERY = {"softcap": 15.0, "logit_scale": 0.5, "label_smoothing": 0.1, "z_loss": 1e-3}
CALLS = (
    ("plain", {}, False),
    ("every option", EVERY | {"reduction": "sum"}, True),
    ("per token", EVERY | {"reduction": "none", "valid_vocab": 30}, True),
    ("small chunks", {"chunk_size": 3, "valid_vocab": 30}, False),
    ("a process without classes", {"valid_vocab": 15}, True),
)
VOCAB, WIDTH, TOKENS = 37, 12, 23  # 19 rows here and 18 there


def inputs(dtype):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype)
    weight, bias = (torch.randn(*s, generator=generator).to(dtype) for s in ((VOCAB, WIDTH), (VOCAB,)))
    targets = torch.randint(0, 15, (TOKENS,), generator=generator)
    targets[::5] = -100
    return hidden, weight, bias, targets


def whole(dtype, options, with_bias):
    hidden, weight, bias, targets = inputs(dtype)
    leaves = [t.double().requires_grad_() for t in (hidden, weight, bias)]
    used = leaves if with_bias else leaves[:2]
    loss = ki.fused_linear_cross_entropy(
        *leaves[:2], targets, bias=leaves[2] if with_bias else None, **options, backend="reference"
    )
    return loss, torch.autograd.grad(loss, used, torch.arange(1.0, 1 + loss.numel()).double().view(loss.shape))


def worker(rank, port, dtype):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (2,))
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for name, options, with_bias in CALLS:
        hidden, weight, bias, targets = inputs(dtype)
        hidden.requires_grad_()
        shards = [distribute_tensor(t, mesh, [Shard(0)]).detach().requires_grad_() for t in (weight, bias)]
        with ki.receipts() as log:
            loss = ki.fused_linear_cross_entropy(
                hidden, shards[0], targets, bias=shards[1] if with_bias else None, **options
            )
        assert [r.ran for r in log] == ["sharded"], name
        upstream = torch.arange(1.0, 1 + loss.numel()).view(loss.shape)
        used = [hidden, *shards] if with_bias else [hidden, shards[0]]
        grads = torch.autograd.grad(loss, used, upstream)
        expected, expected_grads = whole(dtype, options, with_bias)
        torch.testing.assert_close(loss.double(), expected.detach(), **tolerance, msg=lambda m, n=name: f"{n}: {m}")
        for actual, exact in zip(grads, expected_grads, strict=True):
            full = actual.full_tensor() if isinstance(actual, DTensor) else actual
            torch.testing.assert_close(full.double(), exact, **tolerance, msg=lambda m, n=name: f"{n}: {m}")
    hidden, weight, _, targets = inputs(dtype)
    shard = distribute_tensor(weight, mesh, [Shard(0)])
    logs = ki.token_log_probs(hidden, shard, targets)
    exact = ki.token_log_probs(hidden.double(), weight.double(), targets, backend="reference")
    torch.testing.assert_close(logs.double(), exact, **tolerance)
    same = ki.token_log_probs(hidden, shard, targets, backend="reference")
    torch.testing.assert_close(same.double(), exact, **tolerance)
    _assert_lse_is_the_whole_vocabularys(mesh, dtype, tolerance)
    _assert_stats_are_the_whole_vocabularys(mesh, dtype, tolerance)
    _assert_offset_changes_nothing(mesh, dtype)
    with pytest.raises(ki.Ineligible, match="sharded over the vocabulary on a mesh of one dimension"):
        ki.token_log_probs(hidden, distribute_tensor(weight, mesh, [Replicate()]), targets, backend="sharded")
    dist.destroy_process_group()


def _assert_lse_is_the_whole_vocabularys(mesh, dtype, tolerance):
    def call(hidden, weight, **backend):
        out = ki.fused_linear_cross_entropy_with_lse(hidden, weight, targets, **EVERY, **backend)
        return out, torch.autograd.grad(out.loss + out.lse.cos().sum() + out.z_loss, (hidden, weight))

    hidden, weight, _, targets = inputs(dtype)
    shard = distribute_tensor(weight, mesh, [Shard(0)])
    out, (d_hidden, d_weight) = call(hidden.requires_grad_(), shard.detach().requires_grad_())
    exact, exact_grads = call(*(x.detach().double().requires_grad_() for x in (hidden, weight)), backend="reference")
    for a, e in zip((*out, d_hidden, d_weight.full_tensor()), (*exact, *exact_grads), strict=True):
        torch.testing.assert_close(a.double(), e, **tolerance)


STATS = (
    {},
    {"temperature": 0.7, "top_k": 9, "softcap": 15.0},
    {"top_k": 36, "top_p": 0.8},
    {"top_p": 0.8},
    {"top_k": 25, "valid_vocab": 30},
    {"top_p": 0.9, "valid_vocab": 15},  # the second process has padding alone
)


def _assert_stats_are_the_whole_vocabularys(mesh, dtype, tolerance):
    """Logits that both dtypes hold exactly, in equal pairs that lie on two processes: the kept class is the smaller."""
    hidden = torch.eye(7)
    order = torch.stack([torch.randperm(VOCAB, generator=torch.Generator().manual_seed(i)) for i in range(7)], -1)
    weight, targets = order // 2 / 4.0, torch.tensor([0, 3, -100, 7, 9, 11, 14])

    def grads(found, leaves):
        g = torch.linspace(-1, 1, 7)
        loss = (found.log_prob * g).sum() + (found.entropy * g.cos()).sum() + (found.log_support * g.exp()).sum()
        return torch.autograd.grad(loss, leaves)

    for call in STATS:
        exact = [x.double().requires_grad_() for x in (hidden, weight)]
        whole = ki.token_stats(*exact, targets, **call, backend="reference")
        expected = *whole[:3], *grads(whole, exact)
        here = hidden.to(dtype).requires_grad_()
        shard = distribute_tensor(weight.to(dtype), mesh, [Shard(0)]).detach().requires_grad_()
        with ki.receipts() as log:
            found = ki.token_stats(here, shard, targets, **call)
        assert [r.ran for r in log] == ["sharded"]
        d_hidden, d_weight = grads(found, (here, shard))
        assert torch.equal(found.predicted, whole.predicted)
        for a, e in zip((*found[:3], d_hidden, d_weight.full_tensor()), expected, strict=True):
            torch.testing.assert_close(a.double(), e, **tolerance, msg=lambda m, c=call: f"{c}: {m}")
    _assert_rows_of_a_group(mesh.get_group(), hidden, weight, targets)


def _assert_rows_of_a_group(group, hidden, weight, targets):
    """Plain rows of a process, as many on each."""
    weight, bias = weight[:36], torch.arange(36.0) % 5
    half = slice(18 * group.rank(), 18 * group.rank() + 18)
    rows, own = (x[half].clone().requires_grad_() for x in (weight, bias))
    whole, all_bias = (x.clone().requires_grad_() for x in (weight, bias))
    for backend in ("auto", "reference"):
        found = ki.token_stats(hidden, rows, targets, bias=own, top_k=20, top_p=0.9, group=group, backend=backend)
        exact = ki.token_stats(hidden, whole, targets, bias=all_bias, top_k=20, top_p=0.9, backend="reference")
        for a, e in zip(found, exact, strict=True):
            torch.testing.assert_close(a, e)
        actual = torch.autograd.grad(sum(x.sum() for x in found[:3]), (rows, own))
        expected = torch.autograd.grad(sum(x.sum() for x in exact[:3]), (whole, all_bias))
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e[half])
    with pytest.raises(ValueError, match=r"valid_vocab must be at most the 36 rows"):
        ki.token_stats(hidden, rows, targets, group=group, valid_vocab=37)


def _assert_offset_changes_nothing(mesh, dtype):
    """Logits 0 and 1, which both dtypes hold exactly beside the offset."""
    offset = 2.0**20 if dtype == torch.float32 else 2.0**7
    hidden, weight = torch.eye(2, dtype=dtype), (torch.arange(2 * VOCAB).view(VOCAB, 2) % 3 == 0).to(dtype)
    targets, smoothing = torch.tensor([0, 20]), {"label_smoothing": 0.1}
    exact = ki.fused_linear_cross_entropy(hidden.double(), weight.double(), targets, **smoothing, backend="reference")
    shards = [distribute_tensor(t, mesh, [Shard(0)]) for t in (weight, torch.full((VOCAB,), offset, dtype=dtype))]
    loss = ki.fused_linear_cross_entropy(hidden, shards[0], targets, bias=shards[1], **smoothing)
    torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.thorough_if(when=lambda dtype: dtype == torch.bfloat16)
@pytest.mark.thorough
def test_two_processes_equal_one(dtype):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, args=(port, dtype), nprocs=2)


def test_a_whole_weight_is_no_shard():
    hidden, weight, _, targets = inputs(torch.float32)
    with pytest.raises(ki.Ineligible, match="needs a weight sharded over the vocabulary"):
        ki.fused_linear_cross_entropy(hidden, weight, targets, backend="sharded")

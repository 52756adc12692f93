"""Two processes compute what one computes, and what two have saved one can continue."""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from kernel_index.lm import checkpoint as ckpt
from kernel_index.lm.distributed import split_heads
from kernel_index.lm.generate import generate, load_model
from kernel_index.lm.train import Trainer, read_metrics
from tests.lm.two_processes import RESIDUALS, run_config, small_model, split_run

EPS = torch.finfo(torch.float32).eps
PLAIN = {"KERNEL_INDEX_BACKEND": "reference"}  # the arithmetic is at stake here, not the compiler


def both(*args, **environment):
    """Run the module in two processes that find each other, as torchrun would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **environment}
    command = [sys.executable, "-m", "tests.lm.two_processes", *map(str, args)]
    running = [
        subprocess.Popen(command, env={**common, "RANK": str(r)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for r in range(2)
    ]
    printed = [p.communicate(timeout=240)[0].decode() for p in running]
    assert [p.returncode for p in running] == [0, 0], "\n".join(printed)


def alone(small_corpus, folder, **changes):
    trainer = Trainer.start(run_config(small_corpus, backend="reference", **changes), folder)
    return [r.loss for r in trainer.steps()]


@pytest.fixture(scope="module")
def together(small_corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "two"
    both("train", folder, small_corpus, **PLAIN)
    return folder


@pytest.mark.thorough
def test_sharded_training_gives_the_losses_of_one_process(together, small_corpus, tmp_path):
    """Splitting a batch moves the losses by rounding; how far, a split within one process tells."""
    whole = alone(small_corpus, tmp_path / "one")
    split = alone(small_corpus, tmp_path / "accumulated", batch_rows=2, accumulate=2)
    losses = [m.loss for m in read_metrics(together)]
    assert len(losses) == len(whole) == len(split)
    moved = max(abs(a - b) for a, b in zip(whole, split, strict=True))
    for ours, expected in zip(losses, whole, strict=True):
        assert abs(ours - expected) <= 8 * moved + 64 * EPS * expected
    assert float((together / "share.json").read_text()) < 0.6, "each process keeps half of the parameters"


@pytest.mark.thorough
def test_sharded_blocks_without_a_feed_forward_layer(tmp_path):
    """The bias of such a block is added behind it, where its own parameters are gathered no more."""
    both("sharded", tmp_path, **PLAIN)
    for residual in RESIDUALS:
        model, batch = small_model(residual=residual, hidden=0)
        loss = model.loss(batch)
        loss.backward()
        parts = [torch.load(tmp_path / f"{residual}-{rank}.pt") for rank in range(2)]
        torch.testing.assert_close(sum(p["loss"] for p in parts) / 2, loss.detach(), rtol=1e-5, atol=0)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(
                parts[0][name], parameter.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.thorough
def test_one_process_continues_what_two_have_saved(together, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(together, folder)
    shutil.rmtree(folder / "checkpoint-00000004")
    third = read_metrics(together)[2].loss
    resumed = Trainer.resume(folder)
    assert resumed.step == 2
    saved = ckpt.read(folder).optimizer
    for name, tensor in ckpt.optimizer_tensors(resumed.model, resumed.optimizer).items():
        assert torch.equal(tensor, saved[name]), name
    losses = [r.loss for r in resumed.steps()]
    assert len(losses) == 2
    assert abs(losses[0] - third) <= 64 * EPS * third, "the same weights on the same rows"
    assert "".join(generate(load_model(together), "def ", 5)), "a sharded checkpoint also generates"


@pytest.mark.thorough
def test_two_processes_continue_what_one_has_saved(small_corpus, tmp_path):
    whole = alone(small_corpus, tmp_path / "one")
    shutil.rmtree(tmp_path / "one" / "checkpoint-00000004")
    both("resume", tmp_path / "one", **PLAIN)
    found = json.loads((tmp_path / "one" / "resumed.json").read_text())
    assert found["processes"] == 2
    assert len(found["losses"]) == 2
    assert abs(found["losses"][0] - whole[2]) <= 64 * EPS * whole[2], "the same weights on the same rows"
    assert ckpt.read(tmp_path / "one").step == 4


def test_tensor_parallel_loss_and_gradients(tmp_path):
    both("tensor_parallel", tmp_path)
    found = torch.load(tmp_path / "gradients.pt")
    assert found.pop("ran sharded").all()
    model, batch = small_model()
    assert found.pop("heads here") == model.config.heads * model.config.head_dim // 2
    loss = model.loss(batch)
    loss.backward()
    exact, _ = small_model()
    exact = exact.double()
    exact_loss = exact.loss(batch)
    exact_loss.backward()
    assert abs(found.pop("loss") - exact_loss) <= 2 * abs(loss - exact_loss) + 16 * EPS * exact_loss
    doubles = dict(exact.named_parameters())
    for name, parameter in model.named_parameters():
        right = doubles[name].grad
        allowed = 2 * (parameter.grad - right).abs().max() + 64 * EPS * right.abs().max()
        assert (found[name] - right).abs().max() <= allowed, name


@pytest.mark.thorough
def test_a_tensor_parallel_run_takes_the_steps_of_one_process(small_corpus, tmp_path):
    """Dropout included: every process draws the same masks.  One process then continues it."""
    both("train_split", tmp_path / "two", small_corpus)
    trainer = Trainer.start(split_run(small_corpus), tmp_path / "one")
    alone = [(r.loss, r.gradient_norm, r.validation) for r in trainer.steps()]
    found = [(m.loss, m.gradient_norm, m.validation) for m in read_metrics(tmp_path / "two")]
    for (loss, norm, validation), (expected, expected_norm, expected_validation) in zip(found, alone, strict=True):
        assert loss == pytest.approx(expected, rel=256 * EPS)
        assert norm == pytest.approx(expected_norm, rel=2**14 * EPS)
        assert (validation is None) == (expected_validation is None)
    assert Trainer.resume(tmp_path / "two").step == 4


def test_tensor_parallelism_names_what_it_cannot_split():
    class Mesh:
        def size(self):
            return 3

    model, _ = small_model()
    with pytest.raises(ValueError, match="heads must be a multiple of the 3 processes, got 2"):
        split_heads(model, Mesh())
    model.config = replace(model.config, pattern="AM", windows=(None, None))
    with pytest.raises(ValueError, match="pattern must be of A blocks"):
        split_heads(model, Mesh())

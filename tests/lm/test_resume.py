"""A run goes on where it stopped: the same bits, the same data, nothing that is broken."""

import json
import shutil
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import kernel_index as ki
from kernel_index.core.force import STRICT
from kernel_index.lm import checkpoint as ckpt
from kernel_index.lm.train import Trainer, TrainingError, forced_backend, read_metrics
from tests.lm.runs import config, losses


@pytest.mark.parametrize("stop_after", [4, 7])
def test_resume_continues_bit_for_bit(finished, corpus, tmp_path, stop_after):
    """Stopping at a checkpoint or between two: steps after the checkpoint are done again, with the same bits."""
    folder = tmp_path / "run"
    trainer = Trainer.start(config(corpus), folder)
    for report in trainer.steps():
        if report.step == stop_after:
            break
    del trainer
    resumed = Trainer.resume(folder)
    assert resumed.step == 4
    list(resumed.steps())
    assert losses(folder) == losses(finished.folder)
    for name, tensor in finished.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_changed_data_is_refused(finished, corpus, tmp_path):
    folder = tmp_path / "run"
    trainer = Trainer.start(config(corpus), folder)
    trainer.save()
    settings = json.loads((folder / "config.json").read_text())
    smaller = tmp_path / "smaller"
    smaller.mkdir()
    for path in sorted(corpus.iterdir())[:50]:
        (smaller / path.name).write_bytes(path.read_bytes())
    (folder / "config.json").write_text(json.dumps({**settings, "data": str(smaller)}))
    with pytest.raises(ckpt.CheckpointError, match="the data has changed"):
        Trainer.resume(folder)


def test_other_bytes_in_as_many_rows_are_changed_data(corpus, tmp_path):
    own = shutil.copytree(corpus, tmp_path / "own")
    Trainer.start(config(own), tmp_path / "run").save()
    for path in own.iterdir():
        path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(ckpt.CheckpointError, match="the data has changed"):
        Trainer.resume(tmp_path / "run")


def test_a_checkpoint_from_before_the_digest_is_read(corpus, tmp_path):
    """It holds a random generator's state, which nothing needs any more, and no digest of the data."""
    Trainer.start(config(corpus, steps=4), tmp_path / "run").save()
    folder = ckpt.newest(tmp_path / "run")
    state = json.loads((folder / "state.json").read_text())
    del state["data"]
    (folder / "state.json").write_text(json.dumps(state))
    save_file({":rng": torch.get_rng_state()}, folder / "optimizer.safetensors")
    assert len(list(Trainer.resume(tmp_path / "run").steps())) == 4


def test_a_run_that_was_made_longer_goes_on_to_its_new_end(finished, corpus, tmp_path):
    """Also when it is interrupted there: the second resume names no steps."""
    whole = Trainer.start(config(corpus, steps=15), tmp_path / "whole")
    list(whole.steps())
    run = tmp_path / "run"
    list(Trainer.start(config(corpus, steps=4), run).steps())
    longer = Trainer.resume(run, steps=15, checkpoint_every=3)
    for report in longer.steps():
        if report.step == 9:
            break
    again = Trainer.resume(run)
    assert (again.step, again.config.steps, again.config.checkpoint_every) == (9, 15, 3)
    list(again.steps())
    assert [m.step for m in read_metrics(run)] == list(range(1, 16))
    with pytest.raises(ValueError, match="steps must be at least the 15 steps already done, got 14"):
        Trainer.resume(run, steps=14)


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(finished, corpus, tmp_path):
    run = tmp_path / "run"
    for report in Trainer.start(config(corpus), run).steps():
        if report.step == 2:
            break
    assert ckpt.newest(run) is None
    list(Trainer.resume(run).steps())
    assert losses(run) == losses(finished.folder)


def test_what_is_drawn_between_steps_changes_no_mask(finished, corpus, tmp_path):
    """A sample, a validation, the caller's own numbers: dropout depends on seed, step and rows alone."""
    trainer = Trainer.start(config(corpus), tmp_path / "run")
    assert trainer.config.model.dropout > 0
    for _ in trainer.steps():
        torch.rand(3)
    assert losses(trainer.folder) == losses(finished.folder)


def test_processes_that_share_a_step_drop_other_elements(corpus, tmp_path):
    """With heads dealt out, every process sees all rows and must drop the same."""
    trainer = Trainer(config(corpus), tmp_path / "run")
    seeds = {}
    for row_shards in (2, 1):
        trainer.row_shards = row_shards
        for rank in range(2):
            trainer.group = replace(trainer.group, rank=rank, size=2)
            seeds[row_shards, rank] = trainer._seed_of_step()
    assert seeds[2, 0] != seeds[2, 1]
    assert seeds[1, 0] == seeds[1, 1] == seeds[2, 0]
    trainer.step = 1
    assert trainer._seed_of_step() not in seeds.values()


def test_two_runs_side_by_side_each_have_their_backend(corpus, tmp_path):
    runs = [Trainer.start(config(corpus, steps=2, backend=b), tmp_path / b) for b in ("reference", "auto")]
    for _ in zip(*(run.steps() for run in runs), strict=True):
        with ki.receipts() as log:
            ki.fused_relu_squared(torch.ones(3))
        assert log[0].forced_by is None
    assert {r.ran for r in runs[0].receipts} == {"reference"}
    assert {r.forced_by for r in runs[0].receipts} == {"ki.force"}
    assert {r.forced_by for r in runs[1].receipts} == {None}
    with ki.receipts() as log:
        runs[0].evaluate()
    assert {r.ran for r in log} == {"reference"}


def test_a_forced_backend_leaves_an_open_strict_block_strict():
    with ki.strict():
        with forced_backend("reference"):
            assert STRICT[0] == 1
        assert STRICT[0] == 1
    assert STRICT[0] == 0


def test_weights_that_are_not_finite_take_no_checkpoints_place(corpus, tmp_path):
    trainer = Trainer.start(config(corpus, steps=4, checkpoint_every=2), tmp_path / "run")
    steps = trainer.steps()
    for _ in range(3):
        next(steps)
    with torch.no_grad():
        trainer.model.embed.weight[-1, 0] = float("inf")  # of a token that no text has: the loss stays finite
    with pytest.raises(TrainingError, match=r"not finite after step 4: embed\.weight; nothing was saved; .*00000002"):
        next(steps)
    assert ckpt.read(trainer.folder).step == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip": -1.0}, "clip must be finite and at least 0, got -1.0"),
        ({"clip": 0.0}, "clip must be above 0"),
        ({"clip": float("nan")}, "clip must be finite"),
        ({"learning_rate": float("inf")}, "learning_rate must be finite and at least 0, got inf"),
        ({"weight_decay": -0.1}, "weight_decay must be finite"),
        ({"seed": -1}, r"seed must be at least 0 and below 2\*\*63, got -1"),
        ({"seed": 2**63}, "seed must be at least 0"),
    ],
)
def test_numbers_that_would_ruin_a_run_are_refused(corpus, changes, message):
    with pytest.raises(ValueError, match=message):
        config(corpus, **changes)


@pytest.mark.parametrize(("fused", "device"), [(True, "meta"), (False, "cpu")])
def test_a_fused_optimizer_counts_its_steps_where_its_parameters_are(fused, device):
    """On a GPU it refuses a count on the host, where the others want it; the meta device stands for the GPU."""
    model = torch.nn.Linear(2, 3, bias=False, device="meta")
    optimizer = SimpleNamespace(defaults={"fused": fused}, state=defaultdict(dict))
    saved = {"step": torch.tensor(4.0), "exp_avg": torch.ones(3, 2), "exp_avg_sq": torch.ones(3, 2)}
    ckpt.load_optimizer(model, optimizer, {f"weight:{key}": value for key, value in saved.items()})
    assert optimizer.state[model.weight]["step"].device.type == device
    assert optimizer.state[model.weight]["exp_avg"].device.type == "meta"

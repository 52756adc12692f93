"""What a kill, a full disk and a hostile file do to a checkpoint: nothing to the last good one, and one clear error."""

import errno
import json
import pickle
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save, save_file

from kernel_index.lm import checkpoint as ckpt
from kernel_index.lm import sharded_weights
from kernel_index.lm.generate import load_model
from kernel_index.lm.model import LanguageModel
from kernel_index.lm.train import RunConfig, Trainer, read_metrics
from tests.lm.killed_saving import tensors


def number_of(saved: ckpt.Checkpoint) -> int:
    """Which save a checkpoint is of, after a look at every value of it."""
    number = saved.state["number"]
    assert saved.step == number % 100
    assert torch.equal(saved.model["weight"], torch.full((3, 5), float(number)))
    assert torch.equal(saved.model["bias"], torch.full((5,), -float(number)))
    assert saved.optimizer[":rng"].tolist() == [number] * 4
    return number


@pytest.mark.parametrize(("first", "second"), [(1, 2), (1, 101)], ids=["the next step", "the same step again"])
def test_a_kill_at_any_moment_of_a_save_loses_nothing(tmp_path, first, second):
    command = [sys.executable, "-m", "tests.lm.killed_saving", str(tmp_path), str(first), str(second)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    kills = int(done.stdout)
    found = [number_of(ckpt.read(tmp_path / str(at))) for at in range(1, kills + 2)]
    assert found == sorted(found), "once the new one is there it stays"
    assert (found[0], found[-1], kills > 12) == (first, second, True)
    for at in range(1, kills + 2):  # and the run goes on from each
        ckpt.write(tmp_path / str(at), tensors(3))
        assert number_of(ckpt.read(tmp_path / str(at))) == 3
        left = {p.name for p in (tmp_path / str(at)).iterdir()}
        assert len(left) == 2, "no draft is left, nor what was kept for the case"


def failure_of_writing(run, step) -> str:
    try:
        ckpt.write(run, tensors(step))
    except ckpt.CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("call", ["fsync", "rename"])
@pytest.mark.parametrize("step", [2, 101], ids=["the next step", "the same step again"])
def test_a_disk_that_is_full_at_any_moment(tmp_path, monkeypatch, call, step):
    ckpt.write(tmp_path, tensors(1))
    real = getattr(ckpt.os, call)
    failed = 0
    for at in range(1, 20):
        seen = []

        def full(*args, at=at, seen=seen):
            seen.append(args)
            if len(seen) == at:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args)

        monkeypatch.setattr(ckpt.os, call, full)
        message = failure_of_writing(tmp_path, step)
        monkeypatch.setattr(ckpt.os, call, real)
        if len(seen) < at:
            break
        failed += 1
        assert re.search(r"cannot write .*: No space left on device; the last good checkpoint is", message)
        assert number_of(ckpt.read(tmp_path)) in (1, step)
        assert not list(tmp_path.glob(".*"))
    assert failed
    assert number_of(ckpt.read(tmp_path)) == step


@pytest.mark.parametrize("step", [2, 101], ids=["the next step", "the same step again"])
def test_a_power_failure_finds_what_was_promised(tmp_path, monkeypatch, step):
    """Each file is on the disk before the folder that names it, the draft before it gets its final name, and the new
    name before the old checkpoint is dropped.
    """
    ckpt.write(tmp_path, tensors(1))
    events = []
    sync, rename, drop = ckpt.os.fsync, ckpt.os.rename, ckpt._drop

    def synced(handle):
        status = ckpt.os.fstat(handle)
        found = [p for p in (tmp_path, *tmp_path.rglob("*")) if ckpt.os.path.samestat(p.stat(), status)]
        events.append(("on the disk", found[0].relative_to(tmp_path).as_posix()))
        sync(handle)

    def renamed(old, new):
        events.append(("renamed to", new.name))
        rename(old, new)

    def dropped(folder):
        if folder.exists():
            events.append(("dropped", folder.name))
        drop(folder)

    monkeypatch.setattr(ckpt.os, "fsync", synced)
    monkeypatch.setattr(ckpt.os, "rename", renamed)
    monkeypatch.setattr(ckpt, "_drop", dropped)
    final = ckpt.write(tmp_path, tensors(step)).name
    draft = f".{final}.draft"
    files = ("model.safetensors", "optimizer.safetensors", "state.json")
    kept = [("renamed to", f"{final}.before")] if step == 101 else []
    old = [("dropped", f"{final}.before")] if step == 101 else []
    assert events == [
        *(("on the disk", f"{draft}/{name}") for name in files),
        ("on the disk", draft),
        *kept,
        ("renamed to", final),
        ("on the disk", "."),
        *old,
    ]


# Hostile files


class Hostile:
    """Runs code where it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("a checkpoint was unpickled",))


GOOD = save({"a": torch.ones(2)})
HUGE = struct.pack("<Q", 2**62) + b"{}"
BOMB = pickle.dumps(Hostile())
CONTENTS = {
    "empty": b"",
    "truncated": GOOD[: len(GOOD) // 2],
    "cut in the header": GOOD[:12],
    "a huge header": HUGE,
    "a header that points outside": struct.pack("<Q", 56)
    + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,99999]}}'[:56].ljust(56),
    "a pickle": BOMB,
    "a torch file": None,
    "nested JSON": b"[" * 100_000,
    "a list": b"[]",
    "a number": b"3",
    "no step": b"{}",
    "a step that is none": b'{"step": "1"}',
    "a negative step": b'{"step": -1}',
    "not UTF-8": b"\xff\xfe{",
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "state.json", "part-00000-of-00001.safetensors"]
)
def test_a_hostile_file_is_an_error_that_names_the_checkpoint(tmp_path, name, content):
    ckpt.write(tmp_path, tensors(1))
    folder = ckpt.write(tmp_path, tensors(2))
    if content == "a torch file":
        torch.save({"weight": Hostile()}, folder / name)
    else:
        (folder / name).write_bytes(CONTENTS[content])
    with pytest.raises(ckpt.CheckpointError, match=r"cannot read .*00000002: .*also there: checkpoint-00000001"):
        ckpt.read(tmp_path)
    assert number_of(ckpt.read(tmp_path / "checkpoint-00000001")) == 1


def test_a_checkpoint_is_never_unpickled(tmp_path):
    """PyTorch's own format for sharded checkpoints keeps a pickle in ``.metadata``."""
    folder = ckpt.write(tmp_path, tensors(1))
    for name in (".metadata", "__0_0.distcp", "data.pkl"):
        (folder / name).write_bytes(BOMB)
    assert number_of(ckpt.read(tmp_path)) == 1


# Parts of several processes


def write_shards(folder, contents):
    folder.mkdir()
    (folder / "state.json").write_text('{"step": 1}')
    for rank, content in enumerate(contents):
        (folder / sharded_weights.file_name(rank, len(contents))).write_bytes(content)


def shard(rows, shape=(4, 2), **more):
    return save({"model/w": torch.ones(rows, 2), **more}, {"shapes": json.dumps({"model/w": list(shape)})})


def test_shards_make_up_the_whole(tmp_path):
    only_first = {"optimizer/:rng": torch.zeros(3, dtype=torch.uint8)}
    write_shards(tmp_path / "checkpoint-00000001", [shard(3, **only_first), shard(1), shard(0)])
    saved = ckpt.read(tmp_path)
    assert torch.equal(saved.model["w"], torch.ones(4, 2))
    assert saved.optimizer.keys() == {":rng"}


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ([shard(3), shard(3)], r"the shards of model/w must make up \[4, 2\], got \[6, 2\]"),
        ([shard(3), save({"model/w": torch.ones(1, 3)}, {"shapes": "{}"})], "must be slices of one tensor"),
        ([shard(3), save({"model/w": torch.ones(1, 2).int()}, {"shapes": "{}"})], "must be slices of one tensor"),
        (
            [shard(4, **{"model/x": torch.ones(1)}), shard(0, **{"model/x": torch.ones(1)})],
            "model/x must be in one file, got it in 2",
        ),
        ([shard(4), save({"model/w": torch.ones(1, 2)})], "__metadata__"),
        ([shard(4), save({}, {"shapes": "[]"})], "the shapes of a file must be an object"),
        ([shard(4), save({}, {"dims": '{"model/w": 2}'})], "model/w must be sharded along one of its 2 dimensions"),
        ([shard(4, other=torch.ones(1)), shard(0)], "not enough values"),
        ([shard(4, **{"elsewhere/x": torch.ones(1)}), shard(0)], "elsewhere"),
    ],
)
def test_shards_that_do_not_fit(tmp_path, contents, message):
    write_shards(tmp_path / "checkpoint-00000001", contents)
    with pytest.raises(ckpt.CheckpointError, match=message):
        ckpt.read(tmp_path)


def test_a_missing_file(tmp_path):
    write_shards(tmp_path / "checkpoint-00000001", [shard(3), shard(1)])
    (tmp_path / "checkpoint-00000001" / sharded_weights.file_name(1, 2)).unlink()
    with pytest.raises(ckpt.CheckpointError, match="the files must be all of one set, got part-00000-of-00002"):
        ckpt.read(tmp_path)


# A run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    corpus = tmp_path_factory.mktemp("corpus")
    for i in range(60):
        (corpus / f"module_{i}.py").write_text(f"def function_{i}(value):\n    return value + {i}\n" * (1 + i % 3))
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = RunConfig.from_preset("nano", data=str(corpus), seed=3, backend="reference", steps=2, checkpoint_every=1)
    list(Trainer.start(replace(config, validation_rows=4), folder).steps())
    return folder


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


OPTIMIZERS = {
    "a parameter that is not there": {"nothing:step": torch.ones(())},
    "a moment that is not there": {"head.weight:moment": torch.ones(())},
    "a moment too few": {"head.weight:exp_avg": None},
    "a moment of another shape": {"head.weight:exp_avg": torch.ones(3)},
    "integers": {"head.weight:step": torch.ones((), dtype=torch.int64)},
}


@pytest.mark.parametrize("change", OPTIMIZERS)
def test_a_hostile_optimizer_is_refused(copy, change):
    saved = ckpt.read(copy)
    merged = saved.optimizer | OPTIMIZERS[change]
    save_file({n: t for n, t in merged.items() if t is not None}, ckpt.newest(copy) / "optimizer.safetensors")
    with pytest.raises(ckpt.CheckpointError, match="state is of another model"):
        Trainer.resume(copy)


@pytest.mark.parametrize(
    "change",
    [{"dim": 10**12}, {"dim": "64"}, {"heads": 0}, {"dim": -64}, {"pattern": "A" * 60}, {"sparse": 3}, {"x": 1}],
)
def test_a_configuration_that_lies_costs_no_memory(copy, change):
    path = ckpt.newest(copy) / "state.json"
    state = json.loads(path.read_text())
    state["config"]["model"] |= change
    path.write_text(json.dumps(state))
    with pytest.raises(ckpt.CheckpointError, match=r"must hold a model configuration|of another model"):
        load_model(copy)


@pytest.mark.parametrize("state", ["{}", '{"config": 3}', '{"config": {"model": []}}'])
def test_a_state_without_a_configuration(copy, state):
    (ckpt.newest(copy) / "state.json").write_text(json.dumps({"step": 2, **json.loads(state)}))
    with pytest.raises(ckpt.CheckpointError, match="must hold a model configuration"):
        load_model(copy)
    with pytest.raises(ckpt.CheckpointError, match="the data has changed"):
        Trainer.resume(copy)


@pytest.mark.parametrize("seconds", [None, 3, {}, {"step": 1.0}, {"step": "one"}])
def test_a_state_without_the_time_of_every_phase(copy, seconds):
    path = ckpt.newest(copy) / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "seconds": seconds}))
    with pytest.raises(ckpt.CheckpointError, match="must hold the seconds of every phase"):
        Trainer.resume(copy)


def test_integers_are_no_weights(copy):
    saved = ckpt.read(copy)
    model = LanguageModel(Trainer.resume(copy).config.model)
    with pytest.raises(ckpt.CheckpointError, match=r"torch\.int64 .*not torch\.float32"):
        ckpt.load_model(model, saved._replace(model={n: t.long() for n, t in saved.model.items()}))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b"[" * 100_000, b"\xff", b'{"model": {}}', b'{"model": 3}']
)
def test_a_hostile_configuration_of_a_run(copy, content):
    (copy / "config.json").write_bytes(content)
    with pytest.raises(ckpt.CheckpointError, match="cannot read the run's configuration"):
        Trainer.resume(copy)


def test_a_line_of_metrics_that_was_cut_off_is_left_out(copy):
    whole = read_metrics(copy)
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert read_metrics(copy) == whole
    resumed = Trainer.resume(copy, steps=3)
    list(resumed.steps())
    assert [m.step for m in read_metrics(copy)] == [1, 2, 3]


@pytest.mark.parametrize("line", ["nonsense", "[]", "{}", '{"step": 1, "more": 2}', "[" * 100_000])
def test_metrics_that_cannot_be_read_are_named(copy, line):
    (copy / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(ckpt.CheckpointError, match=r"cannot read .*metrics\.jsonl"):
        Trainer.resume(copy)

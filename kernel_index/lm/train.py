"""The training loop: one function of its configuration, resumable bit for bit."""

import contextlib
import json
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import kernel_index as ki
from kernel_index.core import native
from kernel_index.core.atomic_write import write_whole
from kernel_index.lm import checkpoint as ckpt
from kernel_index.lm import distributed
from kernel_index.lm.captured import CapturedStep, GraphRecorder, RecordingError, Step, run_step
from kernel_index.lm.data import IGNORED, Batch, PackedRows, digest, load_documents, unigram_bits_per_byte
from kernel_index.lm.distributed import is_sharded
from kernel_index.lm.goodput import PHASES, Goodput
from kernel_index.lm.model import LanguageModel, flops_per_token
from kernel_index.lm.run_config import DTYPES, Backend, RunConfig, StepReport, read_config, read_metrics
from kernel_index.lm.tensorboard import EventFile

__all__ = ["RunConfig", "StepReport", "Trainer", "TrainingError", "read_config", "read_metrics"]


class TrainingError(RuntimeError):
    """Training cannot continue; the message says at which step, and which checkpoint is saved."""


class Trainer:
    """A run in a folder: ``metrics.jsonl``, TensorBoard's events, ``config.json`` and checkpoints.

    Iterate over ``steps()``; call ``save()`` whenever; ``Trainer.resume(folder)`` continues the newest checkpoint.
    Under ``torchrun`` every process makes one, the parameters are sharded, and each step's rows are distributed over
    the processes.  Every step seeds PyTorch's global generator.
    """

    def __init__(self, config: RunConfig, folder: Path):
        self.config, self.folder = config, folder
        self.device = torch.device(config.device)
        self.group = distributed.join(self.device)
        self.row_shards = 1 if config.parallel == "tensor" else self.group.size  # processes that share a step's rows
        if config.batch_rows % self.row_shards:
            raise ValueError(
                f"batch_rows must be a multiple of the {self.row_shards} processes, got {config.batch_rows}"
            )
        if self.device.type == "cpu":
            native.build_all_or_warn()  # before the first step: `auto` passes over what is not built
        torch.manual_seed(config.seed)
        train, held_out = load_documents(Path(config.data) if config.data else None, config.glob)
        self.model = LanguageModel(config.model).to(self.device)
        for block in self.model.hybrid_blocks():
            block.recompute = config.recompute
        self.parameters = self.model.parameter_count()
        if self.group.size > 1:
            {"fsdp": distributed.shard, "tensor": distributed.split}[config.parallel](self.model, self.group)
        self.forward: Callable[[Batch], Tensor] = self.model
        if config.compile and self.group.size > 1:  # what shards the parameters acts between the blocks
            self.forward = torch.compile(self.model, fullgraph=True)
        elif config.compile:
            self.model.compile_blocks()
        self.captured = self._captured()
        self.digest = digest([*train, *held_out])
        self.rows = PackedRows(train, config.model.context)
        self.validation = self._validation_batches(held_out)
        self.unigram = unigram_bits_per_byte(train, self.validation)
        self.optimizer = self._make_optimizer()
        self.step = 0
        self.receipts: Counter[ki.Receipt] = Counter()
        self.goodput = Goodput()

    @classmethod
    def start(cls, config: RunConfig, folder: Path) -> "Trainer":
        """A new run.  Raises ``ValueError`` if the folder already holds one."""
        if (folder / "config.json").exists():
            raise ValueError(f"out must be a new folder, got {folder}, which holds a run: resume it or choose another")
        trainer = cls(config, folder)
        trainer.group.wait()  # until every process has looked at the folder
        if trainer.group.rank == 0:
            write_whole(folder / "config.json", json.dumps(config.to_json(), indent=1))
        return trainer

    @classmethod
    def resume(cls, folder: Path, *, steps: int | None = None, checkpoint_every: int | None = None) -> "Trainer":
        """Continue the newest checkpoint of a run, or begin again where it ended before its first checkpoint.

        With the same ``steps`` the numbers are those of an uninterrupted run.  Other ``steps`` and another
        ``checkpoint_every`` are written into the run's configuration.
        """
        before = read_config(folder)
        given: dict[str, Any] = {"steps": steps, "checkpoint_every": checkpoint_every}
        config = replace(before, **{name: value for name, value in given.items() if value is not None})
        saved = ckpt.read(folder) if ckpt.newest(folder) else None
        if saved is not None and steps is not None and steps < saved.step:
            raise ValueError(f"steps must be at least the {saved.step} steps already done, got {steps}")
        trainer = cls(config, folder)
        if saved is not None:
            trainer._load(saved)
        if trainer.group.rank == 0:
            if config != before:  # so that every later resume goes on to the same number of steps
                write_whole(folder / "config.json", json.dumps(config.to_json(), indent=1))
            trainer._trim_metrics()
        return trainer

    def _load(self, saved: ckpt.Checkpoint) -> None:
        ckpt.load_model(self.model, saved)
        for what, then, now in (
            ("packed rows", saved.state.get("rows"), len(self.rows)),
            ("a digest of", saved.state.get("data", self.digest), self.digest),  # older checkpoints have none
        ):
            if then != now:
                raise ckpt.CheckpointError(f"the data has changed since the checkpoint: {what} {then} then, {now} now")
        ckpt.load_optimizer(self.model, self.optimizer, saved.optimizer)
        self.step = saved.step
        try:
            self.goodput.earlier = {name: float(saved.state["seconds"][name]) for name in PHASES}
        except (KeyError, TypeError, ValueError) as error:
            raise ckpt.CheckpointError(f"the checkpoint must hold the seconds of every phase: {error!r}") from error

    def steps(self) -> Iterator[StepReport]:
        """Train to the end of the run and yield one report per optimizer step; save as configured and at the end."""
        c = self.config
        with _Log(self.folder) if self.group.rank == 0 else contextlib.nullcontext() as log:
            while self.step < c.steps:
                report = self._one_step()
                if log is not None:
                    log.write(report)
                if self.step % c.checkpoint_every == 0 or self.step == c.steps:
                    self.save()
                yield report

    def save(self) -> Path:
        """Write a checkpoint of the current step.  Raises ``TrainingError`` if a weight is not finite."""
        with self.goodput.phase("checkpoint"):
            state = {
                "config": self.config.to_json(),
                "rows": len(self.rows),
                "data": self.digest,
                "seconds": self.goodput.seconds(),
            }
            self._check_weights()
            optimizer = ckpt.optimizer_tensors(self.model, self.optimizer)
            found = ckpt.Checkpoint(self.step, self.model.state_dict(), optimizer, state)
            return ckpt.write(self.folder, found, self.group)

    def _check_weights(self) -> None:
        """A checkpoint with weights that are not finite must not replace a good one."""
        own = {n: t.to_local() if is_sharded(t) else t for n, t in self.model.state_dict().items()}
        bad = [n for n, t in own.items() if t.is_floating_point() and not t.isfinite().all()]
        if self.group.sum(len(bad)):
            names = ", ".join(bad[:3]) or "those of another process"
            raise TrainingError(
                f"the weights are not finite after step {self.step}: {names}; nothing was saved; "
                f"the last good checkpoint is {ckpt.newest(self.folder) or 'none yet'}"
            )

    @torch.no_grad()
    def evaluate(self) -> float:
        """Bits per byte over the validation rows."""
        self.model.eval()
        nats, count = 0.0, 0
        for batch in self.validation:
            with self._autocast(), forced_backend(self.config.backend):
                nats += float(self.model.loss(self._here(batch), reduction="sum", z_loss=0.0))
            count += int((batch.targets != IGNORED).sum())
        self.model.train()
        return nats / count / math.log(2)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up over a twentieth of the run, then a cosine to a tenth."""
        warm = max(1, self.config.steps // 20)
        if step < warm:
            return self.config.learning_rate * (step + 1) / warm
        done = (step - warm) / max(1, self.config.steps - warm)
        return self.config.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))

    @property
    def flops_per_step(self) -> float:
        c = self.config
        return flops_per_token(c.model) * c.batch_rows * c.accumulate * c.model.context

    def _one_step(self) -> StepReport:
        c, start = self.config, time.perf_counter()
        with self.goodput.phase("data"):
            indices = self.rows.indices(self.step, c.batch_rows * c.accumulate, c.seed)
            batches = [self.rows.batch(indices[i : i + c.batch_rows]) for i in range(0, len(indices), c.batch_rows)]
        with self.goodput.phase("step"):
            self.model.attend_densely(self.step < c.sparse_from_step)
            if self.step == c.sparse_from_step > 0:
                self.goodput.prepares()
                self.captured = self._captured()  # the graph of the dense steps, and its memory, are not used again
            rate = self.learning_rate(self.step)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            torch.manual_seed(self._seed_of_step())
            with forced_backend(c.backend):  # not around a yield: calls of the caller are not forced
                loss = self._gradients(batches)
            norm = self._clip()
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise TrainingError(
                    f"the loss is {loss} and the gradient norm {norm} at step {self.step + 1}, on the packed rows "
                    f"{', '.join(map(str, indices))}; the weights were not changed; the last good checkpoint is "
                    f"{ckpt.newest(self.folder) or 'none yet'}"
                )
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            for router in self.model.routers():
                router.balance(c.model.experts.balance)
        self.step += 1
        seconds = time.perf_counter() - start
        validation = None
        if self.step % c.evaluate_every == 0 or self.step == c.steps:
            with self.goodput.phase("evaluate"):
                validation = self.evaluate()
        tokens = sum(int(batch.valid_counts.sum()) for batch in batches)
        return StepReport(self.step, loss, rate, norm, tokens, seconds, validation)

    def _seed_of_step(self) -> int:
        """Dropout masks depend on the run's seed, the step, and the shard of the step's rows alone.

        So a resumed run draws the masks of an uninterrupted one, whatever the caller drew in between.
        """
        words = np.random.SeedSequence([self.config.seed, self.step, self.group.rank % self.row_shards])
        return int(words.generate_state(1, np.uint64)[0])

    def _gradients(self, batches: list[Batch]) -> float:
        """Forward and backward of every micro-batch; the mean loss over all their targets."""
        counts = [int((batch.targets != IGNORED).sum()) for batch in batches]
        total, loss = max(1, sum(counts)), torch.zeros((), device=self.device)
        for batch in batches:
            own = Batch(*(t[self.group.rank % self.row_shards :: self.row_shards] for t in batch))
            share = torch.tensor(int((own.targets != IGNORED).sum()) / total, dtype=torch.float32)
            found = self._micro_batch(self._here(own), share.to(self.device, non_blocking=True))
            self.receipts += found.receipts
            loss = loss + found.loss
            for router in self.model.routers():
                router.count()
        return self.group.sum(float(loss)) if self.row_shards > 1 else float(loss)

    def _micro_batch(self, batch: Batch, share: Tensor) -> Step:
        if self.captured is not None:
            try:
                batch = self.model.in_order(batch)
                found = self.captured(batch, share, self.step < self.config.sparse_from_step)
                if self.captured.prepared:
                    self.goodput.prepares()
                return found
            except RecordingError as error:
                warnings.warn(f"{error}; every kernel is launched by itself", stacklevel=2)
                self.captured = None
        return run_step(self._add_gradients, batch, share)

    def _add_gradients(self, batch: Batch, share: Tensor) -> Tensor:
        with self._autocast():
            loss_share = self.forward(batch) * share
        (loss_share * self.row_shards).backward()  # FSDP averages the processes' gradients
        return loss_share.detach()

    def _captured(self) -> CapturedStep | None:
        """Steps as CUDA graphs, on one GPU, where nothing is drawn or read on the host."""
        c = self.config
        if not c.graphs or self.device.type != "cuda" or torch.version.hip is not None or self.group.size > 1:
            return None
        if c.compile or c.backend != "auto" or c.model.dropout > 0 or c.model.sparse.report_unions:
            return None
        return CapturedStep(self._add_gradients, self.model.parameters(), GraphRecorder(self.device))

    def _clip(self) -> float:
        if self.config.parallel == "tensor":
            return distributed.clip_each(self.model, self.config.clip)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        return float(distributed.whole(norm))

    def _here(self, batch: Batch) -> Batch:
        return batch.each(lambda t: t.to(self.device, non_blocking=True))

    def _autocast(self):
        return torch.autocast(self.device.type, DTYPES[self.config.dtype], enabled=self.config.dtype != "float32")

    def _make_optimizer(self) -> torch.optim.Optimizer:
        def decays(name: str, p: Tensor) -> bool:
            return p.ndim > 1 and not name.startswith("embed") and not name.endswith(("h_res_logits", "conv"))

        named = list(self.model.named_parameters())
        groups: list[dict[str, Any]] = [
            {"params": [p for n, p in named if decays(n, p)], "weight_decay": self.config.weight_decay},
            {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
        ]
        # With several processes some parameters may be sharded and some not, which foreach kernels do not take.
        one_by_one: dict[str, Any] = {"fused": True} if self.group.size == 1 else {"foreach": False}
        return torch.optim.AdamW(groups, lr=self.config.learning_rate, betas=(0.9, 0.95), **one_by_one)

    def _validation_batches(self, held_out: list) -> list[Batch]:
        rows = PackedRows(held_out, self.config.model.context)
        order = rows.order(0, 0)[: self.config.validation_rows].tolist()
        size = self.config.batch_rows
        return [rows.batch(order[i : i + size]) for i in range(0, len(order), size)]

    def _trim_metrics(self) -> None:
        """Drop what was logged after the checkpoint: the run will do those steps again."""
        path = self.folder / "metrics.jsonl"
        if path.exists():
            kept = [json.dumps(asdict(m)) for m in read_metrics(self.folder) if m.step <= self.step]
            write_whole(path, "".join(f"{line}\n" for line in kept))


class _Log:
    """Appends reports to ``metrics.jsonl`` and to TensorBoard's events."""

    def __init__(self, folder: Path):
        self.metrics = (folder / "metrics.jsonl").open("a")
        self.events = EventFile(folder / "tensorboard")

    def write(self, report: StepReport) -> None:
        self.metrics.write(json.dumps(asdict(report)) + "\n")
        self.metrics.flush()
        self.events.write(report.step, report.scalars())

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, *_: object) -> None:
        self.metrics.close()
        self.events.close()


def forced_backend(backend: Backend) -> contextlib.AbstractContextManager[None]:
    """Inside the block every op runs this backend, by ``ki.force``; ``auto`` changes nothing."""
    return contextlib.nullcontext() if backend == "auto" else ki.force(backend)

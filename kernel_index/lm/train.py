"""The training loop: one function of its configuration, resumable bit for bit."""

import contextlib
import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kernel_index as ki
from kernel_index.dispatch import reload_environment
from kernel_index.files import write_whole
from kernel_index.lm import checkpoint as ckpt
from kernel_index.lm import distributed
from kernel_index.lm.data import IGNORED, Batch, PackedRows, load_documents, unigram_bits_per_byte
from kernel_index.lm.goodput import Goodput
from kernel_index.lm.model import LanguageModel, flops_per_token
from kernel_index.lm.run_config import DTYPES, RunConfig, StepReport, read_config, read_metrics
from kernel_index.lm.tensorboard import EventFile

__all__ = ["RunConfig", "StepReport", "Trainer", "TrainingError", "read_config", "read_metrics"]


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and what is saved."""


class Trainer:
    """A run in a folder: ``metrics.jsonl``, TensorBoard's events, ``config.json`` and checkpoints.

    Iterate over ``steps()``; call ``save()`` whenever; ``Trainer.resume(folder)`` continues the newest checkpoint.
    Under ``torchrun`` every process makes one, the parameters are sharded, and each step's rows are dealt out.
    """

    def __init__(self, config: RunConfig, folder: Path):
        self.config, self.folder = config, folder
        self.device = torch.device(config.device)
        self.group = distributed.join(self.device)
        self.dealt = 1 if config.parallel == "tensor" else self.group.size  # how many processes share a step's rows
        if config.batch_rows % self.dealt:
            raise ValueError(f"batch_rows must be a multiple of the {self.dealt} processes, got {config.batch_rows}")
        torch.manual_seed(config.seed)
        train, held_out = load_documents(Path(config.data) if config.data else None, config.glob)
        self.model = LanguageModel(config.model).to(self.device)
        for block in self.model.hybrid_blocks():
            block.recompute = config.recompute
        self.parameters = self.model.parameter_count()
        if self.group.size > 1:
            {"fsdp": distributed.shard, "tensor": distributed.split}[config.parallel](self.model, self.group)
        self.forward = torch.compile(self.model, fullgraph=True) if config.compile else self.model
        self.rows = PackedRows(train, config.model.context)
        self.validation = self._validation_batches(held_out)
        self.unigram = unigram_bits_per_byte(train, self.validation)
        self.optimizer = self._make_optimizer()
        self.step = 0
        self.receipts: Counter[ki.Receipt] = Counter()
        self.goodput = Goodput()

    @classmethod
    def start(cls, config: RunConfig, folder: Path) -> "Trainer":
        """A new run; refuses a folder that already holds one."""
        if (folder / "config.json").exists():
            raise ValueError(f"out must be a new folder, got {folder}, which holds a run: resume it or choose another")
        trainer = cls(config, folder)
        trainer.group.wait()  # until every process has looked at the folder
        if trainer.group.rank == 0:
            write_whole(folder / "config.json", json.dumps(config.to_json(), indent=1))
        return trainer

    @classmethod
    def resume(cls, folder: Path, *, steps: int | None = None, checkpoint_every: int | None = None) -> "Trainer":
        """Continue the newest checkpoint of a run.  With the run's own ``steps`` the numbers are those of one run."""
        config = read_config(folder)
        config = replace(
            config, steps=steps or config.steps, checkpoint_every=checkpoint_every or config.checkpoint_every
        )
        saved = ckpt.read(folder)
        trainer = cls(config, folder)
        ckpt.load_model(trainer.model, saved)
        if saved.state.get("rows") != len(trainer.rows):
            raise ckpt.CheckpointError(
                f"the data has changed since the checkpoint: {saved.state.get('rows')} packed rows then, "
                f"{len(trainer.rows)} now"
            )
        ckpt.load_optimizer(trainer.model, trainer.optimizer, saved.optimizer)
        trainer.step = saved.step
        trainer.goodput.earlier = saved.state["seconds"]
        if trainer.group.rank == 0:
            trainer._trim_metrics()
        return trainer

    def steps(self) -> Iterator[StepReport]:
        """Train to the end of the run, one report per optimizer step; saves as configured and at the end."""
        c = self.config
        with contextlib.ExitStack() as stack:
            stack.enter_context(forced_backend(c.backend))
            log = stack.enter_context(_Log(self.folder)) if self.group.rank == 0 else None
            while self.step < c.steps:
                report = self._one_step()
                if log is not None:
                    log.write(report)
                if self.step % c.checkpoint_every == 0 or self.step == c.steps:
                    self.save()
                yield report

    def save(self) -> Path:
        """Write a checkpoint of the present step."""
        with self.goodput.phase("checkpoint"):
            state = {"config": self.config.to_json(), "rows": len(self.rows), "seconds": self.goodput.seconds()}
            optimizer = ckpt.optimizer_tensors(self.model, self.optimizer)
            found = ckpt.Checkpoint(self.step, self.model.state_dict(), optimizer, state)
            return ckpt.write(self.folder, found, self.group)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Bits per byte over the validation rows."""
        self.model.eval()
        nats, count = 0.0, 0
        for batch in self.validation:
            with self._autocast():
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
            rate = self.learning_rate(self.step)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
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

    def _gradients(self, batches: list[Batch]) -> float:
        """Forward and backward of every micro-batch; the mean loss over all their targets."""
        counts = [int((batch.targets != IGNORED).sum()) for batch in batches]
        total, loss = max(1, sum(counts)), 0.0
        for batch in batches:
            own = self._here(Batch(*(t[self.group.rank % self.dealt :: self.dealt] for t in batch)))
            share = int((own.targets != IGNORED).sum()) / total
            with ki.receipts() as log:
                with self._autocast():
                    part = self.forward(own) * share
                (part * self.dealt).backward()  # sharding averages the processes' gradients
            self.receipts += log.counts()
            loss += float(part.detach())
            for router in self.model.routers():
                router.count()
        return self.group.sum(loss) if self.dealt > 1 else loss

    def _clip(self) -> float:
        if self.config.parallel == "tensor":
            return distributed.clip_each(self.model, self.config.clip)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        return float(distributed.whole(norm))

    def _here(self, batch: Batch) -> Batch:
        return Batch(*(t.to(self.device, non_blocking=True) for t in batch))

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
        # Of several processes some parameters may be sharded and some not, which the kernels for lists do not take.
        one_by_one: dict[str, Any] = {"fused": True} if self.group.size == 1 else {"foreach": False}
        return torch.optim.AdamW(groups, lr=self.config.learning_rate, betas=(0.9, 0.95), **one_by_one)

    def _validation_batches(self, held_out: list) -> list[Batch]:
        rows = PackedRows(held_out, self.config.model.context)
        order = rows.order(0, 0)[: self.config.validation_rows].tolist()
        size = self.config.batch_rows
        return [rows.batch(order[i : i + size]) for i in range(0, len(order), size)]

    def _trim_metrics(self) -> None:
        """Drop what was logged after the checkpoint: those steps are about to be done again."""
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


@contextlib.contextmanager
def forced_backend(backend: str) -> Iterator[None]:
    """Inside the block every op runs this backend, as if ``KERNEL_INDEX_BACKEND`` said so; ``auto`` changes nothing."""
    if backend == "auto":
        yield
        return
    before = os.environ.get("KERNEL_INDEX_BACKEND")
    os.environ["KERNEL_INDEX_BACKEND"] = backend
    reload_environment()
    try:
        yield
    finally:
        del os.environ["KERNEL_INDEX_BACKEND"]
        if before is not None:
            os.environ["KERNEL_INDEX_BACKEND"] = before
        reload_environment()

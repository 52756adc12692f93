"""What each of two processes does in test_distributed.py: ``python -m tests.lm.two_processes WHAT FOLDER [CORPUS]``."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

import kernel_index as ki
from kernel_index.lm.config import PRESETS, ExpertLayer, Latent, Sparse, StateSpace
from kernel_index.lm.data import Batch
from kernel_index.lm.distributed import join, shard, split_heads, whole
from kernel_index.lm.model import LanguageModel
from kernel_index.lm.train import RunConfig, Trainer

STEPS = 4


def run_config(corpus: str, **changes) -> RunConfig:
    model = replace(
        PRESETS["nano"].model, pattern="AMLSE", windows=(32, *4 * (None,)), dropout=0.0, context=64, hidden=64,
        residual="mhc", ahead=0.2, latent=Latent(16, 8, fused=True), sparse=Sparse(("clustered",), block=8, topk=3),
        state_space=StateSpace(heads=2, head_dim=16, state=8, chunk=16),
        experts=ExpertLayer(count=4, topk=2, hidden=32),
    )  # fmt: skip
    base = RunConfig.from_preset("nano", data=corpus, model=model, seed=3, steps=STEPS, checkpoint_every=2)
    return replace(base, evaluate_every=100, validation_rows=4, **changes)


def train(folder: Path, corpus: str) -> None:
    """Half of the run, a fresh start from its checkpoint, the other half."""
    trainer = Trainer.start(run_config(corpus), folder)
    for report in trainer.steps():
        if report.step == 2:
            break
    list(Trainer.resume(folder).steps())
    if trainer.group.rank == 0:
        own = sum(getattr(p, "_local_tensor", p).numel() for p in trainer.model.parameters())
        (folder / "share.json").write_text(json.dumps(own / trainer.parameters))


def split_run(corpus: str) -> RunConfig:
    base = RunConfig.from_preset("nano", data=corpus, seed=3, steps=STEPS, checkpoint_every=2, parallel="tensor")
    return replace(base, model=replace(base.model, kv_heads=2), evaluate_every=4, validation_rows=4)


def train_split(folder: Path, corpus: str) -> None:
    """A run with heads, hidden channels and vocabulary dealt out."""
    list(Trainer.start(split_run(corpus), folder).steps())


def resume(folder: Path) -> None:
    """Go on from what another number of processes has saved."""
    trainer = Trainer.resume(folder)
    losses = [report.loss for report in trainer.steps()]
    if trainer.group.rank == 0:
        (folder / "resumed.json").write_text(json.dumps({"processes": trainer.group.size, "losses": losses}))


def small_model(**changes) -> tuple[LanguageModel, Batch]:
    """One with weights that all matter, and two packed rows; the same in every process."""
    torch.manual_seed(0)
    model = LanguageModel(replace(PRESETS["nano"].model, kv_heads=2, dropout=0.0, context=32, **changes))
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * (weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.3))
    tokens = torch.randint(0, 256, (2, 32))
    documents = (torch.arange(32) // 20).expand(2, 32).contiguous()
    positions = torch.arange(32).expand(2, 32).contiguous()
    return model, Batch(tokens, tokens.roll(-1, 1), positions, documents, torch.tensor([32, 32]))


def tensor_parallel(folder: Path) -> None:
    """Loss and gradients with heads, hidden channels and vocabulary dealt out."""
    group = join(torch.device("cpu"))
    model, batch = small_model()
    split_heads(model, torch.distributed.device_mesh.init_device_mesh("cpu", (group.size,)))
    with ki.receipts() as log:
        loss = model.loss(batch)
    loss.backward()
    found = {name: whole(p.grad) for name, p in model.named_parameters()}
    found["loss"] = loss.detach()
    found["ran sharded"] = torch.tensor([r.ran == "sharded" for r in log if r.op == "fused_linear_cross_entropy"])
    found["heads here"] = torch.tensor(model.hybrid_blocks()[0].mixer.q.weight.to_local().shape[0])
    if group.rank == 0:
        torch.save(found, folder / "gradients.pt")


RESIDUALS = ("mhc", "fp32")


def sharded(folder: Path) -> None:
    """Loss and gradients of blocks that are a mixer alone, whose bias is added behind them, one row a process."""
    group = join(torch.device("cpu"))
    for residual in RESIDUALS:
        model, batch = small_model(residual=residual, hidden=0)
        shard(model, group)
        loss = model.loss(Batch(*(t[group.rank : group.rank + 1] for t in batch)))
        loss.backward()
        found = {name: whole(p.grad) for name, p in model.named_parameters()}
        torch.save({**found, "loss": loss.detach()}, folder / f"{residual}-{group.rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, place, *rest = sys.argv[1:]
    tasks = {"train": train, "train_split": train_split, "resume": resume, "tensor_parallel": tensor_parallel}
    tasks["sharded"] = sharded
    tasks[what](Path(place), *rest)
    torch.distributed.barrier()  # neither ends while the other still speaks to it
    torch.distributed.destroy_process_group()

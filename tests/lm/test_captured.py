"""A step that is replayed has the effects of one that runs; a recorder that runs again stands for the CUDA graph."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import kernel_index as ki
from kernel_index.lm.captured import MOST, WARM, CapturedStep, GraphRecorder, Step, run_step
from kernel_index.lm.data import Batch
from kernel_index.lm.distributed import Group
from kernel_index.lm.goodput import Goodput
from kernel_index.lm.train import RunConfig, Trainer
from tests.lm.runs import config as run_config
from tests.lm.runs import losses


class Again:
    """Replays by running again, into the memory of the recorded call, as a graph does."""

    def __init__(self, parameters):
        self.parameters, self.recorded, self.replayed = parameters, 0, 0

    def warm(self, run):
        return run()

    def record(self, run):
        self.recorded += 1
        run()
        memory = [p.grad for p in self.parameters]
        for grad in memory:
            grad.fill_(float("nan"))  # a graph that is recorded has not run

        def replay():
            self.replayed += 1
            held = [p.grad for p in self.parameters]
            for p in self.parameters:
                p.grad = None
            run()
            for p, grad, before in zip(self.parameters, memory, held, strict=True):
                grad.copy_(p.grad)
                p.grad = before

        return replay


def batch_of(tokens: int, seed: int) -> Batch:
    torch.manual_seed(seed)
    ids = torch.randint(0, 9, (2, tokens))
    return Batch(ids, ids, ids, torch.zeros_like(ids), torch.full((2,), tokens))


@pytest.fixture
def weight():
    torch.manual_seed(0)
    return torch.nn.Parameter(torch.randn(9, 4))


def gradients_of(weight):
    def gradients(batch: Batch, share: torch.Tensor) -> torch.Tensor:
        h = ki.fused_relu_squared(weight[batch.tokens])
        loss = (h * (1 + batch.targets[..., None])).sum() * share
        loss.backward()
        return loss.detach()

    return gradients


def test_effects_are_those_of_plain_calls(weight):
    """Steps of one and of three micro-batches, of two shapes, gradients dropped between steps or kept."""
    recorder = Again([weight])
    step = CapturedStep(gradients_of(weight), [weight], recorder)
    other = torch.nn.Parameter(weight.detach().clone())
    plain = gradients_of(other)
    for number in range(12):
        for micro in range(1 + 2 * (number % 2)):
            batch = batch_of(5 if number % 3 else 7, 10 * number + micro)
            share = torch.tensor(0.25 + 0.125 * micro)
            found = step(batch, share)
            expected = run_step(plain, batch, share)
            assert torch.equal(found.loss, expected.loss)
            assert found.receipts == expected.receipts
            assert sum(found.receipts.values()) == 1
        assert torch.equal(weight.grad, other.grad)
        if number % 4 != 3:
            weight.grad = other.grad = None
    assert recorder.recorded == 2
    assert recorder.replayed == sum(1 + 2 * (n % 2) for n in range(12)) - 2 * WARM


def test_another_key_is_another_graph(weight):
    recorder = Again([weight])
    step = CapturedStep(gradients_of(weight), [weight], recorder)
    for key in (True, False, True):
        for seed in range(4):
            step(batch_of(5, seed), torch.tensor(1.0), key)
    assert recorder.recorded == 2


def test_a_parameter_without_a_gradient_keeps_none(weight):
    idle = torch.nn.Parameter(torch.ones(2))
    step = CapturedStep(gradients_of(weight), [weight, idle], Again([weight]))
    for seed in range(5):
        step(batch_of(5, seed), torch.tensor(1.0))
        assert idle.grad is None
        weight.grad = None


def test_a_gradient_that_is_not_in_the_graph_stays(weight):
    """What was added to a parameter before is kept, also where the step adds nothing to it."""
    idle = torch.nn.Parameter(torch.ones(2))
    step = CapturedStep(gradients_of(weight), [weight, idle], Again([weight]))
    for seed in range(5):
        idle.grad = torch.full((2,), 3.0)
        step(batch_of(5, seed), torch.tensor(1.0))
        assert torch.equal(idle.grad, torch.full((2,), 3.0))


def test_a_step_that_cannot_be_recorded_leaves_the_gradients(weight):
    recorder = Again([weight])
    step = CapturedStep(gradients_of(weight), [weight], recorder)
    for seed in range(WARM):
        step(batch_of(5, seed), torch.tensor(1.0))
    before = weight.grad.clone()

    def record(run):
        run()
        raise RuntimeError("operation not permitted when stream is capturing")

    recorder.record = record
    with pytest.raises(RuntimeError, match="capturing"):
        step(batch_of(5, WARM), torch.tensor(1.0))
    assert torch.equal(weight.grad, before)


def test_what_is_recorded_and_what_is_not(monkeypatch):
    """A model that reports its unions reads them on the host, which no graph can hold."""
    monkeypatch.setattr("kernel_index.lm.train.GraphRecorder", lambda device: Again([]))

    def captured(preset: str, **changes) -> CapturedStep | None:
        config = replace(RunConfig.from_preset(preset), device="cuda", **changes)
        model = torch.nn.Linear(1, 1)
        trainer = SimpleNamespace(
            config=config, device=torch.device("cuda"), group=Group(), model=model, _add_gradients=None
        )
        return Trainer._captured(trainer)

    assert captured("small") is not None
    assert captured("small", graphs=False) is None
    assert captured("nano") is None, "dropout"
    assert captured("tiny") is None, "report_unions"


def test_a_run_whose_steps_are_replayed(corpus, tmp_path, monkeypatch):
    """It has the numbers of one whose steps run; no graph of the dense steps is left behind them."""
    changes = {"sparse_from_step": 4, "steps": 8, "accumulate": 2, "evaluate_every": 3}
    losses_of = {}
    for replayed in (False, True):
        config = run_config(corpus, **changes)
        config = replace(config, model=replace(config.model, dropout=0.0))
        if replayed:
            monkeypatch.setattr(
                Trainer,
                "_captured",
                lambda self: CapturedStep(
                    self._add_gradients, self.model.parameters(), Again(list(self.model.parameters()))
                ),
            )
        trainer = Trainer.start(config, tmp_path / str(replayed))
        list(trainer.steps())
        losses_of[replayed] = losses(trainer.folder)
    assert losses_of[True] == losses_of[False]
    assert {kind[0] for kind in trainer.captured.recorded} == {False}


def test_a_run_goes_on_where_a_step_cannot_be_recorded(corpus, tmp_path, monkeypatch):
    class Refuses(Again):
        def record(self, run):
            run()
            raise torch.OutOfMemoryError("no memory for the graph\nand more")

    config = run_config(corpus, steps=4)
    config = replace(config, model=replace(config.model, dropout=0.0))
    plain = Trainer.start(config, tmp_path / "plain")
    list(plain.steps())
    monkeypatch.setattr(
        Trainer,
        "_captured",
        lambda self: CapturedStep(self._add_gradients, self.model.parameters(), Refuses(list(self.model.parameters()))),
    )
    trainer = Trainer.start(config, tmp_path / "refused")
    with pytest.warns(UserWarning, match="the step cannot be a CUDA graph: no memory for the graph; every kernel"):
        list(trainer.steps())
    assert losses(trainer.folder) == losses(plain.folder)
    assert trainer.captured is None


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_on_a_gpu_has_the_same_bits(deterministic):
    from kernel_index.lm.config import PRESETS
    from kernel_index.lm.model import LanguageModel

    config = replace(PRESETS["small"].model, context=256)
    ids = [torch.randint(0, 256, (2, 256), device="cuda") for _ in range(6)]
    docs = (torch.arange(256, device="cuda") // 100).expand(2, -1).contiguous()
    at = torch.arange(256, device="cuda").expand(2, -1).contiguous()
    counts = torch.full((2,), 256, device="cuda")
    found = []
    for captured in (False, True):
        torch.manual_seed(0)
        model = LanguageModel(config).cuda()
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.02 * torch.randn_like(weight))

        def gradients(batch, share, model=model):
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(batch) * share
            loss.backward()
            return loss.detach()

        step = CapturedStep(gradients, model.parameters(), GraphRecorder(torch.device("cuda", 0)))
        losses = []
        for tokens in ids:
            batch = Batch(tokens, tokens.roll(-1, 1), at, docs, counts)
            share = torch.ones((), device="cuda")
            result: Step = step(batch, share) if captured else run_step(gradients, batch, share)
            losses.append(result.loss.clone())
            assert isinstance(result.receipts, Counter)
            assert result.receipts
        found.append([*losses, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_steps_that_are_warmed_or_recorded_count_as_compiling(weight):
    """Seconds of steps 10, 5, 3, 1, 1, 1: the first two run as they are, the third records, the others are replayed."""
    seconds = iter([0.0, 10.0, 10.0, 15.0, 15.0, 18.0, 18.0, 19.0, 19.0, 20.0, 20.0, 21.0])
    goodput, captured = Goodput(seconds.__next__), CapturedStep(gradients_of(weight), [weight], Again([weight]))
    for _ in range(6):
        with goodput.phase("step"):
            captured(batch_of(5, 0), torch.tensor(1.0))
            if captured.prepared:
                goodput.prepares()
    assert goodput.seconds()["step"] == 6
    assert goodput.seconds()["compile"] == 15


def test_the_same_documents_in_another_packing_replay_the_same_graph():
    """In invariant numerics, with the loss and the gradients of a step as it is."""
    from tests.lm.test_one_order import documents, rows
    from tests.lm.test_rollout_check import drawn_model

    model, share, found = drawn_model("MA"), torch.tensor(0.5), []

    def gradients(batch, share):
        loss = model(batch) * share
        loss.backward()
        return loss.detach()

    step = CapturedStep(gradients, model.parameters(), again := Again(list(model.parameters())))
    with ki.numerics("invariant"):
        for seed in range(WARM + 3):
            loss = step(model.in_order(rows(documents(0), seed)), share).loss
            found.append([loss.clone(), *(p.grad.clone() for p in model.parameters())])
            model.zero_grad(set_to_none=True)
    assert (len(step.recorded), again.replayed) == (1, 3)
    for one in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(one, found[0], strict=True))


def test_few_graphs_are_kept(weight):
    step = CapturedStep(gradients_of(weight), [weight], again := Again([weight]))
    for tokens in range(5, 5 + MOST + 2):
        for seed in range(WARM + 1):
            step(batch_of(tokens, seed), torch.tensor(1.0))
    assert (len(step.recorded), again.recorded) == (MOST, MOST)

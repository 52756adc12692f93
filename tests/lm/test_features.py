"""What a run can be told to do, and what it says about itself."""

import json
import struct
from dataclasses import replace

import pytest
import torch

import kernel_index as ki
from benchmarks.language_model import packed
from kernel_index.lm.config import PRESETS, ExpertLayer, Latent, ModelConfig, Sparse, StateSpace
from kernel_index.lm.generate import generate
from kernel_index.lm.model import LanguageModel, active_parameters, after_next_targets, flops_per_token
from kernel_index.lm.report import receipt_rows
from kernel_index.lm.tensorboard import crc32c
from kernel_index.lm.train import RunConfig, Trainer, forced_backend, read_metrics

EPS = torch.finfo(torch.float32).eps

HYBRID = replace(
    PRESETS["tiny"].model, pattern="MASLSSE", windows=(None, 16, None, None, None, None, None), dim=32, heads=2,
    head_dim=16, hidden=32, context=64,
    sparse=Sparse(("exact_token", "moba", "clustered"), 8, 2, 8, index_dim=8, hierarchy=(2, 2), report_unions=True),
    latent=Latent(16, 8, fused=True), state_space=StateSpace(2, 16, 8, 16), experts=ExpertLayer(4, 2, 32),
)  # fmt: skip


def config(small_corpus, **changes) -> RunConfig:
    base = RunConfig.from_preset("nano", data=small_corpus, model=HYBRID, seed=3, steps=3, backend="reference")
    return replace(base, checkpoint_every=100, evaluate_every=100, validation_rows=4, **changes)


def run(small_corpus, folder, **changes):
    trainer = Trainer.start(config(small_corpus, **changes), folder)
    return trainer, [(r.loss, r.gradient_norm) for r in trainer.steps()]


@pytest.fixture(scope="module")
def plain(small_corpus, tmp_path_factory):
    return run(small_corpus, tmp_path_factory.mktemp("runs") / "plain")


def test_kernels_train_to_the_losses_of_the_plain_path(plain, small_corpus, tmp_path):
    """Both against the rounding of float32, measured by splitting the batch in the plain path."""
    ours, losses = run(small_corpus, tmp_path / "kernels", backend="auto")
    _, split = run(small_corpus, tmp_path / "split", batch_rows=2, accumulate=2)
    assert {r.ran for r in plain[0].receipts} == {"reference"}
    assert len({r.ran for r in ours.receipts}) > 2
    moved = max(abs(a[0] - b[0]) for a, b in zip(plain[1], split, strict=True))
    for (loss, _), (expected, _) in zip(losses, plain[1], strict=True):
        assert abs(loss - expected) <= 8 * moved + 64 * EPS * expected


def test_recomputing_blocks_changes_no_bit(plain, small_corpus, tmp_path):
    assert run(small_corpus, tmp_path / "run", recompute=True)[1] == plain[1]


def test_a_hybrid_run_resumes_bit_for_bit(plain, small_corpus, tmp_path):
    """Weights, moments, the experts' biases, and the order of the data all come back."""
    trainer = Trainer.start(config(small_corpus), tmp_path / "run")
    for report in trainer.steps():
        if report.step == 2:
            trainer.save()
            break
    resumed = Trainer.resume(tmp_path / "run")
    assert [(r.loss, r.gradient_norm) for r in resumed.steps()] == plain[1][2:]
    whole = plain[0].model.state_dict()
    assert any(name.endswith("router.bias") and tensor.any() for name, tensor in whole.items())
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.model.state_dict().items())


def test_receipts_name_every_computing_entry(plain):
    """Except ``gather_rows_pair``, which ``selected_decode`` needs only where it has no kernel that reads the cache."""
    trainer, _ = plain
    with ki.receipts() as log:
        "".join(generate(trainer.model.eval(), "x", 2))
    trainer.receipts += log.counts()
    assert {row.op for row in receipt_rows(trainer.receipts)} >= {
        "attention", "clustered_sparse_attention", "exact_token_attention", "fa4_kvcache_decode",
        "fused_bias_dropout_add", "fused_linear_cross_entropy", "fused_mla_projection", "fused_relu_squared",
        "fused_residual_add_rms_norm", "fused_rope_qk", "expert_combine", "expert_dispatch", "expert_mlp",
        "expert_plan", "expert_route", "hierarchical_block_select", "lightning_indexer", "mhc_branch_input",
        "mhc_merge_and_branch_input", "moba_attention", "moba_decode", "selected_decode", "sinkhorn",
        "union_selection",
    }  # fmt: skip


def test_tiny_has_every_letter_of_the_hybrid_above():
    tiny = PRESETS["tiny"].model
    assert set(tiny.pattern) == set(HYBRID.pattern) == set("ASLME")
    assert tiny.sparse.kinds == HYBRID.sparse.kinds
    assert tiny.sparse.hierarchy is not None
    assert tiny.sparse.report_unions == HYBRID.sparse.report_unions
    assert tiny.pattern.count("S") == 3
    assert (tiny.residual, tiny.latent.fused) == ("mhc", True)
    assert any(window is not None for window in tiny.windows)


def test_streams_in_the_models_own_dtype(monkeypatch):
    """Under autocast ``mhc-plain`` mixes bfloat16 streams and ``mhc`` float32 ones; without it they are the same."""
    found, seen, mix = {}, [], ki.mhc_merge_and_branch_input

    def spy(hidden, *more, **options):
        seen.append(hidden.dtype)
        return mix(hidden, *more, **options)

    monkeypatch.setattr(ki, "mhc_merge_and_branch_input", spy)
    for residual in ("mhc", "mhc-plain"):
        torch.manual_seed(0)
        model = LanguageModel(replace(HYBRID, pattern="AE", windows=(None, None), residual=residual)).eval()
        for name, parameter in model.named_parameters():
            if name.endswith(("out.weight", "down", "down.weight", "head.weight")):  # zeros at first
                torch.nn.init.normal_(parameter, std=0.05)
        tokens = torch.randint(0, 256, (20,))
        with torch.no_grad():
            exact = model.next_logits(tokens)
            seen.clear()
            with torch.autocast("cpu", torch.bfloat16):
                rounded = model.next_logits(tokens)
        found[residual] = exact, rounded, set(seen)
    (wide, _, wide_dtypes), (plain, rounded, plain_dtypes) = found.values()
    assert (wide_dtypes, plain_dtypes) == ({torch.float32}, {torch.bfloat16})
    assert torch.equal(wide, plain)
    assert (rounded - plain).norm() < 0.03 * plain.norm()  # a few roundings of 2⁻⁹ each


@pytest.mark.parametrize("letter", "MASLE")
def test_the_reference_recomputes_what_it_kept_under_autocast(letter):
    """Backward runs outside of autocast and of the forced backend, where a checkpoint compares what is saved."""
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = LanguageModel(replace(HYBRID, pattern=letter, windows=(None,), residual="mhc-plain"))
        torch.nn.init.normal_(model.head.weight)
        for block in model.hybrid_blocks():
            block.recompute = recompute
        with forced_backend("reference"), torch.autocast("cpu", torch.bfloat16):
            loss = model(packed(model.config, 2, 2))
        loss.backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True) if a is not None)


def test_dense_warm_up_says_when_it_ended(small_corpus, tmp_path):
    trainer = Trainer.start(config(small_corpus, sparse_from_step=2), tmp_path / "run")
    seen = []
    for _ in trainer.steps():
        seen.append({(r.op, r.details.get("path")) for r in trainer.receipts})
        trainer.receipts.clear()
    dense = ("exact_token_attention", "reroute_to_full")
    assert [dense in s for s in seen] == [True, True, False]
    assert ["moba_attention" in {op for op, _ in s} for s in seen] == [False, False, True]


def test_goodput_adds_up_and_metrics_reach_tensorboard(plain):
    trainer, losses = plain
    shares = trainer.goodput.shares()
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["step"] > shares["data"] > 0
    (path,) = (trainer.folder / "tensorboard").iterdir()
    content, records = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        body, (check,) = content[12 : 12 + length], struct.unpack("<I", content[12 + length : 16 + length])
        crc = crc32c(body)
        assert check == ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
        records.append(body)
        content = content[16 + length :]
    assert records[0].endswith(b"brain.Event:2")
    assert len(records) == 1 + len(losses)
    for body, (loss, _) in zip(records[1:], losses, strict=True):
        assert b"train/loss_nats\x15" + struct.pack("<f", loss) in body
    assert [m.loss for m in read_metrics(trainer.folder)] == [loss for loss, _ in losses]


def test_a_configuration_survives_json():
    for model in (HYBRID, *(p.model for p in PRESETS.values())):
        assert ModelConfig.from_json(json.loads(json.dumps(model.to_json()))) == model
    with pytest.raises(ValueError, match="must have the fields of Latent, got lateen"):
        ModelConfig.from_json({**HYBRID.to_json(), "latent": {"lateen": 3}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": "MAR"}, "pattern must be made of the letters A "),
        ({"windows": (3,) * 7}, "windows must be None but for A and S blocks, got one for block 0"),
        ({"residual": "none"}, "residual must be one of 'fp32', 'plain', 'mhc', 'mhc-plain', got 'none'"),
        ({"activation": "gelu"}, "activation must be one of 'relu2', 'swiglu', got 'gelu'"),
    ],
)
def test_unknown_parts_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(HYBRID, **changes)
    with pytest.raises(ValueError, match="kinds must be made of exact_token, moba, clustered"):
        Sparse(("nearest",))


def test_the_head_that_looks_further_adds_its_loss_while_training(plain, small_corpus):
    torch.manual_seed(0)
    model = LanguageModel(replace(HYBRID, pattern="A", windows=(None,), residual="fp32", ahead=0.5))
    batch = plain[0].rows.at_step(0, 2, 0)
    with torch.no_grad():
        model.head.weight.normal_()
        both, alone = model.loss(batch), model.eval().loss(batch)
        further = model.after_next(model.hidden(batch), model.embed(batch.targets.clamp_min(0)))
        logits = (further @ model.head.weight.T)[..., : model.config.vocab]
    targets = after_next_targets(batch)
    assert (
        targets[:, :-1] == torch.where(batch.doc_ids[:, 1:] == batch.doc_ids[:, :-1], batch.targets[:, 1:], -100)
    ).all()
    extra = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    lse = logits.logsumexp(-1)[targets != -100]
    torch.testing.assert_close(both - alone, 0.5 * (extra + model.config.z_loss * lse.square().mean()))


def test_flops_count_every_weight_that_a_token_meets():
    e = ExpertLayer(4, 2, 32, shared=16)
    c = replace(HYBRID, pattern="ALE", windows=(15, None, None), residual="fp32", experts=e, ahead=0.5)
    model = LanguageModel(c)
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    experts = model.blocks[2].mlp
    weights += experts.router.weight.numel() + (experts.up.numel() + experts.down.numel()) // 2
    weights += model.head.weight.numel()  # the head that looks further shares it
    windowed = c.heads * 2 * c.head_dim * 16
    whole = c.heads * (2 * c.head_dim + c.latent.rope) * c.context / 2
    assert flops_per_token(c) == 6 * (weights + windowed + whole)
    assert active_parameters(model) == model.parameter_count() - (experts.up.numel() + experts.down.numel()) // 2


def assert_same_gradients(ours, theirs):
    """But for rounding, of which some gradients are all: a norm cancels the scale of what it reads."""
    largest = max(g.abs().max() for g in theirs)
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert (a - b).abs().max() <= 256 * EPS * b.abs().max() + EPS * largest, number


@pytest.mark.thorough
@pytest.mark.parametrize("by_blocks", [False, True], ids=["the whole model", "each block"])
def test_every_letter_compiles_into_one_graph(plain, by_blocks):
    """``fullgraph=True`` refuses a graph break."""
    torch.manual_seed(0)
    sparse = replace(HYBRID.sparse, kinds=("exact_token", "clustered"))
    model = LanguageModel(replace(HYBRID, pattern="MASLSE", windows=(None, 16, *4 * (None,)), sparse=sparse))
    batch = plain[0].rows.at_step(0, 2, 0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    eager = model(batch)
    if by_blocks:
        model.compile_blocks("aot_eager")
    compiled = model(batch) if by_blocks else torch.compile(model, fullgraph=True, backend="aot_eager")(batch)
    torch.testing.assert_close(compiled, eager)
    weights = list(model.parameters())
    assert_same_gradients(*(torch.autograd.grad(y, weights) for y in (compiled, eager)))


@pytest.mark.thorough
def test_a_compiled_run_takes_the_steps_of_an_eager_one(small_corpus, tmp_path):
    model = replace(PRESETS["nano"].model, pattern="A", windows=(16,), dropout=0.0, context=64)
    runs = [run(small_corpus, tmp_path / str(c), model=model, backend="auto", compile=c)[1] for c in (True, False)]
    for (loss, norm), (expected, expected_norm) in zip(*runs, strict=True):
        assert loss == pytest.approx(expected, rel=64 * EPS)
        assert norm == pytest.approx(expected_norm, rel=1024 * EPS)


def test_mixed_precision_keeps_float32_weights_and_a_close_loss(plain, small_corpus, tmp_path):
    trainer, losses = run(small_corpus, tmp_path / "run", dtype="bfloat16")
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert losses != plain[1]
    for (loss, _), (expected, _) in zip(losses, plain[1], strict=True):
        assert loss == pytest.approx(expected, rel=2**-7)  # the weights and activations have 8 bits


def test_accumulated_gradients_are_those_of_the_whole_batch(small_corpus, tmp_path):
    """Rows with very different numbers of targets: a mean of the parts' means would be far off."""
    found = []
    for rows, parts in ((4, 1), (2, 2), (1, 4)):
        c = config(small_corpus, batch_rows=rows, accumulate=parts)
        trainer = Trainer.start(
            replace(c, model=replace(c.model, pattern="AM", windows=(16, None))), tmp_path / f"{rows}"
        )
        with torch.no_grad():
            trainer.model.head.weight.copy_(
                torch.randn(trainer.model.head.weight.shape, generator=torch.manual_seed(1))
            )
        batch = trainer.rows.at_step(0, 4, 0)
        targets = batch.targets.clone()
        targets[0, 9:], targets[2, 30:] = -100, -100
        batch = batch._replace(targets=targets)
        pieces = [type(batch)(*(t[i : i + rows] for t in batch)) for i in range(0, 4, rows)]
        loss = trainer._gradients(pieces)
        found.append((loss, [p.grad for p in trainer.model.parameters() if p.grad is not None]))
    for loss, grads in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=16 * EPS)
        assert_same_gradients(grads, found[0][1])


def test_the_learning_rate_warms_up_and_decays_and_gradients_are_clipped(small_corpus, tmp_path):
    trainer = Trainer.start(config(small_corpus, clip=1e-3), tmp_path / "run")
    trainer.config = replace(trainer.config, steps=100)
    rates = [trainer.learning_rate(step) / trainer.config.learning_rate for step in range(100)]
    assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[52] == pytest.approx(0.55, abs=0.01)
    assert rates[-1] == pytest.approx(0.1, abs=0.001)
    trainer._gradients([trainer.rows.at_step(0, 4, 0)])
    assert trainer._clip() > 1e-3
    norm = torch.stack([p.grad.norm() for p in trainer.model.parameters() if p.grad is not None]).norm()
    assert norm == pytest.approx(1e-3, rel=1e-3)


def test_a_resumed_run_reports_the_time_of_both(small_corpus, tmp_path):
    trainer = Trainer.start(config(small_corpus), tmp_path / "run")
    next(trainer.steps())
    trainer.save()
    before = trainer.goodput.seconds()["step"]
    resumed = Trainer.resume(tmp_path / "run")
    assert resumed.goodput.seconds()["step"] == before
    list(resumed.steps())
    assert resumed.goodput.seconds()["step"] > before
    assert sum(resumed.goodput.shares().values()) == pytest.approx(1)

"""Choice by measurement: the nearest row decides, only for a backend that may run, and never leaves none."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kernel_index as ki
from kernel_index.core import measured, rules
from kernel_index.core.target import Target, pretend, target_of
from kernel_index.index.rule_sentences import sentences
from kernel_index.kernels.attention.dense_attention import contract, gpu_rules
from kernel_index.kernels.attention.dense_attention.api import BACKENDS
from kernel_index.kernels.attention.dense_fa4_kvcache_decode.api import BACKENDS as DECODE

SM90 = Target("cuda", 90)


def anything(name: str) -> bool:
    return True


@pytest.fixture
def table(monkeypatch, tmp_path):
    def write(**ops) -> None:
        content = {"device": "A card", "date": "2026-01-02", "versions": {}} | ops
        for arch in ("sm_90", "cpu"):
            (tmp_path / f"{arch}.json").write_text(json.dumps(content))
        measured.forget()

    monkeypatch.setattr(measured, "FOLDER", tmp_path)
    measured.forget()
    yield write
    measured.forget()


def row(cell: str, sizes: list[int], kind: list[str] | None = None, **us: float):
    return {"cell": cell, "kind": kind or ["infer"], "sizes": sizes, "us": us}


def test_the_row_that_decided_is_named(table):
    table(op=[row("small", [1024], a=131.0, b=100.0)])
    said = measured.slower("op", "a", SM90, ("infer",), (1024,), anything)
    assert said == f"{measured.SLOWER}: 1.31x of b at small (A card, 2026-01-02)"
    assert measured.slower("op", "b", SM90, ("infer",), (1024,), anything) is None


def test_what_was_not_measured_says_nothing(table):
    table(op=[row("small", [1024], a=200.0, b=100.0)])
    for op, target, kind in (
        ("other", SM90, ("infer",)),
        ("op", Target("cuda", 80), ("infer",)),
        ("op", Target("hip", "gfx942"), ("infer",)),
        ("op", SM90, ("train",)),
    ):
        assert not measured.known(op, target, kind)
        assert measured.slower(op, "a", target, kind, (1024,), anything) is None
    assert measured.known("op", SM90, ("infer",))
    assert measured.slower("op", "new", SM90, ("infer",), (1024,), anything) is None, "a backend without a time"


def test_the_nearest_row_counts_and_the_first_size_first(table):
    table(
        op=[
            row("64 1k", [64, 1024], a=2.0, b=1.0),
            row("128 1k", [128, 1024], a=1.0, b=2.0),
            row("128 32k", [128, 32768], a=2.0, b=1.0),
        ]
    )

    def cell(*sizes: int) -> str | None:
        return measured.slower("op", "a", SM90, ("infer",), sizes, anything)

    assert "64 1k" in cell(64, 32768)
    assert cell(128, 700) is None
    assert cell(100, 3000) is None, "3000 is nearer to 1024 than to 32768 in octaves"
    assert "128 32k" in cell(128, 7000)
    assert "128 32k" in cell(256, 10**6)


def test_times_within_three_percent_are_equal(table):
    table(op=[row("near", [8], a=103.0, b=100.0), row("apart", [1024], a=104.0, b=100.0)])
    assert measured.slower("op", "a", SM90, ("infer",), (8,), anything) is None
    assert "1.04x of b" in measured.slower("op", "a", SM90, ("infer",), (1024,), anything)


def test_only_a_backend_that_may_run_counts(table):
    table(op=[row("cell", [8], a=4.0, b=2.0, c=1.0)])
    assert "4.00x of c" in measured.slower("op", "a", SM90, ("infer",), (8,), anything)
    assert "2.00x of b" in measured.slower("op", "a", SM90, ("infer",), (8,), lambda name: name == "b")
    assert measured.slower("op", "a", SM90, ("infer",), (8,), lambda name: False) is None


def test_without_sizes_a_rival_must_have_been_timed_and_faster_in_every_row(table):
    both = row("one", [8], a=2.0, b=1.0, c=1.5)
    table(op=[both, row("two", [64], a=2.0, c=1.8)])
    said = measured.slower("op", "a", SM90, ("infer",), (), anything)
    assert said == f"{measured.SLOWER}: 1.11x of c at two (A card, 2026-01-02)", "the row in which it was the least"


TIMES = st.dictionaries(st.sampled_from("abcde"), st.floats(1, 4), min_size=1)


@given(st.lists(st.tuples(TIMES, st.integers(1, 2**17)), min_size=1, max_size=4), st.sets(st.sampled_from("abcde")))
def test_of_those_that_may_run_one_is_left(tmp_path_factory, cells, able):
    folder = tmp_path_factory.mktemp("table")
    rows = [row(str(i), [size], **us) for i, (us, size) in enumerate(cells)]
    (folder / "sm_90.json").write_text(json.dumps({"device": "A card", "date": "2026-01-02", "op": rows}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measured, "FOLDER", folder)
        measured.forget()
        for size in (1, 300, 10**5):
            said = [measured.slower("op", n, SM90, ("infer",), (size,), able.__contains__) for n in sorted(able)]
            assert not able or None in said
            unknown = [measured.slower("op", n, SM90, ("infer",), (), able.__contains__) for n in sorted(able)]
            assert not able or None in unknown, "without sizes, as in a trace"
    measured.forget()


def test_a_trace_reads_no_size(table):
    """Else every size would be a graph of its own: what was slower in every row of its kind is passed over."""
    table(op=[row("small", [8], a=2.0, b=1.0, c=3.0), row("large", [4096], a=1.0, b=2.0, c=3.0)])
    chosen = []

    def function(x):
        target, kind = target_of(x.device), ("train" if x.requires_grad else "infer", *[n for n in "ab" if n == "c"])
        assert measured.known("op", target, kind)
        for name in ("a", "c"):
            if measured.slower("op", name, target, kind, (x.shape[0],), anything) is not None:
                x = x + (1 if name == "a" else 10)
        return x

    def backend(graph, _):
        chosen.append(graph)
        return graph

    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=True)
    for size in (8, 4096, 77):
        assert compiled(torch.zeros(size)).sum() == 10 * size
    assert len(chosen) == 1
    assert function(torch.zeros(8)).sum() == 11 * 8, "outside of a trace the small row counts"


# The data of the package

FILES = sorted(measured.FOLDER.glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_file_says_when_and_where_and_names_backends(path):
    content = json.loads(path.read_text())
    assert content["device"]
    assert len(content["date"]) == 10
    for op, table_of in (("attention", BACKENDS), ("fa4_kvcache_decode", DECODE)):
        assert content[op], f"{path.name} has no row of {op}"
        for r in content[op]:
            assert set(r["us"]) <= {b.name for b in table_of}
            assert all(us > 0 for us in r["us"].values())
            assert len(r["sizes"]) == 3
            assert len(r.get("date", content["date"])) == 10
    assert len({r["cell"] for op in ("attention", "fa4_kvcache_decode") for r in content[op]}) == sum(
        len(content[op]) for op in ("attention", "fa4_kvcache_decode")
    )


def test_there_is_a_file():
    assert "sm_90" in {p.stem for p in FILES}


# Attention


ATTENTION = [
    row("causal 8k infer", [128, 8192, 4], ["infer"], fa4=3.5, triton=5.0, flex=5.4, sdpa=3.8),
    row("causal 8k train", [128, 8192, 4], ["train"], fa4=13.4, triton=22.4, flex=20.8, sdpa=15.0),
    row("head size 256 8k train", [256, 8192, 2], ["train"], fa4=9.24, triton=27.0, flex=23.6, sdpa=9.22),
    row("window 1024 32k infer", [128, 32768, 1], ["infer", "window"], fa4=1.0, triton=1.5, flex=1.7),
    row("16 documents 32k infer", [128, 32768, 1], ["infer", "documents"], fa4=1.3, triton=1.7, flex=1.5),
    row("sink + window 128 train", [64, 8192, 2], ["train", "sink", "window"], fa4=1.16, triton=0.94, flex=0.5),
]


@pytest.fixture
def on_sm90(monkeypatch, table):
    """Calls on meta tensors as on a card with this table, with or without flash-attn-4."""
    monkeypatch.setattr(rules, "interpreting", lambda: False)
    table(attention=ATTENTION)

    def explained(tokens: int, d: int, fa4: bool, train: bool = False, arch: int = 90, heads: int = 8, **options):
        monkeypatch.setattr(gpu_rules, "fa4_package_why_not", lambda: None if fa4 else "absent")
        made = {"dtype": torch.bfloat16, "device": "meta", "requires_grad": train}
        q, k, v = (torch.empty(4, tokens, heads, d, **made) for _ in range(3))
        sink = torch.empty(heads, dtype=torch.bfloat16, device="meta") if options.pop("sink", False) else None
        with pretend(Target("cuda", arch)):
            return ki.explain("attention", q, k, v, ki.MaskContract(**options), sink=sink)

    return explained


def test_without_flash_attn_torchs_kernel_is_taken_since_it_was_faster(on_sm90):
    found = on_sm90(8192, 128, fa4=False)
    assert found.would_run == "sdpa"
    said = found.verdicts["triton"]
    assert said.startswith(measured.SLOWER)
    assert "1.32x of sdpa at causal 8k infer (A card, 2026-01-02)" in said
    assert "causal 8k train" in on_sm90(8192, 128, fa4=False, train=True).verdicts["triton"]


def test_the_kernels_for_hopper_are_taken_only_where_they_were_measured(on_sm90, table):
    assert on_sm90(8192, 128, fa4=False).verdicts["gluon"] == gpu_rules.NOT_MEASURED
    table(
        attention=[
            row("causal 8k infer", [128, 8192, 4], ["infer"], fa4=3.5, triton=5.0, gluon=3.7, flex=5.4, sdpa=3.9)
        ]
    )
    found = on_sm90(8192, 128, fa4=False)
    assert found.would_run == "gluon"
    assert "1.35x of gluon at causal 8k infer" in found.verdicts["triton"]
    assert on_sm90(8192, 96, fa4=False).would_run == "sdpa", "gluon takes no head of 96, and torch's was faster"


def test_flex_attention_is_not_taken_where_it_was_not_measured_and_torchs_kernel_was_faster(on_sm90, table):
    """The table of the package has no time of it: it compiles for each mask and shape."""
    table(attention=[row("causal 512 infer", [128, 512, 32], ["infer"], fa4=271.0, triton=307.0, sdpa=226.0)])
    for fa4 in (True, False):
        found = on_sm90(512, 128, fa4=fa4)
        assert found.would_run == "sdpa"
        assert found.verdicts["flex"] == contract.NO_MASK


def test_with_flash_attn_it_is_taken_where_nothing_was_faster(on_sm90):
    for tokens in (1000, 8192, 50000):
        assert on_sm90(tokens, 128, fa4=True).would_run == "fa4"
    assert on_sm90(8192, 256, fa4=True, train=True).would_run == "fa4", "as fast as torch's kernel"
    assert on_sm90(8192, 128, fa4=True, window=(1023, None)).would_run == "fa4"


def test_a_row_in_which_our_kernel_was_faster_than_flash_attn(on_sm90):
    """FlexAttention, which compiles for each mask and shape, is no rival."""
    options = {"window": (127, None), "sink": True}
    found = on_sm90(8192, 64, fa4=True, train=True, **options)
    assert found.would_run == "triton"
    assert "1.23x of triton at sink + window 128 train" in found.verdicts["fa4"]


def test_documents_keep_waiting_for_nobody(on_sm90, monkeypatch):
    """Where their lengths would have to be read, flash-attn-4 is no rival of Triton, however fast it is."""
    monkeypatch.setattr(gpu_rules, "fa4_form", lambda call: "packed")
    ids = torch.zeros(4, 32768, dtype=torch.int64, device="meta")
    found = on_sm90(32768, 128, fa4=True, doc_ids=ids)
    assert found.would_run == "triton"
    assert found.verdicts["fa4"] == gpu_rules.WAITS


def test_where_nothing_was_measured_torchs_kernel_is_taken_for_calls_without_a_mask(on_sm90):
    found = on_sm90(8192, 128, fa4=False, arch=80)
    assert found.would_run == "sdpa"
    assert found.verdicts["triton"] == contract.NO_MASK
    assert on_sm90(8192, 128, fa4=False, arch=80, window=(5, None)).would_run == "triton"


def test_the_rules_that_are_listed_hold_the_measured_one():
    for name in ("fa4", "triton", "gluon", "flex"):
        rule = next(b for b in BACKENDS if b.name == name).not_worth
        assert measured.SLOWER in sentences(rule)
    assert contract.NO_MASK in sentences(gpu_rules.triton_not_worth)


def test_a_named_backend_is_not_asked(on_sm90):
    q = torch.empty(1, 8192, 8, 128, dtype=torch.bfloat16, device="meta")
    with pretend(SM90):
        assert ki.explain("attention", q, q, q, backend="triton").would_run == "triton"


def test_attention_is_chosen_by_measurement_in_a_trace_too(monkeypatch, table):
    monkeypatch.setattr(rules, "interpreting", lambda: False)
    table(attention=ATTENTION)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda q, k, v: ki.attention(q, k, v), backend=backend, fullgraph=True, dynamic=True)
    with pretend(SM90), ki.receipts() as log:
        for tokens in (64, 8192, 300):
            compiled(*(torch.empty(2, tokens, 8, 128, dtype=torch.bfloat16, device="meta") for _ in range(3)))
    assert len(graphs) == 1
    assert [r.ran for r in log] == ["sdpa"]
    assert "of sdpa at causal" in dict(log[0].declined)["triton"]

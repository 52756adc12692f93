"""What dispatch promises, on an op made for the purpose, in eager mode; ``test_dispatch_compiled.py`` has the rest."""

import contextlib
import threading
from dataclasses import FrozenInstanceError

import pytest
import torch

import kernel_index as ki
from kernel_index.core import dispatch
from kernel_index.core import force as forcing
from kernel_index.core.dispatch import Ineligible, Receipt, choose
from kernel_index.core.force import reload_environment
from kernel_index.core.target import Target
from tests import toy_op
from tests.toy_op import LaunchError, PredicateError, toy

ODD = "needs an even width"
SMALL = "too small to pay"


def test_auto_takes_the_first_eligible():
    with ki.receipts() as log:
        assert torch.equal(toy(torch.ones(4, 8)), torch.full((4, 8), 10.0))
        assert torch.equal(toy(torch.ones(4, 7)), torch.full((4, 7), 20.0))
        assert torch.equal(toy(torch.ones(1, 7)), torch.full((1, 7), 30.0))
    assert [(r.requested, r.ran, r.declined) for r in log] == [
        ("auto", "even", ()),
        ("auto", "large", (("even", ODD),)),
        ("auto", "reference", (("even", ODD), ("large", SMALL))),
    ]
    assert {(r.op, r.forced_by, r.tried == r.ran, r.error) for r in log} == {("toy", None, True, None)}


def test_a_backend_behind_the_chosen_one_is_not_asked():
    toy_op.asked.clear()
    toy(torch.ones(4, 8))
    assert toy_op.asked == ["even"]
    toy_op.asked.clear()
    toy(torch.ones(4, 8), backend="large")
    assert toy_op.asked == ["large"]


def test_a_named_backend_runs_or_raises():
    assert toy(torch.ones(1, 8), backend="large")[0, 0] == 20, "advice to auto does not bind who names the backend"
    assert toy(torch.ones(4, 8), backend="reference")[0, 0] == 30
    with ki.receipts() as log, pytest.raises(Ineligible) as error:
        toy(torch.ones(4, 7), backend="even")
    assert str(error.value) == f"toy: backend='even' cannot run this call (even: {ODD})"
    assert isinstance(error.value, ValueError)
    assert log == [], "nothing ran, so nothing is on record"


@pytest.mark.parametrize("name", ["cuda-magic", "", "Reference", None, 3])
def test_an_unknown_backend_is_refused(name):
    with pytest.raises(Ineligible, match=r"\(expected auto or one of: even, large, reference\)"):
        toy(torch.ones(4, 8), backend=name)


def test_no_eligible_backend_lists_every_rule():
    with pytest.raises(Ineligible) as error:
        toy_op.without_reference(torch.ones(1, 7))
    assert str(error.value) == f"toy: backend='auto' cannot run this call (even: {ODD}; large: {SMALL})"


@pytest.mark.parametrize("call", [toy_op.bad_rule, toy_op.bad_advice, toy_op.bad_details])
def test_a_predicate_that_raises_is_a_bug_and_surfaces_unchanged(call):
    with ki.receipts() as log, pytest.raises(PredicateError) as error:
        call(torch.ones(2, 2))
    assert error.value is toy_op.predicate_error
    assert log == []
    with pytest.raises(PredicateError):
        ki.explain(call, torch.ones(2, 2))


@pytest.mark.parametrize("raised", [LaunchError("out of shared memory"), KeyboardInterrupt(), SystemExit(3)])
def test_a_launch_that_fails_raises_and_the_receipt_says_what_was_tried(raised):
    with ki.receipts() as log, pytest.raises(type(raised)) as error:
        toy_op.failing(torch.ones(2, 2), raised)
    assert error.value is raised, "nothing falls back and nothing is wrapped"
    (receipt,) = log
    assert (receipt.ran, receipt.tried, receipt.requested) == ("", "fails", "auto")
    assert receipt.error == f"{type(raised).__name__}: {raised}"
    assert receipt.declined == (("even", ODD),)


def test_details_are_on_the_receipt():
    with ki.receipts() as log:
        toy_op.detailed(torch.ones(4, 8))
        toy_op.detailed(torch.ones(2, 8))
        toy_op.detailed(torch.ones(2, 8))
    assert log[0].details == {"rows": 4, "path": "even"}
    assert sorted(log.counts().values()) == [1, 2], "receipts that differ in details only are different"
    with pytest.raises(FrozenInstanceError):
        log[0].ran = "other"


# Receipts


def test_logs_nest_and_close():
    with ki.receipts() as outer:
        toy(torch.ones(4, 8))
        with ki.receipts() as inner:
            toy(torch.ones(4, 7))
        toy(torch.ones(1, 7))
    toy(torch.ones(4, 8))
    assert [r.ran for r in outer] == ["even", "large", "reference"]
    assert [r.ran for r in inner] == ["large"]
    assert inner[0] is outer[1]


def test_closing_one_of_two_equal_logs_closes_the_right_one():
    with ki.receipts() as outer:
        with ki.receipts() as inner:
            pass
        toy(torch.ones(4, 8))
    assert (len(outer), len(inner)) == (1, 0)


def test_logs_close_in_any_order_and_after_an_exception():
    first, second = contextlib.ExitStack(), contextlib.ExitStack()
    a, b = first.enter_context(ki.receipts()), second.enter_context(ki.receipts())
    first.close()
    toy(torch.ones(4, 8))
    second.close()
    assert (len(a), len(b)) == (0, 1)
    with contextlib.suppress(RuntimeError), ki.receipts():
        raise RuntimeError
    assert dispatch._LOGS == []


def test_a_log_holds_the_calls_of_every_thread():
    with ki.receipts() as log:
        threads = [threading.Thread(target=toy, args=(torch.ones(4, 8),)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [r.ran for r in log] == ["even"] * 4


def test_a_log_of_one_thread_holds_its_own_calls_alone():
    """Blocks are opened and closed, and calls made, in six threads at once; none sees another's, none loses one."""
    logs, others = {}, []

    def work(width):
        logs[width] = []
        for _ in range(200):
            with ki.receipts(every_thread=False) as log:
                toy(torch.ones(4, width))
                toy(torch.ones(1, width))
            logs[width].append([r.ran for r in log])

    with ki.receipts() as everything, ki.receipts(every_thread=False) as own:
        threads = [threading.Thread(target=work, args=(width,)) for width in range(7, 13)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        others.extend(own)
    assert others == []
    assert len(everything) == 6 * 400
    for width, found in logs.items():
        assert found == [["even", "even"] if width % 2 == 0 else ["large", "reference"]] * 200
    assert dispatch._LOGS == []


def test_strict_blocks_of_many_threads_leave_nothing_behind():
    def work():
        for _ in range(2000):
            with ki.strict():
                pass

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert forcing.STRICT[0] == 0


def test_counts():
    with ki.receipts() as log:
        for width in (8, 8, 7, 8):
            toy(torch.ones(4, width))
    assert {(r.ran, n) for r, n in log.counts().items()} == {("even", 3), ("large", 1)}
    assert all(isinstance(r, Receipt) for r in log.counts())


def test_no_log_no_receipt(monkeypatch):
    def explode(*_, **__):
        raise AssertionError("a receipt was built for nobody")

    monkeypatch.setattr(dispatch, "Receipt", explode)
    toy(torch.ones(4, 8))


# Strict mode


@pytest.fixture
def accelerator(monkeypatch):
    monkeypatch.setattr(dispatch, "target_of", lambda device: Target("cuda", 90))


STRICT = "strict mode: a fallback to the reference on an accelerator is an error"


@pytest.mark.usefixtures("accelerator")
def test_strict_refuses_the_fallback_and_nothing_else():
    x = torch.ones(1, 7)
    assert toy(x)[0, 0] == 30
    with ki.strict():
        with pytest.raises(Ineligible, match=STRICT) as error:
            toy(x)
        assert f"even: {ODD}" in str(error.value), "and says why no kernel could run"
        assert toy(torch.ones(4, 8))[0, 0] == 10, "a kernel runs"
        assert toy(x, backend="reference")[0, 0] == 30, "a reference asked for by name is no fallback"
        assert ki.explain(toy, x).would_run is None
        assert ki.explain(toy, x).verdicts["reference"] == STRICT
    assert toy(x)[0, 0] == 30


@pytest.mark.usefixtures("accelerator")
def test_strict_blocks_nest_and_close_after_an_exception():
    x = torch.ones(1, 7)
    with ki.strict():
        with contextlib.suppress(RuntimeError), ki.strict():
            raise RuntimeError
        with pytest.raises(Ineligible):
            toy(x)
    toy(x)


def test_strict_leaves_a_cpu_alone():
    with ki.strict():
        assert toy(torch.ones(1, 7))[0, 0] == 30


def test_strict_takes_any_device_but_the_cpu_for_an_accelerator():
    with ki.strict(), pytest.raises(Ineligible, match="strict mode"):
        toy(torch.ones(1, 7, device="meta"))


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize(("value", "refused"), [("1", True), ("0", False), ("", False)])
def test_strict_by_the_environment(monkeypatch, value, refused):
    monkeypatch.setenv("KERNEL_INDEX_STRICT", value)
    reload_environment()
    with pytest.raises(Ineligible) if refused else contextlib.nullcontext():
        toy(torch.ones(1, 7))


# The environment


def set_variables(monkeypatch, **variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    reload_environment()


def test_the_environment_overrules_the_request_and_the_receipt_says_so(monkeypatch):
    set_variables(monkeypatch, KERNEL_INDEX_BACKEND="reference")
    with ki.receipts() as log:
        toy(torch.ones(4, 8))
        toy(torch.ones(4, 8), backend="even")
    assert [(r.requested, r.ran, r.forced_by) for r in log] == [
        ("auto", "reference", "KERNEL_INDEX_BACKEND"),
        ("even", "reference", "KERNEL_INDEX_BACKEND"),
    ]
    assert ki.explain(toy, torch.ones(4, 8)).forced_by == "KERNEL_INDEX_BACKEND"
    monkeypatch.delenv("KERNEL_INDEX_BACKEND")
    assert toy(torch.ones(4, 8))[0, 0] == 30, "read once, not at every call"
    reload_environment()
    assert toy(torch.ones(4, 8))[0, 0] == 10


def test_the_variable_of_one_op_wins_and_leaves_others_alone(monkeypatch):
    set_variables(monkeypatch, KERNEL_INDEX_BACKEND="reference", KERNEL_INDEX_BACKEND_TOY="large")
    with ki.receipts() as log:
        toy(torch.ones(4, 8))
        ki.fused_relu_squared(torch.ones(3))
    assert [(r.ran, r.forced_by) for r in log] == [
        ("large", "KERNEL_INDEX_BACKEND_TOY"),
        ("reference", "KERNEL_INDEX_BACKEND"),
    ]


def test_an_empty_variable_forces_nothing(monkeypatch):
    set_variables(monkeypatch, KERNEL_INDEX_BACKEND="", KERNEL_INDEX_BACKEND_TOY="")
    assert toy(torch.ones(4, 8))[0, 0] == 10


@pytest.mark.parametrize(("backend", "rule"), [("even", ODD), ("hexagon", "expected auto or one of: even, large, ref")])
def test_a_forced_backend_that_cannot_run_is_not_ignored(monkeypatch, backend, rule):
    set_variables(monkeypatch, KERNEL_INDEX_BACKEND_TOY=backend)
    with pytest.raises(Ineligible) as error:
        toy(torch.ones(4, 7), backend="reference")
    assert f"backend={backend!r} (forced by KERNEL_INDEX_BACKEND_TOY)" in str(error.value)
    assert rule in str(error.value)


# explain


def test_explain_agrees_with_the_call_and_runs_nothing():
    toy_op.ran.clear()
    for x in (torch.ones(4, 8), torch.ones(4, 7), torch.ones(1, 7)):
        with ki.receipts() as log:
            explanation = ki.explain(toy, x)
        assert log == []
        assert toy_op.ran == []
        with ki.receipts() as log:
            toy(x)
        toy_op.ran.clear()
        assert explanation.would_run == log[0].ran
        assert log[0].declined == tuple((n, r) for n, r in explanation.verdicts.items() if r)[: len(log[0].declined)]


def test_explain_shows_every_backend():
    explanation = ki.explain(toy, torch.ones(1, 7))
    assert explanation.verdicts == {"even": ODD, "large": SMALL, "reference": None}
    assert str(explanation) == (
        "toy: backend='auto' would run reference\n"
        f"  even: {ODD}\n"
        f"  large: {SMALL}\n"
        "  reference: can run"
    )  # fmt: skip


def test_explain_of_a_call_that_would_be_refused():
    explanation = ki.explain(toy, torch.ones(4, 7), backend="even")
    assert (explanation.requested, explanation.would_run) == ("even", None)
    assert explanation.verdicts["even"] == ODD
    assert "would run nothing: Ineligible" in str(explanation)


def test_explain_of_an_illegal_call_raises_as_the_call_does():
    for function in (toy, lambda *a: ki.explain(toy, *a)):
        with pytest.raises(TypeError, match=r"x must be a torch\.Tensor, got int"):
            function(3)
    toy(torch.ones(4, 8))
    assert not dispatch._EXPLAINING, "an error ends the explanation"


def test_explain_by_name_and_with_details():
    x = torch.ones(1 << 10, 1 << 8)
    assert ki.explain("fused_relu_squared", x, backend="reference").would_run == "reference"
    assert ki.explain(toy_op.detailed, torch.ones(4, 8)).details == {"rows": 4, "path": "even"}


@pytest.mark.parametrize("op", ["nothing_of_the_kind", "__version__", "dispatch", "torch"])
def test_explain_of_no_op(op):
    with pytest.raises(ValueError, match="op must be the name of a public function of kernel_index, got"):
        ki.explain(op, torch.ones(3))


def test_explain_of_a_function_without_backends():
    with pytest.raises(ValueError, match="op must be a function with backends"):
        ki.explain("rope_tables", torch.arange(3), 8)


def test_explain_in_one_thread_does_not_stop_another():
    inside, go_on = threading.Event(), threading.Event()
    answers = []

    def slow_rule(x):
        inside.set()
        assert go_on.wait(10)

    backends = (dispatch.Backend("slow", slow_rule, lambda x: x),)

    def explaining():
        answers.append(ki.explain(lambda x: choose("slow", backends, "auto", x).run(x), torch.ones(2)))

    thread = threading.Thread(target=explaining)
    thread.start()
    assert inside.wait(10)
    with ki.receipts() as log:
        assert toy(torch.ones(4, 8))[0, 0] == 10
    go_on.set()
    thread.join()
    assert [r.ran for r in log] == ["even"]
    assert answers[0].would_run == "slow"
    assert not dispatch._EXPLAINING

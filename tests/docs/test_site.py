"""The site's pages: states come from records alone, links lead somewhere, and each check can fail."""

import json
import re
from pathlib import Path

import pytest

from docs import __main__ as build
from docs import links, pages, states, text
from kernel_index.core.target import has_package
from kernel_index.index.entries import ENTRIES, FAMILIES

MACHINE = {"processor": "A CPU", "torch": "2.13.0", "date": "2026-01-02"}


@pytest.fixture
def results(tmp_path):
    def write(name: str, **content) -> Path:
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return tmp_path

    return write


def row(passed: int, failed: int = 0, refused: int = 0) -> dict[str, int]:
    return {"passed": passed, "refused": refused, "failed": failed}


# States


def test_a_record_says_what_was_run_interpreted_and_compiled(results):
    counts = {
        "relu": {"triton": {"interpreted": row(3)}, "inductor": {"run": row(2)}, "fa4": {"run": row(0, refused=4)}}
    }
    results("a", proof="numerics", machine=MACHINE, counts=counts)
    counts = {"relu": {"triton": {"sm90": {"compiled": 4, "failed": 1}, "gfx942": {"compiled": 5, "failed": 0}}}}
    found = states.read(results("b", proof="aot", machine=MACHINE, counts=counts))
    seen = {(s.backend, str(s), s.where) for s in found}
    assert seen == {
        ("triton", "interpreted", "A CPU"),
        ("inductor", "run", "A CPU"),
        ("triton", "compiled: 1 of 5 failed", "sm90"),
        ("triton", "compiled", "gfx942"),
    }, "what was only refused says nothing"
    assert {s.versions for s in found} == {"PyTorch 2.13.0, 2026-01-02"}


def test_figures_hold_states_too(results):
    verified = {"relu": {"inductor": row(3), "triton": row(0, refused=3), "reference": row(0, failed=1)}}
    found = states.read(results("bench", machine=MACHINE, comparisons=[], verified=verified))
    assert [(s.backend, str(s)) for s in found] == [("inductor", "run"), ("reference", "failed")]


def test_other_files_beside_the_results_say_nothing(results):
    results("other", proof="traffic", rows=[])
    (results("more", machine=MACHINE) / "list.json").write_text("[1]")
    assert states.read(results("notes", notes=["relu: slow", "of nothing"])) == []
    assert states.notes(["relu"], results("notes", notes=["relu: slow", "of nothing"])) == ["relu: slow"]


def test_the_strongest_state_comes_first():
    def state(kind: str, passed: int = 1, failed: int = 0) -> states.State:
        return states.State("op", "triton", kind, "", "", passed, failed, "")

    found = [state("compiled"), state("interpreted"), state("run", 3, 1), state("compiled")]
    assert states.summary(found) == "run: 1 of 4 failed, interpreted, compiled"
    assert states.summary([state("run", 0, 2)]) == "failed"
    assert states.summary([]) == ""


def test_no_state_without_a_record(tmp_path):
    front = pages.front(states.read(tmp_path))
    cells = {c.strip() for line in front.splitlines() if line.startswith("| [") for c in line.split("|")[3:-1]}
    assert cells == {"–", "no record"}


def test_the_front_page_has_every_entry_and_its_recorded_states():
    front = pages.front(states.read())
    for e in ENTRIES:
        assert f"[{e.name}](kernels/{e.name}.md)" in front
    for family in FAMILIES:
        assert f"## {family}\n" in front
    triton = [s.where for s in states.read() if (s.op, s.backend, s.kind) == ("fused_rope_qk", "triton", "run")]
    assert "NVIDIA H200" in triton


# Text


def test_a_docstring_becomes_markdown():
    source = """Sum ``x * y``; a * b.

With::

    y = x * 2

Args:
    x: [B, T], any
        dtype.
    *rest: more.

Returns:
    A tensor.

>>> 1 + 1
2
"""
    assert text.of_docstring(source) == (
        "Sum `x * y`; a \\* b.\n\nWith:\n\n```text\ny = x * 2\n```\n\n**Args**\n\n- `x`: \\[B, T\\], any\n  dtype.\n"
        "- `*rest`: more.\n\n**Returns**\n\n  A tensor.\n\n```pycon\n>>> 1 + 1\n2\n```\n"
    )


def test_links_of_the_tree_hold_on_the_site():
    def moved(source: str) -> str:
        return text.relink(source, "docs/guides/a.md", "guides/a.md", pages.place)

    assert moved("[c](../../CONTRIBUTING.md#rules)") == "[c](../contributing.md#rules)"
    assert moved("[d](../decisions)") == "[d](../decisions/index.md)"
    assert moved("[k](../../kernel_index/kernels/experts/README.md)") == "[k](../kernels/fused_relu_squared.md)"
    assert moved("[m](../../Makefile)") == "m", "what the site does not have is not linked"
    assert moved("[w](https://example.org/a) [p](#place)") == "[w](https://example.org/a) [p](#place)"


def test_headings_go_down_and_code_stays():
    assert text.deeper("# a\n```\n# b\n```") == "## a\n```\n# b\n```"


@pytest.mark.parametrize("path", sorted((pages.REPOSITORY / "docs" / "decisions").glob("*.md")), ids=lambda p: p.stem)
def test_a_decision_begins_with_its_status_date_context_and_alternatives(path):
    title, _, *head = path.read_text().splitlines()[:6]
    assert title.startswith("# ")
    assert [line.partition(":")[0] for line in head] == ["- **Status", "- **Date", "- **Context", "- **Alternatives"]


# The site


def test_the_link_checker_finds_what_is_broken(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "index.html").write_text('<a href="sub/a.html#here">x</a><a href="sub/">y</a><img src="none.png">')
    (tmp_path / "sub" / "a.html").write_text(
        '<h1 id="here"></h1><a href="../index.html#gone">x</a><a href="#here">x</a>'
    )
    (tmp_path / "sub" / "index.html").write_text('<a href="https://example.org/none">x</a><script src="b.js"></script>')
    assert links.broken(tmp_path) == [
        "index.html: none.png",
        "sub/a.html: ../index.html#gone",
        "sub/index.html: b.js",
    ]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    return folder, pages.write(folder)


def test_every_page_is_written_and_links_to_pages(written):
    folder, nav = written
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*.md")}
    assert listed(nav) == found, "every page is in the navigation"
    for path in folder.rglob("*.md"):
        prose = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(), flags=re.DOTALL)
        for target in re.findall(r"(?<!\\)\]\(([^):\s]+)\)", prose):
            assert (path.parent / target.partition("#")[0]).exists(), f"{path.name}: {target}"


def listed(nav: pages.Nav) -> set[str]:
    return {page for _, v in nav for page in ([v] if isinstance(v, str) else listed(v))}


def test_a_kernels_page_has_its_contract_its_rules_and_its_mathematics(written):
    page = (written[0] / "kernels" / "fused_relu_squared.md").read_text()
    assert "ki.fused_relu_squared(x, *, backend='auto')" in page
    assert "- declines: needs CPU tensors" in page
    assert "y = max(x, 0)²" in page
    assert "| NVIDIA H200 |" in page
    assert ">>> ki.fused_relu_squared(torch.tensor([-1.0, 0.5, 3.0]))" in page


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("doc_window_mask", "p − L ≤ s ≤ p + R"),
        ("union_selection_query_mask", "rank(selected[t, j])"),
        ("exact_token_sparse_telemetry", "Σ_j w[t, j] · relu"),
    ],
)
def test_a_page_has_the_mathematics_of_a_library(written, entry, said):
    """The READMEs of masks and routing, also where only a function of the entry is there."""
    page = (written[0] / "kernels" / f"{entry}.md").read_text()
    assert said in page
    assert page.count("## Mathematics and memory") == 1


READMES = sorted((pages.REPOSITORY / "kernel_index").rglob("README.md"))


@pytest.mark.parametrize("path", READMES, ids=lambda p: p.relative_to(pages.REPOSITORY).parent.as_posix())
def test_links_of_a_readme_lead_to_files(path):
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^):\s#]+)", prose):
        assert (path.parent / target).exists(), target


@pytest.mark.skipif(not has_package("zensical"), reason="needs the docs extra: make docs installs it")
def test_the_built_site_has_no_broken_link_and_can_be_searched(tmp_path):
    assert build.main(tmp_path / "out") == 0
    found = json.loads((tmp_path / "out" / "site" / "search.json").read_text())
    places = {item["location"].partition("#")[0] for item in found["items"]}
    assert {f"kernels/{e.name}.html" for e in ENTRIES} <= places
    (tmp_path / "out" / "site" / "kernels" / "fused_relu_squared.html").unlink()
    assert any("fused_relu_squared.html" in line for line in links.broken(tmp_path / "out" / "site"))

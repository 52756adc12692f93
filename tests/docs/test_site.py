"""The site's pages: states come from records alone, links lead somewhere, and each check can fail."""

import json
import re
import tomllib
from pathlib import Path

import pytest

import kernel_index
from docs import SOURCE, browser, cells, formulas, links, measured, pages, place, reference, states, status, text
from docs import __main__ as build
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


def record(kind: str, passed: int = 1, failed: int = 0, date: str = "2026-01-02") -> states.State:
    return states.State("op", "triton", kind, "a machine", f"PyTorch 2.13, {date}", passed, failed, "")


def test_a_later_record_replaces_an_earlier_one(results):
    for name, date, failed in (("z", "2026-01-02", 1), ("a", "2026-02-03", 0)):  # by date, not by name
        counts = {"relu": {"inductor": {"run": row(3, failed)}}}
        results(name, proof="numerics", machine=MACHINE | {"date": date}, counts=counts)
    (found,) = states.read(results("other", notes=[]))
    assert (found.date, found.failed) == ("2026-02-03", 0)
    shown = [record("run", 3, 1), record("compiled"), record("run", date="2026-01-03")]
    assert states.current(shown) == shown[1:], "of each kind the latest day"


def test_a_mark_says_what_the_records_say():
    def mark(*found: states.State) -> str:
        return status._chip("op", "triton", found)

    assert "ki-none" in mark()
    assert "ki-compiled" in mark(record("compiled"))
    assert "triton · run, compiled<" in mark(record("compiled"), record("run"))
    assert "ki-failed" in mark(record("run", 2, 1))
    assert "1 failed" in mark(record("run", 2, 1))
    assert 'title="run on a machine, 2026-01-02"' in mark(record("run"))


def test_no_state_without_a_record(tmp_path):
    _, *families = status.write(states.read(tmp_path)).split("\n## ")
    marks = re.findall(r'class="ki-chip ki-(\w+)"', "".join(families))
    assert set(marks) == {"none"}


def test_the_status_page_has_every_function_and_its_recorded_states():
    page = status.write(states.read())
    for e in ENTRIES:
        for name in e.functions:
            assert f"{name}</code>](kernels/{e.name}.md)" in page.replace("\\_<wbr>", "_")
    for family in FAMILIES:
        assert f"## {family}\n" in page
    triton = [s.where for s in states.read() if (s.op, s.backend, s.kind) == ("fused_rope_qk", "triton", "run")]
    assert "NVIDIA H200" in triton


# Text


def test_links_of_the_tree_hold_on_the_site():
    def moved(source: str) -> str:
        return text.relink(source, "docs/guides/a.md", "guides/a.md", place.place)

    assert moved("[c](../../CONTRIBUTING.md#rules)") == "[c](../contributing.md#rules)"
    assert moved("[d](../decisions)") == "[d](../decisions/index.md)"
    assert moved("[k](../../kernel_index/kernels/experts/README.md)") == "[k](../kernels/fused_relu_squared.md)"
    assert moved("[m](../../Makefile)") == "m", "what the site does not have is not linked"
    assert moved("[w](https://example.org/a) [p](#place)") == "[w](https://example.org/a) [p](#place)"


def test_headings_go_down_and_code_stays():
    assert text.deeper("# a\n```\n# b\n```") == "## a\n```\n# b\n```"


@pytest.mark.parametrize("path", sorted((place.REPOSITORY / "docs" / "decisions").glob("*.md")), ids=lambda p: p.stem)
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
    assert "::: kernel_index.fused_relu_squared\n" in page
    assert "- declines: needs CPU tensors" in page
    assert r"y &= \max(x, 0)^2" in page
    assert "| NVIDIA H200 |" in page


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("doc_window_mask", r"p - L \le s \le p + R"),
        ("union_selection_query_mask", r"\operatorname{rank}(\mathit{selected}_{t,j})"),
        ("exact_token_sparse_telemetry", r"\sum_{j=1}^{J} w_{t,j}"),
    ],
)
def test_a_page_has_the_mathematics_of_a_library(written, entry, said):
    """The READMEs of masks and routing, also where only a function of the entry is there."""
    page = (written[0] / "kernels" / f"{entry}.md").read_text()
    assert said in page
    assert page.count("## Mathematics and memory") == 1


def test_the_reference_lists_every_public_name(written):
    page = (written[0] / "reference" / "index.md").read_text()
    for name in kernel_index.__all__:
        assert f"[`{name}`](" in page
    for part, (_, module, _) in reference.PACKAGES.items():
        for name in reference.names(module):
            assert f"{part}.md#{module}.{name})" in page
    with pytest.raises(ValueError, match="__all__"):
        reference.names("kernel_index.core.dispatch")


def test_the_pages_by_hand_and_the_plots_are_there(written):
    assert "<svg" in (written[0] / "concepts.md").read_text()
    page = (written[0] / "measured.md").read_text()
    assert page.count('<figure class="ki-plot"') == len(measured.drawn(measured.content())) == 7
    assert "<!-- " not in page
    assert "| causal 8k infer | 3.103 | fa4 | 0.88 fa4 | 0.83 FA4 |" in page
    assert "| 1 | 64k | 64 | 73.0 | triton | 1.00 triton | 1.01 SDPA contiguous |" in page


def test_the_newest_record_of_a_kind_is_shown(results, monkeypatch):
    us = {"kernel_index auto(triton)": 2.0, "kernel_index dense": 8.0, "SDPA contiguous": 4.0}
    row = {"rows": 8, "tokens": 65536, "route_per": "kv_group", "us": us, "ran": "triton"}
    for name, date in (("z", "2026-01-02"), ("a", "2026-02-03")):
        folder = results(name, machine={"device": "A GPU", "date": date}, moba_decode=[row])
    found = states.contents(folder)
    monkeypatch.setattr(states, "contents", lambda: found)
    shown = cells.table("moba_decode")
    assert shown.startswith("A GPU, 2026-02-03 ([data](../../benchmarks/results/a.json))")
    assert "| 8 | 64k | kv_group | 2.0 | triton |  | 0.50 SDPA contiguous |" in shown
    assert cells.table("decode") == ""


def test_no_page_but_the_configuration_says_where_the_source_is(written):
    """The address is in one place, and in files that other sites show as they are."""
    shown = {"README.md", "docs/__init__.py", "docs/site/install.md", "pyproject.toml"}
    for path in [*(place.REPOSITORY / "docs").rglob("*"), place.REPOSITORY / "CONTRIBUTING.md"]:
        name = path.relative_to(place.REPOSITORY).as_posix()
        if path.is_file() and path.suffix in (".md", ".py", ".jinja") and name not in shown:
            assert SOURCE not in path.read_text(), name
    urls = tomllib.loads((place.REPOSITORY / "pyproject.toml").read_text())["project"].get("urls", {})
    assert urls.get("Homepage", SOURCE) == SOURCE


READMES = sorted((place.REPOSITORY / "kernel_index").rglob("README.md"))


@pytest.mark.parametrize("path", READMES, ids=lambda p: p.relative_to(place.REPOSITORY).parent.as_posix())
def test_links_of_a_readme_lead_to_files(path):
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^):\s#]+)", prose):
        assert (path.parent / target).exists(), target


def test_a_formula_becomes_mathml(tmp_path):
    pytest.importorskip("latex2mathml")
    page = tmp_path / "a.html"
    page.write_text(r'<span class="arithmatex">\(x &lt; y\)</span><div class="arithmatex">\[\frac{a}{b}\]</div>$5')
    assert formulas.render(tmp_path) == 2
    assert page.read_text().count("<math ") == 2
    assert "<mfrac>" in page.read_text()
    assert "arithmatex" in page.read_text()
    page.write_text(r'<span class="arithmatex">\(\nosuchcommand{x}\)</span>')
    with pytest.raises(ValueError, match="nosuchcommand"):
        formulas.render(tmp_path)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    missing = [name for name in ("zensical", "mkdocstrings", "latex2mathml") if not has_package(name)]
    if missing:
        pytest.skip("needs the docs extra: make docs installs it")
    out = tmp_path_factory.mktemp("site")
    assert build.main(out / "out") == 0
    return out / "out" / "site"


def test_the_built_site_has_no_broken_link_and_can_be_searched(built):
    found = json.loads((built / "search.json").read_text())
    places = {item["location"].partition("#")[0] for item in found["items"]}
    assert {f"kernels/{e.name}.html" for e in ENTRIES} <= places


def test_the_built_pages_have_signatures_sources_and_formulas(built):
    page = (built / "kernels" / "dense_attention.html").read_text()
    assert 'id="kernel_index.attention"' in page
    assert re.search(rf'href="{SOURCE}/blob/main/kernel_index/kernels/attention/dense_attention/api.py#L\d+"', page)
    assert "<math " in page
    assert "&gt;&gt;&gt;" in page, "an example"
    assert not re.search(r"class=.arithmatex.>\s*\\[(\[]", page), "no TeX is left"


BROKEN = """<html><body style="margin: 0"><div class="md-content"><p style="width: 700px">wide</p></div>
<img src="none.png"><script src="http://127.0.0.1:9/other.js"></script><script>nothing.here</script></body></html>"""


@pytest.mark.skipif(browser.find() is None or not has_package("playwright"), reason="needs Chromium and playwright")
def test_the_browser_finds_what_is_wrong(tmp_path, monkeypatch):
    """``make docs`` looks at every page of the site; here the check itself is checked."""
    monkeypatch.setattr(browser, "SEARCHES", {})
    (tmp_path / "good.html").write_text('<link rel="icon" href="data:,"><h1>Good</h1>')
    assert browser.check(tmp_path, str(browser.find())) == []
    (tmp_path / "bad.html").write_text('<link rel="icon" href="data:,">' + BROKEN)
    wrong = "\n".join(browser.check(tmp_path, str(browser.find()), widths=(390, 1280)))
    for said in (
        "has no heading",
        "is 700 wide in a window of 390",
        "404 ",
        "asks http://127.0.0.1:9",
        "nothing is not",
    ):
        assert f"{said}" in wrong
    assert "window of 1280" not in wrong
    assert "good.html" not in wrong

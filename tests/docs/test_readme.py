"""The README's code runs as it says, its figures are those of the committed results, and its links lead to files."""

import os
import re
import subprocess
import sys

import pytest

import kernel_index as ki
from docs import SOURCE, measured, place
from kernel_index.core.target import has_package

README = (place.REPOSITORY / "README.md").read_text()
HOME = (place.REPOSITORY / "docs" / "site" / "index.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)


def test_the_first_snippet(tmp_path):
    """It runs anywhere in seconds, and needs no compiler."""
    assert len(SNIPPETS[0].splitlines()) == 10
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "KERNEL_INDEX_", "CXX"))}
    environment |= {"PATH": str(tmp_path), "PYTHONPATH": str(place.REPOSITORY)}  # no compiler is found
    done = subprocess.run(
        [sys.executable, "-c", SNIPPETS[0]], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"loss (7\.[6-9]|8\.[0-6])\d, computed by (chunked|triton)\n", done.stdout)
    assert done.stderr == ""


@pytest.mark.skipif(not has_package("transformers"), reason="needs the transformers package")
def test_the_snippet_of_a_transformers_model(capsys):
    exec(SNIPPETS[1], {"ki": ki})
    assert "fused_residual_add_rms_norm" in capsys.readouterr().out
    assert len(SNIPPETS) == 2


def test_the_home_page_has_the_same_snippet():
    assert SNIPPETS[0] in HOME


def headlines() -> dict[str, str]:
    """What is claimed of an H200 -> the figure, from the committed file."""
    content = measured.content()
    stock, ours = (next(m for m in content["models"] if m["contender"] == c) for c in ("as it is", "kernel_index"))
    sparse = [
        r["train_of_dense"]
        for r in content["sparse"]
        if r["contender"] == "kernel_index clustered" and (r["tokens"], r["selection"]) == (65536, "random")
    ]
    compiled = content["memory_bound_geometric_means"]["forward"]["compile"]
    assert compiled["cells"] == len(content["memory_bound"]) == 82
    return {
        "of the time and": f"{ours['ms'] / stock['ms']:.2f}",
        "of the memory": f"{ours['GiB'] / stock['GiB']:.2f}",
        "of FlashAttention-4's time": f"{sparse[0]:.2f}",
        "of the time of `torch.compile`": f"{compiled['ratio']:.2f}",
    }


def test_the_headline_figures_are_those_of_the_committed_results():
    assert len(headlines()) == 4
    for claim, figure in headlines().items():
        assert f"**{figure}** {claim}" in README
        assert f"{figure} of the " in HOME
    assert measured.peers()["machine"]["device"] == "NVIDIA H200"


def test_every_link_is_absolute_and_leads_to_a_file_of_the_tree():
    """So that it works on a package index, too."""
    found = re.findall(r"\]\(([^)]+)\)", README)
    assert len(found) >= 8
    for link in found:
        if link.startswith(SOURCE):
            path = link.removeprefix(f"{SOURCE}/blob/main/").partition("#")[0]
            assert (place.REPOSITORY / path).is_file(), link
        else:
            assert link.startswith("https://"), link


def test_it_is_short_and_names_only_public_functions():
    assert len(README.splitlines()) <= 120
    table = README.partition("## What do you want to do?")[2].partition("\n## ")[0]
    names = [n for n in re.findall(r"`([a-z_0-9]+)`", table) if "_" in n or n == "attention"]
    assert len(names) > 20
    assert [n for n in names if n not in ki.__all__] == []

"""The API reference: a list of every public name, and pages for the names that no kernel's page documents."""

import ast
import inspect

import kernel_index
from docs import kernels, text
from docs.place import place
from kernel_index.index.entries import ENTRIES, FAMILIES
from kernel_index.index.entry import ROOT

PACKAGES = {
    "nn": ("Layers", "kernel_index.nn", "Layers that are built on the kernels."),
    "jax": ("JAX", "kernel_index.jax", "The same functions for JAX arrays. Needs `pip install 'kernel-index[tpu]'`."),
    "transformers": (
        "Transformers",
        "kernel_index.integrations.transformers",
        "Kernels inside a model of Hugging Face Transformers. Needs `pip install 'kernel-index[hf]'`.",
    ),
}
"""Parts of the public interface: page name -> title, module, and what it is for."""


def names(module: str) -> list[str]:
    """What a module exports, read from its source: JAX or Transformers may not be installed."""
    base = ROOT.parent / module.replace(".", "/")
    path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    raise ValueError(f"module must list its public names in __all__, got {module}")


def pages() -> dict[str, str]:
    """Page -> Markdown: the list, the names of the package that belong to no kernel, and the three parts."""
    found = {"reference/index.md": _index(), "reference/others.md": _others()}
    for name, (title, module, purpose) in PACKAGES.items():
        functions_first = sorted(names(module), key=lambda n: name != "nn" and n[0].isupper())
        entries = "\n".join(f"::: {module}.{n}\n" for n in functions_first)
        found[f"reference/{name}.md"] = (
            f"# {title}\n\n{purpose} `import kernel_index as ki` gives `ki.{name}`.\n\n{entries}"
        )
    return found


def _index() -> str:
    parts = [
        "# API reference\n",
        "Every public name of `kernel_index`, `import kernel_index as ki`. "
        "Each name links to its signature, arguments, errors, an example, and its source.\n",
    ]
    home = {name: kernels.page(e) for e in ENTRIES for name in e.functions}
    groups = {f: [n for e in kernels.of_family(f) for n in e.functions] for f in FAMILIES}
    rest = [n for n in kernel_index.__all__ if n not in home]
    for title, group in (*groups.items(), ("Receipts, masks and caches", rest)):
        rows = [[f"[`{n}`](../{home.get(n, 'reference/others.md')}#kernel_index.{n})", _summary(n)] for n in group]
        parts += [f"## {title}\n", text.table(["name", "what it does"], rows)]
    for name, (title, module, purpose) in PACKAGES.items():
        linked = ", ".join(f"[`{n}`]({name}.md#{module}.{n})" for n in names(module))
        parts += [f"## {title}\n", f"{purpose}\n", f"{linked}\n"]
    return "\n".join(parts)


def _summary(name: str) -> str:
    doc = inspect.getdoc(getattr(kernel_index, name)) or ""
    return text.prose(" ".join(doc.split("\n\n")[0].split()))


def _others() -> str:
    """The exported names that no kernel's page documents: receipts, masks, caches, results."""
    documented = {name for e in ENTRIES for name in e.functions}
    parts = ["# Receipts, masks and caches\n", "Every public name of `kernel_index` that is no kernel.\n"]
    parts += [f"::: kernel_index.{name}\n" for name in kernel_index.__all__ if name not in documented]
    legend, found = kernels.readme("kvcache")
    caches = "\n\n".join([f"## How the caches work\n\n{legend}", *(f"### {h}\n\n{found[h]}" for h in found)])
    parts.append(text.relink(caches, "kernel_index/kvcache/README.md", "reference/others.md", place) + "\n")
    return "\n".join(parts)

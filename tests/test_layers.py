"""A folder imports only those above it in this list, and no two modules import each other.

Imports in functions and under TYPE_CHECKING count: a circle that is hidden is still one.
"""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "moebound"
ORDER = [
    # the product
    *("_native", "errors", "extras", "types", "plugins", "score", "files", "jobs", "wordmath"),
    *("checkpoint", "codec", "model", "methods", "plan", "store", "cache", "integrations"),
    *("offload", "text"),
    # what measures
    *("tasks", "evaluate", "calibrate", "profile", "sensitivity", "page", "paper", "bench", "fit"),
    *("demo", "cli", "__main__"),
]


def imports() -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports, wherever in the file."""
    files = {
        ".".join(("moebound", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
            ".__init__"
        ): path
        for path in PACKAGE.rglob("*.py")
    }
    found: dict[str, set[str]] = {}
    for name, path in files.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moebound"):
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    found[name].add(whole if whole in files else str(node.module))
            elif isinstance(node, ast.Import):
                found[name] |= {a.name for a in node.names if a.name.startswith("moebound")}
    return found


def test_a_folder_imports_only_those_above_it() -> None:
    wrong = []
    for module, targets in imports().items():
        if module == "moebound":
            continue
        place = ORDER.index(module.split(".")[1])
        for target in targets - {"moebound"}:
            if ORDER.index(target.split(".")[1]) > place:
                wrong.append(f"{module} imports {target}")
    assert not wrong


def test_no_two_modules_import_each_other() -> None:
    # A package's face imports its modules, and they import each other, not the face.
    graph = {m: {t for t in ts if t != m} for m, ts in imports().items() if m != "moebound"}
    TopologicalSorter(graph).prepare()

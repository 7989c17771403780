"""Who may import whom. A lower layer never imports a higher one, so there are no circles."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "anymask"

# A module may import from its own layer and from those above it in this list. (kernels and eager stand side by side.)
LAYERS = (
    ("errors", "problem"),
    ("expr",),
    ("masks", "scores", "reference", "blocks"),
    ("kernels", "eager"),
    ("ops",),
    ("api",),
    ("compat",),
    ("draw", "testing"),
)
TRITON_FILES = {"kernels"}
NO_TRITON = {"kernels/plan.py", "kernels/configs.py"}
SAME_LAYER_IS_CLOSED = {("kernels", "eager"), ("eager", "kernels"), ("reference", "blocks"), ("blocks", "masks")}


def files() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def layer(name: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if name in names)


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    own = part(path)
    for name in imports(path):
        words = name.split(".")
        if words[0] == "triton":
            relative = str(path.relative_to(ROOT))
            assert own in TRITON_FILES and relative not in NO_TRITON, f"{relative} imports Triton"
        if words[0] != "anymask":
            continue
        other = words[1]
        assert layer(other) <= layer(own), f"{own} imports {other}, which is above it"
        assert (own, other) not in SAME_LAYER_IS_CLOSED, f"{own} and {other} stand side by side"


def test_no_module_imports_itself_in_a_circle() -> None:
    names = {".".join(("anymask", *path.relative_to(ROOT).with_suffix("").parts)): path for path in files()}
    graph = {
        name: {other for other in names for used in imports(path) if used == other or used.startswith(other + ".")}
        - {name}
        for name, path in names.items()
    }
    while leaves := [name for name, others in graph.items() if not others]:
        for name in leaves:
            del graph[name]
        for others in graph.values():
            others.difference_update(leaves)
    assert not graph, f"circle among {sorted(graph)}"

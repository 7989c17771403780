"""Who may import whom. A lower layer never imports a higher one, so there are no circles."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "anymask"

# A module may import from its own layer and from those above it in this list. (kernels and eager stand side by side.)
LAYERS = (
    ("errors", "problem"),
    ("expr",),
    ("masks", "zoo", "scores", "reference", "blocks"),
    ("kernels", "eager"),
    ("ops",),
    ("api",),
    ("compat",),
    ("draw", "testing"),
    ("cli",),
    ("__main__",),
)
PACKAGE = "api"  # the layer of `import anymask` itself, whose names come from all layers up to that one
TRITON_FILES = {"kernels"}
NO_TRITON = {"kernels.plan", "kernels.configs", "kernels.footprint"}
SAME_LAYER_IS_CLOSED = {("kernels", "eager"), ("eager", "kernels"), ("reference", "blocks"), ("blocks", "masks")}

# Doors: (importing module, imported module), allowed upwards, but only inside a function, so that importing the lower
# module still loads nothing above it. Each has its reason; what is not here is not allowed.
DOORS = {
    ("masks", "draw"): "Mask.draw() is where a user looks for a picture; it also keeps matplotlib optional.",
    ("blocks.block_map", "draw"): "BlockMap.draw(), likewise.",
    (
        "blocks.block_map",
        "api",
    ): "BlockMap & mask builds the mask's own map, with the cache and the ops of block_map().",
}


def modules() -> dict[str, str]:
    """Every module's source by its name, as in "blocks.build"; the package itself is left out."""
    paths = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text() for path in paths}


def layer(name: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if name in names)


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """Each name that is imported, and whether that is inside a function."""
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((f"{node.module}.{alias.name}", id(node) in inside) for alias in node.names)


def is_door(module: str, name: str, is_inside: bool) -> bool:
    return is_inside and any(module == own and f"{name}.".startswith(f"anymask.{other}.") for own, other in DOORS)


def complaints(module: str, source: str) -> list[str]:
    """What is wrong with a module's imports."""
    found = []
    own = module.split(".")[0]
    for name, is_inside in imports(source):
        package, *words = name.split(".")
        if package == "triton" and (own not in TRITON_FILES or module in NO_TRITON):
            found.append(f"{module} imports Triton")
        if package != "anymask" or is_door(module, name, is_inside):
            continue
        other = words[0] if words else PACKAGE
        if layer(other) > layer(own):
            found.append(f"{module} imports {name}, which is above it")
        if (own, other) in SAME_LAYER_IS_CLOSED:
            found.append(f"{own} and {other} stand side by side")
    return found


@pytest.mark.parametrize("module", modules())
def test_imports_go_down(module: str) -> None:
    assert not complaints(module, modules()[module])


@pytest.mark.parametrize(("own", "other"), DOORS)
def test_a_door_opens_inside_a_function_alone_and_for_its_module_alone(own: str, other: str) -> None:
    statement = f"from anymask.{other} import anything"
    assert not complaints(own, f"def function():\n    {statement}")
    assert not complaints(own, f"class Thing:\n    def method(self):\n        import anymask.{other}")
    assert complaints(own, statement)
    assert complaints(own, f"class Thing:\n    {statement}")
    assert complaints("scores", f"def function():\n    {statement}")
    assert complaints(own, "def function():\n    from anymask.cli import main")
    assert any(is_door(own, *found) for found in imports(modules()[own])), "nobody goes through this door"


def test_a_wrong_import_is_noticed() -> None:
    assert complaints("expr.ir", "import anymask")
    assert complaints("expr.ir", "from anymask import masks")
    assert complaints("eager", "from anymask.kernels import plan")
    assert complaints("kernels.plan", "import triton.language as tl")
    assert not complaints("kernels.tile", "import triton.language as tl")


def test_no_module_imports_itself_in_a_circle() -> None:
    sources = {f"anymask.{name}".removesuffix(".__init__"): (name, source) for name, source in modules().items()}
    graph = {}
    for full_name, (module, source) in sources.items():
        used = [name for name, is_inside in imports(source) if not is_door(module, name, is_inside)]
        graph[full_name] = {
            other for other in sources for name in used if f"{name}.".startswith(f"{other}.") and other != full_name
        }
    while leaves := [name for name, others in graph.items() if not others]:
        for name in leaves:
            del graph[name]
        for others in graph.values():
            others.difference_update(leaves)
    assert not graph, f"circle among {sorted(graph)}"

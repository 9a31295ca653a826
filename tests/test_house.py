"""The house: imports run one way, the core is light, and the wheel holds the whole product."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "moe_param"

FLOORS = (
    ("errors",),
    ("naming", "statistics", "folder_lock", "ledger", "corpus", "trial"),
    ("experts", "parsing"),
    ("structure",),
    ("scaling",),
    ("optim", "init"),
    ("balancing", "fresh"),
    ("tuned", "record", "explain"),
    ("parameterization",),
    ("applying",),
    ("checks",),
    ("training",),
    ("tuning",),
    ("cli",),
    ("train",),
)
"""Rooms from the ground up. A room imports what lies below it, and nothing of its own floor but itself."""

FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: set[str], *, types: bool) -> Iterator[str]:
    """The modules that one imports, anywhere in it; with `types` also for annotations only."""
    tree = ast.parse(path.read_text("utf-8"))
    hints = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in hints and not types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else str(node.module)


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def arrows(*, types: bool = False) -> list[tuple[str, str]]:
    found = modules()
    return [
        (name, other)
        for name, path in found.items()
        for other in imports(name, path, set(found), types=types)
        if other in found and other != name
    ]


def uphill(pairs: list[tuple[str, str]]) -> list[str]:
    """Imports that run upwards, or from room to room on one floor."""
    return [
        f"{name} imports {other}"
        for name, other in pairs
        if room(name) and room(other) and room(name) != room(other) and FLOOR[room(other)] >= FLOOR[room(name)]
    ]


def circles(pairs: list[tuple[str, str]]) -> set[str]:
    """Modules that reach themselves."""
    graph: dict[str, set[str]] = {}
    for name, other in pairs:
        graph.setdefault(name, set()).add(other)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        left = list(graph.get(start, ()))
        while left:
            node = left.pop()
            if node not in seen:
                seen.add(node)
                left += graph.get(node, ())
        return seen

    return {name for name in graph if name in reached(name)}


def test_every_room_has_its_floor() -> None:
    assert {room(name) for name in modules() if room(name)} <= set(FLOOR)


def test_imports_run_one_way() -> None:
    pairs = arrows()
    assert len(pairs) > 100, "the reader of imports finds too few"
    assert not uphill(pairs)
    # Up the stairs for an annotation alone, nothing is imported at run time.
    assert not circles([pair for pair in pairs if room(pair[0])])


def test_an_arrow_that_runs_back_up_is_seen() -> None:
    assert uphill([("moe_param.structure.roles", "moe_param.scaling.spec")])
    assert uphill([("moe_param.optim.groups", "moe_param.balancing.callback")])
    assert not uphill([("moe_param.scaling.spec", "moe_param.structure.roles")])
    assert circles([("a", "b"), ("b", "c"), ("c", "a"), ("d", "a")]) == {"a", "b", "c"}


def test_nothing_in_the_package_needs_the_checkout() -> None:
    found = modules()
    for name, path in found.items():
        for other in imports(name, path, set(found), types=True):
            assert other.split(".")[0] not in ("recipes", "tests", "patches", "docs"), f"{name} imports {other}"


def test_importing_the_package_loads_the_core_alone() -> None:
    heavy = "torch transformers matplotlib optuna datasets megablocks scipy rich triton pandas"
    code = f"import sys, moe_param; print(*sorted(set({heavy.split()}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    ("name", "package"), [("CommandRunner", "psutil"), ("LoopRunner", "psutil"), ("tune", "optuna")]
)
def test_a_name_of_an_extra_says_which(name: str, package: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; import moe_param; moe_param.apply; moe_param.{name}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    said = f"ImportError: moe_param.{name} needs {package}: pip install 'moe-param[tune]'"
    assert done.stderr.splitlines()[-1] == said


@pytest.mark.parametrize("name", ["apply", "plan", "coord_check", "Parameterization", "scale_config"])
def test_public_names_are_not_hidden_by_modules(name: str) -> None:
    """`import moe_param.X` puts the module where `moe_param.X` is looked up, so no module may have a public name."""
    assert name not in {module.split(".")[1] for module in modules() if module.count(".") == 1}

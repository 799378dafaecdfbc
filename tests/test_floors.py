"""The house: arrows point down only, and no circle of imports within a floor."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ("kernels", "ddpm", "export", "bench")  # from below


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))}


def imported(path: Path, everywhere: bool) -> set[str]:
    """Our modules that a file imports: when it is imported itself, or also inside its functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & MODULES.keys()) or {node.module}
    return found & MODULES.keys()


@pytest.mark.parametrize("floor", FLOORS)
def test_arrows_point_down(floor):
    above = FLOORS[FLOORS.index(floor) + 1 :]
    up = {
        (name, other)
        for name, path in MODULES.items()
        for other in imported(path, everywhere=True)
        if name.partition(".")[0] == floor and other.partition(".")[0] in above
    }
    assert not up


def test_no_module_imports_itself_by_way_of_others():
    """A package's own __init__ lists its modules, so it does not count for them."""
    graph = {
        name: {other for other in imported(path, everywhere=False) if not f"{name}.".startswith(f"{other}.")}
        for name, path in MODULES.items()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_what_only_posix_has_is_imported_where_it_is_used():
    """On Windows everything can be imported; what needs such a module says so when it is called."""
    posix = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios"}
    early = {
        (name, word)
        for name, path in MODULES.items()
        for node in ast.parse(path.read_text(encoding="utf-8")).body  # not within `try`
        for word in ({alias.name for alias in getattr(node, "names", ())} | {getattr(node, "module", None)}) & posix
    }
    assert not early


def test_one_network_is_named_where_it_is_described():
    """What comes above a network takes it by the protocol; the last five: its siblings, a benchmark, old metadata."""
    words = ("ContextUnet", "n_cfeat")
    naming = {name for name, path in MODULES.items() if any(word in path.read_text(encoding="utf-8") for word in words)}
    assert naming == {
        "ddpm",
        "ddpm.networks",
        "ddpm.networks.context_unet",
        "ddpm.inference",
        "ddpm.inference.context_unet",
        "ddpm.commands.importing",
        "ddpm.networks.mlp",
        "ddpm.networks.simple_unet",
        "ddpm.inference.simple_unet",
        "bench.suites.networks",
        "export.run",
    }

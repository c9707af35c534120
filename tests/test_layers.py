"""Data flows one way: a module imports only from layers below its own, and the light modules stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

LAYERS = [
    {"errors"},
    {"folder", "leniency", "like", "pages", "seal"},
    {"background", "blocks", "width", "layout", "movement", "rounding", "schedule", "spelling", "tensorfile", "world"},
    {"profile", "stream"},
    {"quadrature", "target", "manifest", "kernels", "lane", "backends", "commit", "fingerprint", "scope", "staging"},
    {"attachment", "fit", "averages", "identity", "per_tensor", "scores", "tracked", "transcript"},
    {"select", "store", "tally"},
    {"export", "forecast", "frozen", "grid", "job", "replicas", "source", "state", "verify"},
    {"export_dcp", "horizon", "importers", "mapping", "outputs", "recipe", "recommend", "secretary", "winner"},
    {"losses"},
    {"course", "feed", "retention", "session", "swap", "thinning"},
    {"kept", "sums"},
    {"filling", "pruning", "work"},
    {"assembly", "prepare"},
    {"posthoc"},
    {"checkpoint", "load", "rebuild"},
    {"figures", "sweeping"},
    {"plot", "report", "sweep_tables", "tables", "integrations"},
    {"cli_import", "cli_plot", "cli_sweep"},
    {"cli"},
    {"__init__", "__main__"},
]
HEIGHT = {module: height for height, layer in enumerate(LAYERS) for module in layer}
TORCH_FREE = [
    "background",
    "errors",
    "fit",
    "folder",
    "folder.remote",
    "horizon",
    "kept",
    "layout",
    "manifest",
    "movement",
    "per_tensor",
    "profile",
    "quadrature",
    "retention",
    "rounding",
    "schedule",
    "scores",
    "select",
    "spelling",
    "tally",
    "target",
    "thinning",
    "tracked",
    "width",
]
PACKAGE = Path(__file__).parents[1] / "sharded_phema"
FILES = sorted(PACKAGE.rglob("*.py"))
BACKENDS = [file for file in FILES if "backends" in file.parts and file != PACKAGE / "backends" / "__init__.py"]


def dotted(path: Path) -> tuple[str, ...]:
    return (PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts)


def imported(path: Path) -> set[tuple[str, ...]]:
    """Everything of the package that a file imports, wherever the import stands, as parts below the package."""
    here = dotted(path)
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import():
                names += [alias.name for alias in node.names]
            case ast.ImportFrom():
                base = [*here[: -node.level]] if node.level else []
                base += [node.module] if node.module else []
                names += [".".join([*base, alias.name]) for alias in node.names]
    split = [tuple(name.split(".")) for name in names]
    # The version is a constant of the package itself: reading it loads nothing.
    return {parts[1:] for parts in split if parts[0] == PACKAGE.name and parts[1:] != ("__version__",)}


def module_of(parts: tuple[str, ...]) -> str:
    """Which module the imported name belongs to; a name of the package's own front is ``__init__``."""
    first = parts[0] if parts else "__init__"
    return first if (PACKAGE / first).is_dir() or (PACKAGE / f"{first}.py").is_file() else "__init__"


def name_of(path: Path) -> str:
    return "/".join(dotted(path)[1:])


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_module_has_a_layer(path: Path) -> None:
    assert dotted(path)[1] in HEIGHT, f"{name_of(path)} is new: give it a place in LAYERS"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_down(path: Path) -> None:
    own = dotted(path)[1]
    others = {module_of(parts) for parts in imported(path)}
    upward = sorted(other for other in others - {own} if HEIGHT[other] >= HEIGHT[own])
    assert not upward, f"{own} (layer {HEIGHT[own]}) may not import {upward}; move the shared part below both"


@pytest.mark.parametrize("path", BACKENDS, ids=name_of)
def test_a_backend_imports_only_the_contract_of_its_siblings(path: Path) -> None:
    inside = [parts for parts in imported(path) if parts[:1] == ("backends",)]
    # A backend may be a package: its own modules are no siblings.
    allowed = {"contract", dotted(path)[2]} if path.stem != "contract" else set()
    siblings = sorted(".".join(parts) for parts in inside if not {*parts[1:2]} & allowed)
    assert not siblings, f"{name_of(path)} may not import {siblings}; what backends share belongs in layout"


@pytest.mark.parametrize("module", TORCH_FREE)
def test_a_light_module_imports_without_torch(module: str) -> None:
    code = f"import sys, sharded_phema.{module}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or f"{module} imports torch at run time"

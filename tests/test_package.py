"""The public surface: its names, its lazy loading, its one version."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import sharded_phema

ROOT = Path(__file__).parents[1]


def test_the_public_names_are_these_and_sorted() -> None:
    assert sharded_phema.__all__ == [
        "PhemaError",
        "PostHocEMA",
        "__version__",
        "import_run",
        "load_checkpoint",
        "load_into",
        "open_foreign",
        "parse_target",
        "reconstruct",
        "save_checkpoint",
        "sweep",
    ]
    assert sharded_phema.__all__ == sorted(sharded_phema.__all__)


@pytest.mark.parametrize("name", sharded_phema.__all__)
def test_every_public_name_is_there_and_listed(name: str) -> None:
    value = getattr(sharded_phema, name)
    assert name in dir(sharded_phema)
    assert getattr(value, "__name__", name) == name


def test_a_misspelt_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'sharded_phema' has no attribute 'PostHocEma'"):
        _ = sharded_phema.PostHocEma


def test_importing_the_package_imports_neither_torch_nor_numpy() -> None:
    code = "import sys, sharded_phema; print({'torch', 'numpy', 'scipy', 'rich'} & {*sys.modules} or 'light')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "light"


def test_reading_a_run_does_without_torch_distributed_checkpoint() -> None:
    # It takes as long to load as all of the rest together.
    code = (
        "import sys, sharded_phema.rebuild, sharded_phema.tables, sharded_phema.store\n"
        "print([name for name in sys.modules if name.startswith('torch.distributed.checkpoint')])\n"
        "sharded_phema.store.write_part, sharded_phema.store.BoxTensor"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_version_is_written_in_one_place() -> None:
    version = sharded_phema.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", version)
    files = [ROOT / "pyproject.toml", ROOT / "CITATION.cff", *sorted((ROOT / "sharded_phema").rglob("*.py"))]
    assert [file.name for file in files if f'"{version}"' in file.read_text()] == ["__init__.py"]
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "sharded_phema" / "py.typed").is_file()

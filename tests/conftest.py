"""Settings that all tests share."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before DeepSpeed is loaded, in the ranks too, which inherit them: no search for devices, and the operators that
# ``make test`` compiled. DeepSpeed calls ninja to see whether they are up to date.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix, "extensions")))
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])

# Before numpy is loaded: many small solves on threads that spin for each other take ten times as long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

# Machines are shared and slow at times, so that a deadline would measure them and not the code.
settings.register_profile("here", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")

# Workers of pytest-xdist ignore interrupts, and so would all that they start; tests send some.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Ranks compute on one thread each; the unsharded run that they are compared with must sum in the same order.
torch.set_num_threads(1)

# Files of tests that take long, the longest first: a long file that comes last leaves the other worker idle.
LONG = [
    "test_matrix.py",
    "test_zero.py",
    "test_transformers.py",
    "test_lightning.py",
    "test_sharded.py",
    "test_accelerate.py",
    "test_engine_steps.py",
    "test_launched_engines.py",
    "test_launch.py",
    "test_sweep.py",
    "test_posthoc_decay.py",
    "test_reconstruct.py",
    "test_import_direct.py",
    "test_job.py",
    "test_demo.py",
    "test_readme.py",
    "test_benchmarks.py",
    "test_fsdp1.py",
    "test_kill.py",
    "test_whole_model.py",
    "test_cli.py",
]


def pytest_configure(config: pytest.Config) -> None:
    """Have pytest-xdist hand out files in the order in which they are collected, not those of most tests first."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; the order within a file stays."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="session")
def store() -> Iterator[Any]:
    """The object store of all tests: fsspec keeps its connection to the first one that it meets."""
    from object_store import serving

    with serving() as served:
        yield served

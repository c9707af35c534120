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


@pytest.fixture(scope="session")
def store() -> Iterator[Any]:
    """The object store of all tests: fsspec keeps its connection to the first one that it meets."""
    from object_store import serving

    with serving() as served:
        yield served

"""Post-hoc averaging of model weights for sharded training.

The names below load on first use: importing the package alone does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sharded_phema.checkpoint import load_checkpoint, save_checkpoint
    from sharded_phema.errors import PhemaError
    from sharded_phema.importers import import_run, open_foreign
    from sharded_phema.load import load_into
    from sharded_phema.posthoc import PostHocEMA
    from sharded_phema.rebuild import reconstruct
    from sharded_phema.sweeping import sweep
    from sharded_phema.target import parse_target

__all__ = [
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

__version__ = "0.1.0"

_HOME = {
    "PhemaError": "sharded_phema.errors",
    "PostHocEMA": "sharded_phema.posthoc",
    "import_run": "sharded_phema.importers",
    "load_checkpoint": "sharded_phema.checkpoint",
    "load_into": "sharded_phema.load",
    "open_foreign": "sharded_phema.importers",
    "parse_target": "sharded_phema.target",
    "reconstruct": "sharded_phema.rebuild",
    "save_checkpoint": "sharded_phema.checkpoint",
    "sweep": "sharded_phema.sweeping",
}

# Hidden from type checkers: a module __getattr__ would let every misspelt name through.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        globals()[name] = value = getattr(import_module(_HOME[name]), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

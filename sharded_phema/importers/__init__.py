"""Importers: runs of other packages, brought into run folders or read in place. Nothing on disk is ever executed."""

from __future__ import annotations

from sharded_phema.importers.bringing import import_run
from sharded_phema.importers.contract import Reading
from sharded_phema.importers.direct import open_foreign

__all__ = ["Reading", "import_run", "open_foreign"]

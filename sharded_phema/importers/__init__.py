"""Importers: runs of other packages brought into run folders. Nothing that lies on disk is ever executed."""

from __future__ import annotations

from sharded_phema.importers.bringing import import_run
from sharded_phema.importers.contract import Reading

__all__ = ["Reading", "import_run"]

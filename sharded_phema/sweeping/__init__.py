"""Sweeping: the user's metric over rebuilt averages of a run, to choose the averaging length by it."""

from __future__ import annotations

from sharded_phema.sweeping.metric import Command, Metric
from sharded_phema.sweeping.search import descent_cost
from sharded_phema.sweeping.sweeps import sweep
from sharded_phema.sweeping.wish import Form, Towards

__all__ = ["Command", "Form", "Metric", "Towards", "descent_cost", "sweep"]

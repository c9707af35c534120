"""Settings that all tests share."""

import os

# Before numpy is loaded: many small solves on threads that spin for each other take ten times as long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import torch
from hypothesis import settings

# Machines are shared and slow at times, so that a deadline would measure them and not the code.
settings.register_profile("here", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")

# Ranks compute on one thread each; the unsharded run that they are compared with must sum in the same order.
torch.set_num_threads(1)

"""The command line, as tests call it."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from unittest import mock

from sharded_phema.cli import main


def run(*words: object) -> subprocess.CompletedProcess[str]:
    """The command line within this process, which has paid for the imports."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["sharded-phema", *map(str, words)]),
        mock.patch.dict(os.environ, {"COLUMNS": "200"}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())

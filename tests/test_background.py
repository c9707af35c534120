"""Jobs beside the training: one at a time, each failure told once, and an exit that waits but not for good."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from builders import examples
from hypothesis import given
from hypothesis import strategies as st

from sharded_phema.background import Background, Foreground, Jobs
from sharded_phema.errors import StoreError

LONG_S = 30.0  # a job that waits longer for its gate hangs


@pytest.fixture
def background() -> Iterator[Background]:
    jobs = Background()
    yield jobs
    jobs.close()


def failing() -> None:
    raise StoreError("disk full", hint="make room")


def test_no_thread_is_made_before_the_first_job_and_none_stays(background: Background) -> None:
    before = threading.active_count()
    background.check()
    background.wait()
    assert threading.active_count() == before
    gate = threading.Event()
    background.submit(lambda: gate.wait(LONG_S))
    assert threading.active_count() == before + 1
    gate.set()
    background.close()
    deadline = time.monotonic() + LONG_S
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.001)
    assert threading.active_count() == before


def test_a_job_runs_while_its_submitter_goes_on(background: Background) -> None:
    gate, seen = threading.Event(), []
    background.submit(lambda: (gate.wait(LONG_S), seen.append(threading.current_thread())))
    background.check()  # does not wait
    assert seen == []
    gate.set()
    background.wait()
    assert seen != [] and seen[0] is not threading.current_thread()


def test_the_next_job_waits_for_the_one_before_and_says_so_once(
    background: Background, caplog: pytest.LogCaptureFixture
) -> None:
    events: list[str] = []
    background.submit(lambda: (time.sleep(0.3), events.append("first over")))
    began = time.monotonic()
    background.submit(lambda: events.append("second"))
    waited = time.monotonic() - began
    background.close()
    assert events == ["first over", "second"]
    [record] = caplog.records
    assert record.levelno == logging.WARNING and record.name == "sharded_phema.background"
    assert record.getMessage().startswith("training waited 0.") and "less often" in record.getMessage()
    assert 0.2 < record.args[0] <= waited


def test_nothing_is_said_where_nothing_waits(background: Background, caplog: pytest.LogCaptureFixture) -> None:
    over = threading.Event()
    background.submit(over.set)
    assert over.wait(LONG_S)
    while not background._job.done():
        time.sleep(0.001)
    background.submit(over.clear)
    background.close()
    assert caplog.records == []


def test_after_waiting_what_the_job_read_may_be_overwritten(background: Background) -> None:
    buffer, read = [0], []
    for value in range(1, 6):
        background.wait()
        buffer[0] = value
        background.submit(lambda: (time.sleep(0.01), read.append(buffer[0])))
    background.close()
    assert read == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("act", ["submit", "wait", "check", "close"])
def test_a_failure_is_raised_once_at_the_next_call_as_it_was(background: Background, act: str) -> None:
    background.submit(failing)
    while not background._job.done():
        time.sleep(0.001)
    started: list[int] = []
    with pytest.raises(StoreError) as caught:
        getattr(background, act)(*[lambda: started.append(1)] * (act == "submit"))
    assert (caught.value.message, caught.value.hint) == ("disk full", "make room")
    assert "failing" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    for again in (background.check, background.wait, background.close, background.close):
        again()
    assert started == []


def test_a_failure_that_is_no_ordinary_exception_is_raised_too(background: Background) -> None:
    background.submit(lambda: sys.exit(3))
    with pytest.raises(SystemExit):
        background.wait()


@given(st.lists(st.tuples(st.booleans(), st.sampled_from(["check", "wait", ""])), max_size=12))
@examples(50)
def test_every_job_ends_before_the_next_begins_and_every_failure_is_told_once(plan: list[tuple[bool, str]]) -> None:
    jobs, events, told = Background(), [], []

    def job(index: int, fails: bool) -> None:
        events.append(("begin", index))
        events.append(("end", index))
        if fails:
            raise StoreError(str(index), hint="none")

    def telling(call, *args) -> None:
        try:
            call(*args)
        except StoreError as failure:
            told.append(int(failure.message))
            if args:
                call(*args)  # the failure was that of the job before: this one was not started

    logging.getLogger("sharded_phema.background").disabled = True
    try:
        for index, (fails, act) in enumerate(plan):
            telling(jobs.submit, lambda index=index, fails=fails: job(index, fails))
            if act:
                telling(getattr(jobs, act))
        telling(jobs.close)
    finally:
        logging.getLogger("sharded_phema.background").disabled = False
    assert events == [(what, index) for index in range(len(plan)) for what in ("begin", "end")]
    assert told == [index for index, (fails, _) in enumerate(plan) if fails]


def test_an_interrupt_while_training_waits_leaves_the_job_running(background: Background) -> None:
    gate, over = threading.Event(), []
    background.submit(lambda: (gate.wait(LONG_S), over.append(1), failing()))
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        background.wait()
    assert over == []
    gate.set()
    with pytest.raises(StoreError, match="disk full"):
        background.wait()
    assert over == [1]


def test_the_foreground_runs_a_job_at_once_and_raises_its_failure_there() -> None:
    jobs: Jobs = Foreground()
    seen: list[threading.Thread] = []
    jobs.submit(lambda: seen.append(threading.current_thread()))
    assert seen == [threading.current_thread()]
    with pytest.raises(StoreError, match="disk full"):
        jobs.submit(failing)
    for act in (jobs.wait, jobs.check, jobs.close, jobs.close):
        act()


def test_where_no_thread_can_be_made_the_job_runs_at_once(background: Background) -> None:
    seen: list[int] = []
    with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("can't start new thread")):
        background.submit(lambda: seen.append(1))
        assert seen == [1]
        background.submit(failing)
        with pytest.raises(StoreError, match="disk full"):
            background.check()


def left_open(body: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """A program that submits a job and ends without closing."""
    code = f"import sys, time, pathlib\nfrom sharded_phema import background\n{body}"
    return subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_program_that_ends_without_closing_waits_for_its_job(tmp_path: Path) -> None:
    done = left_open(
        "def job():\n time.sleep(0.5)\n pathlib.Path(sys.argv[1]).write_text('whole')\n"
        "background.Background().submit(job)\nraise SystemExit(5)",
        tmp_path,
    )
    assert (done.returncode, (tmp_path / "out").read_text(), done.stderr) == (5, "whole", "")


def test_a_job_may_start_its_exchanges_while_the_program_exits(tmp_path: Path) -> None:
    done = left_open(
        "def job():\n time.sleep(0.5)\n"
        " background.on_thread(lambda: pathlib.Path(sys.argv[1]).write_text('whole'), 'inner').result(30)\n"
        "background.Background().submit(job)",
        tmp_path,
    )
    assert (done.returncode, (tmp_path / "out").read_text(), done.stderr) == (0, "whole", "")


def test_a_program_that_ends_without_closing_logs_the_failure_of_its_job(tmp_path: Path) -> None:
    done = left_open(
        "def job():\n time.sleep(0.2)\n raise OSError('disk full')\nbackground.Background().submit(job)", tmp_path
    )
    assert done.returncode == 0
    assert "the last snapshot failed, and nobody closed or asked: disk full" in done.stderr


def test_a_job_that_never_ends_does_not_keep_a_program_alive(tmp_path: Path) -> None:
    began = time.monotonic()
    done = left_open("background.EXIT_WAIT_S = 0.2\nbackground.Background().submit(lambda: time.sleep(3600))", tmp_path)
    assert done.returncode == 0 and time.monotonic() - began < 30
    assert "the program ends before its last snapshot is written, which is cut off" in done.stderr

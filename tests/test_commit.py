"""Exchanges between ranks: one verdict for all, whoever fails, is late, is killed or hangs, and beside the training."""

from __future__ import annotations

import base64
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from builders import examples
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks

from sharded_phema import commit
from sharded_phema.background import Background
from sharded_phema.commit import Commits
from sharded_phema.errors import OrderError, PhemaError, StoreError, TargetError
from sharded_phema.manifest import Part
from sharded_phema.secretary import Report
from sharded_phema.store import open_run


class Mine(StoreError):
    """An error of somebody else's."""


AMPLE_S, SHORT_S = 60.0, 1.0
"""Timeouts of exchanges: one that no machine is too slow for, and one that is meant to pass."""


def over_tcp() -> dist.TCPStore:
    """Have the ranks meet as launched ones do: by a server that lives in rank 0."""
    rank, size = dist.get_rank(), dist.get_world_size()
    server = dist.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False) if rank == 0 else None
    port = [server.port if server else 0]
    dist.broadcast_object_list(port, src=0)
    store = server or dist.TCPStore("127.0.0.1", port[0], size, is_master=False)
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    return store


def told(act: Callable[[], object]) -> tuple[type[PhemaError], str, float] | object:
    """What a call gave, or the error it raised with the seconds until then."""
    began = time.monotonic()
    try:
        return act()
    except PhemaError as error:
        assert error.hint
        return type(error), error.message, time.monotonic() - began


def fail(error: Exception) -> None:
    raise error


def outcomes_body() -> dict[str, Any]:
    over_tcp()
    rank, found = dist.get_rank(), {}
    ample, short = Commits(AMPLE_S), Commits(SHORT_S)
    found["values"] = [ample.exchange((rank, "x" * rank)) for _ in range(3)]
    found["agreed"] = ample.agree(lambda: 10 * rank)
    full = OrderError("disk full", hint="make room")
    found["one fails"] = told(lambda: ample.agree(lambda: fail(full) if rank == 1 else None))
    found["two fail"] = told(lambda: ample.agree(lambda: fail(full) if rank > 0 else None))
    found["foreign"] = told(lambda: ample.agree(lambda: fail(OSError(28, "No space")) if rank == 2 else None))
    for late in (2, 0):
        dist.barrier()
        time.sleep(2.5 * SHORT_S if rank == late else 0)
        found[f"{late} late"] = told(lambda: short.exchange(rank))
        dist.barrier()  # the next one is short of time otherwise
        found[f"after {late} late"] = short.exchange(rank)
    return found


def test_every_rank_learns_the_same_of_every_exchange_and_training_goes_on() -> None:
    ranks = run_ranks(3, outcomes_body)
    for rank, found in enumerate(ranks):
        assert found["values"] == [[(0, ""), (1, "x"), (2, "xx")]] * 3
        assert found["agreed"] == 10 * rank
        assert found["one fails"][:2] == (OrderError, "rank 1: disk full")
        assert found["two fail"][:2] == (OrderError, "rank 1: disk full (rank 2 failed too)")
        assert found["foreign"][:2] == (StoreError, "rank 2: OSError: [Errno 28] No space")
        for late in (0, 2):
            kind, message, seconds = found[f"{late} late"]
            assert (kind, message) == (
                StoreError,
                f"rank {late} of 3 did not answer within 1 s, and may not have written their part of the snapshot",
            )
            assert seconds < 2 * SHORT_S
            assert found[f"after {late} late"] == [0, 1, 2]


def beside_body(rounds: int) -> tuple[list, list, int, int]:
    store = over_tcp()
    rank, commits, jobs = dist.get_rank(), Commits(AMPLE_S), Background()
    said, sums, over = [], [], torch.zeros(1)
    commits.exchange(None)
    dist.barrier()
    before = store.num_keys()
    dist.barrier()
    jobs.submit(lambda: said.extend(commits.exchange((rank, i)) for i in range(rounds)))
    while not over:  # all ranks leave at once
        total = torch.full((1000,), float(rank + len(sums)))
        dist.all_reduce(total)
        sums.append(total[0].item())
        over.fill_(len(said) == rounds)
        dist.all_reduce(over, dist.ReduceOp.MIN)
    jobs.close()
    dist.barrier()
    return said, sums, before, store.num_keys()


def test_exchanges_on_a_thread_keep_clear_of_the_collectives_of_training_and_leave_nothing_behind() -> None:
    for said, sums, before, after in run_ranks(2, beside_body, 40):
        assert said == [[(0, i), (1, i)] for i in range(40)]
        assert sums == [2.0 * i + 1 for i in range(len(sums))] and len(sums) >= 20
        assert after == before  # the last answers and the last verdict; were keys kept, there would be 120 more


def file_body() -> tuple[list[int], object, float, float, object]:
    rank, commits = dist.get_rank(), Commits(AMPLE_S)
    values = commits.exchange(rank)
    failure = told(lambda: commits.agree(lambda: fail(StoreError("torn", hint="-")) if rank else None))
    time.sleep(0.5 * rank)
    began = time.time()
    commits.close()
    left = time.time()
    commits.close()
    return values, failure[:2], began, left, told(lambda: commits.exchange("after"))[1]


def test_ranks_that_meet_by_a_file_exchange_too_and_rank_0_leaves_last() -> None:
    ranks = run_ranks(2, file_body)
    for values, failure, _, left, refusal in ranks:
        assert (values, failure) == ([0, 1], (StoreError, "rank 1: torn"))
        assert refusal == "the exchanges between ranks were closed"
        assert left >= ranks[1][2]  # when rank 1 began to leave


def killed_body(victim: int, answered: bool) -> list[object]:
    over_tcp()
    rank, commits = dist.get_rank(), Commits(2 * SHORT_S)
    commits.exchange(rank)
    time.sleep(0.5 * SHORT_S)  # until all have read what was said
    if rank == victim and answered:
        # It sleeps in an exchange once it has answered, while others have not.
        commit.time = mock.Mock(monotonic=time.monotonic, sleep=lambda s: os.kill(os.getpid(), signal.SIGKILL))
        commits.exchange(rank)
    if rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(SHORT_S if answered else 0)
    found = [told(lambda: commits.exchange(rank)) for _ in range(2)]
    time.sleep(2 * SHORT_S if rank == 0 else 0)  # the store lives as long as rank 0, and others may be later
    return found


def test_a_rank_killed_before_it_answered_is_named_by_all_others_in_time() -> None:
    found = run_ranks(3, killed_body, 2, False, dying=[2])
    assert found[2] is None
    for rank in (0, 1):
        for kind, message, seconds in found[rank]:
            assert kind is StoreError and message.startswith("rank 2 of 3 did not answer within 2 s")
            assert seconds < 4 * SHORT_S


def test_a_rank_killed_after_it_answered_spoils_the_next_exchange_only() -> None:
    found = run_ranks(3, killed_body, 1, True, dying=[1])
    for rank in (0, 2):
        first, (kind, message, _) = found[rank]
        assert first == [0, 1, 2]
        assert kind is StoreError and message.startswith("rank 1 of 3 did not answer")


def test_where_the_store_dies_with_rank_0_all_others_say_so_and_refuse_from_then_on() -> None:
    found = run_ranks(3, killed_body, 0, False, dying=[0])
    for rank in (1, 2):
        first, later = found[rank]
        assert first[0] is later[0] is StoreError
        assert first[1] == later[1]
        assert first[1].startswith(f"rank {rank} lost the key-value store of the process group: ")
        assert first[2] < 4 * SHORT_S and later[2] < 0.1


def stopped_body() -> object:
    over_tcp()
    rank, commits = dist.get_rank(), Commits(SHORT_S)
    commits.exchange(rank)
    time.sleep(0.5 * SHORT_S)  # until all have read what was said
    if rank == 0:
        subprocess.Popen(["/bin/sh", "-c", f"sleep {5 * SHORT_S}; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
        return None
    time.sleep(0.5 * SHORT_S)
    return [told(lambda: commits.exchange(rank)) for _ in range(2)]


def test_where_the_store_hangs_with_rank_0_the_wait_is_bounded_all_the_same() -> None:
    _, (first, later) = run_ranks(2, stopped_body)
    for kind, message, seconds in (first, later):
        assert kind is StoreError
        assert message == "rank 1 lost the key-value store of the process group: it does not answer"
        assert seconds < 3 * SHORT_S
    assert later[2] < 0.1


def destroyed_body() -> object:
    over_tcp()
    commits = Commits(SHORT_S)
    commits.exchange(None)
    time.sleep(0.5 * SHORT_S)  # until all have read what was said
    dist.destroy_process_group()
    time.sleep(0.5 * SHORT_S)
    return [told(lambda: commits.exchange("after")) for _ in range(2)]


def test_after_the_process_group_was_destroyed_exchanges_are_refused() -> None:
    for first, later in run_ranks(2, destroyed_body):
        assert first[0] is later[0] is StoreError and "lost the key-value store of the process group" in first[1]
        assert first[2] < 2 * SHORT_S and later[2] < 0.1


def simulated(size: int, timeout_s: float, store: Any) -> list[Commits]:
    """Commits of ranks that are threads of this process."""
    ranks = []
    for rank in range(size):
        with (
            mock.patch.object(commit, "rank_and_size", lambda rank=rank: (rank, size)),
            mock.patch.object(commit, "from_first", lambda attempt: "name"),
            mock.patch.object(commit, "_connection", lambda: store),
        ):
            ranks.append(Commits(timeout_s))
    return ranks


@given(st.integers(2, 4).flatmap(lambda n: st.lists(st.lists(st.integers(0, 3), min_size=n, max_size=n), max_size=4)))
@examples(25)
def test_whatever_the_delays_ranks_get_the_same_verdict_and_stay_in_step(rounds: list[list[int]]) -> None:
    size = len(rounds[0]) if rounds else 2
    unit_s = 0.02
    ranks = simulated(size, 2 * unit_s, dist.HashStore())

    def run(rank: int) -> list[object]:
        found = []
        for index, delays in enumerate(rounds):
            time.sleep(delays[rank] * unit_s)
            # So short a time may pass on a busy machine before a store answers: then the rank has no more to say.
            outcome = told(lambda index=index: ranks[rank].exchange((rank, index)))
            found.append(outcome[:2] if isinstance(outcome, tuple) else outcome)
        return found

    with ThreadPoolExecutor(size) as pool:
        found = list(pool.map(run, range(size)))
    for index in range(len(rounds)):
        verdicts = [one[index] for one in found if "lost the key-value store" not in str(one)]
        assert all(verdict == verdicts[0] for verdict in verdicts)
        if verdicts and isinstance(verdicts[0], list):
            assert verdicts[0] == [(rank, index) for rank in range(size)]


def test_one_process_needs_no_group() -> None:
    commits = Commits(AMPLE_S)
    assert commits.exchange("alone") == ["alone"]
    assert commits.agree(lambda: 7) == 7
    with pytest.raises(StoreError, match="rank 0: disk full") as caught:
        commits.agree(lambda: fail(StoreError("disk full", hint="make room")))
    assert isinstance(caught.value.__cause__, StoreError) and caught.value.hint == "make room"


class Reduced:
    """Unpickles as a call."""

    def __init__(self, *call: object) -> None:
        self.call = call

    def __reduce__(self) -> tuple:
        return self.call[0], self.call[1:]


def text_of(code: str) -> bytes:
    """A pickle that asks for one global."""
    module, name = code.split(":")
    return base64.b64encode(f"c{module}\n{name}\n.".encode())


def test_what_ranks_send_each_other_comes_back() -> None:
    report = Report(Part(7, bytes(16), 2), (1.0, 2.0), (), (1 << 60, 3))
    for value in (report, [(None, report)], commit._Verdict((), None), ("x", b"y", 1.5, None, (1, 2))):
        assert commit._object(commit._text(value).encode()) == value
    for kind in PhemaError.__subclasses__():
        found = commit._object(commit._text(kind("why", hint="mend")).encode())
        assert (type(found), found.message, found.hint) == (kind, "why", "mend")


@pytest.mark.parametrize(
    "value",
    [
        Reduced(os.system, "touch /tmp/never"),
        Reduced(eval, "1"),
        Reduced(getattr, Report, "__init__"),
        Reduced(open_run, "."),
        Reduced(commit._text, 1),
        ValueError("foreign"),
        Mine("foreign", hint="-"),
    ],
    ids=["command", "eval", "getattr", "ours to open", "ours to write", "builtin error", "foreign error"],
)
def test_nothing_is_called_that_ranks_do_not_send(value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "system", lambda command: pytest.fail("called"))
    with pytest.raises(StoreError, match="is not sent between ranks"):
        commit._object(commit._text(value).encode())


@pytest.mark.parametrize(
    "code", ["posix:system", "sharded_phema.commit:os.system", "sharded_phema.cli:main", "sharded_phema.errors:math",
             "sharded_phemax:x", "sharded_phema.errors:check_number", "sharded_phema.nowhere:Report"]
)  # fmt: skip
def test_no_function_or_foreign_name_is_found_and_no_module_is_loaded_for_it(code: str) -> None:
    before = {*sys.modules}
    with pytest.raises(StoreError, match="is not sent between ranks"):
        commit._object(text_of(code))
    assert {*sys.modules} == before


@pytest.mark.parametrize("text", [b"", b"%%%", b"gA==", base64.b64encode(b"\x80\x04\x95garbage")])
def test_what_is_no_message_is_an_error_of_ours(text: bytes) -> None:
    with pytest.raises(StoreError, match="what no rank of this job sends") as caught:
        commit._object(text)
    assert caught.value.hint


def test_a_failure_of_somebody_elses_class_is_told_as_what_it_derives_from() -> None:
    with pytest.raises(StoreError, match="rank 0: their disk is full") as caught:
        Commits(AMPLE_S).agree(lambda: fail(Mine("their disk is full", hint="make room")))
    assert type(caught.value) is StoreError and caught.value.hint == "make room"


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf"), "600", None])
def test_a_timeout_is_a_positive_number_of_seconds(timeout_s: object) -> None:
    with pytest.raises(TargetError, match="timeout_s must be a number above 0"):
        Commits(timeout_s)


def test_missing_ranks_are_named_but_not_by_the_thousand() -> None:
    assert commit._listed([3]) == "rank 3"
    assert commit._listed([1, 2]) == "ranks 1, 2"
    assert commit._listed(range(4096)) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 4088 more"


def test_where_others_do_not_answer_a_ranks_own_failure_is_not_lost() -> None:
    first, _ = simulated(2, 0.1, dist.HashStore())
    full = StoreError("disk full", hint="make room")
    with pytest.raises(StoreError, match=r"rank 1 of 2 did not answer within 0\.1 s") as caught:
        first.agree(lambda: fail(full))
    assert caught.value.__cause__ is full


def test_an_interrupted_exchange_leaves_the_ranks_in_step() -> None:
    first, second = simulated(2, AMPLE_S, dist.HashStore())
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        first.exchange("interrupted")
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(lambda: [second.exchange(i) for i in range(2)])
        assert first.exchange("next") == ["next", 1]
        assert other.result() == [["interrupted", 0], ["next", 1]]

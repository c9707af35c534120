"""Jobs: killed at any moment, started again, shared by processes that know nothing of each other; one output, whole."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import faults
import numpy as np
import pytest
from builders import examples, listing, no_flush
from hypothesis import given
from hypothesis import strategies as st

import sharded_phema.folder.disk
import sharded_phema.folder.local
from sharded_phema.errors import OutputError
from sharded_phema.folder.temporary import temporary_name
from sharded_phema.job import FORMAT, Job, begin, journals, place, records, shared
from sharded_phema.seal import sealed

BLOCKS, WIDTH = 5, 8
REQUEST = {"run": "r1", "targets": ["0.1", {"sigma": 0.05}], "dtype": "float32", "sizes": [3, 4]}
COEFFICIENTS = np.array([[0.1, -0.0], [1 / 3, 5e-324], [-2.5, 1.7e308]]).T
DEAD = "0123456789abcdef-1-0123456789abcdef.tmp"
"""End of the name of what a process elsewhere wrote."""

MODULES = (
    place, journals, records, shared, sharded_phema.folder.disk, sharded_phema.folder.local, shutil,
    sys.modules["pathlib"],
)  # fmt: skip

HERE = sys.modules[__name__]


@pytest.fixture(autouse=True, scope="module")
def quick_disk():
    with no_flush():
        yield


def recipe(folder: Path, words: object = "") -> None:
    folder.mkdir(exist_ok=True)
    (folder / "phema.json").write_text(json.dumps({"format": FORMAT, "words": words}))


def create(files: Path) -> None:
    """Two averages to fill, as drafts that ``finalize`` turns into what is wanted."""
    for name in ("0.1", "0.2"):
        recipe(files / name)
        (files / f"{name}.draft").write_bytes(bytes(BLOCKS * WIDTH))


def content(block: int, dtype: str = "float32") -> bytes:
    return f"{block}{dtype}".encode().ljust(WIDTH)[:WIDTH]


def fill(files: Path, block: int, dtype: str = "float32") -> None:
    for name in ("0.1", "0.2"):
        descriptor = os.open(files / f"{name}.draft", os.O_WRONLY)
        os.pwrite(descriptor, content(block, dtype), block * WIDTH)
        os.close(descriptor)


def finalize(files: Path) -> None:
    """Not a rename but a new file, so that it can be killed when it is half done."""
    for name in sorted(os.listdir(files)):
        if name.endswith(".draft"):
            (files / name.removesuffix(".draft") / "model").write_bytes((files / name).read_bytes()[::-1])
            (files / name).unlink()


def expected(dtype: str = "float32") -> dict[str, bytes | None]:
    """What the output must hold, made without any job."""
    with tempfile.TemporaryDirectory() as folder:
        create(Path(folder))
        for block in range(BLOCKS):
            fill(Path(folder), block, dtype)
        finalize(Path(folder))
        return listing(Path(folder))


def begun(out: Path, *, dtype: str = "float32", force: bool = False, **more: Any) -> Job:
    return begin(out, REQUEST | {"dtype": dtype} | more, COEFFICIENTS, BLOCKS, create, force=force)


def ended(job: Job, dtype: str = "float32") -> list[int]:
    """Do what remains, and commit; which blocks that were."""
    remaining = np.flatnonzero(~job.done()).tolist()
    for block in remaining:
        fill(job.files, block, dtype)
        job.mark(block, block + 1)
    assert job.commit(finalize)
    return remaining


def made(out: Path, **options: Any) -> list[int]:
    return ended(begun(out, **options), options.get("dtype", "float32"))


def old_output(out: Path) -> dict[str, bytes | None]:
    out.mkdir()
    recipe(out / "0.3", "old")
    (out / "0.3" / "model").write_bytes(b"old")
    return listing(out)


def partial_of(out: Path) -> Path:
    return out.parent / f".{out.name}.partial"


def hidden(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir() if path.name.startswith("."))


def test_an_output_appears_with_all_that_was_made_and_nothing_beside_it(tmp_path) -> None:
    # Oracle: the same files made without a job.
    out = tmp_path / "new" / "parents" / "out"
    job = begun(out)
    assert job.out == out and job.files.parent.parent == partial_of(out) and not job.done().any()
    assert not job.commit(finalize) and not out.exists()
    for block in (3, 0, 4, 2, 1):
        fill(job.files, block)
        job.mark(block, block + 1)
        assert not out.exists()
    assert job.commit(finalize) and job.commit(finalize)
    assert listing(out) == expected() and [path.name for path in out.parent.iterdir()] == ["out"]
    assert job.done().all()
    job.mark(0, 1)  # by one that did a block twice


def test_without_blocks_there_is_an_output_too_and_an_empty_folder_or_a_link_is_accepted(tmp_path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    job = begin(tmp_path / "out", REQUEST, np.empty((0, 2)), 0, create)
    assert job.coefficients.shape == (0, 2)
    assert job.commit(finalize) and (tmp_path / "out").is_symlink()
    assert (tmp_path / "real" / "0.1" / "phema.json").is_file() and hidden(tmp_path / "real") == []


def test_a_second_start_redoes_only_what_was_not_marked_with_coefficients_equal_to_the_bit(tmp_path) -> None:
    first = begun(tmp_path / "out")
    fill(first.files, 1)
    first.mark(1, 2)
    nearby = np.nextafter(COEFFICIENTS, np.inf)
    second = begin(tmp_path / "out", REQUEST, nearby, BLOCKS, create, force=True)
    assert second.files == first.files
    assert second.coefficients.tobytes() == COEFFICIENTS.tobytes() and second.coefficients.shape == COEFFICIENTS.shape
    assert ended(second) == [0, 2, 3, 4]
    assert listing(tmp_path / "out") == expected()


def test_a_discarded_job_leaves_nothing_and_a_process_that_has_it_is_told(tmp_path) -> None:
    job, other = begun(tmp_path / "out"), begun(tmp_path / "out")
    job.discard()
    job.discard()
    assert listing(tmp_path) == {}
    anew = begun(tmp_path / "out")
    other.discard()  # not the one that took its place
    assert anew.files.is_dir()
    for act in (other.commit, lambda: other.mark(0, 1)):
        with pytest.raises(OutputError, match="another one took its place"):
            act()
    ended(anew)


@pytest.mark.parametrize("error", [OSError("create"), RuntimeError("create"), OutputError("create", hint="mend")])
def test_where_create_fails_nothing_is_left(tmp_path, error) -> None:
    def failing(files: Path) -> None:
        create(files)
        raise error

    with pytest.raises(OutputError if isinstance(error, OSError) else type(error), match="create"):
        begin(tmp_path / "out", REQUEST, COEFFICIENTS, BLOCKS, failing)
    assert listing(tmp_path) == {}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError, FileNotFoundError])
def test_where_finalize_fails_the_next_one_goes_on_at_once(tmp_path, error) -> None:
    def failing(files: Path) -> None:
        (files / "half").write_text("done")
        raise error("finalize")

    job = begun(tmp_path / "out")
    job.mark(0, BLOCKS)
    with pytest.raises(OutputError if issubclass(error, OSError) else error, match="finalize"):
        job.commit(failing)
    assert job.files.is_dir()
    assert begun(tmp_path / "out").commit(lambda files: (files / "half").unlink())


@pytest.mark.parametrize(
    "taken", ["a file", "a folder", "a foreign format", "a damaged recipe", "one of two", "a link"]
)
def test_a_foreign_output_is_refused_with_and_without_force_and_not_a_byte_of_it_changes(tmp_path, taken) -> None:
    out = tmp_path / "out"
    job = begun(out)
    job.mark(0, BLOCKS)
    if taken == "a file":
        out.write_text("keep")
    else:
        out.mkdir()
        (out / "a").mkdir()
        texts = {"a foreign format": '{"format": "other"}', "a damaged recipe": "[" * 9}
        (out / "a" / "phema.json").write_text(texts.get(taken, json.dumps({"format": FORMAT})))
        if taken == "a folder":
            (out / "notes").write_text("keep")
        elif taken == "one of two":
            (out / "b").mkdir()
        elif taken == "a link":
            (out / "b").symlink_to("a")
    before = {name: data for name, data in listing(tmp_path).items() if name.startswith("out")}
    for force, words in ((False, "exists and is not an empty folder"), (True, "something else than rebuilt averages")):
        for act in (lambda f=force: begun(out, force=f), replace(job, force=force).commit):
            with pytest.raises(OutputError, match=words) as caught:
                act()
            assert "another folder" in caught.value.hint
            assert before.items() <= listing(tmp_path).items()
    assert job.files.is_dir()  # and may still be put in place, once that is free


def test_an_output_that_cannot_be_replaced_because_a_disk_is_mounted_there_is_refused_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path)
    with pytest.raises(OutputError, match="mounted") as caught:
        begun(tmp_path)
    assert str(tmp_path / "average") in caught.value.hint


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": "bfloat16"}, 'it has dtype "float32" there, "bfloat16" here'),
        ({"targets": ["0.1", {"sigma": 0.06}]}, r"it has targets\[1\]\.sigma 0\.05 there, 0\.06 here"),
        ({"sizes": [3]}, r"it has sizes \[3, 4\] there, \[3\] here"),
        ({"sizes": [3, 4.0]}, r"it has sizes\[1\] 4 there, 4\.0 here"),
        ({"more": 1}, "it has more null there, 1 here"),
        ({"more": None}, "it has request "),
    ],
)
def test_another_request_is_refused_with_the_first_thing_in_which_it_differs(tmp_path, change, words) -> None:
    job = begun(tmp_path / "out")
    before = listing(tmp_path)
    with pytest.raises(OutputError, match=words) as caught:
        begun(tmp_path / "out", **change)
    assert "finish that" in caught.value.hint and "--force" in caught.value.hint
    assert listing(tmp_path) == before
    ended(job)


@pytest.mark.parametrize(
    ("coefficients", "blocks", "words"),
    [
        (COEFFICIENTS, BLOCKS + 1, r"shape of coefficients \(5, 2, 3\) there, \(6, 2, 3\) here"),
        (COEFFICIENTS[:1], BLOCKS, r"\(5, 2, 3\) there, \(5, 1, 3\) here"),
        (COEFFICIENTS * (1 + 2e-6), BLOCKS, r"coefficients that lie 3.4e\+302 apart, more than 1e-06 of the largest"),
    ],
)
def test_other_coefficients_are_refused(tmp_path, coefficients, blocks, words) -> None:
    job = begun(tmp_path / "out")
    with pytest.raises(OutputError, match=words):
        begin(tmp_path / "out", REQUEST, coefficients, blocks, create)
    anew = begin(tmp_path / "out", REQUEST, coefficients, blocks, create, force=True)
    assert anew.files != job.files and anew.coefficients.tobytes() == coefficients.tobytes()


def damaged_texts() -> list[bytes]:
    whole = records.Record(REQUEST, BLOCKS, COEFFICIENTS, "w", 1).sealed()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    return [b"", whole[:-1], bytes(flipped), sealed({"other": 1}), sealed({"request": 1, "blocks": 1, "shape": "x"})]


@pytest.mark.parametrize("text", damaged_texts(), ids=["empty", "cut", "flipped", "another version", "wrong types"])
def test_a_damaged_record_is_refused_and_with_force_begun_anew(tmp_path, text) -> None:
    left = begun(tmp_path / "out")
    (partial_of(tmp_path / "out") / "job.json").write_bytes(text)
    before = listing(tmp_path)
    with pytest.raises(OutputError, match=r"job\.json: .*damaged") as caught:
        begun(tmp_path / "out")
    assert "--force" in caught.value.hint and listing(tmp_path) == before
    anew = begun(tmp_path / "out", force=True)
    assert anew.files != left.files
    ended(anew)
    assert listing(tmp_path / "out") == expected() and hidden(tmp_path / "out") == []


def test_with_force_averages_are_replaced_when_the_new_ones_are_whole(tmp_path) -> None:
    out = tmp_path / "out"
    old = old_output(out)
    job = begun(out, force=True)
    for block in range(BLOCKS):
        fill(job.files, block)
        job.mark(block, block + 1)
        assert listing(out) == old
    with pytest.raises(OutputError, match="exists"):
        replace(job, force=False).commit(finalize)
    assert listing(out) == old
    assert job.commit(finalize) and listing(out) == expected() and hidden(out) == []


def test_with_force_a_job_for_something_else_is_dropped_and_its_processes_spoil_nothing(tmp_path) -> None:
    out = tmp_path / "out"
    other = begun(out, dtype="float16")
    other.mark(0, BLOCKS)
    job = begun(out, force=True)
    assert not other.files.exists() and not job.done().any()
    with pytest.raises(FileNotFoundError):
        fill(other.files, 0, "float16")
    for act in (other.commit, lambda: other.mark(0, 1)):
        with pytest.raises(OutputError, match="another one took its place"):
            act()
    assert begun(out).files == job.files  # and without force it is gone on with
    ended(job)
    assert listing(out) == expected() and hidden(out) == []


@pytest.mark.parametrize("moment", ["as files are laid out", "as that is recorded"])
def test_force_drops_the_job_that_was_seen_and_none_that_came_in_its_place(tmp_path, monkeypatch, moment) -> None:
    out, others = tmp_path / "out", []
    seen = begun(out, dtype="float16")
    write = records._write

    def meanwhile() -> None:
        if not others:
            seen.discard()
            others.append(seen)
            others.append(begun(out))

    def laid_out(files: Path) -> None:
        create(files)
        if moment == "as files are laid out":
            meanwhile()

    def written(*args: Any) -> bool:
        if moment == "as that is recorded":
            meanwhile()
        return write(*args)

    monkeypatch.setattr(records, "_write", written)
    job = begin(out, REQUEST, COEFFICIENTS, BLOCKS, laid_out, force=True)
    assert job.files == others[1].files
    ended(job)
    assert listing(out) == expected() and hidden(out) == []


def test_names_that_begin_alike_are_kept_apart(tmp_path) -> None:
    # Oracle: what belongs to other outputs, or to nobody, is there afterwards, byte for byte.
    out = tmp_path / "out"
    for name in (
        f".out.x.removed.{DEAD}",
        f".out.removed.x.removed.{DEAD}",
        f".output.replaced.{DEAD}",
        ".out.removed",
    ):
        old_output(tmp_path / name)
    begun(tmp_path / "out.partial")
    before = listing(tmp_path)
    made(out)
    assert before.items() <= listing(tmp_path).items()
    assert len(listing(tmp_path)) == len(before) + len(expected()) + 1


@st.composite
def histories(draw):
    """Marks of some processes in any order, and where each journal is cut; then marks of the same processes again."""
    blocks = draw(st.integers(1, 1200))
    spans = st.tuples(st.integers(0, blocks), st.integers(0, blocks)).map(lambda ends: (min(ends), max(ends)))
    marks = st.lists(st.tuples(st.integers(0, 2), spans), max_size=12)
    junk = st.sampled_from([b"", bytes(9), b"7", b"\n0 9", b"\n0 1200 00000000\n", b"0 3 \xff\n"])
    return blocks, draw(marks), [draw(st.floats(0, 1)) for _ in range(3)], [draw(junk) for _ in range(3)], draw(marks)


@examples(80)
@given(histories())
def test_what_is_done_is_the_union_of_whole_marks_wherever_journals_are_torn(history) -> None:
    # Oracle: a set of blocks. A mark is whole if the cut lies behind its last digit.
    blocks, marks, cuts, junk, more = history
    done: set[int] = set()
    with tempfile.TemporaryDirectory() as folder:
        jobs = [begin(Path(folder, "out"), REQUEST, COEFFICIENTS, blocks, create) for _ in range(3)]
        paths = [job.files.parent / "done" / f"{journals.place_here()}-{os.getpid()}-{job._token}.txt" for job in jobs]
        ends: list[list[tuple[int, tuple[int, int]]]] = [[], [], []]
        for process, span in marks:
            jobs[process].mark(*span)
            ends[process].append((paths[process].stat().st_size - 1, span))
        assert sorted(path.name for path in paths[0].parent.iterdir()) == sorted(
            path.name for path, known in zip(paths, ends, strict=True) if known
        )
        for path, known, cut, tail in zip(paths, ends, cuts, junk, strict=True):
            if known:
                size = round(cut * path.stat().st_size)
                path.write_bytes(path.read_bytes()[:size] + tail)
                # Behind a last digit no junk but a new line may stand, or the whole line is in doubt.
                whole = [span for end, span in known if end < size or (end == size and tail[:1] in (b"", b"\n"))]
                done.update(*(range(*span) for span in whole))
        assert set(np.flatnonzero(jobs[0].done()).tolist()) == done
        for process, span in more:
            jobs[process].mark(*span)
            done.update(range(*span))
        assert [set(np.flatnonzero(job.done()).tolist()) for job in jobs] == [done] * 3


def test_every_cut_of_a_journal_counts_exactly_the_marks_before_it(tmp_path) -> None:
    job = begin(tmp_path / "out", REQUEST, COEFFICIENTS, 10**6, create)
    spans, ends = [(7, 12), (120, 4000), (999_999, 10**6), (0, 1)], []
    folder = job.files.parent / "done"
    for span in spans:
        job.mark(*span)
        ends.append(sum(path.stat().st_size for path in folder.iterdir()) - 1)
    (path,) = folder.iterdir()
    text = path.read_bytes()
    for cut in range(len(text) + 1):
        path.write_bytes(text[:cut])
        count = sum(b - a for (a, b), end in zip(spans, ends, strict=True) if end <= cut)
        assert job.done().sum() == count


def marked_blocks(out: Path) -> set[int]:
    """What the journals of the job say before anybody starts again."""
    for text in records.chain(partial_of(out))[1][-1:]:
        record = records.parse(text, out)
        if record.request["dtype"] == "float32":
            return set(np.flatnonzero(journals.marked(partial_of(out) / record.work / "done", BLOCKS)).tolist())
    return set()


def scene(tmp_path: Path, kind: str) -> tuple[Path, Callable[[], None], dict[str, bytes | None], bool]:
    """A folder to be killed in, what is killed, what stood there before, and whether it is started with force."""
    out = tmp_path / "out"
    (tmp_path / "foreign").write_text("keep")
    (tmp_path / f".other.replaced.{DEAD}").mkdir()
    if kind == "fresh":
        return out, partial(made, out), {}, False
    old = old_output(out)
    if kind == "discarding a job":
        job = begun(out, force=True)
        for block in range(BLOCKS):
            fill(job.files, block)
            job.mark(block, block + 1)
        return out, job.discard, old, True
    if kind == "dropping a job":
        begun(out, dtype="float16", force=True).mark(0, 2)
        return out, partial(begun, out, force=True), old, True
    return out, partial(made, out, force=True), old, True


def check_killed(out: Path, old: dict[str, bytes | None], new: dict[str, bytes | None]) -> None:
    """The output is none, the old or the new one; while it is none, the old one stands beside it."""
    if out.exists():
        assert listing(out) in (old, new)
    elif old:
        (aside,) = out.parent.glob(".out.replaced.*")
        assert listing(aside) == old


@pytest.mark.parametrize("kind", ["fresh", "replacing", "dropping a job", "discarding a job"])
def test_killed_at_every_system_call_it_ends_in_the_same_bytes(tmp_path, kind) -> None:
    # Oracle: files made without a job, and all that stood in the folder before.
    new, k = expected(), 0
    while True:
        folder = tmp_path / str(k)
        folder.mkdir()
        out, act, old, force = scene(folder, kind)
        killed = faults.killed_at(act, k, (*MODULES, HERE))
        check_killed(out, old, new)
        before = marked_blocks(out)
        finished = out.exists() and listing(out) == new
        try:
            assert not before & {*made(out, force=force)}
        except OutputError as error:
            assert finished and not force and "exists" in error.message
        assert listing(out) == new
        assert hidden(out) == [f".other.replaced.{DEAD}"] and (folder / "foreign").read_text() == "keep"
        shutil.rmtree(folder)
        k += 1
        if not killed:
            break
    assert k > {"dropping a job": 30, "discarding a job": 20}.get(kind, 60)


@pytest.mark.parametrize("seed", range(12))
def test_killed_again_and_again_it_ends_in_the_same_bytes(tmp_path, seed) -> None:
    new, dice = expected(), random.Random(seed)
    out, act, old, force = scene(tmp_path, "replacing")
    for _ in range(6):
        killed = faults.killed_at(act, dice.randrange(130), (*MODULES, HERE))
        check_killed(out, old, new)
        if not killed:
            break
    made(out, force=force)
    assert listing(out) == new
    assert hidden(out) == [f".other.replaced.{DEAD}"] and (tmp_path / "foreign").read_text() == "keep"


def test_what_a_crash_of_the_machine_could_tear_is_on_disk_before_anything_says_that_it_is_there(tmp_path) -> None:
    # Oracle: everything below a folder, by name. A rename or a link counts as made when its folder is flushed.
    out, flushed, moments = tmp_path / "out", set(), []
    old_output(out)

    def tree(folder: Path) -> set[str]:
        return {str(path) for path in (folder, *folder.rglob("*"))}

    def before(name: str, args: tuple[Any, ...]) -> None:
        if name == "fsync":
            flushed.add(os.readlink(f"/proc/self/fd/{args[0]}"))
        elif name == "link":
            (folder,) = partial_of(out).glob(".work.*")
            assert tree(folder) | {str(partial_of(out))} <= flushed
            moments.append("recorded")
        elif name == "rename" and args[1] == out:
            assert tree(args[0]) <= flushed
            moments.append("placed")
            flushed.clear()
        elif name == "rename" and ".removed." in str(args[1]):
            assert str(tmp_path) in flushed
            moments.append("removed")

    with faults.counted(before, MODULES):
        made(out, force=True)
    assert moments == ["recorded", "placed", "removed", "removed"]


@pytest.mark.parametrize("moment", [0, 1, 2])
def test_what_somebody_puts_in_the_way_at_the_last_moment_is_kept(tmp_path, moment) -> None:
    out, renames = tmp_path / "out", []
    old = old_output(out)
    job = begun(out, force=True)
    job.mark(0, BLOCKS)

    def before(name: str, args: tuple[Any, ...]) -> None:
        if name == "rename":
            renames.append(args)
            if len(renames) == moment + 1:
                out.mkdir(exist_ok=True)
                (out / "notes").write_text("keep")

    with faults.counted(before, MODULES), pytest.raises(OutputError, match="something else than rebuilt averages"):
        job.commit(finalize)
    assert (out / "notes").read_text() == "keep"
    asides = [*tmp_path.glob(".out.replaced.*")]
    (there,) = asides or [out]
    assert old.items() <= listing(there).items()
    mended = listing(tmp_path)
    with pytest.raises(OutputError, match="something else"):
        begun(out, force=True)
    assert listing(tmp_path) == mended
    (out / "notes").unlink()
    if asides:
        out.rmdir()
    made(out, force=True)
    assert hidden(out) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("kind", ["fresh", "replacing"])
def test_whatever_call_fails_there_is_one_error_and_the_next_start_ends_in_the_same_bytes(tmp_path, kind, code) -> None:
    new, k, failed = expected(), 0, 0
    while True:
        folder = tmp_path / str(k)
        folder.mkdir()
        out, act, old, force = scene(folder, kind)
        try:
            call = faults.failing_at(act, k, code, MODULES)
        except OutputError as error:
            assert os.strerror(code) in error.message and "goes on where it stopped" in error.hint
            call, failed = "failed", failed + 1
        check_killed(out, old, new)
        finished = out.exists() and listing(out) == new
        try:
            made(out, force=force)
        except OutputError as error:
            assert finished and not force and "exists" in error.message
        assert listing(out) == new
        assert (folder / "foreign").read_text() == "keep"
        shutil.rmtree(folder)
        k += 1
        if not call:
            break
    assert failed > 30


FORK = multiprocessing.get_context("fork")


def at_once(count: int, act: Callable[[int, Any], object]) -> list[Any]:
    """What processes give that begin at the same moment; each gets its number and a barrier of all."""
    barrier, results = FORK.Barrier(count), FORK.Queue()

    def run(number: int) -> None:
        barrier.wait(60)
        try:
            results.put((number, act(number, barrier)))
        except BaseException as error:
            results.put((number, error))
            raise

    processes = [FORK.Process(target=run, args=(number,)) for number in range(count)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    return [found[number] for number in range(count)]


def logged(path: Path, *, slow_s: float = 0.0) -> Callable[[Path], None]:
    """``finalize`` that notes each of its calls."""

    def finalizing(files: Path) -> None:
        with path.open("a") as log:
            log.write("called\n")
        time.sleep(slow_s)
        finalize(files)

    return finalizing


SITUATIONS = ["nothing", "with force", "over another job", "over a damaged record", "over the output of before"]


@pytest.mark.parametrize("situation", SITUATIONS)
def test_eight_processes_that_begin_at_once_share_one_job_and_put_it_in_place_once(tmp_path, situation) -> None:
    out, log, force = tmp_path / "out", tmp_path / "log", situation != "nothing"
    if situation == "over another job":
        begun(out, dtype="float16").mark(0, BLOCKS)
    elif situation == "over a damaged record":
        begun(out)
        (partial_of(out) / "job.json").write_bytes(b"{")
    elif situation == "over the output of before":
        old_output(out)

    def act(number: int, barrier: Any) -> Any:
        coefficients = COEFFICIENTS * (1 + number * 2.0**-50)
        job = begin(out, REQUEST, coefficients, BLOCKS, create, force=force)
        barrier.wait(60)
        for block in range(number, BLOCKS, 8):
            fill(job.files, block)
            job.mark(block, block + 1)
        barrier.wait(60)
        assert job.commit(logged(log, slow_s=0.05))
        return str(job.files), job.coefficients.tobytes(), listing(out)

    results = at_once(8, act)
    assert not [one for one in results if isinstance(one, BaseException)], results
    assert {files for files, _, _ in results} == {results[0][0]}
    (coefficients,) = {coefficients for _, coefficients, _ in results}
    assert coefficients in [(COEFFICIENTS * (1 + number * 2.0**-50)).tobytes() for number in range(8)]
    assert all(seen == expected() for _, _, seen in results)
    assert log.read_text() == "called\n"
    assert listing(out) == expected() and sorted(path.name for path in tmp_path.iterdir()) == ["log", "out"]


@pytest.mark.parametrize("seed", range(4))
def test_who_commits_early_is_told_that_blocks_remain_and_who_commits_late_that_all_is_there(tmp_path, seed) -> None:
    # Oracle: the clock of the machine. False only before the last mark was made, True only when the output is there.
    out, log = tmp_path / "out", tmp_path / "log"

    def act(number: int, barrier: Any) -> tuple[float, float, bool, bool]:
        dice = random.Random(8 * seed + number)
        job = begun(out)
        barrier.wait(60)
        time.sleep(dice.random() / 20)
        for block in range(number, BLOCKS, 4):
            fill(job.files, block)
            job.mark(block, block + 1)
        marked = time.monotonic()
        time.sleep(dice.random() / 50)
        asked = time.monotonic()
        there = job.commit(logged(log))
        return marked, asked, there, out.exists()

    results = at_once(4, act)
    last = max(marked for marked, _, _, _ in results)
    assert all((exists if there else asked < last) for _, asked, there, exists in results), results
    assert any(there for _, _, there, _ in results) and log.read_text() == "called\n"
    assert listing(out) == expected() and hidden(out) == []


def test_processes_that_force_different_jobs_at_once_end_in_one_of_them_whole(tmp_path) -> None:
    out = tmp_path / "out"
    dtypes = ["float16", "float32", "bfloat16", "float64"]
    old_output(out)

    def act(number: int, barrier: Any) -> bool:
        try:
            made(out, dtype=dtypes[number], force=True)
        except (OutputError, FileNotFoundError):
            return False
        return True

    results = at_once(4, act)
    assert any(results)
    winners = [dtype for dtype in dtypes if listing(out) == expected(dtype)]
    assert len(winners) == 1 and results[dtypes.index(winners[0])]
    # A job that was dropped as its process ended may have left something, until the next start.
    made(out, force=True)
    assert listing(out) == expected() and hidden(out) == []


def claimed_elsewhere(job: Job) -> Path:
    """As if a process on another machine were finalizing."""
    job.mark(0, BLOCKS)
    return job.files.rename(job.files.parent / f".files.{DEAD}")


@pytest.mark.parametrize("again", [False, True])
def test_a_process_elsewhere_that_gives_no_sign_while_it_finalizes_is_taken_over(tmp_path, monkeypatch, again) -> None:
    monkeypatch.setattr(shared, "SILENCE_S", 0.3)
    monkeypatch.setattr(shared, "POLL_S", 0.05)
    job = begun(tmp_path / "out")
    claimed_elsewhere(job)
    job = begun(tmp_path / "out") if again else job
    since = time.monotonic()
    assert job.commit(finalize) and time.monotonic() - since > 0.3
    assert (tmp_path / "out" / "0.1" / "model").is_file() and hidden(tmp_path / "out") == []


def test_a_process_elsewhere_that_gives_signs_while_it_finalizes_is_waited_for(tmp_path, monkeypatch) -> None:
    for name, value in (("SILENCE_S", 0.6), ("PULSE_S", 0.05), ("POLL_S", 0.05)):
        monkeypatch.setattr(shared, name, value)
    job, calls = begun(tmp_path / "out"), []
    claimed = claimed_elsewhere(job)

    def other() -> None:
        with shared._pulse(job.files.parent / "pulse"):
            time.sleep(1.5)
            place.put(claimed, job.out, force=False)
        calls.append("other")

    thread = threading.Thread(target=other)
    thread.start()
    assert job.commit(lambda files: calls.append("this"))
    thread.join()
    assert calls == ["other"] and hidden(tmp_path / "out") == []


def test_what_a_process_that_was_killed_as_it_finalized_left_is_in_its_place_again(tmp_path) -> None:
    job = begun(tmp_path / "out")
    job.mark(0, BLOCKS)
    since = time.monotonic()
    faults.in_child(lambda: job.files.rename(job.files.parent / temporary_name("files")) and None)
    assert not job.files.exists() and begun(tmp_path / "out").files == job.files and job.files.is_dir()
    faults.in_child(lambda: job.files.rename(job.files.parent / temporary_name("files")) and None)
    assert job.commit(finalize) and time.monotonic() - since < shared.SILENCE_S / 4


def test_a_process_that_was_suspended_while_it_finalized_and_was_taken_over_finds_the_output(tmp_path) -> None:
    job = begun(tmp_path / "out")
    job.mark(0, BLOCKS)

    def suspended(files: Path) -> None:
        files.rename(job.files)
        assert begun(tmp_path / "out").commit(finalize)
        finalize(files)  # finds nothing any more
        (files / "0.1" / "model").write_bytes(b"late")

    assert job.commit(suspended)
    assert (tmp_path / "out" / "0.1" / "model").read_bytes() == bytes(BLOCKS * WIDTH) and hidden(tmp_path / "out") == []


def test_what_processes_elsewhere_left_is_removed_when_it_is_old(tmp_path) -> None:
    job = begun(tmp_path / "out")
    folder = partial_of(tmp_path / "out")
    old, young = folder / f".work.{DEAD}", folder / f".work.{DEAD.replace('-1-', '-2-')}"
    for left in (old, young):
        (left / "files").mkdir(parents=True)
    (folder / f".job.json.{DEAD}").write_text("half")
    for path in (old, folder / f".job.json.{DEAD}", job.files.parent):
        os.utime(path, (1e9, 1e9))
    assert begun(tmp_path / "out").files == job.files and job.files.is_dir()
    assert {path.name for path in folder.iterdir()} == {young.name, "job.json", job.files.parent.name}

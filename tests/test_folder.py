"""The folder of a run: the same promises on a local disk, in memory and on an S3 server; and faults of a local disk."""

import errno
import os
import pickle
import resource
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from faults import calls_of, counted, failing_at, in_child, kill_points, killed_at
from hypothesis import given, settings
from hypothesis import strategies as st
from object_store import BUCKET, ObjectStore, client

from sharded_phema.errors import StoreError
from sharded_phema.folder import Entry, Folder, Want, disk, open_folder, read_each, remote
from sharded_phema.folder.temporary import temporary_name, writer_of

ROOT = Path(__file__).parents[1]
Fresh = Callable[[], Folder]

HOSTILE = ["", "/", "/etc/passwd", "..", "../x", "a/../../x", "a/..", "a//x", "a/", "./a", ".", "a\\x", "a\0", "a\n"]
REASONS = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "quota",
    errno.EROFS: "mount it for writing",
    errno.EACCES: "permission",
    errno.EFBIG: "ulimit -f",
    errno.EIO: "check the storage",
}


@pytest.fixture(scope="session", params=["local", "memory", "s3"])
def fresh(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Fresh:
    """Gives an empty folder at each call, that does not exist before something is written."""
    if request.param == "s3":
        request.getfixturevalue("store")
    bases = {
        "local": tmp_path_factory.mktemp("folders").as_posix(),
        "memory": "memory://folders",
        "s3": f"s3://{BUCKET}",
    }
    return lambda: open_folder(f"{bases[request.param]}/{uuid.uuid4().hex}/run")


@pytest.fixture
def folder(fresh: Fresh) -> Folder:
    return fresh()


@pytest.fixture
def s3(store: ObjectStore) -> Iterator[Folder]:
    """A folder on the object store, whose requests are counted from here on."""
    store.watch()
    yield open_folder(f"s3://{BUCKET}/{uuid.uuid4().hex}/run")
    store.watch()


def ranged(folder: Folder, name: str, begin: int, end: int) -> bytes:
    out = bytearray(end - begin)
    folder.fill([Want(name, begin, out)])
    return bytes(out)


def children(files: dict[str, bytes], parent: str) -> tuple[Entry, ...]:
    """What a listing of a folder must be, by brute force over the names of all files."""
    start = f"{parent}/" if parent else ""
    rest = {name.removeprefix(start): data for name, data in files.items() if name.startswith(start)}
    found = {Entry(name.split("/")[0], 0 if "/" in name else len(data), "/" in name) for name, data in rest.items()}
    return tuple(sorted(found, key=lambda entry: entry.name))


NAMES = st.builds(
    lambda folders, name: "/".join([*folders, name]),
    st.lists(st.sampled_from(["snapshots", "a b", "0"]), max_size=2),
    st.sampled_from(["run.json", "rank-00000.safetensors", "ü:#?*[0]", ".x.tmp"]),
)


@given(st.data(), st.dictionaries(NAMES, st.binary(max_size=300), min_size=1, max_size=5))
@settings(max_examples=15)
def test_what_is_written_is_listed_and_read_back_whole_and_in_ranges(
    fresh: Fresh, data: st.DataObject, files: dict[str, bytes]
) -> None:
    folder = fresh()
    for name, content in files.items():
        cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=4)))
        pieces = [content[a:b] for a, b in zip([0, *cuts], [*cuts, len(content)], strict=True)]
        assert folder.write(name, (memoryview(piece) for piece in pieces)) == len(content)
    for parent in ["", "snapshots", "snapshots/0", "nowhere"]:
        assert folder.list(parent) == children(files, parent)
    assert read_each(folder, list(files), 300) == tuple(files.values())
    wants = []
    for name in data.draw(st.lists(st.sampled_from(sorted(files)), max_size=8)):
        begin, end = sorted(data.draw(st.tuples(*[st.integers(0, len(files[name]))] * 2)))
        wants.append(Want(name, begin, np.zeros(end - begin, np.uint8)))
    folder.fill(wants)
    for want in wants:
        assert bytes(want.out) == files[want.name][want.begin : want.begin + len(want.out)]
    for name in list(files)[::2]:
        folder.remove(name)
        del files[name]
    for parent in ["", "snapshots", "snapshots/0"]:
        # Folders whose last file is gone stay on a disk, and nowhere else.
        left = {entry for entry in folder.list(parent) if not entry.is_folder}
        assert left == {entry for entry in children(files, parent) if not entry.is_folder}


def test_numbers_of_any_shape_are_written_and_filled_in_place(folder: Folder) -> None:
    numbers = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    assert folder.write("numbers", [numbers, np.empty((0, 3))]) == numbers.nbytes
    out = np.zeros((3, 4), np.float32)
    folder.fill([Want("numbers", 12 * 4, out), Want("numbers", 0, np.empty((0, 4)))])
    np.testing.assert_array_equal(out, numbers[1])


def test_a_file_is_never_replaced(folder: Folder) -> None:
    folder.write("a/x", [b"first"])
    taken = iter([b"second"])
    with pytest.raises(StoreError, match="a/x: exists already, and no file is ever replaced") as caught:
        folder.write("a/x", taken)
    assert caught.value.hint == "use another run folder"
    assert folder.read("a/x", 5) == b"first"
    assert [*taken] == [b"second"], "nothing is made ready for a file that cannot be"


@pytest.mark.parametrize("error", [RuntimeError("the source broke"), OSError(errno.EIO, "of another file")])
def test_what_the_source_of_a_file_raises_passes_and_nothing_of_the_file_stays(
    folder: Folder, error: Exception
) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"half"
        raise error

    folder.write("a/before", [b"x"])
    with pytest.raises(type(error)) as caught:
        folder.write("a/x", pieces())
    assert caught.value is error
    assert folder.list("a") == (Entry("before", 1, False),)


def test_a_missing_file_is_named(folder: Folder) -> None:
    folder.write("a/y", [b"x"])
    for reads in (lambda: folder.read("a/x", 10), lambda: ranged(folder, "a/x", 0, 1), lambda: folder.read("a", 10)):
        with pytest.raises(StoreError, match=r"/a(/x)?: expected a file, found ") as caught:
            reads()
        assert "restore" in caught.value.hint


@pytest.mark.parametrize(("begin", "end"), [(0, 6), (4, 6), (5, 6), (9, 12), (2**64, 2**64 + 1)])
def test_a_file_that_ends_before_a_range_is_an_error(folder: Folder, begin: int, end: int) -> None:
    folder.write("x", [b"12345"])
    with pytest.raises(StoreError, match=rf"/x: expected {end} bytes or more, found 5\n"):
        ranged(folder, "x", begin, end)


def test_a_range_cannot_begin_before_its_file() -> None:
    with pytest.raises(StoreError, match="expected a range of bytes, found one that begins at -1"):
        Want("x", -1, bytearray(1))


def test_a_file_above_the_limit_is_refused(folder: Folder) -> None:
    folder.write("x", [b"12345"])
    assert folder.read("x", 5) == b"12345"
    with pytest.raises(StoreError, match="/x: expected at most 4 bytes, found "):
        folder.read("x", 4)


def test_an_empty_file_is_a_file(folder: Folder) -> None:
    assert folder.write("x", []) == 0
    assert folder.read("x", 10) == b""
    assert folder.list("") == (Entry("x", 0, False),)


def test_a_file_has_no_children(folder: Folder) -> None:
    folder.write("x", [b"1"])
    assert folder.list("x") == folder.list("x/y") == ()


def test_removing_again_does_nothing_and_a_folder_that_holds_something_stays(folder: Folder) -> None:
    folder.write("a/x", [b"1"])
    with pytest.raises(StoreError, match="/a: cannot be removed"):
        folder.remove("a")
    assert folder.read("a/x", 1) == b"1"
    for name in ["a/x", "a/x", "a", "a", "a/x"]:
        folder.remove(name)
    assert folder.list("") == ()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_leads_elsewhere_is_refused_by_all(folder: Folder, name: str) -> None:
    acts = [
        lambda: folder.read(name, 10),
        lambda: ranged(folder, name, 0, 1),
        lambda: folder.write(name, [b"x"]),
        lambda: folder.remove(name),
        lambda: folder.list(name or "/"),
        lambda: folder.list(f"{name}/.."),
    ]
    folder.write("a/b", [b"x"])
    for act in acts:
        with pytest.raises(StoreError, match="expected the name of a file inside of the run folder, found '"):
            act()
    assert folder.list("") == (Entry("a", 0, True),)


@given(name=st.text(st.sampled_from("./\\a\0\u202e\udc80~"), max_size=6))
@settings(max_examples=200)
def test_no_name_reaches_what_lies_beside_the_folder(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    base = tmp_path_factory.getbasetemp() / "beside"
    (base / "run").mkdir(parents=True, exist_ok=True)
    (base / "a").write_bytes(b"theirs")
    folder = open_folder(base / "run")
    for act in (lambda: folder.read(name, 10), lambda: folder.write(name, [b"ours"]), lambda: folder.remove(name)):
        try:
            assert act() != b"theirs"
        except StoreError as error:
            str(error).encode()  # can be printed anywhere
    assert sorted(os.listdir(base)) == ["a", "run"] and (base / "a").read_bytes() == b"theirs"


def test_a_folder_travels_to_other_processes(folder: Folder) -> None:
    folder.write("x", [b"1"])
    assert pickle.loads(pickle.dumps(folder)).read("x", 1) == b"1"
    assert open_folder(folder.url).read("x", 1) == b"1"

    def read() -> None:
        assert folder.read("x", 1) == b"1"

    in_child(read)


# Local disks


def test_a_path_a_file_url_and_a_string_are_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    relative = open_folder("run")
    relative.write("x", [b"1"])
    monkeypatch.chdir("/")
    folders = [relative, open_folder(tmp_path / "run"), open_folder(f"file://{tmp_path}/run")]
    assert [folder.read("x", 1) for folder in folders] == [b"1"] * 3


def test_a_link_that_leads_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    outside, root = tmp_path / "outside", tmp_path / "run"
    outside.mkdir(), root.mkdir()
    (outside / "x").write_bytes(b"theirs")
    (root / "folder").symlink_to(outside)
    (root / "file").symlink_to(outside / "x")
    (root / "up").symlink_to("..")
    (root / "loop").symlink_to("loop")
    folder = open_folder(root)
    for name in ["file", "folder/x", "up/outside/x"]:
        for act in (lambda name=name: folder.read(name, 10), lambda name=name: ranged(folder, name, 0, 1)):
            with pytest.raises(StoreError, match="is a link that leads out of the folder"):
                act()
    for act in (
        lambda: folder.write("folder/y", [b"ours"]),
        lambda: folder.remove("folder/x"),
        lambda: folder.list("up/outside"),
    ):
        with pytest.raises(StoreError, match="is a link that leads out of the folder"):
            act()
    for act in (lambda: folder.read("loop", 10), lambda: folder.write("loop/x", [b"ours"])):
        with pytest.raises(StoreError, match="loop"):
            act()
    assert folder.clean("", older_than_s=-1) == ()
    folder.remove("file"), folder.remove("folder")
    assert os.listdir(outside) == ["x"] and (outside / "x").read_bytes() == b"theirs"
    assert [entry.name for entry in folder.list("")] == ["loop", "up"]


def test_the_folder_itself_may_be_a_link_and_so_may_files_that_stay_inside(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to("disk")
    folder = open_folder(tmp_path / "run")
    folder.write("a/x", [b"1"])
    (tmp_path / "disk" / "y").symlink_to("a/x")
    assert folder.read("a/x", 1) == folder.read("y", 1) == b"1"


def test_a_pipe_in_the_place_of_a_file_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x")
    with pytest.raises(StoreError, match="x: expected a file, found something else"):
        open_folder(tmp_path).read("x", 10)


def test_no_memory_is_taken_for_bytes_that_a_file_only_claims(tmp_path: Path) -> None:
    with open(tmp_path / "x", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(StoreError, match=f"expected at most 100 bytes, found {1 << 40}"):
        open_folder(tmp_path).read("x", 100)


def three_pieces(root: Path) -> Callable[[], object]:
    """Write a file of 3 pieces into a folder that has to be made, below one that has to be made."""
    root.mkdir(exist_ok=True)
    return lambda: open_folder(root / "run").write("snapshots/x", [b"123", b"4567", b"89"])


def remaining(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_writer_that_is_killed_anywhere_leaves_the_whole_file_or_none(tmp_path: Path) -> None:
    points = kill_points(three_pieces(tmp_path / "all"))
    outcomes = []
    for k in range(points):
        root = tmp_path / str(k)
        assert killed_at(three_pieces(root), k)
        left = remaining(root)
        assert left.pop("x", b"123456789") == b"123456789"
        folder = open_folder(root / "run")
        assert len(folder.clean("", older_than_s=3600)) == len(left) <= 1, "what is left is known as ours, and dead"
        outcomes.append("x" in remaining(root))
        assert set(remaining(root)) <= {"x"}
        if not outcomes[-1]:
            folder.write("snapshots/x", [b"again"])
    assert not killed_at(three_pieces(tmp_path / "end"), points)
    # The name is given in one moment: before it there is no file, after it there is.
    assert points >= 20 and outcomes == sorted(outcomes) and {*outcomes} == {False, True}


@pytest.mark.parametrize("reason", REASONS, ids=errno.errorcode.get)
def test_a_call_that_fails_anywhere_is_one_error_and_leaves_nothing(tmp_path: Path, reason: int) -> None:
    calls = calls_of(three_pieces(tmp_path / "all"))
    assert {"mkdir", "open", "write", "fsync", "close", "link", "unlink"} <= {*calls}
    for k, call in enumerate(calls):
        root = tmp_path / str(k)
        with pytest.raises(StoreError, match=f"run/snapshots/x: cannot be written: {os.strerror(reason)}") as caught:
            failing_at(three_pieces(root), k, reason)
        assert REASONS[reason] in caught.value.hint and "earlier snapshots are intact" in caught.value.hint
        assert remaining(root) == {}, f"call {k}, {call}"
        three_pieces(root)()
        assert remaining(root) == {"x": b"123456789"}


@pytest.mark.parametrize("reason", [errno.EIO, errno.EACCES])
def test_a_read_that_fails_anywhere_is_one_error(tmp_path: Path, reason: int) -> None:
    folder = open_folder(tmp_path)
    folder.write("x", [b"123"])
    acts = {
        "read": lambda: folder.read("x", 3),
        "read ": lambda: ranged(folder, "x", 0, 3),
        "listed": lambda: folder.list(""),
    }
    for words, act in acts.items():
        for k in range(len(calls_of(act))):
            with pytest.raises(StoreError, match=f"{tmp_path}(/x)?: cannot be {words.strip()}: {os.strerror(reason)}"):
                failing_at(act, k, reason)
    for k in range(len(calls_of(lambda: open_folder(tmp_path / "other").write("x", [b"1"]) and folder.remove("x")))):
        folder.write(f"y{k}", [b"123"])
        try:
            assert failing_at(lambda k=k: folder.remove(f"y{k}"), k, reason) == ""
        except StoreError as error:
            assert "cannot be removed" in error.message


def test_a_large_piece_is_written_in_several_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    assert 1 << 24 <= disk.PIECE_BYTES <= 1 << 26
    monkeypatch.setattr(disk, "PIECE_BYTES", 7)
    content = bytes(range(100))
    with counted(lambda name, args: sizes.append(len(args[1])) if name == "write" else None):
        open_folder(tmp_path).write("x", [content[:50], content[50:]])
    assert sizes == [7] * 7 + [1] + [7] * 7 + [1]
    assert (tmp_path / "x").read_bytes() == content


def test_a_system_that_takes_fewer_bytes_than_it_is_given_gets_them_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "os", SimpleNamespace(**{**vars(os), "write": lambda to, view: os.write(to, view[:3])}))
    assert open_folder(tmp_path).write("x", [b"1234567", b"89"]) == 9
    assert (tmp_path / "x").read_bytes() == b"123456789"


def test_everything_is_on_disk_before_the_file_has_its_name_and_its_folders_after(tmp_path: Path) -> None:
    order = calls_of(three_pieces(tmp_path))
    named = order.index("link")
    assert order.index("fsync") < order.index("close") < named and "write" not in order[order.index("fsync") :]
    flushed: list[str] = []
    with counted(lambda name, args: flushed.append(args[0]) if name == "open" and args[1] & os.O_DIRECTORY else None):
        open_folder(tmp_path / "a" / "b").write("c/d/x", [b"1"])
        # The second writer flushes what the first made: it may not yet have come to that.
        open_folder(tmp_path / "a" / "b").write("c/d/y", [b"1"])
    inside = [f"{tmp_path}/a/b/c/d", f"{tmp_path}/a/b/c", f"{tmp_path}/a/b"]
    assert flushed == [*inside, f"{tmp_path}/a", f"{tmp_path}", *inside]


@pytest.mark.parametrize("reason", [errno.EPERM, errno.EOPNOTSUPP])
def test_without_hard_links_a_file_still_comes_whole_and_replaces_none(tmp_path: Path, reason: int) -> None:
    def linkless(name: str, args: tuple[object, ...]) -> None:
        if name == "link":
            raise OSError(reason, os.strerror(reason))

    with counted(linkless):
        open_folder(tmp_path).write("a/x", [b"123"])
    assert remaining(tmp_path) == {"x": b"123"}


@pytest.mark.parametrize("reason", [0, errno.EPERM], ids=["links", "no links"])
def test_a_file_that_came_while_ours_was_written_is_not_replaced(tmp_path: Path, reason: int) -> None:
    def raced(name: str, args: tuple[object, ...]) -> None:
        if name == "link":
            (tmp_path / "x").write_bytes(b"theirs")
            if reason:
                raise OSError(reason, os.strerror(reason))

    with counted(raced), pytest.raises(StoreError, match="x: exists already"):
        open_folder(tmp_path).write("x", [b"ours"])
    assert remaining(tmp_path) == {"x": b"theirs"}


def test_a_name_that_a_repeated_request_finds_given_is_ours(tmp_path: Path) -> None:
    def repeated(name: str, args: tuple[str, ...]) -> None:
        if name == "link":
            os.link(*args)

    with counted(repeated):
        open_folder(tmp_path).write("x", [b"ours"])
    assert remaining(tmp_path) == {"x": b"ours"}


def test_a_folder_that_cannot_be_flushed_by_its_nature_is_no_failure(tmp_path: Path) -> None:
    folders: list[int] = []

    def unflushable(name: str, args: tuple[int, ...]) -> None:
        if name == "fsync" and os.path.isdir(f"/proc/self/fd/{args[0]}"):
            folders.append(args[0])
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    with counted(unflushable):
        open_folder(tmp_path).write("a/x", [b"123"])
    assert folders and remaining(tmp_path) == {"x": b"123"}


def test_a_limit_on_the_size_of_files_is_one_error_and_leaves_nothing(tmp_path: Path) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        with pytest.raises(StoreError, match=r"x: cannot be written: File too large\nhint: .*ulimit -f"):
            open_folder(tmp_path).write("x", [bytes(600)] * 3)

    in_child(limited)
    assert remaining(tmp_path) == {}


def test_only_files_of_dead_writers_are_cleaned_away(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    own = temporary_name("x")
    place = writer_of(own).place
    rest = f"{place}-{dead.pid}-{'0' * 16}.tmp"
    elsewhere = f".x.{'0' * 16}-{dead.pid}-{'0' * 16}.tmp"
    kept = [own, elsewhere, f".x.{rest}0", f"x.{rest}", f"..{rest}", f".x.{rest[1:]}", f".x.{dead.pid}.tmp", "x.tmp"]
    (tmp_path / "a").mkdir()
    for name in [*kept, f".x.{rest}", f"a/.y.json.{rest}"]:
        (tmp_path / name).write_bytes(b"1")
    (tmp_path / f".link.{rest}").symlink_to("x.tmp")
    (tmp_path / "bad\\name\n").mkdir()
    folder = open_folder(tmp_path)
    assert folder.clean("a", older_than_s=60) == (f"a/.y.json.{rest}",)
    assert folder.clean("", older_than_s=60) == (f".x.{rest}",)
    assert {*kept, f".link.{rest}"} <= {*os.listdir(tmp_path)}
    yesterday = time.time() - 86400
    for name in kept:
        os.utime(tmp_path / name, (yesterday, yesterday))
    # Age tells of any writer; of names that are not ours nothing does.
    assert {*folder.clean("", older_than_s=3600)} == {own, elsewhere}
    assert {*kept[2:], f".link.{rest}"} <= {*os.listdir(tmp_path)}


# Behind URLs


def test_ranges_are_fetched_at_the_same_time(s3: Folder, store: ObjectStore) -> None:
    content = np.random.default_rng(0).bytes(64_000)
    s3.write("x", [content])
    store.watch(delay_s=0.2)
    outs = [bytearray(1000) for _ in range(32)]
    began = time.perf_counter()
    s3.fill([Want("x", 1000 * i, out) for i, out in enumerate(outs)])
    took = time.perf_counter() - began
    assert b"".join(outs) == content[:32_000]
    assert len(store.requests) == 32 and 8 <= store.most_in_flight <= 16
    assert took < 32 * 0.2 / 2, "one after the other they wait 6.4 s for the server alone"


def test_a_long_range_is_fetched_in_several_requests(
    s3: Folder, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = np.random.default_rng(0).bytes(10_000)
    s3.write("x", [content])
    monkeypatch.setattr(remote, "REQUEST_BYTES", 3000)
    store.watch(delay_s=0.02)
    assert ranged(s3, "x", 500, 9_700) == content[500:9_700]
    assert [method for method, _, _ in store.requests] == ["GET"] * 4 and store.most_in_flight > 1


def test_records_are_read_at_the_same_time_in_one_request_each(s3: Folder, store: ObjectStore) -> None:
    names = [f"sessions/{i}" for i in range(20)]
    for name in names:
        s3.write(name, [name.encode()])
    store.watch(delay_s=0.03)
    assert read_each(s3, names[::-1], 100) == tuple(name.encode() for name in names[::-1])
    assert len(store.requests) == 20 and store.most_in_flight > 4
    with pytest.raises(StoreError, match="sessions/x: expected a file, found none"):
        read_each(s3, [*names, "sessions/x"], 100)


def test_a_listing_shows_what_others_wrote_and_removed_since(s3: Folder) -> None:
    s3.write("a/x", [b"1"])
    assert [entry.name for entry in s3.list("a")] == ["x"]
    key = s3.url.removeprefix(f"s3://{BUCKET}/")
    client().put_object(Bucket=BUCKET, Key=f"{key}/a/y", Body=b"22")
    assert s3.list("a") == (Entry("x", 1, False), Entry("y", 2, False))
    with pytest.raises(StoreError, match="exists already"):
        s3.write("a/y", [b"3"])
    client().delete_object(Bucket=BUCKET, Key=f"{key}/a/x")
    assert s3.list("a") == (Entry("y", 2, False),)
    client().put_object(Bucket=BUCKET, Key=f"{key}/a/", Body=b"")
    assert s3.list("a") == (Entry("y", 2, False),), "the mark that keeps an empty folder is no file in it"


def test_parts_are_sent_while_the_file_is_still_made(
    s3: Folder, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "UPLOAD_BYTES", 5 << 20)
    content = np.random.default_rng(0).bytes(17 << 20)
    sent = []

    def pieces() -> Iterator[memoryview]:
        for begin in range(0, len(content), 4 << 20):
            sent.append(sum(method == "PUT" for method, _, _ in store.requests))
            yield memoryview(content)[begin : begin + (4 << 20)]

    store.watch()
    assert s3.write("x", pieces()) == len(content)
    assert sent == [0, 0, 1, 1, 2]
    assert max(size for _, _, size in store.requests) < 10.1 * (1 << 20), "a part is at most two blocks"
    assert ranged(s3, "x", 0, len(content)) == content


def test_an_upload_that_breaks_off_leaves_nothing(s3: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "UPLOAD_BYTES", 5 << 20)

    def pieces() -> Iterator[bytes]:
        yield bytes(6 << 20)
        assert client().list_multipart_uploads(Bucket=BUCKET).get("Uploads"), "a part is sent"
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        s3.write("x", pieces())
    assert s3.list("") == ()
    assert not client().list_multipart_uploads(Bucket=BUCKET).get("Uploads")


@pytest.mark.parametrize("size", [10, 6 << 20])
def test_a_store_that_refuses_is_one_error(
    s3: Folder, store: ObjectStore, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(remote, "UPLOAD_BYTES", 5 << 20)
    store.watch(refused=["PUT"])
    with pytest.raises(StoreError, match="/run/x: cannot be written: PermissionError") as caught:
        s3.write("x", [bytes(size)])
    assert "credentials" in caught.value.hint and "earlier snapshots are intact" in caught.value.hint
    assert s3.list("") == () and not client().list_multipart_uploads(Bucket=BUCKET).get("Uploads")
    store.watch(refused=["GET", "HEAD"])
    acts = [lambda: s3.read("x", 1), lambda: s3.list(""), lambda: ranged(s3, "x", 0, 1), lambda: s3.write("x", [b"1"])]
    for act in acts:
        with pytest.raises(StoreError, match="PermissionError"):
            act()


def test_a_bucket_that_does_not_exist_is_named(store: ObjectStore) -> None:
    folder = open_folder("s3://nowhere/run")
    assert folder.list("") == ()
    with pytest.raises(StoreError, match=r"s3://nowhere/run/x: cannot be written"):
        folder.write("x", [b"1"])


def test_settings_of_fsspec_are_followed(store: ObjectStore) -> None:
    code = f"""
from sharded_phema.folder import open_folder
folder = open_folder("s3://{BUCKET}/{uuid.uuid4().hex}")
folder.write("x", [b"1"])
print(folder.read("x", 1), "torch" in __import__("sys").modules)
"""
    environment = {**os.environ, "FSSPEC_S3_ENDPOINT_URL": store.endpoint, "PYTHONPATH": str(ROOT)}
    del environment["AWS_ENDPOINT_URL"]
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "b'1' False\n", done.stderr


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(StoreError, match=r"gs://bucket/run: cannot be opened: .*gcsfs") as caught:
        open_folder("gs://bucket/run")
    assert "pip install 'sharded_phema[remote]'" in caught.value.hint and "gcsfs for gs://" in caught.value.hint
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(StoreError, match=r"memory://run: cannot be opened: .*fsspec"):
        open_folder("memory://run")


def test_an_unknown_protocol_is_an_error() -> None:
    with pytest.raises(StoreError, match="nosuch://x: cannot be opened: Protocol not known: nosuch"):
        open_folder("nosuch://x")


def test_messages_hold_no_password() -> None:
    with pytest.raises(StoreError) as caught:
        open_folder("nosuch://user:hunter2@host/run")
    assert "nosuch://user:***@host/run" in str(caught.value) and "hunter2" not in str(caught.value)


def test_fsspec_is_loaded_for_urls_only(tmp_path: Path) -> None:
    code = f"""
import sys
from sharded_phema.folder import open_folder
open_folder({str(tmp_path)!r}).write("x", [b"1"])
print(*sorted({{"fsspec", "torch"}} & {{*sys.modules}}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"

"""What lies on disk is not trusted: malicious pickles and zip files are refused by name, and nothing of them runs."""

from __future__ import annotations

import builtins
import io
import math
import os
import pickle
import random
import struct
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import foreign
import pytest
import torch
from foreign import states
from safetensors.torch import save_file

from sharded_phema.errors import PhemaError, StoreError
from sharded_phema.importers.bringing import import_run
from sharded_phema.importers.contract import Reading
from sharded_phema.importers.dcp import find_dcp
from sharded_phema.importers.edm2 import network_tensors
from sharded_phema.importers.extent import Extent
from sharded_phema.importers.formats import FORMATS
from sharded_phema.importers.safetensors import open_safetensors
from sharded_phema.importers.torchfile import load
from sharded_phema.importers.unpickling import unpickled


class Evil:
    """Pickles as a call of anything."""

    def __init__(self, act: Any, *args: Any) -> None:
        self.reduced = (act, args)

    def __reduce__(self) -> tuple:
        return self.reduced


def attacks(canary: Path) -> dict[str, Any]:
    touch = f"open({str(canary)!r}, 'w').close()"
    return {
        "os.system": Evil(os.system, f"touch {canary}"),
        "subprocess": Evil(subprocess.Popen, ["touch", str(canary)]),
        "eval": Evil(builtins.eval, touch),
        "exec": Evil(builtins.exec, touch),
        "getattr": Evil(getattr, "text", "format"),
        "open": Evil(builtins.open, str(canary), "w"),
        "import": Evil(builtins.__import__, "antigravity"),
        "torch.load": Evil(torch.load, str(canary)),
        "path": Evil(Path.touch, canary),
        "set of evil": {"x": {Evil(os.system, f"touch {canary}")}},
    }


NAMES = list(attacks(Path("canary")))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_an_attack_is_refused_by_name_and_does_not_run(name, protocol, tmp_path) -> None:
    # Oracle: the library's own unpickler runs the first of them.
    canary = tmp_path / "canary"
    data = pickle.dumps({"a": 1, "b": attacks(canary)[name]}, protocol)
    with pytest.raises(StoreError, match="its pickle asks for") as caught:
        unpickled(io.BytesIO(data), "file")
    assert "nothing was executed" in caught.value.hint and not canary.exists()
    if name == "os.system":
        pickle.loads(data)
        assert canary.exists(), "the attack is one"


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["os.system", "eval", "set of evil"])
def test_files_of_torch_save_with_an_attack_are_refused(name, legacy, tmp_path) -> None:
    canary, file = tmp_path / "canary", tmp_path / "step_1.pt"
    torch.save({**states()[0], "x": attacks(canary)[name]}, file, _use_new_zipfile_serialization=not legacy)
    for format in ("torch", "lightning", "ema-pytorch", "deepspeed"):
        source = tmp_path / format
        source.mkdir()
        names = {"lightning": "a.ckpt", "ema-pytorch": "0.1.pt", "deepspeed": "mp_rank_00_model_states.pt"}
        (source / names.get(format, "step_1.pt")).write_bytes(file.read_bytes())
        if format == "deepspeed":
            source = source.rename(tmp_path / "global_step5")
        how = Reading(profiles=("0.05",), update_every=1.0) if format == "ema-pytorch" else Reading()
        with pytest.raises(StoreError, match="its pickle asks for"):
            import_run(source, tmp_path / "run", format=format, reading=how)
    assert not canary.exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["os.system", "eval"])
def test_attacks_in_network_pickles_and_metadata_are_refused(name, tmp_path) -> None:
    canary = tmp_path / "canary"
    network = foreign.as_edm2(foreign.tiny())
    for place in ("ema", "loss_fn"):
        file = tmp_path / "network-snapshot-0000001-0.050.pkl"
        foreign.write_pickle(file, {"ema": network, place: attacks(canary)[name]})
        with pytest.raises(StoreError, match="its pickle asks for"):
            network_tensors(file)
    # Inside of the bytes of a tensor, too, which are a pickle in themselves.
    inner = io.BytesIO()
    torch.save(attacks(canary)[name], inner, _use_new_zipfile_serialization=False)
    foreign.write_pickle(file, {"ema": network, "x": Evil(torch.storage._load_from_bytes, inner.getvalue())})
    with pytest.raises(StoreError, match="its pickle asks for"):
        network_tensors(file)
    folder = tmp_path / "step-1"
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(attacks(canary)[name]))
    with pytest.raises(StoreError, match="its pickle asks for"):
        find_dcp(tmp_path, Reading())[0].open()
    assert not canary.exists()


def test_code_that_a_network_brings_along_is_not_run() -> None:
    # The stand-in for EDM2's persistence holds "raise SystemExit" as its source, and its own function raises.
    with pytest.raises(AssertionError, match="nobody may call this"):
        foreign._reconstruct_persistent_obj({})
    assert foreign.as_edm2(foreign.tiny()).meta["module_src"] == "raise SystemExit"


@pytest.mark.parametrize(
    "data",
    [
        b"cos\nsystem\n(S'true'\ntR.",  # GLOBAL and REDUCE
        b"(S'true'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'true'\no.",  # OBJ
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",  # STACK_GLOBAL
        b"\x80\x04\x8c\x0bcollections\x8c\x1bOrderedDict.fromkeys.__self__\x93.",  # a dotted name
        b"\x80\x02\x82\x01.",  # EXT1
        b"\x80\x02cnumpy.f2py.crackfortran\n_eval_scalar\n.",
    ],
)
def test_every_opcode_that_names_a_global_is_refused(data) -> None:
    with pytest.raises(StoreError):
        unpickled(io.BytesIO(data), "file")


def test_stand_ins_cannot_be_changed_by_a_pickle() -> None:
    # BUILD with slots sets attributes of whatever lies on the stack: here of the stand-ins themselves.
    from sharded_phema.importers.torchfile import GLOBALS

    for module, name in (("torch._utils", "_rebuild_tensor_v2"), ("torch", "Size"), ("torch", "device")):
        data = f"c{module}\n{name}\n".encode() + b"(N}(S'__call__'\nI1\nS'_act'\nI2\nutb."
        with pytest.raises(StoreError, match="no pickle that can be read"):
            unpickled(io.BytesIO(data), "file", allowed=GLOBALS)
    assert unpickled(io.BytesIO(b"ctorch\nSize\n((I3\nI4\nttR."), "file", allowed=GLOBALS) == (3, 4)


def zip_of(file: Path, change: Any) -> None:
    """A file of torch.save, its members changed."""
    torch.save(states()[0], file)
    with zipfile.ZipFile(file) as archive:
        members = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    compressed = zipfile.ZIP_DEFLATED if change == "compressed" else zipfile.ZIP_STORED
    with zipfile.ZipFile(file, "w", compressed) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
            if change == "twice":
                archive.writestr(name, data)
        if change == "two pickles":
            archive.writestr("other/data.pkl", b"N.")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("change", ["compressed", "twice", "two pickles"])
def test_zip_files_with_tricks_are_refused(change, tmp_path) -> None:
    zip_of(tmp_path / "x.pt", change)
    with pytest.raises(StoreError, match=r"compressed|no file twice"):
        load(Extent.whole(tmp_path / "x.pt"))


def test_a_member_whose_own_header_says_otherwise_is_refused(tmp_path) -> None:
    file = tmp_path / "x.pt"
    torch.save(states()[0], file)
    data = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        entry = next(e for e in archive.infolist() if e.filename.endswith("/data/0"))
    begin = entry.header_offset
    length = struct.unpack("<H", data[begin + 26 : begin + 28])[0]
    data[begin + 30 + length - 1] = ord("9")
    file.write_bytes(data)
    with pytest.raises(StoreError, match="not what the directory says"):
        load(Extent.whole(file))


@pytest.mark.parametrize(
    ("offset", "shape", "strides", "dtype"),
    [
        (10**6, (2,), (1,), "FloatStorage"),
        (0, (10**9,), (1,), "FloatStorage"),
        (0, (3, 10**9), (1, 0), "FloatStorage"),
        (-1, (2,), (1,), "FloatStorage"),
        (0, (2,), (-1,), "FloatStorage"),
        (0, (2.5,), (1,), "FloatStorage"),
        (0, ("a",), (1,), "FloatStorage"),
        (0, (2,), (1,), "QInt8Storage"),
    ],
)
def test_a_tensor_that_lies_outside_of_its_file_is_refused(offset, shape, strides, dtype, tmp_path) -> None:
    # A pickle by hand: what torch.save writes, but for the numbers.
    if strides == (1, 0):
        shape, strides = (3, 10**9), (10**9, 1)
    reduced = (torch._utils._rebuild_tensor_v2, (0, offset, shape, strides, False, None))
    buffer = io.BytesIO()

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", getattr(torch, dtype), "0", "cpu", 4) if value == "numbers" else None

    act, args = reduced
    Pickler(buffer, 2).dump({"w": Evil(act, "numbers", *args[1:])})
    with zipfile.ZipFile(tmp_path / "x_1.pt", "w") as archive:
        archive.writestr("x/data.pkl", buffer.getvalue())
        archive.writestr("x/data/0", bytes(16))
    with pytest.raises(PhemaError):
        import_run(tmp_path, tmp_path / "run", format="torch")
    assert not (tmp_path / "run" / "run.json").exists()


def test_metadata_that_refers_outside_of_its_folder_is_refused(tmp_path) -> None:
    foreign.write_dcp(tmp_path, {1: states()[0]})
    path = tmp_path / "step-1" / ".metadata"
    data, name = path.read_bytes(), b"__0_0.distcp"
    for other, message in ((b"/../x.distcp", "outside of it"), (b"__0_9.distcp", "cannot be read")):
        path.write_bytes(data.replace(name, other))
        with pytest.raises(StoreError, match=message):
            find_dcp(tmp_path, Reading())[0].open()


@pytest.mark.parametrize("cut", [0.0, 0.001, 0.1, 0.5, 0.99])
def test_files_that_were_cut_short_are_refused(cut, tmp_path) -> None:
    whole = {k: v for k, v in states()[0].items()}
    for name, write in (
        ("a.pt", torch.save),
        ("b.pt", lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False)),
        ("c.safetensors", save_file),
        (
            "d-0000001-0.050.pkl",
            lambda state, path: foreign.write_pickle(path, {"ema": foreign.as_edm2(foreign.tiny())}),
        ),
    ):
        path = tmp_path / name
        write(whole, path)
        data = path.read_bytes()
        path.write_bytes(data[: int(cut * len(data))])
        read = {"c": open_safetensors, "d": network_tensors}.get(name[0], lambda path: load(Extent.whole(path)))
        with pytest.raises(StoreError):
            read(path)


def test_headers_of_safetensors_that_lie_are_refused(tmp_path) -> None:
    def header(text: str) -> bytes:
        return len(text).to_bytes(8, "little") + text.encode() + bytes(8)

    for text in (
        '{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}',
        '{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8]}}',
        '{"a": {"dtype": "X32", "shape": [2], "data_offsets": [0, 8]}}',
        '{"a": {"dtype": "F32", "shape": "ab", "data_offsets": [0, 8]}}',
        '{"a": 3}',
        "[]",
        "[" * 100_000,
    ):
        (tmp_path / "x").write_bytes(header(text))
        with pytest.raises(StoreError):
            open_safetensors(tmp_path / "x")
    (tmp_path / "x").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(StoreError):
        open_safetensors(tmp_path / "x")


@pytest.mark.parametrize("format", ["hf", "torch", "legacy", "dcp", "lightning", "edm2", "posthoc-ema"])
def test_files_with_any_byte_changed_are_read_or_refused_and_nothing_else(format, tmp_path) -> None:
    # Oracle: the only exceptions are those that say what is wrong. Early bytes are changed most: headers and pickles.
    held, t = {30: states()[29]}, 35 if format == "legacy" else 30
    writers: dict[str, Any] = {"hf": foreign.write_hf, "dcp": foreign.write_dcp, "lightning": foreign.write_lightning}
    if format == "edm2":
        foreign.write_edm2(tmp_path / "source", {"0.050": held}, kimg=lambda t: t)
    elif format == "posthoc-ema":
        foreign.write_karras(tmp_path / "source", [held], "", lambda t: t)
    else:
        writers.get(format, foreign.write_torch)(tmp_path / "source", {t: held[30]})
    files = [path for path in sorted((tmp_path / "source").rglob("*")) if path.is_file()]
    draw, refused = random.Random(format), 0
    name = "torch" if format == "legacy" else format
    how = Reading(profiles=("0.05",), update_every=3.0) if format == "posthoc-ema" else Reading()
    for _ in range(60):
        path = draw.choice(files)
        whole = path.read_bytes()
        data = bytearray(whole)
        for _ in range(draw.choice([1, 3])):
            data[draw.randrange(min(len(data), 2000))] = draw.choice([draw.randrange(256), *b".Rb0(\x80"])
        path.write_bytes(data)
        try:
            opened = [one.open() for one in FORMATS[name](tmp_path / "source", how)]
            for lazy in (lazy for several in opened[0].values() for lazy in several.values()):
                lazy.read(0, math.prod(lazy.shape))
        except PhemaError:
            refused += 1
        path.write_bytes(whole)
    assert refused > 5

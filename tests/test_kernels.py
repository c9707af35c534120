"""Kernels: all give what one would write down, to one unit in the last place, however tensors lie in memory."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
from allocations import Allocations
from builders import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sharded_phema.errors import TargetError
from sharded_phema.kernels import choice, kernels_for, library
from sharded_phema.kernels import foreach as foreach_file
from sharded_phema.kernels.reference import Reference

ROOT = Path(__file__).parents[1]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TRITON_ON = "cuda" if torch.cuda.is_available() else "cpu"

needs_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="module", params=["reference", "foreach", pytest.param("fused", marks=needs_compiler), "triton"])
def kernel(request):
    """The name of each in turn. Triton runs on a device or, where there is none, in its interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "triton":
            pytest.importorskip("triton", reason="Triton weighs a gigabyte, and is not installed by make test")
            if TRITON_ON == "cpu":
                patch.setenv("TRITON_INTERPRET", "1")
        yield request.param


def device_of(kernel: str) -> str:
    return TRITON_ON if kernel == "triton" else "cpu"


def laid(values: Tensor, how: str, offset: int) -> Tensor:
    """The same values as a view of a longer storage, at any alignment and with some stride."""
    if how == "whole":
        return values
    if how == "rows apart" and values.ndim:
        room = torch.full((*values.shape[:-1], values.shape[-1] + 3), 7.0, dtype=values.dtype)
        view = room[..., : values.shape[-1]]
    elif how == "transposed" and values.ndim > 1:
        view = torch.full(values.mT.shape, 7.0, dtype=values.dtype).mT
    else:
        room = torch.full((values.numel() + offset + 2,), 7.0, dtype=values.dtype)
        view = room[offset : offset + values.numel()].view(values.shape)
    return view.copy_(values)


LAYOUTS = st.sampled_from(["whole", "shifted", "shifted", "rows apart", "transposed"])
SHAPES = st.one_of(
    st.lists(st.integers(0, 6), max_size=3).map(tuple), st.tuples(st.integers(0, 70)), st.just((3, 1367)), st.just(())
)
WEIGHTS = st.one_of(
    st.sampled_from([0.0, 1.0, 0.5, 0.4999999, 1e-12]), st.floats(0, 1, width=32), st.floats(1e-6, 1e-2)
)


@st.composite
def cases(draw):
    """Parameters, their averages and the weights."""
    seed, width = draw(st.integers(0, 1 << 20)), draw(st.integers(1, 4))
    noise = torch.Generator().manual_seed(seed)
    params, averages = [], [[] for _ in range(width)]
    for _ in range(draw(st.integers(0, 5))):
        shape, dtype, scale = draw(SHAPES), draw(st.sampled_from(DTYPES)), draw(st.sampled_from([1.0, 1e-6, 3e4]))
        values = (torch.randn(shape, generator=noise).clamp(-2, 2) * scale).to(dtype)
        params.append(laid(values, draw(LAYOUTS), draw(st.integers(0, 9))))
        for average in averages:
            # Some near the parameter, as late in a run.
            near = values.float() * (1 + 1e-3 * torch.randn(shape, generator=noise))
            value = near if draw(st.booleans()) else torch.randn(shape, generator=noise)
            average.append(laid(value, draw(st.sampled_from(["whole", "shifted"])), draw(st.integers(0, 9))))
    return params, averages, draw(st.lists(WEIGHTS, min_size=width, max_size=width))


def twin(view: Tensor, device: str) -> Tensor:
    """A copy that lies in its own storage as the view lies in its."""
    return storage_of(view).to(device, copy=True).as_strided(view.shape, view.stride(), view.storage_offset())


def storage_of(view: Tensor) -> Tensor:
    return torch.empty(0, dtype=view.dtype, device=view.device).set_(view.untyped_storage())


def moved(kernel: str, params, averages, weights) -> list[list[Tensor]]:
    """What becomes of copies of the averages, nothing beside them having been written to."""
    device = device_of(kernel)
    copies = [[twin(average, device) for average in tensors] for tensors in averages]
    params = [twin(param, device) for param in params]
    for each in kernels_for(kernel, copies, params):
        each(weights)
    found = [[copy.cpu().clone() for copy in tensors] for tensors in copies]
    for average, copy in zip(chain(*averages), chain(*copies), strict=True):
        copy.copy_(average)
        assert torch.equal(storage_of(copy).cpu(), storage_of(average))
    return found


def spacing(*tensors: Tensor) -> Tensor:
    """Distance between float32 numbers where the largest of each lies."""
    largest = torch.stack([tensor.float().abs() for tensor in tensors]).amax(0)
    return torch.nextafter(largest, torch.tensor(torch.inf)) - largest


@given(case=cases())
@examples(60)
def test_every_kernel_gives_what_one_would_write_down(kernel, case) -> None:
    # Oracle: float64 throughout. The difference is rounded once, being at most twice as large, and then weighs less
    # than a half; the sum is rounded once: together at most one unit in the last place of the larger number.
    params, averages, weights = case
    expected = [[average.double() for average in tensors] for tensors in averages]
    Reference(expected, params)(weights)
    found, usual = moved(kernel, params, averages, weights), moved("foreach", params, averages, weights)
    for k, weight in enumerate(weights):
        for i, param in enumerate(params):
            old, new, unit = averages[k][i], found[k][i], spacing(averages[k][i], param)
            assert ((new.double() - expected[k][i]).abs() <= unit).all()
            assert kernel == "reference" or ((new - usual[k][i]).abs() <= unit).all()
            assert weight != 0 or torch.equal(new, old)
            assert weight != 1 or torch.equal(new, param.float())


@given(case=cases(), odd=st.sampled_from([torch.nan, torch.inf, -torch.inf]), data=st.data())
@examples(40)
def test_every_kernel_tells_whether_parameters_are_finite(kernel, case, odd, data) -> None:
    params, averages, _ = case
    device = device_of(kernel)
    params = [twin(param, device) for param in params]
    kernels = kernels_for(kernel, [[twin(average, device) for average in row] for row in averages], params)
    assert all(bool(each.finite()) for each in kernels)
    full = [param for param in params if param.numel()]
    if full:
        param = data.draw(st.sampled_from(full))
        place = tuple(data.draw(st.integers(0, length - 1)) for length in param.shape)
        param[place] = odd
        assert not all(bool(each.finite()) for each in kernels)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_zero_leaves_an_average_as_it_is_whatever_the_parameters_are(kernel, dtype) -> None:
    params = [torch.full((5,), torch.nan, dtype=dtype), torch.full((4, 3), torch.inf, dtype=dtype).mT]
    averages = [[torch.randn(p.shape) for p in params] for _ in range(3)]
    found = moved(kernel, params, averages, torch.tensor([0.0, 1.0, 0.0]).to(device_of(kernel)))
    assert all(torch.equal(a, b) for k in (0, 2) for a, b in zip(averages[k], found[k], strict=True))
    assert not any(torch.isfinite(a).any() for a in found[1])


def test_many_averages_and_long_tensors_of_all_dtypes(kernel) -> None:
    lengths, width = (70_001, 4096, 4097, 1, 0), 6
    params = [torch.randn(n).to(dtype) for n in lengths for dtype in DTYPES]
    averages = [[torch.randn(p.shape) for p in params] for _ in range(width)]
    weights = [1.0, 0.3, 0.0, 0.7, 1e-4, 0.5]
    found, usual = moved(kernel, params, averages, weights), moved("foreach", params, averages, weights)
    for param, *pairs in zip(params, *found, *usual, *averages, strict=True):
        for new, other, old in zip(pairs[:width], pairs[width : 2 * width], pairs[2 * width :], strict=True):
            assert ((new - other).abs() <= spacing(old, param)).all()


@needs_compiler
def test_the_fused_kernel_gives_the_same_bits_on_any_number_of_threads() -> None:
    params = [torch.randn(200_003), torch.randn(7), torch.randn(100_000).bfloat16()]
    averages = [[torch.randn(p.shape) for p in params] for _ in range(2)]
    one = moved("fused", params, averages, (0.1, 0.9))
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        five = moved("fused", params, averages, (0.1, 0.9))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(chain(*one), chain(*five), strict=True))


@needs_compiler
def test_every_float16_and_bfloat16_number_is_widened_as_torch_does() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        params = [torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)]
        found, expected = moved("fused", params, [[torch.zeros(1 << 16)]], [1.0])[0][0], params[0].float()
        assert torch.equal(found[expected.isfinite()], expected[expected.isfinite()])
        assert found[~expected.isfinite()].isnan().all(), "0 times infinity, as lerp has it"


# No allocation, and no time in Python that grows.


@pytest.mark.parametrize("name", ["foreach", pytest.param("fused", marks=needs_compiler)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_allocates_nothing(name, dtype) -> None:
    params = [torch.randn(1000 + i).to(dtype) for i in range(20)]
    kernels = kernels_for(name, [[torch.zeros(p.shape) for p in params] for _ in range(2)], params)
    with Allocations() as seen:
        for each in kernels:
            each((0.1, 0.2))
    assert seen.elements == 0


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40), st.booleans()), max_size=6))
@examples(60)
def test_pieces_that_are_widened_together_are_no_longer_than_the_room_for_them(shapes) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(foreach_file, "CHUNK", 16)
        params = [torch.randn(r, c).bfloat16().mT if flip else torch.randn(r, c).bfloat16() for r, c, flip in shapes]
        averages = [torch.zeros(p.shape) for p in params]
        kernel = foreach_file.ForeachLerp([averages], params)
        assert all(group._used.numel() <= 16 for group in kernel._groups)
        assert bool(kernel.finite())
        kernel((1.0,))
    assert all(torch.equal(a, p.float()) for a, p in zip(averages, params, strict=True))


@needs_cuda
def test_on_a_device_nothing_is_waited_for() -> None:
    params = [torch.randn(1000 + i, device="cuda").bfloat16() for i in range(50)]
    (kernel,) = kernels_for("auto", [[torch.zeros(p.shape, device="cuda") for p in params] for _ in range(2)], params)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernel((0.1, 0.2))
        kernel.finite()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_allocated() <= before + 4096


@needs_cuda
def test_on_a_device_an_update_can_be_part_of_a_graph() -> None:
    params = [torch.randn(1000 + i, device="cuda").bfloat16() for i in range(50)]
    usual, captured = ([[torch.zeros(p.shape, device="cuda") for p in params] for _ in range(2)] for _ in range(2))
    ((eager,), (kernel,)) = (kernels_for("auto", averages, params) for averages in (usual, captured))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel((0.1, 0.2))
    for _ in range(3):
        graph.replay()
        eager((0.1, 0.2))
    for average, expected in zip(captured, usual, strict=True):
        assert all(torch.equal(a, e) for a, e in zip(average, expected, strict=True))


def test_what_triton_makes_for_a_device_reads_four_numbers_at_once() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", PTX], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    aligned, others = (set(line.split()) for line in done.stdout.strip().splitlines())
    assert {"ld.global.v4.b32", "st.global.v4.b32", "fma.rn.f32"} <= aligned
    assert not any(".v4." in word for word in others), "addresses that are not aligned must not be read so"


PTX = """
import re
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sharded_phema.kernels.triton import update_kernel

kinds = dict.fromkeys(["firsts", "lengths", "table"], "*i64") | {"tensors": "*i32", "weights": "*fp32", "count": "i32"}
for step in (16, 1):
    fixed = {"KIND": tl.float32, "WIDTH": 2, "SIZE": 4096, "STEP": step}
    source = ASTSource(fn=update_kernel, signature=kinds | dict.fromkeys(fixed, "constexpr"), constexprs=fixed)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    print(*sorted(set(re.findall(r"(?:ld|st)[.]global[.a-z0-9]*|fma[.]rn[.]f32", made))))
"""


# Which kernel, and the compiler.


def test_the_rule_takes_the_fused_kernel_where_it_can_and_does_without_where_not(monkeypatch, tmp_path, caplog) -> None:
    params, averages = [torch.ones(3)], [[torch.zeros(3)]]
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    library.library.cache_clear()
    try:
        with caplog.at_level(logging.INFO):
            assert [type(k).__name__ for k in kernels_for("auto", averages, params)] == ["ForeachLerp"]
        assert "no C++ compiler" in caplog.text
        with pytest.raises(TargetError, match="no C\\+\\+ compiler is installed"):
            kernels_for("fused", averages, params)
    finally:
        library.library.cache_clear()


def test_the_rule_does_without_triton_where_that_does_not_work(monkeypatch, caplog) -> None:
    monkeypatch.setattr(choice, "find_spec", lambda name: name == "triton")
    monkeypatch.setitem(sys.modules, "sharded_phema.kernels.triton", None)  # importing it fails
    made = choice.KERNELS["auto"](torch.device("cuda"))([[torch.zeros(3)]], [torch.ones(3)])
    assert type(made).__name__ == "ForeachLerp"
    assert "without Triton" in caplog.text


def test_a_kernel_that_is_none_or_does_not_run_here_is_refused(monkeypatch) -> None:
    params, averages = [torch.ones(3)], [[torch.zeros(3)]]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(TargetError, match="expected one of auto, reference, foreach, fused, triton"):
        kernels_for("best", averages, params)
    with pytest.raises(TargetError, match=r"runs on CUDA|not installed"):
        kernels_for("triton", averages, params)
    with pytest.raises(TargetError, match="runs on the CPU, parameters are on meta"):
        kernels_for("fused", [[torch.zeros(3, device="meta")]], [torch.ones(3, device="meta")])


LOAD = "import logging; logging.basicConfig(level='INFO'); from sharded_phema.kernels.library import library; library()"


def load(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(folder)} | environment
    return subprocess.run([sys.executable, "-c", LOAD], env=environment, capture_output=True, text=True, cwd=ROOT)


@needs_compiler
def test_what_was_compiled_is_found_again_without_a_compiler(tmp_path) -> None:
    first = load(tmp_path)
    assert first.returncode == 0, first.stderr
    assert "compiling" in first.stderr, "it is announced"
    built = [path.name for path in (tmp_path / "sharded_phema").iterdir()]
    again = load(tmp_path, PATH="", CXX="no-such-compiler")
    assert again.returncode == 0, again.stderr
    assert "compiling" not in again.stderr
    assert [path.name for path in (tmp_path / "sharded_phema").iterdir()] == built
    assert len(built) == 1


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(tmp_path) -> None:
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho sorry >&2\nexit 3\n")
    compiler.chmod(0o755)
    done = load(tmp_path / "cache", CXX=str(compiler))
    assert "Unavailable" in done.stderr and "failed: sorry" in done.stderr
    assert not list((tmp_path / "cache" / "sharded_phema").iterdir())

"""Sums of rows: product by product, each rounded, so that numpy, torch and the compiled kernel give the same bits."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from builders import examples
from hypothesis import given
from hypothesis import strategies as st

from sharded_phema.kernels import library, summing
from sharded_phema.kernels.summing import torch_sums

needs_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module", params=["torch", pytest.param("compiled", marks=needs_compiler)])
def sums(request):
    return torch_sums if request.param == "torch" else summing.summing(worth_compiling=True)


@examples(150)
@given(
    st.integers(1, 6),
    st.integers(1, 9),
    st.sampled_from([0, 1, 7, 8, 1023, 1024, 1025, 3000]),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_every_product_is_rounded_and_then_every_sum(sums, targets, rows, count, dtype, fresh, seed) -> None:
    # Oracle: the same by numpy, in which nothing is fused.
    draw = torch.Generator().manual_seed(seed)
    values = [torch.randn(count + 3, generator=draw).to(dtype)[3:] for _ in range(rows)]  # at odd addresses
    weights = torch.randn(targets, rows, generator=draw)
    found = torch.randn(targets, count + 5, generator=draw)[:, :count]
    expected = found.numpy().copy()
    if fresh:
        expected[:] = -0.0
    for value, column in zip(values, weights.numpy().T, strict=True):
        for k, weight in enumerate(column):
            expected[k] += weight * value.float().numpy()
    sums(found, values, weights, fresh)
    assert found.numpy().tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_weight_one_alone_comes_out_as_it_is(sums, dtype) -> None:
    row = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 6e-8, -1.5], dtype=dtype)
    found = torch.full((1, 7), torch.nan)
    sums(found, [row], torch.ones(1, 1), True)
    assert np.array_equal(found[0].numpy(), row.float().numpy(), equal_nan=True)
    assert np.signbit(found[0, :2].numpy()).tolist() == [False, True]
    # Over groups: a second row of zeros changes nothing but the sign of zeros.
    sums(found, [torch.zeros(7, dtype=dtype)], torch.ones(1, 1), False)
    assert np.array_equal(found[0].numpy(), row.float().numpy(), equal_nan=True)


def test_little_work_is_not_worth_compiling(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert not library.is_built()
    assert summing.summing(worth_compiling=False) is torch_sums and not any(tmp_path.iterdir())


def test_without_a_compiler_torch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise library.Unavailable("no C++ compiler is installed")

    monkeypatch.setattr(summing, "library", refuse)
    assert summing.summing(worth_compiling=True) is torch_sums

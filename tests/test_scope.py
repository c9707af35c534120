"""Scope: what becomes of each tensor of a model, and what is refused."""

import itertools

import pytest
import torch
from worlds import shard_of

from sharded_phema.errors import TargetError, UnsupportedModel
from sharded_phema.layout import whole
from sharded_phema.scope import scope_of


def tensor(name, kind="trained", dtype=torch.float32):
    return shard_of(torch.zeros(2, 3, dtype=dtype), (whole((2, 3)),), name=name, kind=kind)


ANCHOR = tensor("anchor")  # so that something is averaged always
TENSORS = [
    tensor("weight"),
    tensor("half", dtype=torch.bfloat16),
    tensor("frozen", "frozen"),
    tensor("frozen_codes", "frozen", torch.int8),
    tensor("mean", "buffer"),
    tensor("count", "buffer", torch.int64),
    tensor("phase", "buffer", torch.complex64),
]
# How the tensors above fare where they are included, where they are not, and where they are excluded.
FATES = {
    "copy": ["acc", "acc", "ffc", "ffc", "ccc", "ccc", "ccc"],
    "average": ["acc", "acc", "ffc", "ffc", "acc", "ccc", "ccc"],
    "omit": ["acc", "acc", "ffc", "ffc", "ooo", "ooo", "ooo"],
}


def fate(scope, name):
    found = {
        letter
        for letter, shards in (("a", scope.averaged), ("c", scope.copied), ("f", scope.frozen))
        if name in [shard.name for shard in shards]
    }
    assert len(found) <= 1
    return found.pop() if found else "o"


@pytest.mark.parametrize(
    ("buffers", "shard", "fates"),
    [(mode, shard, fates) for mode, table in FATES.items() for shard, fates in zip(TENSORS, table, strict=True)],
    ids=lambda value: getattr(value, "name", value),
)
def test_every_tensor_has_the_fate_of_the_table(buffers, shard, fates):
    layout = (ANCHOR, shard)
    asked = [(["*"], []), (["anchor"], []), (["*"], [shard.name])]
    found = [fate(scope_of(layout, include, exclude, buffers), shard.name) for include, exclude in asked]
    assert "".join(found) == fates


@pytest.mark.parametrize("buffers", FATES)
def test_each_tensor_is_in_one_place_at_most_and_keeps_its_order(buffers):
    names = [shard.name for shard in (ANCHOR, *TENSORS)]
    for order in itertools.islice(itertools.permutations((ANCHOR, *TENSORS)), 0, 5040, 997):
        scope = scope_of(order, ["*"], ["half"], buffers)
        for shards in (scope.averaged, scope.copied, scope.frozen):
            assert [shard for shard in order if shard in shards] == list(shards)
        placed = [shard.name for shard in (*scope.averaged, *scope.copied, *scope.frozen)]
        assert sorted(placed) == sorted(n for n in names if buffers != "omit" or n not in {"mean", "count", "phase"})


def test_an_excluded_pattern_outweighs_an_included_one_and_case_counts():
    layout = (tensor("net.Attn.w"), tensor("net.attn.w"), tensor("net.mlp.w"))
    scope = scope_of(layout, ["net.*"], ["*.attn.*"], "copy")
    assert [shard.name for shard in scope.averaged] == ["net.Attn.w", "net.mlp.w"]
    assert [shard.name for shard in scope.copied] == ["net.attn.w"]


@pytest.mark.parametrize("name", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused_by_name(name):
    asked = {"include": ["*"], "exclude": []} | {name: ["*.atn.*"]}
    with pytest.raises(TargetError, match=rf"{name}: pattern '\*\.atn\.\*' matches none of 1 tensors, such as anchor"):
        scope_of((ANCHOR,), asked["include"], asked["exclude"], "copy")


@pytest.mark.parametrize("name", ["include", "exclude"])
def test_a_single_text_in_the_place_of_a_list_is_refused(name):
    asked = {"include": ["*"], "exclude": []} | {name: "anchor"}
    with pytest.raises(TargetError, match=rf"{name}='anchor': a list is expected\nhint: write {name}=\['anchor'\]"):
        scope_of((ANCHOR,), asked["include"], asked["exclude"], "copy")


def test_a_mode_of_buffers_that_is_none_is_refused():
    with pytest.raises(TargetError, match=r"expected one of \('copy', 'average', 'omit'\), found 'none'"):
        scope_of((ANCHOR,), ["*"], [], "none")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32, torch.bool])
def test_a_trained_parameter_that_is_not_real_is_refused_with_the_mend_and_the_mend_helps(dtype):
    layout = (ANCHOR, tensor("phase", dtype=dtype))
    with pytest.raises(UnsupportedModel, match=rf"phase: a {dtype} parameter cannot be averaged") as caught:
        scope_of(layout, ["*"], [], "copy")
    assert caught.value.hint.startswith("leave it out with exclude=['phase']")
    assert fate(scope_of(layout, ["*"], ["phase"], "copy"), "phase") == "c"


@pytest.mark.parametrize(
    ("layout", "exclude"),
    [((tensor("w", "frozen"),), []), ((tensor("b", "buffer"),), []), ((ANCHOR,), ["anchor"]), ((), [])],
)
def test_a_model_of_which_nothing_is_averaged_is_refused(layout, exclude):
    with pytest.raises(UnsupportedModel, match=f"none of the model's {len(layout)} tensors is averaged"):
        scope_of(layout, ["*"], exclude, "copy")

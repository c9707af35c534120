from __future__ import annotations

import pytest

from sharded_phema.errors import TargetError
from sharded_phema.per_tensor import parse_outputs, read_patterns, whole_model
from sharded_phema.target import parse_target

NAMES = ("attn.q", "attn.k", "mlp.w", "norm")


def test_the_first_pattern_that_matches_counts():
    (output,) = parse_outputs({"attn.q": 0.05, "attn.*": "0.1", "*": "window:0.2"})
    assert [target.text for target in output.choice(NAMES)] == ["0.05", "0.1", "window:0.2", "window:0.2"]
    assert output.slug == "per-tensor"


def test_targets_and_mappings_mix_and_have_folders_of_their_own():
    outputs = parse_outputs(["0.12", {"*": 0.12}, {"*": 0.2}, "decay:linear:0.2"])
    assert [output.slug for output in outputs[1:3]] == ["per-tensor", "per-tensor-2"]
    assert outputs[0].uniform
    assert not outputs[1].uniform
    assert len({output.slug for output in outputs}) == 4


def test_a_target_alone_is_that_of_every_parameter():
    target = parse_target("0.12")
    assert whole_model(target).choice(NAMES) == (target,) * 4
    assert whole_model(target).slug == target.slug


def test_brackets_and_case_are_those_of_file_names():
    (output,) = parse_outputs({"mlp.[wv]": 0.1, "Norm*": 0.2, "*": 0.05})
    with pytest.raises(TargetError, match=r"pattern 'Norm\*' matches none of 4 parameters, such as attn.q"):
        output.choice(NAMES)


def test_a_parameter_without_a_pattern_is_named_with_the_patterns():
    (output,) = parse_outputs({"attn.*": 0.05, "mlp*": 0.1})
    with pytest.raises(
        TargetError, match=r"parameter norm matches none of the patterns \['attn.\*', 'mlp\*'\]"
    ) as caught:
        output.choice(NAMES)
    assert 'end with "*"' in caught.value.hint


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        ([], "no target"),
        ({}, "the mapping is empty"),
        ([{}], "the mapping is empty"),
        ("0.12", "expected a list, found the text '0.12'"),
        (["0.12", 0.12], "target '0.12' is asked for twice"),
        ([{"*": 0.1}, {"*": "0.1"}], "target 'per-tensor-2' is asked for twice"),
        ({"*": "nonsense"}, "nonsense"),
    ],
)
def test_bad_wishes_are_refused(wanted, text):
    with pytest.raises(TargetError, match=text):
        parse_outputs(wanted)


def test_patterns_are_read_from_json(tmp_path):
    path = tmp_path / "widths.json"
    path.write_text('{"*.attn": 0.05, "*": "0.12"}')
    assert read_patterns(path) == {"*.attn": 0.05, "*": "0.12"}
    for text in ("[1]", "{"):
        path.write_text(text)
        with pytest.raises(TargetError, match=r"widths\.json: "):
            read_patterns(path)
    with pytest.raises(TargetError, match=r"missing\.json: cannot be read"):
        read_patterns(tmp_path / "missing.json")

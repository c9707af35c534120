"""The HTML report: whole in itself, escaped, true to the scores, and its commands rebuild the best."""

from __future__ import annotations

import base64
import json
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from builders import Division, averages_of, new_run, new_session, no_flush, rows_of, store
from commands import run as command
from safetensors.torch import load_file

from sharded_phema import reconstruct
from sharded_phema.errors import ModelMismatch, OutputError
from sharded_phema.report import report_html, write_report
from sharded_phema.scores import Score, Second, append_score
from sharded_phema.tally import tally
from sharded_phema.winner import rebuild_lines, targets_of

EVIL = "<script>alert(1)</script>\"'&"
PARTS = Division(((3, 4), (5,)), (rows_of((3, 4), 3).held[0], rows_of((5,), 5).held[0]))


class Page(HTMLParser):
    """Tags with their attributes, the text outside of them, and the cells of the table."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        here = self._open[-1] if self._open else ""
        self.texts.setdefault(here, []).append(data)
        if here in ("td", "th"):
            self.rows[-1][-1] += data

    @property
    def images(self) -> list[bytes]:
        sources = [attrs["src"] or "" for tag, attrs in self.tags if tag == "img"]
        assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
        return [base64.b64decode(source.partition(",")[2], validate=True) for source in sources]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report") / "a run's folder"
    with no_flush():
        new_run(root, PARTS)
        new_session(root, PARTS)
        for number in range(5):
            store(root, PARTS, averages_of(PARTS, number), t=10.0 * (number + 1), number=number)
    return root


def score(width: float, value: float, **others) -> Score:
    return Score("run", "steps", "m:f", f"{width}", 50.0, value, 2e-3, 1.0, sigma_rel=width, **others)


def texts_of(svg: bytes) -> str:
    """What an SVG says of its texts: letters are paths, and what they spell stands in comments."""
    return " ".join(re.findall(r"<!-- (.*?) -->", svg.decode()))


def test_the_page_asks_for_nothing_and_runs_nothing_whatever_names_say(root) -> None:
    base = json.dumps({EVIL: "0.2", "*": "0.1"})
    evil = {"group": f"{EVIL}*", "base": base, "second": Second(EVIL, 1.0)}
    scores = [replace(score(w, w), unit=EVIL, metric=EVIL, **evil) for w in (0.05, 0.1)]
    html = report_html(tally([replace(one, run=EVIL) for one in scores]))
    page = Page(html)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form", "a", "svg"}
    for tag, attributes in page.tags:
        assert not [key for key in attributes if key.startswith("on") or key in ("href", "action", "background")]
        assert "src" not in attributes or tag == "img"
    assert "http:" not in html and "https:" not in html and "url(" not in html and "@import" not in html
    assert "<script" not in html.lower() and page.texts["h1"][0].endswith(EVIL) and page.texts["title"] == [EVIL]
    (policy,) = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert [cell for cell in page.rows[1] if "<script>" in cell] == [f"{EVIL}*", base]
    for image in page.images:
        tags = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(image).iter()}
        assert "script" not in tags and "image" not in tags


def test_the_table_has_every_average_best_first_with_its_spread_and_forecast() -> None:
    rng = np.random.default_rng(3)
    values = {width: rng.random(3).tolist() for width in (0.03, 0.05, 0.1)}
    scores = [score(w, v, repeat=k) for w, row in values.items() for k, v in enumerate(row)]
    page = Page(report_html(tally(scores, better="higher")))
    head, *rows = page.rows
    assert head == ["target", "steps", "score", "least", "most", "evaluations", "forecast error"]
    order = sorted(values, key=lambda width: -np.mean(values[width]))
    numbers = [(np.mean(values[w]), min(values[w]), max(values[w])) for w in order]
    assert rows == [
        [f"{w}", "50", *(f"{x:.5g}" for x in three), "3", "2.0e-03"] for w, three in zip(order, numbers, strict=True)
    ]
    marked = [attributes.get("class") for tag, attributes in page.tags if tag == "tr"]
    assert marked == [None, "best", None, None]
    assert "9 evaluations of 3 averages; higher is better" in page.texts["p"][0]
    assert "RUN stands for the run folder." in page.texts["p"] and "reconstruct RUN" in page.texts["pre"][0]


def test_there_is_a_figure_of_every_kind_the_scores_are_enough_for_and_of_the_run(root) -> None:
    scores = [score(w, w, second=Second("g", v)) for w in (0.05, 0.1) for v in (1.0, 2.0)]
    alone = tally(scores)
    page = Page(report_html(alone, root))
    names = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert names == ["quality: grid", "quality: length", "profiles", "coefficients", "forecast", "timeline"]
    assert [ElementTree.fromstring(image).tag for image in page.images] == ["{http://www.w3.org/2000/svg}svg"] * 6
    assert "0.05@t=50" in texts_of(page.images[3]) and "5 used" in texts_of(page.images[5])
    assert len(page.texts["figcaption"]) == 6


def test_the_same_scores_give_the_same_file_and_its_command_writes_it(root, tmp_path) -> None:
    file = tmp_path / "scores.jsonl"
    for width in (0.05, 0.1):
        append_score(file, score(width, width))
    for name in ("one.html", "two.html"):
        done = command("plot", "report", file, "--out", tmp_path / name)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()
    done = command("plot", "report", file, "--out", tmp_path / "report.pdf")
    assert done.returncode == 1 and "expected a name that ends in .html" in done.stderr


def test_the_command_on_the_page_rebuilds_the_best(root, tmp_path, monkeypatch) -> None:
    # Oracle: the same target from Python.
    monkeypatch.chdir(tmp_path)
    best = tally([score(0.12, 0.5), score(0.05, 0.9)])
    (line,) = rebuild_lines(best.best, str(root))
    assert line in Page(report_html(best, root)).texts["pre"][0]
    program, *words = shlex.split(line)
    assert program == "sharded-phema" and words[1] == str(root)
    assert command(*words).returncode == 0
    reconstruct(root, ["0.12@t=50"], out=tmp_path / "expected")
    assert same(tmp_path / "best" / "0.12-t-50", tmp_path / "expected" / "0.12-t-50")


def test_the_lines_for_a_group_write_its_patterns_and_rebuild_them(root, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = json.dumps({"layer.1.*": "0.2", "*": "0.1"})
    for number, (others, patterns) in enumerate(
        (("0.1", {"layer.0.*": "0.05@t=50", "*": "0.1@t=50"}),
         (base, {"layer.0.*": "0.05@t=50", "layer.1.*": "0.2@t=50", "*": "0.1@t=50"}))
    ):  # fmt: skip
        best = tally([score(0.05, 0.5, group="layer.0.*", base=others)]).best
        cat, text, end, line = rebuild_lines(best, str(root))
        assert (cat, end, json.loads(text)) == ("cat > best.json <<'END'", "END", patterns)
        assert {target.text for target in targets_of(best)} == set(patterns.values())
        (tmp_path / "best.json").write_text(text)
        words = shlex.split(line)[1:]
        assert command(*words[:-1], f"best{number}").returncode == 0
        reconstruct(root, patterns, out=tmp_path / f"expected{number}")
        assert same(tmp_path / f"best{number}" / "per-tensor", tmp_path / f"expected{number}" / "per-tensor")


def same(a: Path, b: Path) -> bool:
    first, second = (load_file(folder / "model.safetensors") for folder in (a, b))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_scores_of_another_run_and_a_folder_that_cannot_be_written_are_refused(root, tmp_path) -> None:
    other = tally([replace(score(0.1, 1.0), run="other")])
    with pytest.raises(ModelMismatch, match=r"the scores are of run other, and .* holds run run"):
        write_report(other, tmp_path / "r.html", root=root)
    with pytest.raises(OutputError, match="cannot be written"):
        write_report(other, tmp_path / "no" / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_a_name_that_is_no_text_at_all_is_written_as_a_question_mark(tmp_path) -> None:
    write_report(tally([replace(score(0.1, 1.0), metric="a\ud800")]), tmp_path / "r.html")
    assert "<title>a?</title>" in (tmp_path / "r.html").read_text("utf-8")

"""Figures, compared by the data that they draw with what records, plans and files hold."""

from __future__ import annotations

import ast
import itertools
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from builders import averages_of, new_run, new_session, no_flush, rows_of, store
from commands import run as command

from sharded_phema import figures
from sharded_phema.errors import OutputError, StoreError, TargetError
from sharded_phema.figures.canvas import literal
from sharded_phema.figures.curves import LINE
from sharded_phema.figures.sweep import kinds_in
from sharded_phema.per_tensor import whole_model
from sharded_phema.profile import Power
from sharded_phema.recipe import plan_rebuild
from sharded_phema.scores import Score, Second, append_score
from sharded_phema.store import Run, open_run, sessions_of
from sharded_phema.tally import Tally, tally
from sharded_phema.target import parse_target, parse_targets
from sharded_phema.width import gamma_of, sigma_rel_of

DIVISION = rows_of((3, 4), 1, 2)
SPOILT = 60.0


@dataclass(frozen=True)
class Story:
    """A run that was resumed from an earlier state, and lost a snapshot since; and what was stored when."""

    run: Run
    stored: dict[tuple[str, float], dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    root, stored = tmp_path_factory.mktemp("figures") / "ema", {}
    taken = [("s0", 0, 10.0), ("s0", 1, 20.0), ("s0", 2, 30.0), ("s0", 3, 40.0), ("s0", 4, 50.0)]
    taken += [("s1", 0, 40.0), ("s1", 1, 50.0), ("s1", 2, 60.0), ("s1", 3, 70.0), ("s1", 4, 80.0)]
    with no_flush():
        new_run(root, DIVISION)
        new_session(root, DIVISION)
        new_session(root, DIVISION, "s1", "s0", 30.0)
        for session, number, t in taken:
            values = averages_of(DIVISION, 10 * int(t) + number)
            stored[session, t] = {label: arrays[0] for label, arrays in values.items()}
            where = store(root, DIVISION, values, t=t, number=number, session=session)
            if t == SPOILT:
                (Path(where) / "rank-00001.safetensors").write_bytes(b"cut")
        store(root, DIVISION, averages_of(DIVISION, 0), t=90.0, number=5, session="s1", ranks=[0])
    return Story(open_run(root), stored)


def points(line) -> tuple[np.ndarray, np.ndarray]:
    x, y = line.get_data()
    return np.asarray(x, float), np.asarray(y, float)


def labelled(axes) -> dict:
    """Lines by their labels."""
    return {line.get_label(): line for line in axes.lines}


def test_sessions_come_from_the_first_to_the_newest(story) -> None:
    assert [(s.session, s.resumed_at) for s in sessions_of(story.run)] == [("s0", 0.0), ("s1", 30.0)]


def test_coefficients_are_those_of_the_plan_at_the_times_of_their_snapshots(story) -> None:
    targets = parse_targets(["0.12", "window:0.3@t=50"])
    drawn = figures.coefficients(story.run, targets)
    plan = plan_rebuild(story.run, [whole_model(target) for target in targets])
    for k, axes in enumerate(drawn.axes):
        lines = labelled(axes)
        for average, label in enumerate(story.run.record.averages):
            name = rf"$\sigma_\mathrm{{rel}}$ {sigma_rel_of(float(label.partition('=')[2])):.4g}"
            expected = {
                source.snapshot.t: weight
                for source, weight in zip(plan.sources, plan.coefficients[:, k], strict=True)
                if source.average == average and weight
            }
            assert dict(zip(*points(lines[name]), strict=True)) == expected
            stems = axes.collections[average].get_segments()
            assert {tuple(stem[1]) for stem in stems} == set(expected.items()) and all(s[0][1] == 0.0 for s in stems)
        shown = np.concatenate([points(line)[1] for label, line in lines.items() if "rel" in label])
        # What stands still stays what it is; and the noise gain is the sum of what is drawn, without signs.
        assert shown.sum() == pytest.approx(1.0, abs=1e-9)
        title = axes.get_title(loc="left")
        assert title.startswith(f"{targets[k].text}: {len(shown)} averages, sum 1, ")
        assert float(re.search("noise gain ([^,]*)", title)[1]) == pytest.approx(np.abs(shown).sum(), rel=5e-3)
        read = {source.snapshot.t for source, c in zip(plan.sources, plan.coefficients[:, k], strict=True) if c}
        assert set(points(lines["snapshots not read"])[0]) == {10.0, 20.0, 30.0, 40.0, 50.0, 70.0, 80.0} - read
    assert [text.get_text() for text in drawn.legends[0].get_texts()][-1] == "snapshots not read"


def test_a_stored_profile_is_drawn_as_it_is_and_rebuilt_ones_as_their_mixture(story) -> None:
    drawn = figures.profiles(story.run, parse_targets(["0.12", "power:gamma=16@t=40"]))
    stored, rebuilt = drawn.axes
    (exact,) = [p for p in stored.patches if p.get_data().edges[np.nonzero(p.get_data().values)[0].max() + 1] == 40.0
                and p.get_data().values.max() > 0.3]  # fmt: skip
    edges = exact.get_data().edges
    expected = np.diff(Power(16.0, 40.0, 1.0).cumulative(edges)) / np.diff(edges)
    np.testing.assert_allclose(exact.get_data().values, expected, rtol=1e-12, atol=1e-15)
    wanted, found = (patch.get_data() for patch in rebuilt.patches[2:])
    np.testing.assert_allclose(wanted.values, expected, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(found.values, expected, rtol=1e-9, atol=1e-12)


def test_forecasts_at_several_times_are_those_of_single_targets_and_the_tolerance_is_shaded(story) -> None:
    drawn = figures.forecast(story.run, [40.0, 80.0], 0.05)
    (axes,) = drawn.axes
    lines = labelled(axes)
    curves = [points(lines[f"at {t} steps"]) for t in (40, 80)]
    for t, (widths, errors) in zip((40, 80), curves, strict=True):
        for place in (3, 40, 77):
            target = whole_model(parse_target(f"{float(widths[place])!r}@t={t}"))
            single = plan_rebuild(story.run, [target], tolerance="exact").targets[0].fit.forecast
            # Solved in other company: the same least squares to rounding.
            assert errors[place] == pytest.approx(single, rel=1e-6)
    marks = sorted(float(line.get_xdata()[0]) for line in axes.lines if line.get_linestyle() == "--")
    assert marks == pytest.approx(sorted(sigma_rel_of(gamma) for gamma in (6.0, 16.0)))
    assert set(points(lines["tolerance 0.05"])[1]) == {0.05}
    good = curves[0][0][np.maximum(curves[0][1], curves[1][1]) <= 0.05]
    (shade,) = axes.collections
    corners = np.concatenate([path.vertices[:, 0] for path in shade.get_paths()])
    assert good.size and (corners.min(), corners.max()) == pytest.approx((good[0], good[-1]))
    assert f"within 0.05: {good[0]:.2g} to " in axes.get_title()
    with pytest.raises(TargetError, match="lies outside the snapshots"):
        figures.forecast(story.run, [81.0])
    with pytest.raises(TargetError, match="tolerance must be a number above 0"):
        figures.forecast(story.run, tolerance=0.0)


def test_the_timeline_has_every_snapshot_in_its_session_with_its_size_and_norms(story) -> None:
    drawn = figures.timeline(story.run)
    sessions, sizes, norms, gaps = drawn.axes
    found = {label: set(zip(*points(line), strict=True)) for label, line in labelled(sessions).items()}
    living = [("s0", 10.0), ("s0", 20.0), ("s0", 30.0), ("s1", 40.0), ("s1", 50.0), ("s1", 70.0), ("s1", 80.0)]
    assert found == {
        "7 used": {(t, float(session == "s1")) for session, t in living},
        "2 abandoned": {(40.0, 0.0), (50.0, 0.0)},
        "1 damaged": {(SPOILT, 1.0)},
    }
    # Of each session the stretch that counts, then what the next one took the place of.
    bars = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in sessions.patches]
    assert bars == [(1.0, 30.0), (30.0, 50.0), (30.0, 80.0), (80.0, 80.0)]
    assert "1 unfinished" in sessions.get_title()
    assert [tick.get_text() for tick in sessions.get_yticklabels()] == ["1 (2 ranks)", "2 (2 ranks)"]
    for snapshots, label in ((story.run.snapshots, "used"), (story.run.abandoned, "abandoned")):
        expected = {s.t: sum(path.stat().st_size for path in Path(s.where).glob("*.safetensors")) for s in snapshots}
        assert dict(zip(*points(labelled(sizes)[label]), strict=True)) == expected
    values = [story.stored[key] for key in living]
    for line, label in zip(norms.lines, story.run.record.averages, strict=True):
        np.testing.assert_allclose(points(line)[1], [np.linalg.norm(v[label].astype(float)) for v in values], rtol=1e-6)
    for line, pair in zip(gaps.lines, itertools.combinations(story.run.record.averages, 2), strict=True):
        apart = [np.linalg.norm(v[pair[0]].astype(float) - v[pair[1]]) for v in values]
        np.testing.assert_allclose(points(line)[1], apart, rtol=1e-6)


def test_a_run_without_a_snapshot_has_no_timeline(tmp_path) -> None:
    new_run(tmp_path / "ema", DIVISION)
    with pytest.raises(StoreError, match="holds no finished snapshot"):
        figures.timeline(open_run(tmp_path / "ema"))


def score(width: float | None, value: float, *, target: str = "", t: float = 100.0, **others: object) -> Score:
    text = target or parse_target(width or 0.1).text
    return Score("r1", "steps", "fid", text, t, value, 1e-3, 1.0, sigma_rel=width, **others)  # type: ignore[arg-type]


WIDTHS = (0.03, 0.05, 0.1, 0.2)
RNG = np.random.default_rng(7)


def bowl(middle: float) -> dict[float, float]:
    """A score for each width, lowest at one of them, with something that tells one evaluation from another."""
    return {width: 5.0 + np.log(width / middle) ** 2 + 0.01 * RNG.random() for width in WIDTHS}


def curve(line) -> dict[float, float]:
    return dict(zip(*(data.tolist() for data in points(line)), strict=True))


def test_quality_over_length_has_means_a_band_of_repeats_the_others_and_the_best_circled() -> None:
    repeats = [bowl(0.1) for _ in range(3)]
    scores = [score(w, values[w], repeat=k) for k, values in enumerate(repeats) for w in reversed(WIDTHS)]
    scores += [score(None, value, target="window:0.2", repeat=k) for k, value in enumerate((6.0, 8.0))]
    scores += [score(0.1, 1.0, t=50.0)]  # an earlier time is not drawn
    table = np.array([[values[w] for w in WIDTHS] for values in repeats])
    drawn = figures.sweep(tally(scores), "length")
    axes, others = drawn.axes
    assert curve(axes.lines[0]) == pytest.approx(dict(zip(WIDTHS, table.mean(axis=0).tolist(), strict=True)))
    band, ring = axes.collections
    corners = band.get_paths()[0].vertices
    for width, column in zip(WIDTHS, table.T, strict=True):
        there = corners[np.isclose(corners[:, 0], width), 1]
        assert (there.min(), there.max()) == pytest.approx((column.min(), column.max()))
    assert ring.get_offsets().tolist() == [pytest.approx([0.1, table.mean(axis=0).min()])]
    assert points(others.lines[0])[1].tolist() == [7.0]
    (bar,) = others.collections[0].get_segments()
    assert bar[:, 1].tolist() == [6.0, 8.0] and [t.get_text() for t in others.get_xticklabels()] == ["window:0.2"]
    title = axes.get_title(loc="left")
    assert title.startswith("fid at 100 steps\nbest (circled): ") and " for 0.1 (" in title and "edge" not in title
    assert axes.get_ylabel() == "score, lower is better" and axes.get_xscale() == "log"


def test_the_best_may_be_the_highest_at_the_edge_or_without_a_width() -> None:
    scores = [score(w, value) for w, value in bowl(0.03).items()]
    highest = figures.sweep(tally(scores, better="higher")).axes[0]
    assert highest.collections[-1].get_offsets()[0].tolist() == [0.2, pytest.approx(max(s.score for s in scores))]
    assert "at the edge of what was tried" in highest.get_title(loc="left")
    noisy = [score(w, value + repeat, repeat=repeat) for w, value in bowl(0.03).items() for repeat in (0, 1)]
    title = figures.sweep(tally(noisy)).axes[0].get_title(loc="left")
    assert " ".join(title.split()).endswith("in 2 evaluations); at the edge of what was tried")
    assert max(map(len, title.splitlines())) <= LINE  # longer ones would be cut
    best = [*scores, score(None, 9.0, target="uniform"), score(None, 1.0, target="window:0.2")]
    others = figures.sweep(tally(best)).axes[1]
    assert others.collections[-1].get_offsets().tolist() == [[1.0, 1.0]]
    # Scores that differ by large factors are drawn on a logarithmic axis.
    assert figures.sweep(tally([*scores, score(0.28, 500.0)])).axes[0].get_yscale() == "log"


def test_a_second_parameter_is_one_curve_a_value_when_length_is_asked_for() -> None:
    rows = {value: bowl(0.05) for value in (1.0, 2.0)}
    scores = [score(w, s, second=Second("guidance", v)) for v, row in rows.items() for w, s in row.items()]
    (axes,) = figures.sweep(tally(scores), "length").axes
    lines = labelled(axes)
    assert axes.get_legend().get_title().get_text() == "guidance"
    assert {label: curve(line) for label, line in lines.items()} == {f"{v:g}": rows[v] for v in rows}


def test_groups_have_a_curve_each_and_the_base_is_a_line() -> None:
    rows = {"*.attn.*": bowl(0.03), "_mlp$\\x$": bowl(0.2)}
    scores = [score(w, s, group=group, base="0.07") for group, row in rows.items() for w, s in row.items()]
    scores += [score(0.07, 7.5), score(0.07, 99.0, t=50.0)]
    (axes,) = figures.sweep(tally(scores)).axes
    lines = labelled(axes)
    assert curve(lines["*.attn.*"]) == rows["*.attn.*"]
    assert curve(lines[literal("_mlp$\\x$")]) == rows["_mlp$\\x$"]
    assert set(points(lines["all parameters: 0.07"])[1]) == {7.5}
    assert len(axes.get_legend().get_texts()) == 3, "a name with an underscore before it is listed too"
    least = min(s for row in rows.values() for s in row.values())
    assert axes.collections[-1].get_offsets()[0][1] == pytest.approx(least)


def test_over_training_there_is_a_curve_a_time_and_the_course_of_the_best_width() -> None:
    middles = {100.0: 0.2, 50.0: 0.1, 25.0: 0.05}
    rows = {t: bowl(middle) for t, middle in middles.items()}
    drawn = figures.sweep(tally([score(w, s, t=t) for t in rows for w, s in rows[t].items()]))
    curves, course = drawn.axes
    assert {label: curve(line) for label, line in labelled(curves).items()} == {f"{t:g}": rows[t] for t in rows}
    assert curve(course.lines[0]) == middles
    assert [ring.get_offsets()[0][0] for ring in curves.collections] == [0.05, 0.1, 0.2]
    least = {t: min(row.values()) for t, row in rows.items()}
    assert f" at {min(least, key=least.__getitem__):g} steps" in drawn.get_suptitle()


def test_a_grid_has_every_score_in_its_cell_and_the_best_width_of_every_row() -> None:
    middles = {1.0: 0.05, 1.5: 0.1, 4.0: 0.2}
    rows = {value: bowl(middle) for value, middle in middles.items()}
    scores = [score(w, s, second=Second("guidance", v)) for v, row in rows.items() for w, s in row.items()]
    missing = scores.pop(0)
    axes, bar = figures.sweep(tally(scores)).axes
    mesh, ring = axes.collections
    table = np.array([[rows[v][w] for w in WIDTHS] for v in middles])
    cells = mesh.get_array().reshape(table.shape)
    assert cells.mask.sum() == 1 and cells.mask[0, 0] and missing.sigma_rel == 0.03
    np.testing.assert_array_equal(cells.compressed(), table[~cells.mask])
    corners = mesh.get_coordinates()
    for row, value in enumerate(middles):
        assert corners[row, 0, 1] < value < corners[row + 1, 0, 1]
    for column, width in enumerate(WIDTHS):
        assert corners[0, column, 0] < width < corners[0, column + 1, 0]
    assert points(axes.lines[0])[0].tolist() == list(middles.values())
    assert points(axes.lines[0])[1].tolist() == list(middles)
    assert table.flat[np.argmin(table)] == min(s.score for s in scores)
    assert ring.get_offsets()[0].tolist() == [list(middles.values())[np.argmin(table.min(axis=1))],
                                              list(middles)[np.argmin(table.min(axis=1))]]  # fmt: skip
    assert bar.get_ylabel() == "score, lower is better" and axes.get_ylabel() == "guidance"


def test_a_sparse_grid_as_a_search_leaves_it_is_drawn_as_points() -> None:
    tried = {1.0: (0.05, 0.06, 0.07), 10.0: (0.08, 0.09), 100.0: (0.11, 0.12)}
    scores = [score(w, 1.0 + w * v, second=Second("guidance", v)) for v, widths in tried.items() for w in widths]
    axes = figures.sweep(tally(scores), "grid").axes[0]
    cloud = axes.collections[0]
    found = {tuple(place): value for place, value in zip(cloud.get_offsets().tolist(), cloud.get_array(), strict=True)}
    assert found == {(s.sigma_rel, s.second.value): s.score for s in scores}
    assert axes.get_yscale() == "log", "values that differ by large factors"


def test_auto_takes_the_most_particular_and_what_is_missing_is_said() -> None:
    plain = [score(w, 1.0) for w in WIDTHS]
    grid = [score(w, 1.0, second=Second("g", v)) for w in WIDTHS for v in (1.0, 2.0)]
    group = [score(w, 1.0, group="a", base="0.1") for w in WIDTHS]
    times = [score(w, 1.0, t=50.0) for w in WIDTHS]
    assert kinds_in(tally(plain)) == ("length",)
    assert kinds_in(tally(plain + times)) == ("time", "length")
    assert kinds_in(tally(grid)) == ("grid", "length")
    assert kinds_in(tally(plain + group + grid + times)) == ("group", "grid", "time", "length")
    with pytest.raises(StoreError, match="a figure of kind grid needs scores of widths at two or more values") as error:
        figures.sweep(tally(plain), "grid")
    assert error.value.hint == "these scores are enough for: length"
    with pytest.raises(StoreError, match="no scores"):
        tally([])
    other = Score("r2", "steps", "fid", "0.1", 1.0, 1.0, 0.0, 0.0)
    with pytest.raises(StoreError, match="expected one run, found 2: 'r1', 'r2'"):
        tally([*plain, other])
    with pytest.raises(StoreError, match="expected one second parameter, found 2: 'g', 'h'"):
        tally([*grid, score(0.1, 1.0, second=Second("h", 1.0))])


def test_no_name_breaks_a_figure(tmp_path) -> None:
    texts = ["$\\nonsense{$", "a$b", "_hidden", "<script>&", "two\nlines\x00\ud800", "x" * 300]
    title = "".join(texts)
    scores = [
        Score(title, title, title, "0.1", 9.0, float(k), 0.0, 0.0, w, text, text, Second(title, 1.0))
        for k, text in enumerate(texts)
        for w in WIDTHS
    ]
    drawn = figures.sweep(tally(scores))
    figures.save(drawn, tmp_path / "p.png")
    assert [text.get_text() for text in drawn.axes[0].get_legend().get_texts()] == [literal(t, 34) for t in texts]
    assert all(len(literal(text)) <= 52 and literal(text).isprintable() for text in [title, *texts])
    assert figures.svg_bytes(drawn) == figures.svg_bytes(drawn)


def test_every_figure_is_drawn_by_its_command(story, tmp_path) -> None:
    file = tmp_path / "scores.jsonl"
    with no_flush():
        for width, value in bowl(0.1).items():
            append_score(file, score(width, value))
    file.write_bytes(file.read_bytes() + b'{"version": 1, "half')
    root = story.run.root.url
    kinds = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}
    for words in (
        ("coefficients", root, "0.12", "0.05", "--tolerance", "1e-1", "--out", "c.pdf"),
        ("timeline", root, "--out", "t.svg"),
        ("forecast", root, "--time", 40, "--time", 80, "--tolerance", "1e-2", "--out", "f.PNG"),
        ("sweep", file, "--kind", "length", "--better", "higher", "--out", "s.png"),
    ):
        done = command("plot", *words[:-1], tmp_path / str(words[-1]))
        assert (done.returncode, done.stderr) == (0, ""), words
        out = tmp_path / str(words[-1])
        assert out.read_bytes().startswith(kinds[out.suffix.lower()])
    for words, error in (
        (("sweep", file, "--kind", "time", "--out", tmp_path / "x.png"), "two or more training times"),
        (("sweep", tmp_path / "none", "--out", tmp_path / "x.png"), "cannot be read"),
        (("timeline", root, "--out", tmp_path / "x.docx"), "expected a name that ends in one of .png"),
        (("timeline", root, "--out", tmp_path / "no" / "x.png"), "cannot be written"),
    ):
        done = command("plot", *words)
        assert done.returncode == 1 and error in done.stderr and "hint: " in done.stderr, words
    for name in ("profiles", "forecast", "coefficients", "timeline", "sweep", "report"):
        assert f"Example: sharded-phema plot {name} " in command("plot", name, "--help").stdout
    assert command("plot", "coefficients", root, "0.12", "--tolerance", "few", "--out", "x.png").returncode == 2


def test_without_matplotlib_the_mend_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(OutputError, match="drawing needs matplotlib") as error:
        figures.sweep(tally([score(0.1, 1.0)]))
    assert error.value.hint == "pip install 'sharded-phema[plot]'"


def test_matplotlib_is_imported_only_where_something_is_drawn_and_never_its_global_state() -> None:
    package = Path(figures.__file__).parents[1]
    for path in [*package.glob("figures/*.py"), *package.glob("*plot.py"), package / "report.py"]:
        tree = ast.parse(path.read_text())
        at_import = {id(node) for node in tree.body}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
                assert "pyplot" not in " ".join(names), path
                assert id(node) not in at_import or "matplotlib" not in " ".join(names), path


def test_a_tally_keeps_the_order_and_adds_up_what_is_alike() -> None:
    found: Tally = tally([score(0.1, 3.0), score(0.05, 2.0), score(0.1, 5.0, repeat=1)])
    assert [(e.first.target, e.values, e.mean, e.least, e.most) for e in found.entries] == [
        ("0.1", (3.0, 5.0), 4.0, 3.0, 5.0),
        ("0.05", (2.0,), 2.0, 2.0, 2.0),
    ]
    assert found.best.first.target == "0.05" and gamma_of(0.1) > 0

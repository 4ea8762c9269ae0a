"""The frame of the claims: runs are kept, nothing runs twice, verdicts are recorded."""

import json
import pathlib

import numpy as np
import pytest
from matplotlib.figure import Figure

from benchmarks import __main__ as command
from benchmarks import _claims
from benchmarks._claims import Verdict
from benchmarks.claims import _figures, _frame, _networks
from tests import pictures

RESULTS = pathlib.Path(command.__file__).parent / "results"


def make_claim(calls, fail_at=None):
    def run(settings):
        if settings["seed"] == fail_at:
            raise KeyboardInterrupt
        calls.append(settings["seed"])
        return {"value": 10.0 * settings["seed"]}

    return _claims.Claim(
        name="made_up",
        paper="Nobody 1900",
        statement="more is more",
        printed="nothing",
        settings=lambda preset: [{"seed": seed} for seed in range(4)],
        run=run,
        judge=lambda records: [Verdict("reproduced", f"{len(records)} runs")],
        draw=draw,
    )


def draw(records, figure):
    figure.subplots().plot(_claims.numbers(records, "value"), label="a line")
    return "One line."


def test_runs_are_kept_and_go_on_where_they_stopped(tmp_path):
    path, calls, seen = tmp_path / "runs.jsonl", [], []
    with pytest.raises(KeyboardInterrupt):
        _claims.collect(make_claim(calls, fail_at=2), "cpu", path, lambda *done: None)
    with path.open("a") as file:
        file.write('{"key": "cut o')  # killed while it wrote
    records = _claims.collect(make_claim(calls), "cpu", path, lambda *done: seen.append(done))
    assert calls == [0, 1, 2, 3]
    assert records == [{"seed": seed, "value": 10.0 * seed} for seed in range(4)]
    assert seen[-1] == (4, 4)
    # Another preset is other runs.
    _claims.collect(make_claim(calls), "smoke", path, lambda *done: None)
    assert calls[4:] == [0, 1, 2, 3]


def test_the_verdict_is_recorded_and_drawn(tmp_path):
    claim = make_claim([])
    records = _claims.collect(claim, "cpu", tmp_path / "runs.jsonl", lambda *done: None)
    entry = _claims.conclude(claim, "cpu", records, tmp_path)
    assert entry["verdicts"] == [{"verdict": "reproduced", "evidence": "4 runs"}]
    assert (tmp_path / "claim_made_up.png").stat().st_size > 1000
    entries = json.loads((tmp_path / "claims.json").read_text())
    assert entries["made_up"] == entry


def test_redraw_writes_the_figure_of_recorded_runs_and_runs_nothing(tmp_path, monkeypatch, capsys):
    arguments = ["claims", "--redraw", "--only", "made_up", "--out", str(tmp_path)]
    never = make_claim([], fail_at=0)
    monkeypatch.setattr(_claims, "find_claims", lambda: {"made_up": never})
    path = tmp_path / "claims_runs.jsonl"
    with pytest.raises(KeyboardInterrupt):
        _claims.collect(make_claim([], fail_at=3), "cpu", path, lambda *done: None)
    # Verdicts on a part of the runs would take the place of those on all.
    assert command.main(arguments) == 2
    assert "has 3 of the 4 runs of made_up; without --redraw" in capsys.readouterr().err
    assert not (tmp_path / "claims.json").exists()
    _claims.collect(make_claim([]), "cpu", path, lambda *done: None)
    assert command.main(arguments) == 0
    assert (tmp_path / "claim_made_up.png").stat().st_size > 1000
    path = tmp_path / "claims.json"
    entries = json.loads(path.read_text())
    assert entries["made_up"]["runs"] == 4
    # The date is that of the runs, not of the drawing.
    entries["made_up"]["date"] = "2000-01-01"
    path.write_text(json.dumps(entries))
    assert command.main(arguments) == 0
    assert json.loads(path.read_text()) == entries


def test_parts_of_a_claim_have_a_mark_for_each_data_set():
    verdicts = [
        "reproduced (digits, relu): it is fast",
        "not reproduced, only at p = 0.5 (fashion_mnist, relu): it is fast",
        "not testable at this size: 500 layers",
        "reproduced (perceptron)",
        "reported (digits): a bound (N >= 3)",
        "reproduced (fashion_mnist)",
    ]
    assert _frame.parts([{"verdict": verdict, "evidence": ""} for verdict in verdicts]) == {
        "relu: it is fast": {"digits": "reproduced", "fashion_mnist": "not reproduced"},
        "500 layers": {"": "not testable at this size"},
        "perceptron": {"digits": "reproduced"},
        "a bound (N >= 3)": {"digits": "reported"},
        "as claimed": {"fashion_mnist": "reproduced"},
    }


def test_every_recorded_verdict_has_its_mark_in_a_small_figure():
    entries = json.loads((RESULTS / "claims.json").read_text())
    assert set(entries) == set(_claims.find_claims())
    for name, entry in entries.items():
        marks = sum(map(len, _frame.parts(entry["verdicts"]).values()))
        assert marks == len(entry["verdicts"]), name
        assert (RESULTS / f"claim_{name}.png").stat().st_size < 150_000


def test_what_stands_around_the_panels_is_inside_the_figure_and_off_the_panels(tmp_path):
    figure = Figure(figsize=(_frame.WIDTH, 2.2), dpi=100, layout="constrained")
    for axes in figure.subplots(1, 2):
        for i in range(7):
            axes.plot([0, 1], [0, i], label=f"a line with a rather long name, number {i}")
    claim = "a claim in many words " * 6
    text = "a part of the claim in many words " * 5
    verdicts = [
        {"verdict": f"reproduced ({data}): {text}", "evidence": ""}
        for data in ("digits", "fashion_mnist")
    ]
    note = "What points and bars are. " * 8
    _frame.save(figure, tmp_path / "f.png", claim=claim, verdicts=verdicts, note=note)
    assert len(figure.legends[0].get_texts()) == 7  # each label once
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    around = [text.get_window_extent() for text in figure.texts]
    around.append(figure.legends[0].get_window_extent())
    for box in around:
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y0 >= 0
        assert box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes)
    sizes = [text.get_fontsize() for text in (*figure.texts, *figure.legends[0].get_texts())]
    assert min(sizes) >= 7


def test_lines_that_share_a_setting_stand_side_by_side_at_their_values():
    records = [
        {"rate": rate, "seed": seed, "accuracy": rate + seed}
        for rate in (0.1, 1.0)
        for seed in (0, 1)
    ]
    axes = Figure().subplots()
    for i in range(2):
        _figures.sweep(axes, records, "rate", "accuracy", values=(0.1, 1.0), index=i, of=2)
    places, heights = zip(*(line[0].get_data(orig=False) for line in axes.containers), strict=True)
    assert np.all(places[1] - places[0] > 0.1)
    assert np.all(np.abs(places) < 1.3)
    np.testing.assert_allclose(heights[0], [0.6, 1.5])
    np.testing.assert_allclose(heights[0], heights[1])
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0.1", "1"]


def test_selections_and_errors():
    records = [{"a": a, "b": b, "v": a + b} for a in (0, 1) for b in (0.0, 2.0)]
    assert _claims.select(records, a=1, b=2.0) == [{"a": 1, "b": 2.0, "v": 3.0}]
    mean, error = _claims.mean_and_error(_claims.numbers(_claims.select(records, a=0), "v"))
    assert mean == 1
    assert error == pytest.approx(np.sqrt(2) / np.sqrt(2))


# Each seed of influence trains a network anew without each of forty examples.
FEWER_SEEDS = {"influence": {"digits": 3}}


def test_every_claim_says_what_it_is_and_has_enough_seeds():
    for name, claim in _claims.find_claims().items():
        assert name == claim.name
        settings = claim.settings("cpu")
        # Our own promises have no data: a thousand matrices, or ten spectra, instead.
        num_matrices = sum(s["matrices"] for s in settings if "matrices" in s) * 10
        num_spectra = len({s["spectrum"] for s in settings if "spectrum" in s})
        no_data = num_matrices >= 1000 or num_spectra >= 10
        for data, least in FEWER_SEEDS.get(name, {"digits": 5, "fashion_mnist": 3}).items():
            assert no_data or len({s["seed"] for s in settings if s["data"] == data}) >= least
        keys = [json.dumps(dict(s), sort_keys=True) for s in settings]
        assert len(set(keys)) == len(keys)


def test_the_parts_of_the_digits_are_disjoint_and_fixed():
    split = _networks.digits()
    assert (len(split.y), len(split.y_test)) == (300, 1497)
    assert float(split.x.max()) == 1
    training = {bytes(np.asarray(row)) for row in split.x}
    assert len(training & {bytes(np.asarray(row)) for row in split.x_test}) <= 1


def recorded(name):
    """A claim with its recorded runs and the entry that follows from them."""
    entry = json.loads((RESULTS / "claims.json").read_text())[name]
    claim = _claims.find_claims()[name]
    records, wanted = _claims.kept(claim, entry["preset"], RESULTS / "claims_runs.jsonl")
    assert len(records) == wanted == entry["runs"]
    return claim, records, entry


# What is judged and drawn in a second or two; `python -m benchmarks claims --redraw` does all.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["batch_entropy", "group_norm_plus", "influence", "noise_scale"])
def test_verdicts_and_figures_are_those_of_the_recorded_runs(name, tmp_path):
    claim, records, entry = recorded(name)
    verdicts = [verdict._asdict() for verdict in claim.judge(records)]
    assert verdicts == entry["verdicts"]
    _claims.draw(claim, records, verdicts, tmp_path / "now.png")
    then = (RESULTS / f"claim_{name}.png").read_bytes()
    assert pictures.difference(then, (tmp_path / "now.png").read_bytes()) == ""

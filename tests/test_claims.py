"""The frame of the claims: runs are kept, nothing runs twice, verdicts are recorded."""

import json

import numpy as np
import pytest

from benchmarks import _claims
from benchmarks._claims import Verdict
from benchmarks.claims import _networks


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
        draw=lambda records, figure: figure.subplots().plot(_claims.numbers(records, "value")),
    )


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

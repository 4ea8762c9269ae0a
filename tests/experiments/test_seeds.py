"""Several seeds of each network: what is run, and what is said of the spread."""

import dataclasses
import json
import re

import numpy as np
import pytest

from regjax.__main__ import main
from regjax.experiments import (
    SpectrumSettings,
    TrainSettings,
    UsageError,
    _compare,
    _report,
    _seeds,
    _table,
    run_compare,
    run_train,
)
from tests.experiments.test_training import SMALL, silent

pytestmark = pytest.mark.usefixtures("small_data", "standard_promotion")


def record_of(seed, loss, eigenvalue=None, converged=True):
    names = ("train_loss", "test_loss", "train_accuracy", "test_accuracy")
    numbers = dict.fromkeys((*names, "loss_gap", "accuracy_gap"), 0.5)
    record = {
        "settings": {"seed": seed},
        "generalization": {**numbers, "test_loss": loss},
        "training": {"failure": None},
    }
    if eigenvalue is not None:
        values = {"values": [eigenvalue], "residual_norms": [0.1], "converged": [converged]}
        estimate = {"value": 1.0, "standard_error": 0.1}
        density = {"trace": estimate, "effective_dimension": estimate}
        record["blocks"] = {"network": {"eigenvalues": values, "density": density}}
    return record


def shown(records):
    return _table.text(_seeds.seeds_contents(records))


def row(text, name):
    """The numbers in a row, in pairs of value and error."""
    line = next(line for line in text.splitlines() if line.strip().startswith(name))
    return [tuple(map(float, pair)) for pair in re.findall(r"(\S+) ± (\S+)", line)]


def test_mean_deviation_and_paired_difference_are_numpys():
    """The differences are taken seed by seed: here they are far smaller than the spread."""
    random = np.random.default_rng(0)
    first = 1 + random.random(6)
    second = first + 0.01 * random.random(6) - 0.1
    losses = {"sgd": first, "sam": second}
    records = {
        item: [record_of(3 + i, loss) for i, loss in enumerate(values)]
        for item, values in losses.items()
    }
    text = shown(records)
    (mean, deviation), (other_mean, _) = row(text, "test loss")
    assert mean == pytest.approx(first.mean(), abs=0.05 * first.std())
    assert other_mean == pytest.approx(second.mean(), abs=0.05 * second.std())
    assert deviation == pytest.approx(first.std(ddof=1), rel=0.05)
    difference = second - first
    ((found, error),) = row(text[text.index("difference to sgd") :], "test loss")
    assert found == pytest.approx(difference.mean(), abs=0.1 * difference.std())
    assert error == pytest.approx(difference.std(ddof=1) / np.sqrt(6), rel=0.05)
    assert "over 6 seeds, 3 to 8" in text
    assert "trace" not in text


def test_what_is_not_known_of_one_seed_is_not_known_of_all():
    records = {
        "a": [record_of(0, 1.0, 2.0), record_of(1, 2.0, 3.0)],
        "b": [record_of(0, None, 2.0), record_of(1, 2.0, 3.0, converged=False)],
    }
    text = shown(records)
    for name in ("test loss", "largest eigenvalue"):
        lines = [line for line in text.splitlines() if line.strip().startswith(name)]
        assert [line.count("not known") for line in lines] == [1, 1]
    failed = record_of(1, 2.0)
    failed["training"]["failure"] = "The loss is that of a guess."
    text = shown({"a": [record_of(0, 1.0), failed]})
    assert "a, seed 1: The loss is that of a guess." in text
    assert "difference" not in text


def test_each_seed_is_the_run_of_that_seed_in_a_folder_of_its_own(tmp_path):
    settings = TrainSettings(**SMALL, compare=("sgd", "adam"), seeds=2, seed=3, out=tmp_path)
    records = run_compare(settings, silent)
    for item, of in records.items():
        assert [record["settings"]["seed"] for record in of] == [3, 4]
        for record in of:
            seed = record["settings"]["seed"]
            assert (tmp_path / item / f"seed_{seed}" / "checkpoint.npz").exists()
    single = TrainSettings(**SMALL, optimizer="adam", seed=4, out=tmp_path / "single")
    assert (
        run_train(single, silent)["training"]["losses"]
        == (records["adam"][1]["training"]["losses"])
    )
    on_disk = json.loads((tmp_path / "train_compare.json").read_text())
    assert {item: len(of) for item, of in on_disk.items()} == {"sgd": 2, "adam": 2}
    assert sorted(path.name for path in tmp_path.glob("*.*")) == [
        "report.html",
        "train_compare.json",
    ]
    # One seed more goes on from there; fewer items would lose some.
    again = run_compare(dataclasses.replace(settings, seeds=3, resume=True), silent)
    assert again["sgd"][0]["training"]["losses"] == records["sgd"][0]["training"]["losses"]
    assert len(again["sgd"]) == 3
    with pytest.raises(UsageError, match=r"train_compare\.json must stay"):
        run_compare(dataclasses.replace(settings, compare=("sgd",)), silent)


def test_seeds_of_what_is_trained_alike_share_their_networks(tmp_path):
    settings = SpectrumSettings(compare=("hessian", "gauss_newton"), seeds=2, out=tmp_path)
    items = _compare.compared_settings(settings)
    hessian, other = (_compare.seeded(items[item], settings) for item in settings.compare)
    assert [own.checkpoint for own in hessian] == [None, None]
    assert [own.checkpoint for own in other] == [own.out / "checkpoint.npz" for own in hessian]
    assert [own.seed for own in other] == [0, 1]


def test_one_network_with_several_seeds_needs_no_comparison(tmp_path, capsys):
    words = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    assert main(["train", *words, "--seeds", "2", "--out", str(tmp_path)]) in (0, 1)
    out = capsys.readouterr().out
    assert "standard deviation over 2 seeds, 0 to 1" in out
    assert "test accuracy, %" in out
    assert (tmp_path / "sgd" / "seed_1" / "checkpoint.npz").exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--seeds", "1001"], "--seeds must be at most 1000, got 1001"),
        (["--seeds", "2", "--seed", str(2**32 - 1)], "--seed must be at most 4294967295"),
        (["--seeds", "2", "--compare", "seeds=3"], "--compare must name options, got 'seeds'"),
    ],
)
def test_seeds_that_cannot_be(options, text, tmp_path, capsys):
    assert main(["train", *options, "--out", str(tmp_path / "none")]) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_tables_of_one_seed_say_so():
    records = {item: record_of(0, 1.0) for item in ("sgd", "sam")}
    for record in records.values():
        record["num_parameters"] = 3
        record["settings"] |= {"normalization": "none"}
    assert "All of this is one seed" in _table.text(_report.comparison_contents(records))

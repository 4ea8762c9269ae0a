"""A probe is known by the weights that it is of."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from regjax import CheckpointError
from regjax.experiments import (
    LandscapeSettings,
    UsageError,
    _analysis,
    _inputs,
    _network,
    _probes,
    _training,
    train,
)
from tests.experiments.test_training import make_dataset


@pytest.fixture(autouse=True)
def _promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


def make_settings(folder, **options):
    small = {"width": 2, "depth": 1, "batch_size": 5, "epochs": 2, "probe_points": 2}
    return LandscapeSettings(**{**small, "out": folder, "checkpoint_seconds": 0, **options})


def probed(settings, dataset=None):
    """The probes of a run, written as a landscape does."""
    dataset = make_dataset() if dataset is None else dataset
    path = settings.out / "landscape.json"
    probes = _probes.Probes(path, settings.out / "checkpoint.npz", settings)
    scaling = _inputs.measure_scaling(dataset, "float32")

    def look(epochs, model):
        probes.look(epochs, _analysis.Subject(model, dataset, scaling))
        path.write_text(json.dumps({"probes": probes.records()}))

    settings.out.mkdir(exist_ok=True)
    train(settings, dataset, path=settings.out / "checkpoint.npz", look=look)
    return probes.records()


def resumed(settings, **options):
    return dataclasses.replace(settings, resume=True, **options)


def test_probes_of_another_run_in_the_folder_are_not_taken(tmp_path):
    """Whatever made the weights differ: options, data, or the probe's own options."""
    mine, other = make_settings(tmp_path / "mine"), make_settings(tmp_path / "other", seed=1)
    whole = probed(mine)
    assert [probe["epochs"] for probe in whole] == [0, 1, 2]
    theirs = probed(other)
    assert theirs[1]["losses"] != whole[1]["losses"]
    for name, probes in (
        ("another run", theirs),
        ("both runs, mixed", [theirs[0], whole[1], theirs[2], whole[2]]),
        ("other data", [{**probe, "data_sha256": "0" * 63 + "9"} for probe in whole]),
        ("other weights", [{**probe, "weights_sha256": "0" * 64} for probe in whole]),
        ("other steps", [{**probe, "learning_rates": [1.0, 2.0]} for probe in whole]),
        ("another number of examples", [{**probe, "num_examples": 6} for probe in whole]),
    ):
        wrong = [{**probe, "losses": [9.0, 9.0]} for probe in probes if probe not in whole]
        right = [probe for probe in probes if probe in whole]
        (mine.out / "landscape.json").write_text(json.dumps({"probes": [*wrong, *right]}))
        found = probed(resumed(mine))
        # Of epochs that are over the weights are gone; the one at hand is probed again.
        epochs = sorted({2, *(probe["epochs"] for probe in right)})
        assert found == [whole[i] for i in epochs], name


def test_a_probe_that_an_interruption_has_cost_is_made(tmp_path):
    settings = make_settings(tmp_path / "run")
    whole = probed(settings)
    (settings.out / "landscape.json").write_text(json.dumps({"probes": whole[:2]}))
    assert probed(resumed(settings)) == whole
    (settings.out / "landscape.json").unlink()
    assert probed(resumed(settings)) == whole[2:]
    longer = probed(resumed(settings, epochs=3))
    assert longer[:1] == whole[2:]
    assert [probe["epochs"] for probe in longer] == [2, 3]


def test_probes_before_the_checkpoint_may_be_newer_than_it(tmp_path):
    """The checkpoint is of epoch 1, the probes of 0 to 2: the last is of weights to come."""
    settings = make_settings(tmp_path / "run", epochs=1)
    probed(settings)
    early = tmp_path / "early.npz"
    shutil.copy(settings.out / "checkpoint.npz", early)
    longer = resumed(settings, epochs=2)
    whole = probed(longer)
    # Its options are those of the run: two epochs are asked for once more.
    shutil.copy(early, settings.out / "checkpoint.npz")
    computed, probe = [], _probes._probe
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_probes, "_probe", lambda *args: computed.append(1) or probe(*args))
        assert probed(longer) == whole
    assert computed == []


@pytest.mark.parametrize(
    "text",
    [
        '{"probes": 1}',
        '{"probes": [1]}',
        '{"probes": [{"epochs": 0}]}',
        '{"probes": [{"learning_rates": 1, "losses": [1]}]}',
    ],
)
def test_probes_that_are_none_are_refused(text, tmp_path):
    settings = make_settings(tmp_path)
    train(settings, make_dataset(), path=tmp_path / "checkpoint.npz")
    (tmp_path / "landscape.json").write_text(text)
    with pytest.raises(UsageError, match="must have the probes of a landscape"):
        probed(resumed(settings))
    (tmp_path / "landscape.json").write_text(text[:-1])
    with pytest.raises(CheckpointError, match="a whole record"):
        probed(resumed(settings))


def test_the_hash_of_weights_is_of_all_of_them():
    settings = make_settings(None, normalization="batch")
    model = _network.build_model(settings, make_dataset())
    first = _training.weights_sha256(model)
    assert first == _training.weights_sha256(model)
    for name in ("params", "state"):
        leaves, treedef = jax.tree.flatten(getattr(model, name))
        for i, leaf in enumerate(leaves):
            array = np.array(leaf)
            array.ravel()[-1] = np.nextafter(array.ravel()[-1], 2)
            changed = jax.tree.unflatten(treedef, [*leaves[:i], array, *leaves[i + 1 :]])
            assert _training.weights_sha256(model._replace(**{name: changed})) != first

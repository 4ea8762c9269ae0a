import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import regjax
from regjax.experiments import (
    LandscapeSettings,
    UsageError,
    _network,
    _probes,
    _report,
    _table,
    _training,
    run_compare,
    run_landscape,
)
from tests import oracles
from tests.experiments.test_training import make_dataset, silent

pytestmark = pytest.mark.usefixtures("small_data", "standard_promotion")


def make_settings(tmp_path, **options):
    small = {"width": 2, "depth": 1, "batch_size": 5, "epochs": 2, "points": 3, "probe_points": 2}
    return LandscapeSettings(**{**small, "out": tmp_path / "run", **options})


def loss_of(settings, epochs):
    """The loss of the finished run on its first training images, and its parameters."""
    dataset = make_dataset()
    model = _network.build_model(settings, dataset)
    if epochs:
        state, _ = _training.restore(settings.out / "checkpoint.npz", settings, dataset, model)
        model = model._replace(params=state.weights.params)
    images = dataset.train_inputs / 255
    inputs = jnp.asarray((images - images.mean()) / images.std(), jnp.float32)
    function = regjax.model_function(model)

    def loss(params, count):
        targets = jnp.asarray(dataset.train_targets[:count])
        return oracles.cross_entropy(function(params, inputs[:count]), targets)

    return loss, model.params


def test_the_record_holds_the_surface_and_a_probe_for_each_epoch(tmp_path):
    settings, stages = make_settings(tmp_path), []
    record = run_landscape(settings, lambda *stage: stages.append(stage))
    loss, params = loss_of(settings, 2)
    surface, losses = record["surface"], np.asarray(record["surface"]["losses"])
    assert surface["positions"] == [-1, 0, 1]
    assert losses.shape == (3, 3)
    np.testing.assert_allclose(losses[1, 1], loss(params, 23), rtol=1e-5)
    assert len({round(value, 6) for value in losses.ravel()}) == 9
    assert stages[-1] == ("surface", 3, 3)
    assert [probe["epochs"] for probe in record["probes"]] == [0, 1, 2]
    for probe, epochs in ((record["probes"][0], 0), (record["probes"][2], 2)):
        loss, params = loss_of(settings, epochs)
        step = probe["learning_rates"][1]
        assert step == pytest.approx(4 * 0.05)
        gradient = jax.grad(loss)(params, 5)
        moved = jax.tree.map(lambda w, g, step=step: w - step * g, params, gradient)
        assert probe["losses"][1] == pytest.approx(float(loss(moved, 5)), rel=1e-5)
    on_disk = json.loads((settings.out / "landscape.json").read_text())
    assert on_disk["surface"]["losses"] == surface["losses"]
    for name in ("surface.png", "probes.png"):
        assert (settings.out / name).stat().st_size > 10_000
    text = _table.text(_report.landscape_contents(record))
    assert "3 x 3 points" in text
    assert "width of {loss < e x minimum}, direction 1" in text


def test_a_checkpoint_is_probed_as_it_is_and_gives_the_same_surface(tmp_path):
    settings = make_settings(tmp_path, probe_examples=7, surface_examples=9, chunk_size=4)
    record = run_landscape(settings, silent)
    again = run_landscape(
        dataclasses.replace(settings, checkpoint=settings.out, out=tmp_path / "again"), silent
    )
    assert [probe["epochs"] for probe in again["probes"]] == [2]
    assert again["probes"][0] == record["probes"][2]
    np.testing.assert_allclose(again["surface"]["losses"], record["surface"]["losses"], rtol=1e-6)
    whole = run_landscape(dataclasses.replace(settings, chunk_size=50, overwrite=True), silent)
    np.testing.assert_allclose(whole["surface"]["losses"], record["surface"]["losses"], rtol=1e-5)


def test_what_was_computed_before_an_interruption_stays(tmp_path, monkeypatch):
    def interrupt(stage, done, total):
        if stage == "surface" and done == 2:
            raise KeyboardInterrupt

    settings = make_settings(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_landscape(settings, interrupt)
    on_disk = json.loads((settings.out / "landscape.json").read_text())
    assert len(on_disk["surface"]["losses"]) == 2
    # One more epoch: the probes of those before are read, not computed again.
    longer = dataclasses.replace(settings, resume=True, epochs=3)
    computed, probe = [], _probes._probe
    monkeypatch.setattr(_probes, "_probe", lambda *args: computed.append(1) or probe(*args))
    record = run_landscape(longer, silent)
    assert [probe["epochs"] for probe in record["probes"]] == [0, 1, 2, 3]
    assert record["probes"][:3] == on_disk["probes"]
    assert len(computed) == 1
    # Probes of another kind do not mix with them.
    other = dataclasses.replace(longer, probe_points=3, epochs=4, overwrite=True)
    other = run_landscape(other, silent)
    # The epoch that the run begins with is probed as well.
    assert [(p["epochs"], len(p["losses"])) for p in other["probes"]] == [(3, 3), (4, 3)]


def test_settings_side_by_side(tmp_path):
    settings = make_settings(tmp_path, compare=("none", "batch"), epochs=1)
    records = {item: record for item, (record,) in run_compare(settings, silent).items()}
    assert list(records) == ["none", "batch"]
    for name in (".json", ".png", "_probes.png"):
        assert (settings.out / f"landscape_compare{name}").exists()
    text = _table.text(_report.comparison_contents(records))
    assert "effective smoothness" in text
    assert "All of this is one seed" in text
    assert "trace" not in text


def test_bad_options(tmp_path):
    with pytest.raises(UsageError, match="--points must be odd, got 4"):
        run_landscape(make_settings(tmp_path, points=4), silent)
    with pytest.raises(UsageError, match="--span must be above 0, got 0"):
        run_landscape(make_settings(tmp_path, span=0.0), silent)
    with pytest.raises(UsageError, match="--surface-examples must be at most"):
        run_landscape(make_settings(tmp_path, surface_examples=99), silent)
    coupled = {"normalization": "batch", "batch_norm_mode": "train", "chunk_size": 4}
    with pytest.raises(UsageError, match="--chunk-size must be at least the number of examples"):
        run_landscape(make_settings(tmp_path / "coupled", **coupled), silent)

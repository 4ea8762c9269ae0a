"""Normalizations and initialisations as options: each trains, and the initial network is theirs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax import initializers
from regjax.experiments import UsageError, _inputs, _network, _settings, _training, train
from regjax.models import _normalized
from tests.experiments.test_training import (
    assert_same_bits,
    make_dataset,
    make_settings,
    state_in,
)


@pytest.fixture(autouse=True)
def _promotion(default_promotion):
    """The optimisers are optax's, which promote."""


def settings_of(**changes):
    return _settings.replace(make_settings(), changes)


@pytest.mark.parametrize(
    ("norm", "model"),
    [
        *((norm, "mlp") for norm in _normalized.NORMALIZATIONS),
        ("group_plus", "convnet"),
        ("weight", "convnet"),
    ],
)
def test_every_normalization_trains_and_evaluates(norm, model, tmp_path):
    dataset = make_dataset()
    size = {"batch_size": 16} if norm == "ghost" else {}
    settings = settings_of(normalization=norm, model=model, width=4, depth=1, epochs=2, **size)
    result = train(settings, dataset, path=tmp_path / "checkpoint.npz")
    assert all(np.isfinite(result.losses))
    scaling = _inputs.measure_scaling(dataset, "float32")
    evaluation = _network.evaluate(result.model, dataset.test_inputs, dataset.test_targets, scaling)
    assert np.isfinite(evaluation.loss)
    if norm == "group_plus":  # the variant whose evaluation does not couple the examples
        assert result.model.has_batch_statistics


@pytest.mark.parametrize("norm", ["none", "weight", "batch"])
def test_data_dependent_start(norm):
    dataset = make_dataset()
    settings = settings_of(
        normalization=norm, init="data_dependent", **{"data_dependent.num_examples": 20}
    )
    plain = _network.build_model(settings, dataset)
    model = _training.initialized(settings, plain, dataset)
    images = _inputs.normalize(
        jnp.asarray(dataset.train_inputs[:20]), _inputs.measure_scaling(dataset, "float32")
    )
    outputs, _ = model.apply(model.params, model.state, images, train=True)
    np.testing.assert_allclose(np.mean(outputs, 0), 0, atol=1e-4)
    np.testing.assert_allclose(np.std(outputs, 0), 1, rtol=1e-3)
    too_many = _settings.replace(settings, {"data_dependent.num_examples": 10_000})
    with pytest.raises(UsageError, match=r"--data-dependent.num-examples must be at most"):
        _training.initialized(too_many, plain, dataset)


@pytest.mark.parametrize("step", ["sgd", "adam"])
def test_gradinit_start(step):
    dataset = make_dataset()
    settings = settings_of(
        init="gradinit",
        **{
            "gradinit.num_iterations": 4,
            "gradinit.half_batch": 5,
            "gradinit.first_step": step,
            "gradinit.learning_rate": 0.1,
        },
    )
    plain = _network.build_model(settings, dataset)
    model = _training.initialized(settings, plain, dataset)
    kernel = lambda m: m.params["head"]["kernel"]
    ratio = np.asarray(kernel(model) / kernel(plain))
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-5)
    assert abs(ratio[0, 0] - 1) > 0.05
    again = _training.initialized(settings, plain, dataset)
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


def test_resumed_run_does_not_initialise_again(tmp_path, monkeypatch):
    dataset, path = make_dataset(), tmp_path / "checkpoint.npz"
    settings = settings_of(init="data_dependent", epochs=2, **{"data_dependent.num_examples": 20})
    train(settings, dataset, path=path)
    half = tmp_path / "half.npz"
    train(dataclasses.replace(settings, epochs=1), dataset, path=half)
    monkeypatch.setattr(initializers, "data_dependent", None)
    train(dataclasses.replace(settings, resume=True), dataset, path=half)
    assert_same_bits(*(state_in(p, settings, dataset) for p in (path, half)))
    other = _settings.replace(settings, {"data_dependent.std": 2.0, "resume": True})
    with pytest.raises(UsageError, match=r"--data-dependent.std must be 1.0 as in the"):
        train(other, dataset, path=half)

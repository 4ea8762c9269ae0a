"""A checkpoint as a model: the network that was trained, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import regjax
from regjax import CheckpointError, _files
from regjax.experiments import load_model, scaled_inputs, train
from tests.experiments.test_training import assert_same_bits, make_dataset, make_settings


@pytest.fixture(autouse=True)
def _promotion(default_promotion):
    """The optimisers are optax's, which promote."""


@pytest.mark.parametrize(
    "options",
    [{"normalization": "batch"}, {"model": "convnet"}, {"transformation": "anticorrelated_noise"}],
)
def test_the_model_is_the_trained_one(options, tmp_path):
    settings, dataset = make_settings(epochs=1, **options), make_dataset()
    result = train(settings, dataset, path=tmp_path / "checkpoint.npz")
    model = load_model(tmp_path)
    assert isinstance(model, regjax.Model)
    assert_same_bits(model.params, result.model.params)
    assert_same_bits(model.state, result.model.state)
    inputs, _ = scaled_inputs(dataset)
    outputs, expected = (
        regjax.model_function(one)(one.params, inputs) for one in (model, result.model)
    )
    np.testing.assert_array_equal(outputs, expected)
    loss_fn = regjax.model_loss(model, lambda outputs, targets: jnp.mean(outputs**2))
    grads = jax.grad(loss_fn)(model.params, inputs, dataset.train_targets)
    assert jax.tree.structure(grads) == jax.tree.structure(model.params)


def test_double_precision_needs_x64(tmp_path):
    settings, dataset = make_settings(epochs=1, dtype="float64"), make_dataset()
    with jax.enable_x64(True):
        train(settings, dataset, path=tmp_path / "checkpoint.npz")
        assert load_model(tmp_path).params["head"]["bias"].dtype == jnp.float64
    with pytest.raises(CheckpointError, match="jax_enable_x64"):
        load_model(tmp_path)


def test_what_is_no_checkpoint_of_a_run_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        load_model(tmp_path / "nothing.npz")
    path = tmp_path / "checkpoint.npz"
    train(make_settings(epochs=1), make_dataset(), path=path)
    state = {"a": 1}
    for entry, value in (("input_shape", [4, 4, -1]), ("num_classes", True), ("input_shape", "x")):
        metadata = {**_files.read_metadata(path), entry: value}
        _files.save(tmp_path / "other.npz", state, metadata=metadata)
        with pytest.raises(CheckpointError, match=f"something else for '{entry}'"):
            load_model(tmp_path / "other.npz")

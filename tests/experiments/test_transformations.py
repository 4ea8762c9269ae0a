"""The transformations as options: each trains, resumes to the same bits, and gets its batches."""

import ast
import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax import transforms
from regjax.experiments import (
    UsageError,
    _epochs,
    _initializations,
    _kernels,
    _network,
    _optimizer,
    _settings,
    _training,
    _transformations,
    _validation,
    train,
)
from tests.experiments.test_training import (
    assert_same_bits,
    make_dataset,
    make_settings,
    state_in,
)

NAMES = [name for name in _transformations.TRANSFORMATIONS if name != "plain"]


@pytest.fixture(autouse=True)
def _promotion(default_promotion):
    """The optimisers are optax's, which promote."""


def settings_of(name, **options):
    batch = {"normalization": "batch"} if name == "rescale_weights" else {}
    return make_settings(transformation=name, **{**batch, **options})


def test_options_are_the_arguments_of_the_functions():
    import inspect

    renamed = {"entropy_sgd": {"growth"}, "coherent_regularization": {"penalty", "threshold"}}
    renamed["coherent_regularization"] |= {"hold", "delay"}
    for name in NAMES:
        ours = {f.name for f in dataclasses.fields(getattr(make_settings(), name))}
        arguments = set(inspect.signature(getattr(transforms, name)).parameters)
        assert ours - renamed.get(name, set()) <= arguments


def test_what_is_known_of_a_method_stands_in_its_class():
    """So that a new one is a class in one file; a help text may name one in an example."""
    room = pathlib.Path(_transformations.__file__).parent
    methods = {**_transformations.TRANSFORMATIONS, **_initializations.INITIALIZATIONS}
    for path in sorted({*room.glob("*.py"), room.parent / "__main__.py"}):
        strings = {
            n.value for n in ast.walk(ast.parse(path.read_text())) if type(n) is ast.Constant
        }
        defaults = {"plain", "default"} if path.stem == "_settings" else set()
        assert strings & set(methods) <= defaults, path.name


@pytest.mark.parametrize("name", NAMES)
def test_trains_resumes_and_is_not_plain_descent(name, tmp_path):
    settings, dataset = settings_of(name, epochs=2), make_dataset()
    path = tmp_path / "checkpoint.npz"
    result = train(settings, dataset, path=path)
    assert all(np.isfinite(result.losses))
    half = tmp_path / "half.npz"
    train(dataclasses.replace(settings, epochs=1), dataset, path=half)
    train(dataclasses.replace(settings, resume=True), dataset, path=half)
    assert_same_bits(state_in(path, settings, dataset), state_in(half, settings, dataset))
    plain = dataclasses.replace(settings, transformation="plain", learning_rate=0.05, momentum=0.9)
    other = train(plain, dataset, path=tmp_path / "plain.npz").model.params
    differences = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), result.model.params, other)
    assert max(jax.tree.leaves(differences)) > 1e-6


def test_another_option_of_the_transformation_is_another_training(tmp_path):
    settings, dataset = settings_of("sam", epochs=1), make_dataset()
    path = tmp_path / "checkpoint.npz"
    train(settings, dataset, path=path)
    changed = _settings.replace(settings, {"sam.rho": 0.2, "resume": True})
    with pytest.raises(UsageError, match=r"--sam.rho must be 0.05 as in the checkpoint .* got 0.2"):
        train(changed, dataset, path=path)
    # The options of transformations that are not used do not matter.
    unused = _settings.replace(settings, {"gsam.rho": 0.2, "resume": True})
    train(unused, dataset, path=path)
    stored, _, _ = _training.read_run(path)
    assert _settings.replace(make_settings(), stored).sam.rho == 0.05


def inner_batches(settings, num_shards, indices):
    """Labels of the batches that `grad_fn` uses for some indices, at step 1 of a block of 3."""
    labels = jnp.arange(12, dtype=jnp.int32).reshape(3, 4)
    images = jnp.zeros((3, 4, 2, 2, 1), jnp.uint8)
    step = _epochs.Step(None, _optimizer.optimizer(settings), num_shards)
    block = _epochs.Block(images, labels, None, None, jnp.int32(0))
    return [step._inner_batch(block, jnp.int32(1), i)[1].tolist() for i in indices]


def test_inner_steps_see_the_batches_that_follow_and_shards_their_parts():
    following = inner_batches(settings_of("entropy_sgd"), 1, [0, 1, 2])
    assert following == [[4, 5, 6, 7], [8, 9, 10, 11], [0, 1, 2, 3]]
    assert inner_batches(settings_of("sam"), 2, [0, 1]) == [[4, 5], [6, 7]]


def test_what_is_evaluated_carries_no_noise(tmp_path):
    settings, dataset = settings_of("anticorrelated_noise", epochs=1), make_dataset()
    result = train(settings, dataset, path=tmp_path / "checkpoint.npz")
    weights = state_in(tmp_path / "checkpoint.npz", settings, dataset).weights
    noise = weights.optimizer_state[-1].noise
    trees = map(jax.tree.leaves, (result.model.params, weights.params, noise))
    for ours, noisy, xi in zip(*trees, strict=True):
        np.testing.assert_array_equal(ours, noisy - xi)
        assert jnp.abs(xi).max() > 1e-3


def test_masks_are_kernels_and_those_before_a_normalization():
    settings = make_settings(model="convnet", normalization="batch", depth=2)
    params = _network.build_model(settings, make_dataset(shape=(8, 8, 1))).params
    kernels, normalized = _kernels.kernels(params), _kernels.normalized_kernels(params)
    names = lambda mask: {
        jax.tree_util.keystr(path)
        for path, chosen in jax.tree_util.tree_leaves_with_path(mask)
        if chosen
    }
    assert names(kernels) - names(normalized) == {"['head']['kernel']"}
    assert len(names(normalized)) == 2


def test_entropy_descent_moves_to_the_mean_by_default():
    assert _settings.learning_rate(settings_of("entropy_sgd")) == 1
    assert _settings.momentum(settings_of("entropy_sgd")) == 0
    given = settings_of("entropy_sgd", learning_rate=0.3, momentum=0.5)
    assert (_settings.learning_rate(given), _settings.momentum(given)) == (0.3, 0.5)
    assert _settings.momentum(settings_of("sam")) == 0.9


def test_the_controller_takes_the_place_of_sgd():
    settings = settings_of("spectral_controller")
    assert _settings.momentum(settings) == 0
    for options, text in (
        ({"optimizer": "adam"}, "--transformation spectral_controller must have --optimizer sgd"),
        ({"momentum": 0.9}, "spectral_controller must have no --momentum, which it finds, got 0.9"),
    ):
        with pytest.raises(UsageError, match=text):
            _validation.validate(dataclasses.replace(settings, **options))
    _validation.validate(_settings.replace(settings, {"spectral_controller.rule": "polyak"}))
    wrong = _settings.replace(settings, {"spectral_controller.every": 0})
    with pytest.raises(UsageError, match=r"--spectral-controller\.every must be"):
        _validation.validate(wrong)

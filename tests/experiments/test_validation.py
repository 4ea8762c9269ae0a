"""Options that do not fit each other, or are out of their range."""

import dataclasses
import math
import typing

import jax
import numpy as np
import pytest

from regjax.experiments import (
    LandscapeSettings,
    SpectrumSettings,
    TrainSettings,
    UsageError,
    _effects,
    _memory,
    _network,
    _preflight,
    _ranges,
    _settings,
    _validation,
    run_compare,
    run_landscape,
    run_spectrum,
    run_train,
    scaled_inputs,
    train,
)
from regjax.experiments._initializations import INITIALIZATIONS
from regjax.experiments._transformations import SpectralController
from tests.experiments.test_training import make_dataset


@pytest.mark.parametrize("kind", [SpectrumSettings, LandscapeSettings])
def test_every_number_has_a_range(kind):
    """A new number among the options must be given one."""
    for name, hint in _settings.option_types(kind).items():
        parts = set(typing.get_args(hint)) or {hint}
        if "." in name or parts.isdisjoint({int, float}):
            continue
        assert name in _ranges.RANGES
        for bad in (-1, 10**31, "3", True, *([math.inf, math.nan] if float in parts else [1.5])):
            with pytest.raises(UsageError, match=f"{_settings.option(name)} must be .*got"):
                _validation.validate(dataclasses.replace(kind(), **{name: bad}))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model": "mpl"}, r"--model must be one of mlp.* got 'mpl' \(did you mean mlp\?\)"),
        ({"model": 3}, "--model must be one of mlp"),
        ({"data": ""}, "--data must name a data set"),
        ({"data": 3}, "--data must be a text, got 3"),
        ({"out": "runs/x"}, "--out must be a path, got 'runs/x'"),
        ({"compare": "sgd"}, "--compare must be .*got 'sgd'"),
        ({"resume": 1}, "--resume must be a flag, got 1"),
        ({"sam": 0.1}, "`sam` must be Sam"),
        ({"width": None, "depth": 0, "model": "convnet"}, "--depth must be at least 1 with --mod"),
        ({"damping": 0}, "--damping must be above 0, got 0"),
        ({"damping": 1e-300}, "--damping must be at least 1e-30 in magnitude, got 1e-300"),
        ({"weight_decay": 1e-300}, "--weight-decay must be 0 or at least 1e-30"),
        ({"momentum": 1}, "--momentum must be below 1, got 1"),
        (
            {
                "transformation": "spectral_controller",
                "spectral_controller": SpectralController(smallest_ratio=1.5),
            },
            "--spectral-controller.smallest-ratio must be at most 1, got 1.5",
        ),
        ({"seed": 2**32}, "--seed must be at most 4294967295, got 4294967296"),
    ],
)
def test_values_of_another_type_or_range_are_refused(changes, text):
    with pytest.raises(UsageError, match=text):
        _validation.validate(dataclasses.replace(SpectrumSettings(), **changes))


@pytest.mark.parametrize("settings", [None, {}, TrainSettings, 3])
def test_settings_must_be_settings(settings):
    with pytest.raises(TypeError, match="`settings` must be of a kind of TrainSettings"):
        _validation.validate(settings)


@pytest.mark.parametrize(
    ("function", "settings", "kind"),
    [
        (run_train, None, "TrainSettings"),
        (run_spectrum, TrainSettings(), "SpectrumSettings"),
        (run_spectrum, LandscapeSettings(), "SpectrumSettings"),
        (run_landscape, SpectrumSettings(), "LandscapeSettings"),
        (run_compare, {"compare": ("sgd",)}, "TrainSettings"),
    ],
)
def test_runs_take_settings_of_their_kind_and_a_function(function, settings, kind):
    with pytest.raises(
        TypeError, match=f"`settings` must be {kind}, got {type(settings).__name__}"
    ):
        function(settings, print)
    right = {"SpectrumSettings": SpectrumSettings, "LandscapeSettings": LandscapeSettings}
    with pytest.raises(TypeError, match="`progress` must be callable, got None"):
        function(right.get(kind, TrainSettings)(), None)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        (
            {"train_inputs": np.zeros((23, 4, 4))},
            ValueError,
            r"`dataset.train_inputs` must be \(ex",
        ),
        ({"test_targets": np.zeros(3, int)}, ValueError, r"`dataset.test_targets` \(examples,\)"),
        ({"train_targets": np.zeros(23)}, TypeError, "`dataset.train_targets` must be integers"),
        ({"train_targets": [0] * 23}, TypeError, "`dataset.train_targets` must be a NumPy array"),
        ({"num_classes": 2}, ValueError, "must be classes from 0 to 1, got 0 to 2"),
    ],
)
def test_a_data_set_has_arrays_that_fit_each_other(changes, error, text, tmp_path):
    dataset = make_dataset()._replace(**changes)
    with pytest.raises(error, match=text):
        train(TrainSettings(batch_size=5), dataset, path=tmp_path / "checkpoint.npz")
    with pytest.raises(error, match=text):
        scaled_inputs(dataset)


def test_ends_of_the_ranges_are_taken():
    _validation.validate(SpectrumSettings(seed=2**32 - 1, weight_decay=0, tol=0.0, momentum=0))
    _validation.validate(LandscapeSettings(points=3, span=1000.0, probe_points=1, epochs=0))


def test_every_number_of_a_method_is_validated():
    for field in dataclasses.fields(SpectrumSettings):
        own = getattr(SpectrumSettings(), field.name, None)
        for inner in dataclasses.fields(own) if dataclasses.is_dataclass(own) else ():
            hint = _settings.option_types(SpectrumSettings)[f"{field.name}.{inner.name}"]
            if {hint, *typing.get_args(hint)}.isdisjoint({int, float}):
                continue
            method = "init" if field.name in INITIALIZATIONS else "transformation"
            changes = {method: field.name, f"{field.name}.{inner.name}": -1}
            if field.name == "rescale_weights":
                changes["normalization"] = "batch"
            if (field.name, inner.name) == ("coherent_regularization", "delay"):
                changes["coherent_regularization.gate"] = "delayed"
            option = _settings.option(f"{field.name}.{inner.name}")
            for bad in (-1, math.inf, math.nan, 10**31, "1", True):
                changes[f"{field.name}.{inner.name}"] = bad
                with pytest.raises(UsageError, match=rf"{option} must .*got '?{bad}"):
                    _validation.validate(_settings.replace(SpectrumSettings(), changes))


def test_rescaling_needs_a_normalization_that_allows_it():
    rescale = {"transformation": "rescale_weights"}
    with pytest.raises(UsageError, match="must have a --normalization that divides the scale"):
        _validation.validate(_settings.replace(SpectrumSettings(), rescale))
    grouped = {**rescale, "normalization": "group"}
    with pytest.raises(UsageError, match=r"--rescale-weights\.per-filter must be off"):
        _validation.validate(_settings.replace(SpectrumSettings(), grouped))
    whole = {**grouped, "rescale_weights.per_filter": False}
    _validation.validate(_settings.replace(SpectrumSettings(), whole))


def test_shards_divide_the_batch():
    sharded = {"transformation": "sam", "sam.num_shards": 0}
    with pytest.raises(UsageError, match=r"--sam.num-shards must be at least 1, got 0"):
        _validation.validate(_settings.replace(SpectrumSettings(), sharded))
    sharded["sam.num_shards"] = 3
    with pytest.raises(UsageError, match=r"--sam.num-shards must divide the batch size, 64, got 3"):
        _validation.validate(_settings.replace(SpectrumSettings(), sharded))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"batch_size": 24}, r"--batch-size over the number of shards must .* of 16.* got 24"),
        (
            {"transformation": "sam", "sam.num_shards": 8},
            r"--batch-size over the number of shards must be a multiple of 16",
        ),
        (
            {"init": "data_dependent", "data_dependent.num_examples": 500},
            r"--data-dependent.num-examples must be a multiple of 16",
        ),
        (
            {"init": "gradinit", "gradinit.half_batch": 5},
            r"--gradinit.half-batch must be a multiple",
        ),
    ],
)
def test_ghosts_divide_the_batches(changes, text):
    ghost = _settings.replace(SpectrumSettings(), {"normalization": "ghost"})
    _validation.validate(ghost)
    with pytest.raises(UsageError, match=text):
        _validation.validate(_settings.replace(ghost, changes))


def test_options_of_the_models_are_those_of_the_command_line():
    from regjax.experiments import _normalization
    from regjax.models import _normalized

    assert set(_normalization.NORMALIZATIONS) == set(_normalized.NORMALIZATIONS)
    assert _normalization.GHOST_SIZE == _normalized.GHOST_SIZE
    shape = (8, 8, 1)
    for name, kind in _normalization.NORMALIZATIONS.items():
        settings = TrainSettings(width=4, depth=1, normalization=name)
        shapes = _network.model_shapes(settings, make_dataset(shape=shape))
        assert shapes.has_batch_statistics == kind.has_batch_statistics, name


# Options without effect.


def effects(names, **options):
    settings = _settings.replace(SpectrumSettings(), options)
    return [_effects.missing(name, settings) for name in names]


def test_what_options_need_to_have_an_effect():
    assert effects(["sam.rho"]) == ["--transformation sam"]
    assert effects(["sam.rho", "gsam.rho"], transformation="sam") == [None, "--transformation gsam"]
    assert effects(["sam.eta"], **{"transformation": "sam", "sam.adaptive": True}) == [None]
    assert effects(["gradinit.clip", "gradinit.clip"], init="gradinit") == [None, None]
    assert effects(["momentum"], optimizer="adam") == ["--optimizer sgd"]
    assert effects(["num_samples", "momentum"], matrix="fisher") == [None, None]
    coherent = "coherent_regularization"
    names = [f"{coherent}.{name}" for name in ("threshold", "hold", "delay")]
    for gate, needs in (("cosine", "--n"), ("always", "ttd"), ("delayed", "tt-")):
        found = effects(names, **{"transformation": coherent, f"{coherent}.gate": gate})
        kinds = {
            None: "-",
            "--coherent-regularization.gate delayed": "d" if gate == "always" else "n",
        }
        kinds["--coherent-regularization.gate cosine or ratio"] = "t"
        assert "".join(kinds[text] for text in found) == needs


def test_an_option_of_a_comparison_has_to_matter_for_one_item():
    items = [SpectrumSettings(), SpectrumSettings(transformation="sam", seed=1)]
    _effects.check_effects(["sam.rho", "seed"], SpectrumSettings(), items)
    with pytest.raises(UsageError, match=r"--gsam\.rho needs --transformation gsam"):
        _effects.check_effects(["gsam.rho"], SpectrumSettings(), items)
    with pytest.raises(UsageError, match="--seed 2 is overridden by every item of --compare"):
        _effects.check_effects(["seed"], SpectrumSettings(seed=2), items)
    read = dataclasses.replace(items[0], checkpoint=items[0].out)
    _effects.check_effects(["device_bytes"], SpectrumSettings(), [read, items[1]])


# What data and shapes show.


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (SpectrumSettings(batch_size=24), "--batch-size must be at most the number of .* 23, got"),
        (SpectrumSettings(curvature_examples=24), "--curvature-examples must be at most .* 23,"),
        (LandscapeSettings(surface_examples=24), "--surface-examples must be at most .* 23, got"),
        (LandscapeSettings(probe_examples=24), "--probe-examples must be at most .* 23, got 24"),
        (SpectrumSettings(num_eigenvalues=12), "--num-eigenvalues must be at most the number of"),
        (SpectrumSettings(num_steps=12), "--num-steps must be at most the number of parameters"),
        (
            SpectrumSettings(normalization="batch", batch_norm_mode="train", chunk_size=22),
            "--chunk-size must be at least the number of examples, 23, .* got 22",
        ),
    ],
)
def test_what_the_data_and_the_shapes_refuse(settings, text):
    """16 pixels and 3 classes; the head of a single unit has 6 parameters."""
    small = {"width": 1, "depth": 0, "batch_size": min(settings.batch_size, 24), "model": "mlp"}
    if settings.batch_size == 64:
        small["batch_size"] = 5
    if isinstance(settings, SpectrumSettings):
        counts = {"num_eigenvalues": 3, "num_steps": 3}
        own = {name: getattr(settings, name) for name in counts}
        small |= {n: own[n] if own[n] == 12 else counts[n] for n in counts}
    dataset = make_dataset(shape=(1, 2, 1))
    with pytest.raises(UsageError, match=text):
        _preflight.check_fit(dataclasses.replace(settings, **small), dataset)


def test_memory_is_that_of_parameters_activations_or_vectors(monkeypatch):
    settings, dataset = SpectrumSettings(width=100, depth=1, batch_size=5), make_dataset()
    model = _network.model_shapes(settings, dataset)
    size = 16 * 100 + 100 + 100 * 3 + 3
    assert _memory.num_parameters(model) == size
    for room, text in (
        (4 * 4 * size - 1, "2,003 parameters in training"),
        (4 * 4 * size, "parameters and activations"),
        (4 * 42 * size, "the 42 vectors of the spectrum"),
    ):
        monkeypatch.setattr(_memory, "available_bytes", lambda room=room: room)
        with pytest.raises(UsageError, match=text):
            _memory.check_memory(settings, dataset, model)
    monkeypatch.setattr(_memory, "available_bytes", lambda: 4 * 43 * size)
    _memory.check_memory(settings, dataset, model)


def test_shapes_are_those_of_the_network():
    settings, dataset = (
        TrainSettings(model="resnet", width=4, normalization="batch"),
        make_dataset(),
    )
    built, shapes = (f(settings, dataset) for f in (_network.build_model, _network.model_shapes))
    described = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert described(built.params) == described(shapes.params)

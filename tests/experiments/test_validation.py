"""Options that do not fit each other, or are out of their range."""

import dataclasses

import pytest

from regjax.experiments import SpectrumSettings, UsageError, _settings, _validation
from regjax.experiments._initializations import INITIALIZATIONS


def test_every_option_is_validated_or_free():
    """A new number among the options must be given its range."""
    numbers = {
        field.name
        for field in dataclasses.fields(SpectrumSettings)
        if isinstance(field.default, int | float) and not isinstance(field.default, bool)
    }
    for name in numbers:
        with pytest.raises(UsageError, match=_settings.option(name)):
            _validation.validate(dataclasses.replace(SpectrumSettings(), **{name: -1}))


def test_every_number_of_a_method_is_validated():
    for field in dataclasses.fields(SpectrumSettings):
        own = getattr(SpectrumSettings(), field.name, None)
        for inner in dataclasses.fields(own) if dataclasses.is_dataclass(own) else ():
            if type(getattr(own, inner.name)) not in (int, float):
                continue
            method = "init" if field.name in INITIALIZATIONS else "transformation"
            changes = {method: field.name, f"{field.name}.{inner.name}": -1}
            if field.name == "rescale_weights":
                changes["normalization"] = "batch"
            if (field.name, inner.name) == ("coherent_regularization", "delay"):
                changes["coherent_regularization.gate"] = "delayed"
            option = _settings.option(f"{field.name}.{inner.name}")
            with pytest.raises(UsageError, match=rf"{option} must be .*got -1"):
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

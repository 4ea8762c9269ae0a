"""Options that are given and change nothing, because of others."""

from collections.abc import Callable, Iterable
from typing import Any

from regjax.experiments._initializations import INITIALIZATIONS
from regjax.experiments._normalization import NORMALIZATIONS
from regjax.experiments._options import UsageError, option
from regjax.experiments._settings import TrainSettings, value_of

# They belong to a comparison as a whole.
COMMON = (
    *("compare", "seeds", "checkpoint", "resume", "overwrite", "out"),
    *("figure", "figure_width"),
)

_TRAINING = "training, and nothing is trained with --checkpoint"
_WITH_STATISTICS = [name for name, kind in NORMALIZATIONS.items() if kind.has_batch_statistics]


def _trains(settings: Any) -> bool:
    return getattr(settings, "checkpoint", None) is None


def _monitors(settings: Any) -> bool:
    return settings.monitor is not None


# When an option has an effect, and else what it needs.
_NEEDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "data_dir": (
        lambda settings: settings.data != "digits" and not settings.data.endswith(".npz"),
        "other --data than digits or a file",
    ),
    "momentum": (lambda settings: settings.optimizer == "sgd", "--optimizer sgd"),
    "monitor": (_trains, _TRAINING),
    "monitor_every": (_monitors, "--monitor"),
    "monitor_examples": (_monitors, "--monitor"),
    "checkpoint_seconds": (_trains, _TRAINING),
    "device_bytes": (_trains, _TRAINING),
    "resume": (_trains, _TRAINING),
    "seeds": (_trains, _TRAINING),
    "num_samples": (lambda settings: settings.matrix == "fisher", "--matrix fisher"),
    "batch_norm_mode": (
        lambda settings: (
            settings.batch_norm_mode == "evaluation" or settings.normalization in _WITH_STATISTICS
        ),
        f"a --normalization with batch statistics, {', '.join(_WITH_STATISTICS)}",
    ),
}


def missing(name: str, settings: TrainSettings) -> str | None:
    """Returns what the option `name` needs to have an effect; None: it has one."""
    outer, _, inner = name.partition(".")
    if not inner:
        has_effect, needs = _NEEDS.get(name, (lambda settings: True, ""))
        return None if has_effect(settings) else needs
    chooser = "init" if outer in INITIALIZATIONS else "transformation"
    if getattr(settings, chooser) != outer:
        return f"{option(chooser)} {outer}"
    return getattr(settings, outer).missing().get(inner)


def check_effects(
    names: Iterable[str], settings: TrainSettings, compared: Iterable[TrainSettings] = ()
) -> None:
    """Checks that each given option has an effect on what is run, on one network at least.

    Args:
      names: of the options that were given.
      settings: the settings with them.
      compared: the settings of the items of a comparison, if there is one.

    Raises:
      UsageError: an option has none; the message says what it needs.
    """
    runs = list(compared)
    for name in names:
        value = value_of(settings, name)
        users = [settings]
        if runs and name not in COMMON:
            users = [own for own in runs if value_of(own, name) == value]
        if not users:
            raise UsageError(f"{option(name)} {value} is overridden by every item of --compare.")
        needs = [missing(name, own) for own in users]
        if None not in needs:
            raise UsageError(f"{option(name)} needs {needs[0]}.")

"""The gradient noise scale grows while the loss falls."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

from benchmarks import _claims
from benchmarks._claims import Record, Settings, Verdict
from benchmarks.claims import _figures, _networks
from regjax import diagnostics

_LOSSES = (2.0, 1.0, 0.5, 0.25, 0.1, 0.05)
_BATCH, _LIMIT = 30, 20_000
_NOISE_BATCH = 5
_TX = optax.sgd(0.05)
# Of many examples, so that the gradient of all stands out of its noise for longer.
_DATA: dict[str, Any] = {
    "digits": (lambda: _networks.digits(1200), 5),
    "fashion_mnist": (_networks.fashion_mnist, 3),
}


def _settings(preset: str) -> Sequence[Settings]:
    if preset == "smoke":
        return [{"data": "digits", "width": 16, "seed": seed, "last": 1.0} for seed in (0, 1)]
    return [
        {"data": data, "width": 128, "seed": seed, "last": _LOSSES[-1]}
        for data, (_, num_seeds) in _DATA.items()
        for seed in range(num_seeds)
    ]


def _run(settings: Settings) -> dict[str, float]:
    split, seed, width = _DATA[settings["data"]][0](), settings["seed"], settings["width"]
    sizes = (split.x.shape[1], width, width, 10)
    params = _networks.he_network(sizes, jax.random.key(seed))
    numbers = {}
    for i, level in enumerate(_levels(settings)):
        trained = _networks.train(
            params, _TX, split,
            batch_size=_BATCH, num_steps=_LIMIT, seed=1000 * seed + i, stop_below=level,
        )  # fmt: skip
        params = trained.params
        found = diagnostics.gradient_noise(
            _networks.loss_fn, params, split.x, split.y, batch_size=_NOISE_BATCH
        )
        for name in ("gradient_noise_scale", "squared_gradient_norm", "noise_trace"):
            numbers[f"{name}_{level:g}"] = float(getattr(found, name))
        error = found.gradient_noise_scale_standard_error
        numbers[f"error_{level:g}"] = float(error)
        numbers[f"resolved_{level:g}"] = float(found.resolved)
        numbers[f"loss_{level:g}"] = trained.loss
    return numbers


def _levels(settings: Settings) -> list[float]:
    return [level for level in _LOSSES if level >= settings["last"]]


def _judge(records: Sequence[Record]) -> list[Verdict]:
    verdicts = []
    for data, own in _claims.groups(records, "data").items():
        levels = _levels(own[0])
        steps, rises, grown = 0, 0, []
        for record in own:
            scales = _seen(record, levels)
            steps += len(scales) - 1
            rises += sum(b > a for a, b in itertools.pairwise(scales.values()))
            ends = [next(iter(scales)), next(reversed(scales))]
            grown.append(scales[ends[1]] / scales[ends[0]])
        first, last = (
            _claims.mean_and_error(_claims.numbers(own, f"noise_trace_{level:g}"))[0]
            for level in (levels[0], levels[-1])
        )
        hidden = sum(len(levels) - len(_seen(record, levels)) for record in own)
        growth, error = _claims.mean_and_error(np.log(grown))
        # The first was asked first; the second is the mildest reading of "grows".
        verdicts += [
            Verdict(
                f"{_claims.word(rises == steps)} ({data}): the noise scale rises from each loss to "
                "the next",
                f"in {rises} of {steps} cases; in {hidden} more the gradient did not stand out of "
                "its noise",
            ),
            Verdict(
                f"{_claims.word(growth > 2 * error)} ({data}): the noise scale is larger at the "
                "last loss than at the first",
                f"{np.exp(growth):.1f} times (mean of logarithms over seeds, a standard error of "
                f"{100 * error:.0f} %; {min(grown):.1f} to {max(grown):.1f}); tr Sigma goes from "
                f"{first:.3g} to {last:.3g}",
            ),
        ]
    return verdicts


def _seen(record: Record, levels: Sequence[float]) -> dict[float, float]:
    """The noise scales at the losses at which the gradient stood out of its noise."""
    return {
        level: record[f"gradient_noise_scale_{level:g}"]
        for level in levels
        if record[f"resolved_{level:g}"]
    }


def _draw(records: Sequence[Record], figure: Any) -> str:
    names = {
        "gradient_noise_scale": "gradient noise scale\n(examples)",
        "noise_trace": "trace of the\ngradients' covariance",
    }
    unresolved = 0
    for axes, own, name in _figures.panels(figure, records, names):
        for i, record in enumerate(own):
            levels = _levels(record)
            losses, values, errors = (
                np.asarray([record[f"{what}_{level:g}"] for level in levels])
                for what in ("loss", name, "error")
            )
            seen = np.ones(len(levels), bool)
            if name == "gradient_noise_scale":
                seen = np.asarray([record[f"resolved_{level:g}"] for level in levels]) > 0
                unresolved += int(np.sum(~seen))
            bars = errors[seen] if name == "gradient_noise_scale" else None
            axes.errorbar(
                losses[seen], values[seen], yerr=bars, **_figures.look(i), capsize=2, alpha=0.8
            )
        _figures.logarithmic(axes, "xy")
        axes.invert_xaxis()
        _figures.label(axes, x="training loss (training goes to the right)")
    left_out = (
        f" {unresolved} points whose scale was not resolved are left out." if unresolved else ""
    )
    return f"One line per seed; bars: the standard error of one measurement.{left_out}"


CLAIM = _claims.Claim(
    name="noise_scale",
    paper="McCandlish, Kaplan, Amodei (2018), arXiv:1812.06162",
    statement="the gradient noise scale grows over the training of a network, as the loss falls",
    printed="nothing is quoted: other data and other networks",
    settings=_settings,
    run=_run,
    judge=_judge,
    draw=_draw,
)

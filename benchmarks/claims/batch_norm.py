"""Batch norm saves training steps, with sigmoid units most of all; noise and norms besides."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

import regjax
from benchmarks import _claims
from benchmarks._claims import Record, Settings, Verdict
from benchmarks.claims import _figures, _networks
from regjax import normalization

_NORMS = ("none", "batch", "noisy", "noise alone", "L1", "L2", "Linf")
_RATES, _UNITS = (0.03, 0.1, 0.3, 1.0), ("relu", "sigmoid")
_WIDTH, _DEPTH, _BATCH, _STEPS, _WINDOW, _LOSS = 64, 6, 64, 1500, 20, 0.2
_SAVING, _NOISY = 2.0, 1.6  # times as few steps as none, as many as without noise
_ORDERS = {"L1": 1, "L2": 2, "Linf": math.inf}
_GLOROT = nnx.initializers.glorot_normal()  # the same object again compiles nothing again
_DATA: dict[str, tuple[Callable[[], _networks.Split], int]] = {
    "digits": (lambda: _networks.digits(1440), 5),
    "fashion_mnist": (_networks.fashion_mnist, 3),
}


def _settings(preset: str) -> Sequence[Settings]:
    if preset == "smoke":
        return [
            {"data": "digits", "units": "relu", "norm": n, "rate": 0.1, "seed": s, "steps": 60}
            for n in _NORMS[:4]
            for s in (0, 1)
        ]
    return [
        {"data": data, "units": units, "norm": norm, "rate": rate, "seed": seed, "steps": _STEPS}
        for data, (_, num_seeds) in _DATA.items()
        for units in _UNITS
        for norm in _NORMS
        for rate in _RATES
        for seed in range(num_seeds)
    ]


def _run(settings: Settings) -> dict[str, float]:
    split, seed = _DATA[settings["data"]][0](), settings["seed"]
    model = _model(split.x.shape[1], settings["norm"], settings["units"], seed)
    trained, losses = _networks.train_model(
        model, _descent(settings["rate"]), split,
        batch_size=_BATCH, num_steps=settings["steps"], seed=seed,
    )  # fmt: skip
    smooth = np.convolve(losses, np.full(_WINDOW, 1 / _WINDOW), "valid")
    reached = np.flatnonzero(smooth < _LOSS)
    # A run that does not get there counts as the limit.
    steps = int(reached[0]) + _WINDOW if len(reached) else settings["steps"]
    return {
        "needed": steps,
        "reached": float(len(reached) > 0),
        "accuracy": _networks.model_accuracy(trained, split),
    }


@functools.cache
def _descent(rate: float) -> Any:
    return optax.chain(optax.sgd(rate))


def _model(num_inputs: int, norm: str, units: str, seed: int) -> regjax.Model:
    rngs, sizes = nnx.Rngs(seed), (num_inputs, *[_WIDTH] * _DEPTH)
    linear = functools.partial(nnx.Linear, kernel_init=_GLOROT, rngs=rngs)
    layers = [
        (linear(n, m, use_bias=norm in ("none", "noise alone")), _norm(norm, rngs))
        for n, m in itertools.pairwise(sizes)
    ]
    activation = {"relu": jax.nn.relu, "sigmoid": jax.nn.sigmoid}[units]
    return regjax.from_nnx(_networks.Net(layers, linear(_WIDTH, 10), activation))


def _norm(norm: str, rngs: nnx.Rngs) -> Any:
    if norm == "none":
        return None
    if norm in _ORDERS:
        return normalization.nnx.LpNorm(_WIDTH, order=_ORDERS[norm], momentum=0.9)
    if norm == "noise alone":
        return _Noise(_WIDTH, rngs)
    kind = {"batch": normalization.nnx.BatchNorm, "noisy": normalization.nnx.NoisyBatchNorm}[norm]
    return kind(_WIDTH, momentum=0.9, rngs=rngs)


class _Noise(nnx.Module):
    """The noise of noisy batch norm without the batch norm."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.width, self.rngs, self.deterministic = width, rngs.dropout.fork(), False

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.deterministic:
            return x
        keys = jax.random.split(self.rngs(), 4)
        mu = jax.random.uniform(keys[0], (self.width,), x.dtype, -0.5, 0.5)
        sigma = jax.random.uniform(keys[1], (self.width,), x.dtype, 1, 1.25)
        m = mu + 0.1 * jax.random.uniform(keys[2], x.shape, x.dtype, -1, 1)
        return (sigma + 0.1 * jax.random.normal(keys[3], x.shape, x.dtype)) * x + m


def _judge(records: Sequence[Record]) -> list[Verdict]:
    verdicts = []
    for data, everything in _claims.groups(records, "data").items():
        for units, own in _claims.groups(everything, "units").items():
            best, shown = {}, []
            for norm, part in _claims.groups(own, "norm").items():
                rates = _claims.groups(part, "rate")
                means = {r: _claims.numbers(group, "needed").mean() for r, group in rates.items()}
                rate = min(means, key=lambda r: means[r])
                reached = int(_claims.numbers(rates[rate], "reached").sum())
                best[norm] = means[rate]
                accuracy = _claims.numbers(rates[rate], "accuracy").mean()
                failed = "" if reached == len(rates[rate]) else f", {reached} of {len(rates[rate])}"
                shown.append(f"{norm} {means[rate]:.0f} (rate {rate:g}{failed}; {accuracy:.3f})")
            evidence = f"mean steps to a loss of {_LOSS} at the best rate (test accuracy): "
            evidence += "; ".join(shown)
            saves = best["batch"] * _SAVING <= best["none"]
            word = _claims.word(saves)
            if not saves and not any(r["reached"] for r in _claims.select(own, norm="none")):
                word = "not testable at this size, without it the loss was never reached"
            verdicts.append(
                Verdict(
                    f"{word} ({data}, {units}): batch norm needs at most half the steps", evidence
                )
            )
            noisy = best["noisy"] <= _NOISY * best["batch"] and best["noisy"] < best["none"]
            verdicts.append(
                Verdict(
                    f"{_claims.word(noisy)} ({data}, {units}): with noise it still trains fast",
                    f"noisy {best['noisy']:.0f}, batch {best['batch']:.0f}, none "
                    f"{best['none']:.0f}; the noise alone {best['noise alone']:.0f}",
                )
            )
    return verdicts


def _draw(records: Sequence[Record], figure: Any) -> str:
    words = {
        "none": "no norm", "batch": "batch norm", "noisy": "batch norm, then noise",
        "noise alone": "noise alone", "L1": "L1 norm", "L2": "L2 norm", "Linf": "L-infinity norm",
    }  # fmt: skip
    rows = [{**r, r["units"]: r["needed"]} for r in records]
    names = dict.fromkeys(_claims.groups(records, "units"), f"steps to a loss of {_LOSS}")
    rates = sorted(_claims.groups(records, "rate"))
    limit = max(_claims.numbers(records, "steps"))
    for axes, own, units in _figures.panels(figure, rows, names, height=2.1):
        axes.set_title(f"{axes.get_title()}, {units} units", fontsize=8)
        part = _claims.select(own, units=units)
        norms = [norm for norm in words if _claims.select(part, norm=norm)]
        for i, norm in enumerate(norms):
            line = _claims.select(part, norm=norm)
            style: dict[str, Any] = {"values": rates, "index": i, "of": len(norms)}
            _figures.sweep(axes, line, "rate", "needed", name=words[norm], **style)
            for place, rate in enumerate(rates):
                runs = _claims.select(line, rate=rate)
                if not all(run["reached"] for run in runs):
                    look = {**_figures.look(i), "markerfacecolor": "white", "zorder": 5}
                    mean = _claims.numbers(runs, "needed").mean()
                    axes.plot(place + _figures.side(i, len(norms)), mean, **look)
        axes.set_yscale("log")
        axes.set_ylim(top=1.6 * limit)
        _figures.logarithmic(axes)
        _figures.level(axes, limit, f"stopped here: {limit:.0f} steps")
        _figures.label(axes, x="learning rate")
    return (
        f"{_figures.BARS} Open points: not all seeds reached the loss; one that did not counts "
        f"with {limit:.0f} steps, so that the mean is too low."
    )


CLAIM = _claims.Claim(
    name="batch_norm",
    paper="Ioffe & Szegedy 2015 (arXiv:1502.03167); Santurkar et al. 2018 (arXiv:1805.11604)",
    statement="batch norm reaches a loss in a fraction of the steps, even with noise behind it",
    printed="ImageNet, Inception: 31.0M steps to 72.2 %, with batch norm x5 2.1M to 73.0 %",
    settings=_settings,
    run=_run,
    judge=_judge,
    draw=_draw,
)

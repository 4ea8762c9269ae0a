"""SAM: climbing before the gradient flattens the minimum, and helps most at small batches."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

from benchmarks import _claims
from benchmarks._claims import Record, Settings, Verdict
from benchmarks.claims import _figures, _networks
from regjax import transforms

_RHOS = (0.0, 0.05, 0.1, 0.2, 0.4)
_BATCHES = (30, 300)
_LIMIT = 20_000
_DATA = {"digits": (_networks.digits, 5), "fashion_mnist": (_networks.fashion_mnist, 3)}


def _settings(preset: str) -> Sequence[Settings]:
    if preset == "smoke":
        return [
            {"data": "digits", "batch": 30, "rho": rho, "seed": seed, "stop": 1.0}
            for rho in (0.0, 0.4)
            for seed in (0, 1)
        ]
    return [
        {"data": data, "batch": batch, "rho": rho, "seed": seed, "stop": 0.02}
        for data, (_, num_seeds) in _DATA.items()
        for batch in _BATCHES
        for rho in _RHOS
        for seed in range(num_seeds)
    ]


def _run(settings: Settings) -> dict[str, float]:
    split, seed = _DATA[settings["data"]][0](), settings["seed"]
    sizes = (split.x.shape[1], 128, 128, 10)
    params = _networks.he_network(sizes, jax.random.key(seed))
    trained = _networks.train(
        params,
        _chain(settings["rho"]),
        split,
        batch_size=settings["batch"],
        num_steps=_LIMIT,
        seed=seed,
        stop_below=settings["stop"],
    )
    largest, residual = _networks.sharpness(trained.params, split, seed)
    return {
        "accuracy": _networks.accuracy(trained.params, split),
        "sharpness": largest,
        "residual": residual,
        "loss": trained.loss,
        "steps": trained.num_steps,
    }


@functools.cache
def _chain(rho: float) -> Any:
    return optax.chain(transforms.sam(rho), optax.sgd(0.1))


def _judge(records: Sequence[Record]) -> list[Verdict]:
    verdicts = []
    for data, own in _claims.groups(records, "data").items():
        batches = sorted({record["batch"] for record in own})
        falls, runs, ends = 0, 0, []
        reached: dict[int, list[float]] = {}
        for batch in batches:
            rhos = reached[batch] = _reached(_claims.select(own, batch=batch))
            seeds = sorted({r["seed"] for r in _claims.select(own, batch=batch)})
            for seed in seeds:
                line = _claims.select(own, batch=batch, seed=seed)
                values = [_claims.select(line, rho=rho)[0]["sharpness"] for rho in rhos]
                falls, runs = falls + bool(np.all(np.diff(values) < 0)), runs + 1
            means = [
                _claims.numbers(_claims.select(own, batch=batch, rho=rho), "sharpness").mean()
                for rho in (rhos[0], rhos[-1])
            ]
            ends.append(f"{means[0]:.2f} to {means[1]:.2f} at rho = {rhos[-1]:g}, batch {batch}")
        num_radii = len({record["rho"] for record in own})
        is_short = any(len(rhos) < num_radii for rhos in reached.values())
        left_out = f" (beyond, {_LIMIT} steps did not always reach the loss)" if is_short else ""
        verdicts.append(
            Verdict(
                f"{_claims.word(falls == runs)} ({data}): the largest eigenvalue falls with rho",
                f"in {falls} of {runs} seeds and batches from each radius to the next; mean "
                f"{', '.join(ends)}{left_out}",
            )
        )
        gains = {
            batch: (rhos[-1], *_gain(own, batch, rhos[0], rhos[-1]))
            for batch, rhos in reached.items()
        }
        _, gain, error = gains[batches[0]]
        text = "; ".join(
            f"{g:+.4f} ± {e:.4f} at rho = {rho:g}, batch {batch}"
            for batch, (rho, g, e) in gains.items()
        )
        verdicts.append(
            Verdict(
                f"{_claims.word(gain > 2 * error)} ({data}): accuracy gains at small batches",
                f"gain over rho = 0: {text} (mean over seeds, one standard error)",
            )
        )
    return verdicts


def _reached(records: Sequence[Record]) -> list[float]:
    """The radii at which every seed came down to the loss at which all are compared."""
    missed = {record["rho"] for record in records if record["loss"] >= record["stop"]}
    return sorted({record["rho"] for record in records} - missed)


def _gain(records: Sequence[Record], batch: int, low: float, high: float) -> tuple[float, float]:
    """Mean and standard error over seeds of the accuracy at `high` less that at `low`."""
    pairs = [
        _claims.numbers(_claims.select(records, batch=batch, rho=rho), "accuracy")
        for rho in (high, low)
    ]
    return _claims.mean_and_error(pairs[0] - pairs[1])


def _draw(records: Sequence[Record], figure: Any) -> str:
    names = {"sharpness": "largest Hessian eigenvalue", "accuracy": "test accuracy"}
    rhos = sorted(_claims.groups(records, "rho"))
    batches = _claims.groups(records, "batch")
    for axes, own, name in _figures.panels(figure, records, names):
        lines = {f"batches of {batch}": _claims.select(own, batch=batch) for batch in batches}
        _figures.sweeps(axes, lines, "rho", name, values=rhos)
        _figures.label(axes, x="length rho of the step uphill (0: SGD)")
        if name == "sharpness":
            _figures.logarithmic(axes)
    return _figures.BARS


CLAIM = _claims.Claim(
    name="sharpness_aware",
    paper="Foret et al. 2021 (arXiv:2010.01412); Kaur et al. 2023 (arXiv:2206.10654)",
    statement="SAM, which takes the gradient after a step uphill, finds flatter minima and helps "
    "most at small batches",
    printed="tables of the papers were not checked; none is quoted",
    settings=_settings,
    run=_run,
    judge=_judge,
    draw=_draw,
)

"""Many regularisers lower geometric complexity: step, batch, penalties, noise, initialisation."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats

from benchmarks import _claims
from benchmarks._claims import Record, Settings, Verdict
from benchmarks.claims import _figures, _networks
from regjax import regularizers

_RATE, _BATCH, _LIMIT, _STOP = 0.1, 30, 4000, 0.02
# Which way each knob should move geometric complexity, and its values.
_SWEEPS: dict[str, tuple[int, tuple[float, ...]]] = {
    "rate": (-1, (0.02, 0.05, 0.1, 0.2, 0.4)),
    "batch": (1, (10, 30, 100, 300)),
    "L2": (-1, (0.0, 1e-4, 3e-4, 1e-3, 1e-2)),
    "explicit": (-1, (0.0, 1e-4, 3e-4, 1e-3, 1e-2)),
    "gradient norm": (-1, (0.0, 0.01, 0.03, 0.1)),
    "spectral norm": (-1, (0.0, 3e-4, 1e-3, 3e-3)),
    "input noise": (-1, (0.0, 0.1, 0.2, 0.4)),
    "initial scale": (1, (0.5, 0.71, 1.0, 1.41)),
    "width": (0, (32, 128, 512, 1024)),
}
_ON_FASHION = ("rate", "batch", "L2", "explicit", "gradient norm", "initial scale")
_DATA: dict[str, tuple[Callable[[], _networks.Split], int, Sequence[str]]] = {
    "digits": (_networks.digits, 5, tuple(_SWEEPS)),
    "fashion_mnist": (lambda: _networks.fashion_mnist(300), 3, _ON_FASHION),
}
_PENALTIES = ("L2", "explicit", "gradient norm", "spectral norm")


def _settings(preset: str) -> Sequence[Settings]:
    if preset == "smoke":
        return [
            {"data": "digits", "knob": knob, "value": value, "seed": seed, "stop": 1.0}
            for knob, values in (("rate", (0.1, 0.4)), ("explicit", (1e-3, 1e-2)))
            for value in values
            for seed in (0, 1)
        ]
    return [
        {"data": data, "knob": knob, "value": value, "seed": seed, "stop": _STOP}
        for data, (_, num_seeds, knobs) in _DATA.items()
        for knob in knobs
        for value in _SWEEPS[knob][1]
        for seed in range(num_seeds)
    ]


def _run(settings: Settings) -> dict[str, float]:
    knob, value, seed = settings["knob"], settings["value"], settings["seed"]
    split = _standardized(settings["data"])
    chosen = lambda name, default: value if knob == name else default
    batch_size, width = int(chosen("batch", _BATCH)), int(chosen("width", 128))
    sizes = (split.x.shape[1], width, width, 10)
    params = _networks.he_network(sizes, jax.random.key(seed))
    scale = chosen("initial scale", 1.0)
    params = [{**layer, "kernel": scale * layer["kernel"]} for layer in params]
    penalty = knob if knob in _PENALTIES and value else None
    numbers = jnp.asarray(
        [chosen("rate", _RATE), value if penalty else 0.0, chosen("input noise", 0.0)], jnp.float32
    )
    random, done, loss = np.random.default_rng(seed), 0, np.inf
    while done < _LIMIT and loss >= settings["stop"]:
        order = random.permutation(len(split.y))
        order = order[: len(order) - len(order) % batch_size].reshape(-1, batch_size)
        key = jax.random.fold_in(jax.random.key(seed), done)
        params, last = _epoch(penalty, params, split.x, split.y, order, numbers, key)
        done, loss = done + len(order), float(last)
    return {
        "complexity": float(regularizers.geometric_complexity(_networks.outputs, params, split.x)),
        "accuracy": _networks.accuracy(params, split),
        "loss": loss,
        "steps": done,
    }


@functools.cache
def _standardized(data: str) -> _networks.Split:
    """Inputs less one mean, over one standard deviation, both of the training images."""
    split = _DATA[data][0]()
    mean, deviation = jnp.mean(split.x), jnp.std(split.x)
    return split._replace(x=(split.x - mean) / deviation, x_test=(split.x_test - mean) / deviation)


@functools.partial(jax.jit, static_argnums=0)
def _epoch(
    penalty: str | None, params: Any, x: Any, y: Any, order: Any, numbers: Any, key: jax.Array
) -> Any:
    rate, strength, noise = numbers

    def step(params: Any, inputs: Any) -> Any:
        rows, key = inputs
        seen = x[rows] + noise * jax.random.normal(key, x[rows].shape)

        def objective(params: Any) -> jax.Array:
            loss = _networks.loss_fn(params, seen, y[rows])
            if penalty is None:
                return loss
            return loss + strength * _penalty(penalty, params, seen, y[rows])

        grads = jax.grad(objective)(params)
        return jax.tree.map(lambda w, g: w - rate * g, params, grads), None

    params, _ = jax.lax.scan(step, params, (order, jax.random.split(key, len(order))))
    return params, _networks.loss_fn(params, x, y)


def _penalty(name: str, params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    if name == "L2":
        return 0.5 * optax.tree.norm(params, squared=True)
    if name == "explicit":
        return regularizers.geometric_complexity(_networks.outputs, params, x)
    if name == "gradient norm":
        return regularizers.gradient_norm_penalty(_networks.loss_fn, params, x, y)
    return regularizers.spectral_norm_penalty(params)


def _judge(records: Sequence[Record]) -> list[Verdict]:
    verdicts = []
    for data, everything in _claims.groups(records, "data").items():
        for knob, own in _claims.groups(everything, "knob").items():
            verdicts.append(_judge_sweep(data, knob, own))
    return verdicts


def _judge_sweep(data: str, knob: str, records: Sequence[Record]) -> Verdict:
    """At matched training loss; values at which a seed did not get there are told apart."""
    shown, values, means, accuracies = [], [], [], []
    for value, own in _claims.groups(records, "value").items():
        complexity, accuracy = (_claims.numbers(own, n) for n in ("complexity", "accuracy"))
        loss = _claims.numbers(own, "loss")
        is_matched = bool(np.all(loss < own[0]["stop"]))
        apart = "" if is_matched else f", loss {loss.mean():.2g}, left out"
        shown.append(
            f"{value:g}: {complexity.mean():.1f} ± {complexity.std(ddof=1):.1f}, "
            f"{accuracy.mean():.4f} ± {accuracy.std(ddof=1):.4f}{apart}"
        )
        if is_matched:
            values.append(value)
            means.append(complexity.mean())
            accuracies.append(accuracy.mean())
    direction = _SWEEPS[knob][0]
    evidence = f"{knob}, geometric complexity and test accuracy (mean, deviation): "
    evidence += "; ".join(shown)
    if len(values) < 2:
        what = f"not testable at this size ({data}): {knob}"
        return Verdict(what, evidence)
    # Of four values 0.8 is one of the possible ones, and comes out a rounding below.
    correlation = round(float(scipy.stats.spearmanr(values, means).statistic), 6)
    follows = float(scipy.stats.spearmanr(means, accuracies).statistic)
    evidence += f"; rank correlation {correlation:+.2f}, of complexity and accuracy {follows:+.2f}"
    if direction == 0:
        return Verdict(f"reported ({data}): {knob}", evidence)
    claim = "raises" if direction > 0 else "lowers"
    return Verdict(
        f"{_claims.word(direction * correlation >= 0.8)} ({data}): {knob} {claim} it", evidence
    )


def _draw(records: Sequence[Record], figure: Any) -> str:
    figure.set_figheight(4.4)
    words = {
        "rate": "learning rate", "batch": "batch size", "L2": "L2 penalty",
        "explicit": "explicit penalty on it", "gradient norm": "gradient-norm penalty",
        "spectral norm": "spectral-norm penalty", "input noise": "noise on the inputs",
        "initial scale": "initial scale / He's", "width": "width (no claim)",
    }  # fmt: skip
    knobs = _claims.groups(records, "knob")
    panels = figure.subplots(3, 3).flat
    for axes, (knob, own) in zip(panels, knobs.items(), strict=False):
        values = sorted(_claims.groups(own, "value"))
        for i, (data, part) in enumerate(_claims.groups(own, "data").items()):
            least = _claims.numbers(_claims.select(part, value=values[0]), "complexity").mean()
            scaled = [{**r, "complexity": r["complexity"] / least} for r in part]
            _figures.sweep(
                axes, scaled, "value", "complexity", values=values, index=i, of=2,
                name=_figures.NAMES[data],
            )  # fmt: skip
            for place, value in enumerate(values):
                runs = _claims.select(scaled, value=value)
                if any(run["loss"] >= run["stop"] for run in runs):
                    mean = _claims.numbers(runs, "complexity").mean()
                    look = {**_figures.look(i), "markerfacecolor": "white", "zorder": 5}
                    axes.plot(place + _figures.side(i, 2), mean, **look)
        axes.margins(y=0.3)
        _figures.level(axes, 1, "")
        sign = {-1: "claimed: falls", 1: "claimed: rises", 0: ""}[_SWEEPS[knob][0]]
        _figures.note(axes, 0.04, 0.9 if sign.endswith("rises") else 0.1, sign)
        _figures.label(axes, x=words[knob])
    for axes in panels:
        axes.set_axis_off()
    figure.supylabel("geometric complexity / that at the left-most setting", fontsize=8)
    return (
        f"{_figures.BARS} Networks stop at a training loss of {_STOP}. Open points: not all "
        "reached it, left out of the verdict; no point: one diverged."
    )


CLAIM = _claims.Claim(
    name="geometric_complexity",
    paper="Dherin et al. 2022 (arXiv:2209.13083)",
    statement="large rates, small batches, penalties, noise and small initial weights all lower "
    "the geometric complexity of a network",
    printed="the abstract; no table of the paper is known",
    settings=_settings,
    run=_run,
    judge=_judge,
    draw=_draw,
)

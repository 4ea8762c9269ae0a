"""Descent with noise moves less along a principal direction the sharper the loss is there."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats

from benchmarks import _claims
from benchmarks._claims import Record, Settings, Verdict
from benchmarks.claims import _figures, _networks
from regjax import diagnostics

_STEPS, _DIRECTIONS, _RANKS = 500, 10, (1, 5, 10)
# Without decay the loss goes on falling and the walk drifts; with it the walk comes to rest first.
_DECAYS, _TO_REST = (0.0, 0.01), 6000
_DATA = {"digits": (_networks.digits, 5), "fashion_mnist": (_networks.fashion_mnist, 3)}


def _settings(preset: str) -> Sequence[Settings]:
    if preset == "smoke":
        return [
            {"data": "digits", "decay": decay, "seed": seed, "steps": 20, "before": 50}
            for decay in _DECAYS
            for seed in (0, 1)
        ]
    return [
        {"data": data, "decay": decay, "seed": seed, "steps": _STEPS, "before": _TO_REST}
        for data, (_, num_seeds) in _DATA.items()
        for decay in _DECAYS
        for seed in range(num_seeds)
    ]


def _run(settings: Settings) -> dict[str, float]:
    split, seed = _DATA[settings["data"]][0](), settings["seed"]
    params = _networks.he_network((split.x.shape[1], 64, 64, 10), jax.random.key(seed))
    trained = _networks.train(
        params, _descent(settings["decay"]), split,
        batch_size=30, num_steps=settings["before"], seed=seed,
        stop_below=0.0 if settings["decay"] else 0.05,
    )  # fmt: skip
    params, path = _walk(
        settings["steps"], trained.params, split.x, split.y, settings["decay"], jax.random.key(seed)
    )
    variances, directions = _principal(path, min(_DIRECTIONS, settings["steps"] - 1))
    widths, sure = [], []
    for direction in directions:
        flatness = diagnostics.interval_flatness(
            _networks.loss_fn,
            params,
            _like(direction, params),
            split.x,
            split.y,
            max_distance=100.0,
        )
        widths.append(float(flatness.interval_width))
        sure.append(float(flatness.converged))
    loss = float(_networks.loss_fn(params, split.x, split.y))
    found = {f"width {rank}": widths[rank - 1] for rank in _RANKS}
    found |= {f"deviation {rank}": float(np.sqrt(variances[rank - 1])) for rank in _RANKS}
    return {
        "correlation": float(scipy.stats.spearmanr(variances, widths).statistic),
        "converged": float(np.mean(sure)),
        "loss": loss,
        "loss before": trained.loss,
        **found,
    }


@functools.cache
def _descent(decay: float) -> Any:
    return optax.chain(optax.add_decayed_weights(decay), optax.sgd(0.1))


@functools.partial(jax.jit, static_argnums=0)
def _walk(num_steps: int, params: Any, x: Any, y: Any, decay: Any, key: jax.Array) -> Any:
    """The last point and the path (num_steps, n) of descent on random batches."""

    def step(params: Any, key: jax.Array) -> Any:
        rows = jax.random.choice(key, len(y), (30,), replace=False)
        grads = jax.grad(_networks.loss_fn)(params, x[rows], y[rows])
        params = jax.tree.map(lambda w, g: w - 0.1 * (g + decay * w), params, grads)
        return params, jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(params)])

    return jax.lax.scan(step, params, jax.random.split(key, num_steps))


def _principal(path: jax.Array, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest variances of the path, and their unit directions as rows."""
    centred = np.asarray(path, np.float64) - np.mean(np.asarray(path, np.float64), 0)
    values, vectors = np.linalg.eigh(centred @ centred.T)
    values, vectors = values[::-1][:count], vectors[:, ::-1][:, :count]
    return values / len(path), (vectors / np.sqrt(values)).T @ centred


def _like(vector: np.ndarray, params: Any) -> Any:
    leaves, treedef = jax.tree.flatten(params)
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
    pieces = np.split(vector.astype(np.float32), ends)
    shaped = [piece.reshape(leaf.shape) for piece, leaf in zip(pieces, leaves, strict=True)]
    return jax.tree.unflatten(treedef, shaped)


def _judge(records: Sequence[Record]) -> list[Verdict]:
    verdicts = []
    parts = [
        (f"{data}, {'with decay, at rest' if decay else 'without decay, drifting'}", own)
        for data, everything in _claims.groups(records, "data").items()
        for decay, own in _claims.groups(everything, "decay").items()
    ]
    for data, own in parts:
        correlation = _claims.numbers(own, "correlation")
        means = {
            rank: (
                _claims.numbers(own, f"deviation {rank}").mean(),
                _claims.numbers(own, f"width {rank}").mean(),
            )
            for rank in _RANKS
        }
        text = ", ".join(f"{rank}: {d:.3g}, {w:.3g}" for rank, (d, w) in means.items())
        verdicts.append(
            Verdict(
                f"{_claims.word(correlation.mean() < -0.8)} ({data}): the variance of the walk "
                "falls with the flatness",
                f"rank correlation over {_DIRECTIONS} directions {correlation.mean():.2f} "
                f"± {correlation.std(ddof=1):.2f} in {len(own)} seeds; standard deviation and "
                f"interval of direction {text}; loss from "
                f"{_claims.numbers(own, 'loss before').mean():.3f} to "
                f"{_claims.numbers(own, 'loss').mean():.3f}; "
                f"level reached in {_claims.numbers(own, 'converged').mean():.0%}",
            )
        )
    return verdicts


def _draw(records: Sequence[Record], figure: Any) -> str:
    names = {"walk": "standard deviation\nof the walk", "correlation": "rank correlation"}
    words = {0.0: "without decay,\ndrifting", 0.01: "with decay,\nat rest"}
    for axes, own, name in _figures.panels(figure, records, names):
        decays = _claims.groups(own, "decay")
        if name == "correlation":
            _figures.dots(axes, own, "decay", name, [words.get(d, f"decay {d:g}") for d in decays])
            _figures.level(axes, 0, "claimed: below 0", left=0.36, above=False)
            axes.set_ylim(-1, 1.1)
            continue
        for i, (decay, part) in enumerate(decays.items()):
            for record in part:
                ranks = [rank for rank in _RANKS if f"width {rank}" in record]
                widths, deviations = (
                    [record[f"{what} {rank}"] for rank in ranks] for what in ("width", "deviation")
                )
                axes.plot(
                    widths, deviations,
                    **_figures.look(i), alpha=0.7,
                    label=words.get(decay, f"{decay:g}").replace("\n", " "),
                )  # fmt: skip
        _figures.label(axes, x="flatness: width of the interval at e times the loss")
        _figures.logarithmic(axes, "xy")
    shown = ", ".join(map(str, _RANKS))
    return (
        f"Left: one line per seed through the principal directions {shown} of the walk; the claim "
        f"is that lines fall. Right: over {_DIRECTIONS} directions. {_figures.DOTS}"
    )


CLAIM = _claims.Claim(
    name="variance_flatness",
    paper="Feng & Tu 2021 (PNAS, doi 10.1073/pnas.2015617118)",
    statement="along principal directions the variance of the weights grows with the curvature",
    printed="the inverse relation of variance and flatness, without a table that is known",
    settings=_settings,
    run=_run,
    judge=_judge,
    draw=_draw,
)

"""Influence functions: whether they foresee what leaving a training example out does."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.stats
from jax.flatten_util import ravel_pytree

from benchmarks import _claims
from benchmarks._claims import Record, Settings, Verdict
from benchmarks.claims import _figures, _networks
from regjax import diagnostics

_DECAY = 0.01
_MODELS = ("softmax regression", "perceptron")
# The rank correlation from which the effect counts as foreseen, on the mean over the seeds.
_LEAST = {"softmax regression": 0.95, "perceptron": 0.8}
_SIZES = {"smoke": (60, 2, 4), "cpu": (1000, 10, 40)}
_WIDTH = 16


class Problem(NamedTuple):
    """Images, one-hot labels and initial weights in float64.

    Attributes:
      train: (inputs, targets). test: likewise.
      start: a list of layers (kernel, bias).
    """

    train: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]
    start: Any


def _settings(preset: str) -> Sequence[Settings]:
    size = "smoke" if preset == "smoke" else "cpu"
    seeds = range(2) if preset == "smoke" else range(3)
    return [
        {"model": model, "size": size, "seed": seed, "data": "digits"}
        for model in _MODELS
        for seed in seeds
    ]


def _run(settings: Settings) -> dict[str, Any]:
    num_train, num_test, num_left_out = _SIZES[settings["size"]]
    with jax.enable_x64(True):
        return _measured(settings["model"], settings["seed"], num_train, num_test, num_left_out)


def _measured(
    model: str, seed: int, num_train: int, num_test: int, num_left_out: int
) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    problem = _problem(random, model, num_train, num_test)
    params = _fitted(problem.start, problem.train, np.ones(num_train))
    found = diagnostics.influence(
        _loss, params, problem.train, problem.test, damping=_DECAY, tol=1e-6, chunk_size=250
    )
    foreseen = -np.asarray(found.value) / num_train
    # Half of those that matter most, half of all.
    order = np.argsort(-np.abs(foreseen).mean(0))
    first = order[: num_left_out // 2]
    rest = random.choice(order[len(first) :], num_left_out - len(first), replace=False)
    left_out = np.concatenate([first, rest])
    before = _losses(params, *problem.test)
    happened = []
    for i in left_out:
        weights = np.ones(num_train)
        weights[i] = 0
        happened.append(_losses(_fitted(params, problem.train, weights), *problem.test) - before)
    pairs = list(zip(np.stack(happened, 1), foreseen[:, left_out], strict=True))
    return {
        "rank_correlation": float(np.mean([scipy.stats.spearmanr(*pair)[0] for pair in pairs])),
        "correlation": float(np.mean([np.corrcoef(*pair)[0, 1] for pair in pairs])),
        "slope": float(np.mean([np.polyfit(pair[1], pair[0], 1)[0] for pair in pairs])),
        "converged": float(np.mean(found.converged)),
        "products": int(found.num_matvecs),
        "happened": [float(value) for value in pairs[0][0]],
        "foreseen": [float(value) for value in pairs[0][1]],
    }


def _problem(random: np.random.Generator, model: str, num_train: int, num_test: int) -> Problem:
    split = _networks.digits(1440)
    rows = random.choice(len(split.x), num_train, replace=False)
    tests = random.choice(len(split.x_test), num_test, replace=False)
    wide = lambda x, y: (jnp.asarray(x, float), jax.nn.one_hot(y, 10, dtype=float))
    sizes = [(64, 10)] if model == _MODELS[0] else [(64, _WIDTH), (_WIDTH, 10)]
    start = [
        (jnp.asarray(random.normal(size=size) / np.sqrt(size[0])), jnp.zeros(size[1]))
        for size in sizes
    ]
    train = wide(split.x[rows], split.y[rows])
    return Problem(train, wide(split.x_test[tests], split.y_test[tests]), start)


def _outputs(params: Any, inputs: jax.Array) -> jax.Array:
    for kernel, bias in params[:-1]:
        inputs = jnp.tanh(inputs @ kernel + bias[None])
    kernel, bias = params[-1]
    return inputs @ kernel + bias[None]


@jax.jit
def _losses(params: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    return -jnp.sum(targets * jax.nn.log_softmax(_outputs(params, inputs)), 1)


def _loss(params: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.mean(_losses(params, inputs, targets))


def _objective(vector: jax.Array, like: Any, weights: jax.Array, *batch: jax.Array) -> jax.Array:
    """The penalised loss of the examples that count, over the number of all."""
    params = ravel_pytree(like)[1](vector)
    penalty = _DECAY / 2 * jnp.sum(vector**2)
    return jnp.sum(weights * _losses(params, *batch)) / len(weights) + penalty


_value_and_grad = jax.jit(jax.value_and_grad(_objective))


def _fitted(start: Any, train: tuple[jax.Array, jax.Array], weights: np.ndarray) -> Any:
    """The minimum that descent reaches from some weights, up to a gradient of 1e-8."""
    vector, unravel = ravel_pytree(start)
    arguments = start, jnp.asarray(weights), *train

    def function(vector: np.ndarray) -> tuple[float, np.ndarray]:
        value, grad = _value_and_grad(jnp.asarray(vector), *arguments)
        return float(value), np.asarray(grad)

    options = {"maxiter": 5000, "maxfun": 10000, "gtol": 1e-8, "ftol": 1e-16, "maxcor": 30}
    found = scipy.optimize.minimize(
        function, np.asarray(vector), jac=True, method="L-BFGS-B", options=options
    )
    return unravel(jnp.asarray(found.x))


def _judge(records: Sequence[Record]) -> Sequence[Verdict]:
    verdicts = []
    for model in _MODELS:
        own = _claims.select(records, model=model)
        ranks, slopes = (_claims.numbers(own, name) for name in ("rank_correlation", "slope"))
        least = _LEAST[model]
        word = "reproduced" if ranks.mean() >= least else "not reproduced"
        verdicts.append(
            Verdict(
                f"{word} ({model})",
                f"rank correlation of the change foreseen and the change after retraining "
                f"{ranks.mean():.3f} ± {ranks.std(ddof=1):.3f} (mean and standard deviation over "
                f"seeds, each the mean over the test digits), {least:g} was asked for; slope "
                f"{slopes.mean():.2f} ± {slopes.std(ddof=1):.2f}",
            )
        )
    return verdicts


def _draw(records: Sequence[Record], figure: Any) -> str:
    figure.set_figheight(2.6)
    for axes, model in zip(figure.subplots(1, 2), _MODELS, strict=True):
        own = _claims.select(records, model=model)
        for i, record in enumerate(own):
            style = {**_figures.look(i), "linestyle": "", "alpha": 0.7}
            axes.plot(
                record["foreseen"], record["happened"], **style, label=f"seed {record['seed']}"
            )
        ends = np.asarray([f(record["foreseen"]) for record in own for f in (min, max)])
        axes.plot([ends.min(), ends.max()], [ends.min(), ends.max()], color="0.35", linewidth=0.9,
                  linestyle=(0, (4, 2)), label="foreseen = happened")  # fmt: skip
        axes.set_xscale("symlog", linthresh=1e-5)
        axes.set_yscale("symlog", linthresh=1e-5)
        ticks = [-1e-2, -1e-4, 0, 1e-4, 1e-2]
        axes.set_xticks(ticks)
        axes.set_yticks(ticks)
        axes.minorticks_off()
        axes.set_title(model, fontsize=8)
        rank = _claims.numbers(own, "rank_correlation").mean()
        _figures.note(axes, 0.97, 0.06, f"rank correlation {rank:.2f}", ha="right")
        _figures.label(axes, x="change of a test loss, foreseen", y="change after retraining")
    return (
        "Each point is one training example that is left out. Axes are linear within 0.00001 of "
        "0 and logarithmic beyond."
    )


CLAIM = _claims.Claim(
    name="influence",
    paper="Koh, Liang 2017 (arXiv:1703.04730)",
    statement="influence functions foresee how leaving a training example out changes a test loss",
    printed="scatter plots; the numbers beside them were not at hand",
    settings=_settings,
    run=_run,
    judge=_judge,
    draw=_draw,
)

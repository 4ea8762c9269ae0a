"""Batch curvature: how the largest eigenvalue and the largest stable rate follow the batch size."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import _claims
from benchmarks._claims import Record, Settings, Verdict
from benchmarks.claims import _figures, _networks
from regjax import curvature, schedules

_N = 1440
_DATA = {
    "digits": (lambda: _networks.digits(_N), 5),
    "fashion_mnist": (lambda: _networks.small_fashion_mnist(_N), 3),
}
_BATCHES = (4, 16, 32, 64, 128, 256, 720)
_RATE_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_STATES = (0, 60, 120)
# The laws are judged from this batch size on, and may be off by so much.
_LEAST_BATCH, _ALLOWED = 32, 0.25
# Where the rates are looked for from, a state whose crossover lies within the batch sizes.
_START = 60
# Smallest rate, and the factor between those of the coarse grid, which eight finer ones divide.
_LOWEST, _FACTOR, _GRID = {"sgd": 2e-3, "adam": 2e-4}, 2.5, 8
_OPTIMIZERS = {"sgd": optax.sgd, "adam": optax.adam}
_LAWS = {
    "additive law, noise along v1": ("additive", "noise_top"),
    "Wigner law, random direction": ("wigner", "noise_random"),
    "Marchenko-Pastur law, random direction": ("marchenko_pastur", "noise_random"),
}


class State(NamedTuple):
    """A network after some steps, and the curvature of its loss on all examples.

    Attributes:
      params: list of layers. split: the data. loss: on all training examples.
      facts: the largest eigenvalue and the noise powers, floats by name.
    """

    params: Any
    split: Any
    loss: float
    facts: dict[str, float]


def _settings(preset: str) -> Sequence[Settings]:
    if preset == "smoke":
        law = {"part": "laws", "data": "digits", "steps": _START, "batch": 64, "draws": 2}
        rate = {"part": "rates", "data": "digits", "optimizer": "sgd", "steps": 20, "orders": 1}
        return [{**law, "seed": seed} for seed in (0, 1)] + [
            {**rate, "batch": batch, "seed": seed} for batch in (4, 64) for seed in (0, 1)
        ]
    seeds = {data: range(num_seeds) for data, (_, num_seeds) in _DATA.items()}
    laws: list[Settings] = [
        {"part": "laws", "data": data, "steps": steps, "batch": batch, "draws": 10, "seed": seed}
        for data in _DATA
        for seed in seeds[data]
        for steps in _STATES
        for batch in _BATCHES
    ]
    rates = {"part": "rates", "steps": 200, "orders": 4}
    return laws + [
        {**rates, "data": data, "optimizer": name, "batch": batch, "seed": seed}
        for data in _DATA
        for seed in seeds[data]
        for name in _OPTIMIZERS
        for batch in _RATE_BATCHES
    ]


def _run(settings: Settings) -> dict[str, float]:
    data, seed, batch = settings["data"], settings["seed"], settings["batch"]
    if settings["part"] == "laws":
        state = _state(data, settings["steps"], seed)
        random = np.random.default_rng([seed, batch])
        found = []
        for _ in range(settings["draws"]):
            rows = random.choice(_N, batch, replace=False)
            part = state.split._replace(x=state.split.x[rows], y=state.split.y[rows])
            found.append(_networks.sharpness(state.params, part, seed))
        values, residuals = np.asarray(found).T
        return state.facts | {
            "measured": float(values.mean()),
            "of_a_draw": float(values.std(ddof=1)),
            "residual": float(np.max(residuals / values)),
        }
    state = _state(data, _START, seed)
    return {"rate": _largest_stable(settings, state), "crossover": state.facts["crossover"]}


@functools.cache
def _state(data: str, num_steps: int, seed: int) -> State:
    split = _DATA[data][0]()
    params = _networks.he_network((split.x.shape[1], 64, 64, 10), jax.random.key(seed))
    trained = _networks.train(
        params, _descent(), split, batch_size=64, num_steps=num_steps, seed=seed
    )
    hessian = curvature.hessian(_networks.loss_fn, trained.params, split.x, split.y)
    top = curvature.top_eigenpairs(hessian, 1, key=jax.random.key(seed), search=False)
    random = np.random.default_rng(seed)
    directions = {
        "top": jax.tree.map(lambda leaf: leaf[0], top.vectors),
        "random": jax.tree.map(
            lambda leaf: jnp.asarray(random.normal(size=leaf.shape), leaf.dtype), trained.params
        ),
    }
    noise = {
        name: curvature.hessian_noise_power(
            _networks.loss_fn, trained.params, direction, split.x, split.y
        )
        for name, direction in directions.items()
    }
    largest = float(top.values[0])
    facts = {
        "largest": largest,
        "num_params": float(hessian.shape[0]),
        "noise_top": float(noise["top"].value),
        "noise_top_error": float(noise["top"].standard_error),
        "noise_random": float(noise["random"].value),
        "crossover": float(noise["top"].value) / largest**2,
    }
    return State(trained.params, split, trained.loss, facts)


@functools.cache
def _descent() -> Any:
    return optax.sgd(0.05, momentum=0.9)


def _largest_stable(settings: Settings, state: State) -> float:
    """The largest rate after whose steps the loss is below its start, geometric mean of orders."""
    random = np.random.default_rng([settings["seed"], settings["batch"]])
    found = []
    for _ in range(settings["orders"]):
        draw = functools.partial(random.choice, _N, settings["batch"], replace=False)
        rows = np.stack([draw() for _ in range(settings["steps"])])
        found.append(_largest_of_order(settings["optimizer"], state, rows))
    return float(np.exp(np.mean(np.log(found))))


def _largest_of_order(name: str, state: State, rows: np.ndarray) -> float:
    """The last rate of a grid before the first that is not stable, then of a finer one."""
    split, stable = state.split, _LOWEST[name] / _FACTOR
    for factor in (_FACTOR, _FACTOR ** (1 / (_GRID + 1))):
        rates = jnp.asarray(stable * factor ** np.arange(1, _GRID + 1), jnp.float32)
        losses = _final_losses(_OPTIMIZERS[name], rates, state.params, split.x, split.y, rows)
        num_stable = int(np.cumprod(np.asarray(losses) < state.loss).sum())
        stable = stable * factor**num_stable
    return stable


@functools.partial(jax.jit, static_argnums=0)
def _final_losses(
    make: Callable[..., Any], rates: Any, params: Any, x: Any, y: Any, rows: Any
) -> jax.Array:
    def final(rate: jax.Array) -> jax.Array:
        tx = make(rate)

        def step(carry: Any, batch: jax.Array) -> Any:
            params, state = carry
            grads = jax.grad(_networks.loss_fn)(params, x[batch], y[batch])
            updates, state = tx.update(grads, state)
            return (optax.apply_updates(params, updates), state), None

        (last, _), _ = jax.lax.scan(step, (params, tx.init(params)), rows)
        return _networks.loss_fn(last, x, y)

    return jax.vmap(final)(rates)


def _predicted(law: str, noise: str, records: Sequence[Record], batches: Any) -> np.ndarray:
    """What a law says, the mean over the records of one state."""
    functions: dict[str, Callable[[int], Any]] = {
        "additive": lambda _: curvature.additive_outlier,
        "wigner": lambda _: curvature.wigner_outlier,
        "marchenko_pastur": lambda num_params: functools.partial(
            curvature.marchenko_pastur_outlier, num_params=num_params
        ),
    }
    values = [
        curvature.batch_extreme_eigenvalues(
            record["largest"], 0.0,
            noise_power=record[noise], batch_size=jnp.asarray(batches, jnp.float32),
            num_examples=_N, law=functions[law](int(record["num_params"])),
        ).largest
        for record in records
    ]  # fmt: skip
    return np.mean(values, axis=0)


def _judge(records: Sequence[Record]) -> list[Verdict]:
    verdicts = []
    for data, own in _claims.groups(records, "data").items():
        laws = [r for r in _claims.select(own, part="laws") if r["batch"] >= _LEAST_BATCH]
        verdicts += [_judge_law(data, title, laws) for title in _LAWS]
        rates = _claims.select(own, part="rates")
        verdicts += [
            _judge_rates(data, name, some)
            for name, some in _claims.groups(rates, "optimizer").items()
        ]
    return verdicts


def _judge_law(data: str, title: str, records: Sequence[Record]) -> Verdict:
    """Whether the law is near enough at all states and batches, and says more than no law."""
    law, noise = _LAWS[title]
    found = []
    for steps, at in _claims.groups(records, "steps").items():
        for batch, some in _claims.groups(at, "batch").items():
            measured = _claims.numbers(some, "measured")
            predicted = float(_predicted(law, noise, some, batch))
            ratio = predicted / measured.mean()
            flat = _claims.numbers(some, "largest").mean() / measured.mean()
            where = (
                f"{predicted:.2f} against {measured.mean():.2f} ± {_spread(measured):.2f} after "
            )
            found.append((abs(ratio - 1), abs(flat - 1), f"{where}{steps} steps, batch {batch}"))
    worst, flat = max(found)[0], max(flat for _, flat, _ in found)
    evidence = (
        f"off by {worst:.0%} at the worst of batches from {_LEAST_BATCH} on ({max(found)[2]}, mean "
        f"and standard error over seeds), {_ALLOWED:.0%} was allowed; the eigenvalue of all "
        f"examples, as no law at all, is off by {flat:.0%}"
    )
    word = _claims.word(worst <= _ALLOWED) if flat > _ALLOWED else "not testable at this size"
    return Verdict(f"{word} ({data}): {title}", evidence)


def _judge_rates(data: str, name: str, records: Sequence[Record]) -> Verdict:
    """Slopes of the largest stable rate: Adam's over all batches, SGD's below and above."""
    crossover = float(_claims.numbers(records, "crossover").mean())
    sizes = sorted({record["batch"] for record in records})
    if name == "adam":
        parts = {"all batches": sizes}
        title = "Adam's largest stable rate grows as the square root (0.5 ± 0.15)"
    else:
        title = "SGD's largest stable rate grows below the crossover (slope 0.7 or more)"
        title += " and saturates above (0.3 or less)"
        parts = {
            "below": [size for size in sizes if size < crossover],
            "above": [size for size in sizes if size > crossover],
        }
    if min(map(len, parts.values())) < 2:
        evidence = f"the crossover, {crossover:.0f}, leaves too few batch sizes on one side"
        return Verdict(f"not testable at this size ({data}): {title}", evidence)
    slopes = {part: _slopes(records, own) for part, own in parts.items()}
    means = {part: float(values.mean()) for part, values in slopes.items()}
    if name == "adam":
        holds = abs(means["all batches"] - 0.5) <= 0.15
    else:
        holds = means["below"] >= 0.7 and means["above"] <= 0.3
    text = ", ".join(f"{means[p]:.2f} ± {_spread(v):.2f} {p}" for p, v in slopes.items())
    evidence = f"log-log slope {text} (mean and standard error over seeds)"
    if name != "adam":
        evidence += f"; crossover {crossover:.0f}"
    return Verdict(f"{_claims.word(holds)} ({data}): {title}", evidence)


def _slopes(records: Sequence[Record], sizes: Sequence[int]) -> np.ndarray:
    found = []
    for own in _claims.groups(records, "seed").values():
        rates = [_claims.select(own, batch=size)[0]["rate"] for size in sizes]
        found.append(np.polyfit(np.log(sizes), np.log(rates), 1)[0])
    return np.asarray(found)


def _spread(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def _draw(records: Sequence[Record], figure: Any) -> str:
    sets = list(_claims.groups(records, "data"))
    figure.set_figheight(2.1 * len(sets))
    curve = np.geomspace(4, 720, 50)
    names: dict[str, dict[str, Any]] = {
        "additive law, noise along v1": {"linewidth": 1.2},
        "Wigner law, noise along a random direction": {"linewidth": 4, "alpha": 0.35},
        "Marchenko-Pastur law, the same": {"linewidth": 1.2, "linestyle": "--"},
    }
    for data, (laws, rates) in zip(sets, figure.subplots(len(sets), 2, squeeze=False), strict=True):
        own = _claims.select(records, data=data, part="laws", steps=_START)
        sizes = sorted(_claims.groups(own, "batch"))
        values = [_claims.numbers(_claims.select(own, batch=s), "measured") for s in sizes]
        laws.errorbar(
            sizes, [v.mean() for v in values], [v.std(ddof=1) for v in values], fmt="ko",
            markersize=3, linewidth=1, capsize=2, label="measured",
        )  # fmt: skip
        seeds = _claims.select(own, batch=own[0]["batch"])
        for color, (text, style), (law, noise) in zip(
            _figures.COLORS, names.items(), _LAWS.values(), strict=False
        ):
            predicted = _predicted(law, noise, seeds, curve)
            laws.plot(curve, predicted, color=color, label=text, **style)
        _figures.logarithmic(laws, "xy")
        laws.set_title(f"{_figures.NAMES[data]}, after {_START} steps", fontsize=8)
        _figures.label(laws, x="batch size", y="largest eigenvalue\nof a batch's Hessian")
        _draw_rates(rates, _claims.select(records, data=data, part="rates"))
        rates.set_title(_figures.NAMES[data], fontsize=8)
    return "Points: means over the seeds; bars: their standard deviation."


def _draw_rates(axes: Any, records: Sequence[Record]) -> None:
    """With what the claim says of them, through their geometric mean."""
    for i, (name, own) in enumerate(_claims.groups(records, "optimizer").items(), 3):
        sizes = np.asarray(sorted(_claims.groups(own, "batch")), np.float64)
        values = [_claims.numbers(_claims.select(own, batch=s), "rate") for s in sizes]
        title = {"sgd": "SGD", "adam": "Adam"}[name]
        axes.errorbar(
            sizes, [v.mean() for v in values], [v.std(ddof=1) for v in values], capsize=2,
            label=f"largest stable rate of {title}", **_figures.look(i),
        )  # fmt: skip
        shape, claimed = np.sqrt(sizes), "root of the batch size"
        if name == "sgd":
            crossover = float(_claims.numbers(own, "crossover").mean())
            rule = schedules.saturating_batch_size_scaling(
                1.0, float(sizes[0]), crossover=crossover
            )
            shape, claimed = np.asarray(rule(jnp.asarray(sizes))), "linear, then saturated"
        level = np.exp(np.mean([np.log(v).mean() for v in values]) - np.mean(np.log(shape)))
        axes.plot(
            sizes, level * shape, color=_figures.COLORS[i], linewidth=1, linestyle=":",
            label=f"claimed for {title}: {claimed} (height fitted)",
        )  # fmt: skip
    _figures.logarithmic(axes, "xy")
    _figures.label(axes, x="batch size", y="largest stable\nlearning rate")


CLAIM = _claims.Claim(
    name="batch_curvature",
    paper="Granziol, Zohren, Roberts 2022 (arXiv:2006.09092)",
    statement="random matrix theory predicts a batch Hessian's largest eigenvalue; the largest "
    "stable rate is linear in the batch for SGD, a square root for Adam",
    printed="VGG-16, CIFAR-100: largest eigenvalue 11.41 of all examples, 80.15 at batch 128; SGD "
    "stable with rate 0.01 B / 128 from 16 to 512, Adam with 0.0004 sqrt(B / 128) down to 16",
    settings=_settings,
    run=_run,
    judge=_judge,
    draw=_draw,
)

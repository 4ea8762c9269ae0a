"""The spectral controller: rate and momentum from Lanczos against SGD with a tuned rate."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import _claims
from benchmarks._claims import Record, Settings, Verdict
from benchmarks.claims import _figures, _networks
from regjax import schedules, transforms

# Data, number of training images, held-out images that choose the rate, and seeds.
_DATA = {
    "digits": (_networks.digits, 900, 300, 5),
    "fashion_mnist": (_networks.small_fashion_mnist, 3000, 2000, 3),
}
_RATES = (0.003, 0.01, 0.03, 0.06, 0.1, 0.2, 0.4)
_BATCH, _MOMENTUM, _SUBSET, _INITIAL = 64, 0.9, 256, 0.01
# The paper's, for all.
_DECAY = 5e-4
# The last reads the curvature of the batch at hand instead of a fixed subset.
_TITLES = {
    "nesterov": "controller, Nesterov",
    "polyak": "controller, Polyak",
    "nesterov_batch": "controller, batch curvature",
}
# Below this accuracy a run has lost what it had learned: one in ten is chance.
_LOST = 0.5


def _settings(preset: str) -> Sequence[Settings]:
    if preset == "smoke":
        return [
            {"data": "digits", "method": method, "rate": rate, "epochs": 2, "seed": seed}
            for method, rate in (("sgd", 0.01), ("sgd", 0.1), ("nesterov", 0.0))
            for seed in (0, 1)
        ]
    methods = [("sgd", rate) for rate in _RATES] + [(name, 0.0) for name in _TITLES]
    return [
        {"data": data, "method": method, "rate": rate, "epochs": 30, "seed": seed}
        for data, (_, _, _, num_seeds) in _DATA.items()
        for method, rate in methods
        for seed in range(num_seeds)
    ]


def _run(settings: Settings) -> dict[str, float]:
    data, method, seed = settings["data"], settings["method"], settings["seed"]
    load, num_train, num_held_out, _ = _DATA[data]
    split = load(num_train)
    tx = _descent(settings["rate"]) if method == "sgd" else _controller(data, method)
    trained = _networks.train(
        _networks.he_network((split.x.shape[1], 64, 64, 10), jax.random.key(seed)),
        tx,
        split,
        batch_size=_BATCH,
        num_steps=settings["epochs"] * (num_train // _BATCH),
        seed=seed,
    )
    held_out = split._replace(
        x_test=split.x_test[:num_held_out], y_test=split.y_test[:num_held_out]
    )
    rest = split._replace(x_test=split.x_test[num_held_out:], y_test=split.y_test[num_held_out:])
    found = {
        "accuracy": _networks.accuracy(trained.params, rest),
        "held_out_accuracy": _networks.accuracy(trained.params, held_out),
        "loss": trained.loss,
        "learned_rate": settings["rate"],
        "learned_momentum": _MOMENTUM,
    }
    if method != "sgd":
        found["learned_rate"] = float(trained.state[-1].learning_rate)
        found["learned_momentum"] = float(trained.state[-1].momentum)
    return found


@functools.cache
def _any_descent() -> Any:
    def make(learning_rate: Any) -> Any:
        descent = optax.sgd(learning_rate, momentum=_MOMENTUM, nesterov=True)
        return optax.chain(optax.add_decayed_weights(_DECAY), descent)

    return optax.inject_hyperparams(make)(learning_rate=0.0)


@functools.cache
def _descent(rate: float) -> Any:
    """The same program for each rate: the rate is in the state."""
    tx = _any_descent()

    def init(params: Any) -> Any:
        state = tx.init(params)
        return state._replace(hyperparams={**state.hyperparams, "learning_rate": jnp.float32(rate)})

    return optax.GradientTransformationExtraArgs(init, tx.update)


@functools.cache
def _controller(data: str, method: str) -> Any:
    """The controller, which looks once an epoch at the first images of the training set."""
    load, num_train, _, _ = _DATA[data]
    split = load(num_train)
    x, y = split.x[:_SUBSET], split.y[:_SUBSET]
    is_polyak = method == "polyak"
    controller = transforms.spectral_controller(
        key=jax.random.key(0),
        initial_learning_rate=_INITIAL,
        every=num_train // _BATCH,
        rule=schedules.polyak_rule if is_polyak else schedules.nesterov_rule,
        nesterov=not is_polyak,
    )
    tx = optax.chain(optax.add_decayed_weights(_DECAY), controller)
    if method == "nesterov_batch":
        return tx
    gradient = lambda params: jax.grad(_networks.loss_fn)(params, x, y)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        return tx.update(updates, state, params, curvature_grad_fn=gradient, **extra)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _judge(records: Sequence[Record]) -> list[Verdict]:
    verdicts = []
    for data, own in _claims.groups(records, "data").items():
        best, tuned = _tuned(own)
        nesterov = _claims.select(own, method="nesterov")
        difference = _difference(nesterov, tuned)
        worst = min(
            _claims.numbers(some, "accuracy").mean()
            for some in _claims.groups(_claims.select(own, method="sgd"), "rate").values()
        )
        verdicts.append(
            Verdict(
                f"{_claims.word(difference[0] >= -0.01)} ({data}): the controller is as good as "
                "tuned SGD",
                f"test accuracy {_accuracy(nesterov)} against {_accuracy(tuned)} at the rate "
                f"{best:g}, the best of the grid on held-out images: {difference[0]:+.4f} ± "
                f"{difference[1]:.4f}, 0.01 less was allowed; worst rate {worst:.4f}. "
                f"{_end(nesterov)}",
            )
        )
        polyak = _claims.select(own, method="polyak")
        if polyak:
            gain = _difference(nesterov, polyak)
            verdicts.append(
                Verdict(
                    f"{_claims.word(gain[0] > 2 * gain[1])} ({data}): Nesterov's rule is better "
                    "than Polyak's",
                    f"gain {gain[0]:+.4f} ± {gain[1]:.4f}. Polyak: {_end(polyak)}",
                )
            )
        batch = _claims.select(own, method="nesterov_batch")
        if batch:
            gap = _difference(batch, tuned)
            verdicts.append(
                Verdict(
                    f"{_claims.word(gap[0] >= -0.01)} ({data}): with the curvature of the batch at "
                    "hand the controller is as good as tuned SGD",
                    f"not the paper's: {gap[0]:+.4f} ± {gap[1]:.4f} against tuned SGD. "
                    f"{_end(batch)}",
                )
            )
    return verdicts


def _tuned(records: Sequence[Record]) -> tuple[float, list[Record]]:
    """The rate with the best mean accuracy on the held-out images, and its runs."""
    rates = _claims.groups(_claims.select(records, method="sgd"), "rate")
    best = max(rates, key=lambda r: _claims.numbers(rates[r], "held_out_accuracy").mean())
    return best, rates[best]


def _difference(one: Sequence[Record], other: Sequence[Record]) -> tuple[float, float]:
    values = [_claims.numbers(records, "accuracy") for records in (one, other)]
    return _claims.mean_and_error(values[0] - values[1])


def _accuracy(records: Sequence[Record]) -> str:
    return f"{_claims.numbers(records, 'accuracy').mean():.4f}"


def _end(records: Sequence[Record]) -> str:
    """What the runs end with."""
    rates, momenta = (
        np.sort(_claims.numbers(records, name)) for name in ("learned_rate", "learned_momentum")
    )
    num_lost = int(np.sum(_claims.numbers(records, "accuracy") < _LOST))
    return (
        f"{num_lost} of {len(records)} runs end below {_LOST}; last rates {rates[0]:.3f} to "
        f"{rates[-1]:.3f}, momenta {momenta[0]:.2f} to {momenta[-1]:.2f}"
    )


def _draw(records: Sequence[Record], figure: Any) -> str:
    names = {"accuracy": "test accuracy"}
    for axes, own, _ in _figures.panels(figure, records, names, height=2.3):
        sgd = _claims.groups(_claims.select(own, method="sgd"), "rate")
        values = [_claims.numbers(part, "accuracy") for part in sgd.values()]
        axes.errorbar(
            list(sgd), [v.mean() for v in values], [v.std(ddof=1) for v in values], capsize=2,
            label="SGD, momentum 0.9, at fixed rates", **_figures.look(0),
        )  # fmt: skip
        for i, (method, title) in enumerate(_TITLES.items(), 1):
            some = _claims.select(own, method=method)
            if some:
                rates, accuracies = (
                    _claims.numbers(some, name) for name in ("learned_rate", "accuracy")
                )
                style = {**_figures.look(i), "linestyle": "", "markersize": 5, "alpha": 0.8}
                axes.plot(rates, accuracies, label=title, **style)
                axes.axhline(
                    accuracies.mean(), color=style["color"], linewidth=0.9, linestyle=(0, (4, 2)),
                    label=f"mean of {title}",
                )  # fmt: skip
        axes.set_ylim(0, 1.05)
        _figures.logarithmic(axes, "x")
        _figures.label(axes, x="learning rate (of a controller: its last)")
    return (
        "SGD: means over the seeds, bars: their standard deviation. Controllers: one point per "
        "seed. The claim is that they come up to the best fixed rate."
    )


CLAIM = _claims.Claim(
    name="spectral_controller",
    paper="Granziol, Zohren, Roberts 2022 (arXiv:2006.09092)",
    statement="rate and momentum from a few Lanczos steps train as well as SGD with a tuned rate",
    printed="PreResNet-110, CIFAR-100, validation error: Nesterov rule .227, tuned SGD with "
    "averaging .237, Polyak rule .30; learned Nesterov rates .05-.12, momenta .78-.91",
    settings=_settings,
    run=_run,
    judge=_judge,
    draw=_draw,
)

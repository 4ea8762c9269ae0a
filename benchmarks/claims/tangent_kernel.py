"""The tangent kernel changes fast in the first epochs and slowly later, and learns the task.

Perceptrons of 300 images, so that an epoch is 10 steps where the paper's have hundreds. The kernel
is the sum over the logits, of the training images and 300 test images; as a classifier it is ridge
regression on one-hot classes with a ridge of 1e-3 of the mean eigenvalue.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import _claims
from benchmarks._claims import Record, Settings, Verdict
from benchmarks.claims import _figures, _networks
from regjax import curvature

_HIDDEN, _BATCH, _RATE, _NUM_TEST, _RIDGE = (64, 64), 30, 0.05, 300, 1e-3
_TX = optax.sgd(_RATE, momentum=0.9)
_EPOCHS = (0, 1, 2, 4, 8, 16, 32, 64)
# The first epochs and the last ones; "much faster" is by this factor.
_EARLY, _LATE, _FASTER = (0, 2), (32, 64), 5.0
_DATA: dict[str, tuple[Callable[[], _networks.Split], int]] = {
    "digits": (_networks.digits, 5),
    "fashion_mnist": (_networks.small_fashion_mnist, 3),
}


def _settings(preset: str) -> Sequence[Settings]:
    data = {"digits": 2} if preset == "smoke" else {name: n for name, (_, n) in _DATA.items()}
    return [{"data": name, "seed": seed} for name, n in data.items() for seed in range(n)]


def _run(settings: Settings) -> dict[str, float]:
    split, seed = _DATA[settings["data"]][0](), settings["seed"]
    sizes = (split.x.shape[1], *_HIDDEN, 10)
    params = _networks.he_network(sizes, jax.random.key(seed))
    state, epochs = _TX.init(params), _networks.epochs(len(split.y), _BATCH, seed)
    found: dict[str, float] = {}
    kernels: dict[int, jax.Array] = {}
    for epoch in range(_EPOCHS[-1] + 1):
        if epoch in _EPOCHS:
            kernel, test_kernel = _kernels(params, split.x, split.x_test[:_NUM_TEST])
            kernels[epoch] = kernel
            found |= {f"{name}_{epoch}": value for name, value in _looked(kernel, split).items()}
            found[f"kernel_accuracy_{epoch}"] = _accuracy(kernel, test_kernel, split)
            right = jnp.argmax(_networks.outputs(params, split.x_test[:_NUM_TEST]), 1)
            found[f"accuracy_{epoch}"] = float(jnp.mean(right == split.y_test[:_NUM_TEST]))
        params, state, _ = _networks.epoch(
            _TX.update, params, state, split.x, split.y, next(epochs)
        )
    pairs = itertools.pairwise(_EPOCHS)
    for start, stop in (*pairs, _EARLY, (0, _EPOCHS[-1])):
        distance = 1 - float(curvature.kernel_alignment(kernels[start], kernels[stop]))
        found[f"distance_{start}_{stop}"] = distance
    return found


@jax.jit
def _kernels(params: Any, x: jax.Array, x_test: jax.Array) -> tuple[jax.Array, jax.Array]:
    compute = functools.partial(
        curvature.neural_tangent_kernel, _networks.outputs, params, output_axes="trace"
    )
    return compute(x), compute(x_test, x)


def _looked(kernel: jax.Array, split: _networks.Split) -> dict[str, float]:
    """Alignment with the classes, and how few directions hold the kernel."""
    classes = jax.nn.one_hot(split.y, 10)
    values = np.linalg.eigvalsh(np.asarray(kernel, np.float64))
    return {
        "alignment": float(curvature.target_alignment(kernel, classes, centered=True)),
        "top_share": float(values[-1] / values.sum()),
        "directions": float(values.sum() ** 2 / np.sum(values**2)),
    }


def _accuracy(kernel: jax.Array, test_kernel: jax.Array, split: _networks.Split) -> float:
    """Share of the test images that the kernel's ridge regression classifies rightly."""
    double = np.asarray(kernel, np.float64)
    ridge = _RIDGE * np.trace(double) / len(double)
    classes = np.eye(10)[np.asarray(split.y)]
    weights = np.linalg.solve(double + ridge * np.eye(len(double)), classes)
    guessed = np.argmax(np.asarray(test_kernel, np.float64) @ weights, 1)
    return float(np.mean(guessed == np.asarray(split.y_test[: len(guessed)])))


def _judge(records: Sequence[Record]) -> list[Verdict]:
    return [
        verdict
        for data, own in _claims.groups(records, "data").items()
        for verdict in (_on_speed(data, own), _on_accuracy(data, own), _on_alignment(data, own))
    ]


def _on_speed(data: str, records: Sequence[Record]) -> Verdict:
    speeds = [
        _claims.numbers(records, f"distance_{start}_{stop}") / (stop - start)
        for start, stop in (_EARLY, _LATE)
    ]
    ratio, error = _claims.mean_and_error(np.log(speeds[0] / speeds[1]))
    holds = ratio - 2 * error > np.log(_FASTER)
    total = _claims.numbers(records, f"distance_0_{_EPOCHS[-1]}").mean()
    return Verdict(
        f"{_claims.word(holds)} ({data}): fast first, slow later",
        f"1 - cosine of the kernels per epoch: {speeds[0].mean():.3g} in epochs {_EARLY[0]} to "
        f"{_EARLY[1]}, {speeds[1].mean():.2g} in {_LATE[0]} to {_LATE[1]}; ratio "
        f"{np.exp(ratio):.3g} (a factor of {np.exp(error):.2f} is one standard error); from the "
        f"first to the last {total:.2f}",
    )


def _on_accuracy(data: str, records: Sequence[Record]) -> Verdict:
    last = _EPOCHS[-1]
    first, later, at_end = (
        _claims.numbers(records, f"kernel_accuracy_{epoch}") for epoch in (0, _EPOCHS[3], last)
    )
    gain, error = _claims.mean_and_error(later - first)
    network = _claims.numbers(records, f"accuracy_{last}")
    return Verdict(
        f"{_claims.word(gain > 2 * error)} ({data}): soon a better kernel than the first",
        f"test accuracy of the kernel: {first.mean():.3f} at the start, {later.mean():.3f} after "
        f"{_EPOCHS[3]} epochs (gain {gain:+.3f} ± {error:.3f}), {at_end.mean():.3f} after {last}; "
        f"of the network then {network.mean():.3f}",
    )


def _on_alignment(data: str, records: Sequence[Record]) -> Verdict:
    first, last = (_claims.numbers(records, f"alignment_{epoch}") for epoch in (0, _EPOCHS[-1]))
    gain, error = _claims.mean_and_error(last - first)
    shares = [_claims.numbers(records, f"top_share_{e}").mean() for e in (0, _EPOCHS[-1])]
    counts = [_claims.numbers(records, f"directions_{e}").mean() for e in (0, _EPOCHS[-1])]
    return Verdict(
        f"{_claims.word(gain > 2 * error)} ({data}): aligned with the classes",
        f"centred alignment {first.mean():.3f} to {last.mean():.3f} (gain {gain:+.3f} ± "
        f"{error:.3f}); the top eigenvalue's share of the trace {shares[0]:.2f} to "
        f"{shares[1]:.2f}, (sum)^2 / sum of squares of the eigenvalues {counts[0]:.1f} to "
        f"{counts[1]:.1f}",
    )


def _draw(records: Sequence[Record], figure: Any) -> str:
    names = {
        "distance": "change of the kernel per\nepoch (1 - cosine)",
        "accuracy": "test accuracy",
        "alignment": "alignment of the kernel\nwith the classes",
    }
    for axes, own, name in _figures.panels(figure, records, names):
        epochs = [epoch for epoch in _EPOCHS if f"accuracy_{epoch}" in own[0]]
        if name == "distance":
            spans = list(itertools.pairwise(epochs))
            for i, record in enumerate(own):
                each = [record[f"distance_{a}_{b}"] / (b - a) for a, b in spans]
                axes.plot(range(len(spans)), each, **_figures.look(i), alpha=0.8)
            axes.set_xticks(range(len(spans)), [f"{a}-{b}" for a, b in spans], rotation=60)
            _figures.logarithmic(axes)
            _figures.label(axes, x="between these epochs")
            continue
        lines = {"kernel_accuracy": "regression with the kernel of that epoch",
                 "accuracy": "the network itself"}  # fmt: skip
        for i, (what, text) in enumerate(lines.items() if name == "accuracy" else [(name, None)]):
            values = [_claims.numbers(own, f"{what}_{epoch}") for epoch in epochs]
            axes.errorbar(
                range(len(epochs)), [v.mean() for v in values], [v.std(ddof=1) for v in values],
                capsize=2, label=text, **_figures.look(i),
            )  # fmt: skip
        axes.set_xticks(range(len(epochs)), [str(epoch) for epoch in epochs])
        _figures.label(axes, x="epoch")
    return (
        "Left: one line per seed. Middle and right: means over the seeds; bars: their standard "
        "deviation. The kernel is better than the first one if its accuracy rises."
    )


CLAIM = _claims.Claim(
    name="tangent_kernel",
    paper="Fort et al. 2020 (arXiv:2010.15110)",
    statement="the tangent kernel changes fast in the first epochs and slowly afterwards, and soon "
    "is a better kernel than the first one",
    printed="the abstract: a chaotic transient of 2 to 3 epochs in which the kernel changes "
    "rapidly and learns features of the data, then slower change; convolutional nets on CIFAR",
    settings=_settings,
    run=_run,
    judge=_judge,
    draw=_draw,
)

"""GradInit: after it, a network trains alike from wrongly scaled initial weights."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

from benchmarks import _claims
from benchmarks._claims import Record, Settings, Verdict
from benchmarks.claims import _figures, _networks
from regjax import initializers

_METHODS = ("plain", "gradinit")
_SCALES = (0.5, 1.0, 2.0)
_BOUND, _STEP, _RATE, _ITERATIONS, _HALF = 1.0, 0.1, 2e-2, 300, 64
_FALL, _SLACK = 10, 1.1  # what is asked of the spread and of the norm
_TRAIN_RATE, _MOMENTUM, _BATCH, _CLIP = 0.05, 0.9, 64, 1.0
_DATA: dict[str, tuple[Callable[[], _networks.Split], int]] = {
    "digits": (lambda: _networks.digits(1440), 5),
    "fashion_mnist": (_networks.fashion_mnist, 3),
}


def _settings(preset: str) -> Sequence[Settings]:
    iterations = 20 if preset == "smoke" else _ITERATIONS
    data = {"digits": 2} if preset == "smoke" else {name: n for name, (_, n) in _DATA.items()}
    return [
        {"data": name, "scale": scale, "method": method, "seed": seed, "iterations": iterations}
        for name, num_seeds in data.items()
        for scale in _SCALES
        for method in _METHODS
        for seed in range(num_seeds)
    ]


def _run(settings: Settings) -> dict[str, float]:
    split, seed = _DATA[settings["data"]][0](), settings["seed"]
    params = _networks.he_network((split.x.shape[1], *[64] * 6, 10), jax.random.key(seed))
    for layer in params:
        layer["kernel"] = settings["scale"] * layer["kernel"]
    first = _norm(params, split)
    if settings["method"] == "gradinit":
        params = initializers.gradinit(
            _networks.loss_fn,
            params,
            _batches(split, seed, settings["iterations"]),
            gradient_norm_bound=_BOUND,
            learning_rate=_RATE,
            first_step_learning_rate=_STEP,
        ).params
    trained = _networks.train(
        params,
        _CHAIN,
        split,
        batch_size=_BATCH,
        num_steps=len(split.y) // _BATCH,
        seed=seed,
    )
    return {
        "accuracy": _networks.accuracy(trained.params, split),
        "first_norm": first,
        "norm": _norm(params, split),
        "loss": trained.loss,
    }


_CHAIN = optax.chain(optax.clip_by_global_norm(_CLIP), optax.sgd(_TRAIN_RATE, momentum=_MOMENTUM))


def _norm(params: Any, split: _networks.Split) -> float:
    """Norm of the gradient on test images, as many as an iteration joins."""
    part = slice(0, 2 * _HALF)
    grads = jax.grad(_networks.loss_fn)(params, split.x_test[part], split.y_test[part])
    return float(optax.tree.norm(grads))


def _batches(split: _networks.Split, seed: int, iterations: int) -> tuple[jax.Array, jax.Array]:
    random = np.random.default_rng(seed)
    rows = np.stack(
        [random.choice(len(split.y), 3 * _HALF, replace=False) for _ in range(iterations)]
    ).reshape(iterations, 3, _HALF)
    return split.x[rows], split.y[rows]


def _judge(records: Sequence[Record]) -> list[Verdict]:
    verdicts = []
    for data, own in _claims.groups(records, "data").items():
        spreads, texts = {}, []
        for method, part in _claims.groups(own, "method").items():
            means = {
                scale: _claims.numbers(group, "accuracy").mean()
                for scale, group in _claims.groups(part, "scale").items()
            }
            spreads[method] = max(means.values()) - min(means.values())
            shown = ", ".join(f"{mean:.3f} at {scale:g}" for scale, mean in means.items())
            texts.append(f"{method} {shown}")
        ours = _claims.select(own, method="gradinit")
        norms = _claims.numbers(ours, "norm")
        fall = spreads["plain"] / spreads["gradinit"]
        verdicts.append(
            Verdict(
                f"{_claims.word(fall >= _FALL)} ({data}): the spread over the initial scales falls "
                "tenfold",
                f"test accuracy after one epoch, {'; '.join(texts)}: spread {spreads['plain']:.3f} "
                f"to {spreads['gradinit']:.3f}, {fall:.1f} times smaller",
            )
        )
        is_kept = bool(np.all(norms < _SLACK * _BOUND))
        verdicts.append(
            Verdict(
                f"{_claims.word(is_kept)} ({data}): the gradient norm keeps its bound on held-out "
                "images",
                f"mean {norms.mean():.2f}, largest {norms.max():.2f}, bound {_BOUND:g}; before "
                f"{_claims.numbers(ours, 'first_norm').max():.3g} at most",
            )
        )
        pair = [
            _claims.numbers(_claims.select(own, method=method, scale=1.0), "accuracy")
            for method in _METHODS
        ]
        gain, error = _claims.mean_and_error(pair[1] - pair[0])
        verdicts.append(
            Verdict(
                f"{_claims.word(gain > 2 * error)} ({data}): better than He's scale",
                f"{pair[0].mean():.3f} to {pair[1].mean():.3f}, {gain:+.3f} ± {error:.3f}",
            )
        )
    return verdicts


def _draw(records: Sequence[Record], figure: Any) -> str:
    words = {"plain": "He's initialisation, scaled", "gradinit": "after GradInit"}
    names = {
        "accuracy": "test accuracy\nafter one epoch",
        "norm": "gradient norm at the\nstart, held out",
    }
    scales = sorted(_claims.groups(records, "scale"))
    for axes, own, name in _figures.panels(figure, records, names):
        lines = {text: _claims.select(own, method=method) for method, text in words.items()}
        _figures.sweeps(axes, lines, "scale", name, values=scales)
        _figures.label(axes, x="initial scale / He's scale")
        if name == "norm":
            _figures.logarithmic(axes)
            _figures.level(axes, _BOUND, "bound", left=0.98)
        else:
            axes.set_ylim(0, 0.85)
    return f"{_figures.BARS} A flat line does not depend on the initial scale."


CLAIM = _claims.Claim(
    name="gradinit",
    paper="Zhu et al. 2021 (arXiv:2102.08098)",
    statement="a learned scale for each array makes training insensitive to the initial scale",
    printed="VGG-19, CIFAR-10: 94.71 % (benchmark listing); other figures were not checked",
    settings=_settings,
    run=_run,
    judge=_judge,
    draw=_draw,
)

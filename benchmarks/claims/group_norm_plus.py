"""GroupNorm+ withstands noise behind the norm that group norm does not."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import regjax
from benchmarks import _claims
from benchmarks._claims import Record, Settings, Verdict
from benchmarks.claims import _figures, _networks
from regjax import normalization

_NORMS = ("none", "group", "plus", "plus, usable", "batch")
# Mean and standard deviation of the additive noise.
_NOISES = {"none": (0.0, 0.0), "small": (0.001, 1.001), "big": (0.5, 1.25)}
_GAINS = {"small": 0.02, "big": 0.05}  # of plus over group, in accuracy
_SHARE = 0.8  # of the seeds
_GROUPS, _BATCH, _STEPS = 8, 128, 220
_ADAM = optax.chain(optax.adam(3e-3))
_DATA: dict[str, tuple[Callable[[], _networks.Split], int]] = {
    "digits": (lambda: _networks.digits(1440), 5),
    "fashion_mnist": (_networks.fashion_mnist, 3),  # at half the resolution
}


def _settings(preset: str) -> Sequence[Settings]:
    if preset == "smoke":
        return [
            {"data": "digits", "norm": norm, "noise": noise, "seed": seed, "steps": 5}
            for norm in ("group", "plus")
            for noise in _NOISES
            for seed in (0, 1)
        ]
    return [
        {"data": data, "norm": norm, "noise": noise, "seed": seed, "steps": _STEPS}
        for data, (_, num_seeds) in _DATA.items()
        for noise in _NOISES
        for norm in _NORMS
        for seed in range(num_seeds)
    ]


def _run(settings: Settings) -> dict[str, float]:
    split, seed = _images(settings["data"]), settings["seed"]
    model = regjax.from_nnx(_Net(settings["norm"], settings["noise"], nnx.Rngs(seed)))
    trained, losses = _networks.train_model(
        model, _ADAM, split, batch_size=_BATCH, num_steps=settings["steps"], seed=seed
    )
    return {
        "accuracy": _networks.model_accuracy(trained, split),
        "loss": float(losses[-20:].mean()),
    }


@functools.cache
def _images(data: str) -> _networks.Split:
    split = _networks.as_images(_DATA[data][0]())
    if data == "digits":
        return split
    halve = lambda x: nnx.avg_pool(x, (2, 2), strides=(2, 2))
    return split._replace(x=halve(split.x), x_test=halve(split.x_test))


class _Net(nnx.Module):
    """Convolutions 16-16, halved, 32-32, the mean over positions, a linear head."""

    def __init__(self, norm: str, noise: str, rngs: nnx.Rngs):
        sizes = (1, 16, 16, 32, 32)
        pairs = list(itertools.pairwise(sizes))
        self.layers = nnx.List(
            [nnx.Conv(n, m, (3, 3), use_bias=norm == "none", rngs=rngs) for n, m in pairs]
        )
        self.norms = nnx.List([_norm(norm, m, rngs) for _, m in pairs])
        self.noises = nnx.List([_Noise(*_NOISES[noise], rngs) for _ in pairs])
        self.head = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        parts = zip(self.layers, self.norms, self.noises, strict=True)
        for i, (layer, norm, noise) in enumerate(parts):
            x = nnx.relu(noise(norm(layer(x))))
            if i == 1:
                x = nnx.max_pool(x, (2, 2), strides=(2, 2))
        return self.head(jnp.mean(x, (1, 2)))


def _norm(norm: str, width: int, rngs: nnx.Rngs) -> Any:
    if norm == "none":
        return nnx.identity
    if norm == "group":
        return nnx.GroupNorm(width, _GROUPS, rngs=rngs)
    if norm == "batch":
        return normalization.nnx.BatchNorm(width, momentum=0.9)
    usable: dict[str, Any] = {}
    if norm == "plus, usable":
        usable = {"batch_axes": None, "track_running": True}
    return normalization.nnx.GroupNormPlus(width, num_groups=_GROUPS, **usable)


class _Noise(nnx.Module):
    """Adds one normal number for each example and group, in training."""

    def __init__(self, mean: float, deviation: float, rngs: nnx.Rngs):
        self.mean, self.deviation = mean, deviation
        self.rngs, self.deterministic = rngs.dropout.fork(), False

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.deterministic or not self.deviation:
            return x
        shape = (x.shape[0], 1, 1, _GROUPS)
        drawn = self.mean + self.deviation * jax.random.normal(self.rngs(), shape, x.dtype)
        return x + jnp.repeat(drawn, x.shape[-1] // _GROUPS, axis=-1)


def _judge(records: Sequence[Record]) -> list[Verdict]:
    verdicts = []
    for data, own in _claims.groups(records, "data").items():
        accuracy = {
            noise: {
                norm: _claims.numbers(group, "accuracy")
                for norm, group in _claims.groups(part, "norm").items()
            }
            for noise, part in _claims.groups(own, "noise").items()
        }
        texts = [
            f"{noise}: {', '.join(f'{norm} {value.mean():.3f}' for norm, value in found.items())}"
            for noise, found in accuracy.items()
        ]
        gains = {noise: accuracy[noise]["plus"] - accuracy[noise]["group"] for noise in _GAINS}
        shares = {noise: float(np.mean(gains[noise] >= _GAINS[noise])) for noise in _GAINS}
        counts = ", ".join(f"{noise} {shares[noise]:.0%}" for noise in shares)
        verdicts.append(
            Verdict(
                f"{_claims.word(min(shares.values()) >= _SHARE)} ({data}): withstands noise",
                f"mean test accuracy, noise {'; '.join(texts)}; seeds with 2 and 5 points more "
                f"than group norm: {counts}",
            )
        )
        gain, error = _claims.mean_and_error(accuracy["none"]["plus"] - accuracy["none"]["group"])
        verdicts.append(
            Verdict(
                f"{_claims.word(gain > 2 * error)} ({data}): better than group norm without noise",
                f"{gain:+.4f} ± {error:.4f}",
            )
        )
    return verdicts


def _draw(records: Sequence[Record], figure: Any) -> str:
    words = {"plus": "group+", "plus, usable": "group+\n(running)"}
    rows = [{**r, r["noise"]: r["accuracy"]} for r in records]
    deviations = {noise: deviation for noise, (_, deviation) in _NOISES.items()}
    names = dict.fromkeys(_claims.groups(records, "noise"), "test accuracy")
    for axes, own, noise in _figures.panels(figure, rows, names):
        part = _claims.select(own, noise=noise)
        norms = [words.get(norm, norm) for norm in _claims.groups(part, "norm")]
        _figures.dots(axes, part, "norm", noise, norms)
        axes.set_title(f"{axes.get_title()}, noise {deviations[noise]:.3g}", fontsize=8)
        axes.tick_params(axis="x", rotation=50)
    return (
        f"{_figures.DOTS} Noise: standard deviation of what is added behind each norm in training. "
        "group+ (running): with running statistics, so that it can be used one image at a time."
    )


CLAIM = _claims.Claim(
    name="group_norm_plus",
    paper="Gunawan et al. 2022 (arXiv:2207.01972)",
    statement="GroupNorm+, a mix of group norm and a batch norm of it, is more accurate than group "
    "norm and withstands noise",
    printed="CIFAR-10, VGG: small noise, group norm 10.00 (diverged), plus 83.06; SVHN: plus worse",
    settings=_settings,
    run=_run,
    judge=_judge,
    draw=_draw,
)

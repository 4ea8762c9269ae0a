"""Noise in all layers at once fails where noise in one layer at a time still trains."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import _claims
from benchmarks._claims import Record, Settings, Verdict
from benchmarks.claims import _figures, _networks
from regjax import transforms

_MODES = ("none", "layerwise", "all")
_STEPS, _BATCH, _RATE, _QUIET = 3_000, 30, 0.05, 0.9  # the share of the steps with noise
_PROBES = 20
# Widths, scales of the noise, seeds.
_DATA: dict[str, tuple[Callable[[], _networks.Split], Sequence[int], Sequence[float], int]] = {
    "digits": (_networks.digits, (64, 256, 1024), (0.1, 0.5, 1.0), 5),
    "fashion_mnist": (_networks.fashion_mnist, (64, 256), (0.1, 1.0), 3),
}


def _settings(preset: str) -> Sequence[Settings]:
    if preset == "smoke":
        return [
            {"data": "digits", "width": 16, "mode": mode, "scale": 0.1, "seed": seed, "steps": 20}
            for mode in _MODES
            for seed in (0, 1)
        ]
    return [
        {
            "data": data,
            "width": width,
            "mode": mode,
            "scale": scale,
            "seed": seed,
            "steps": _STEPS,
        }
        for data, (_, widths, scales, num_seeds) in _DATA.items()
        for width in widths
        for mode in _MODES
        for scale in (scales if mode != "none" else (0.0,))
        for seed in range(num_seeds)
    ]


def _run(settings: Settings) -> dict[str, float]:
    split, seed = _DATA[settings["data"]][0](), settings["seed"]
    sizes = (split.x.shape[1], settings["width"], settings["width"], 10)
    trained = _networks.train(
        _networks.he_network(sizes, jax.random.key(seed)),
        _chain(settings["mode"], settings["scale"], settings["steps"], seed),
        split,
        batch_size=_BATCH,
        num_steps=settings["steps"],
        seed=seed,
    )
    return _networks.flatness(trained, split, seed, _PROBES)


def _chain(mode: str, scale: float, num_steps: int, seed: int) -> Any:
    if mode == "none":
        return optax.chain(optax.sgd(_RATE))
    noise = transforms.perturbed_gradient(
        lambda count: jnp.where(count < _QUIET * num_steps, scale, 0.0),
        key=jax.random.key(seed),
        layerwise=mode == "layerwise",
    )
    return optax.chain(noise, optax.sgd(_RATE))


def _judge(records: Sequence[Record]) -> list[Verdict]:
    verdicts = []
    for data, own in _claims.groups(records, "data").items():
        largest = max(record["scale"] for record in own)
        survives, texts, falls, traces = [], [], [], []
        for width in sorted({record["width"] for record in own}):
            layerwise, everywhere = (
                _claims.select(own, width=width, mode=mode, scale=largest)
                for mode in ("layerwise", "all")
            )
            pair = _claims.numbers(layerwise, "accuracy"), _claims.numbers(everywhere, "accuracy")
            gain, error = _claims.mean_and_error(pair[0] - pair[1])
            survives.append(gain > 2 * error)
            texts.append(
                f"width {width}: {pair[0].mean():.3f} against {pair[1].mean():.3f}, "
                f"{gain:+.3f} ± {error:.3f}"
            )
            smallest = min(record["scale"] for record in own if record["scale"])
            noisy = _claims.select(own, width=width, mode="layerwise", scale=smallest)
            plain = _claims.select(own, width=width, mode="none")
            ends = [_claims.numbers(part, "trace").mean() for part in (plain, noisy)]
            falls.append(ends[1] < ends[0])
            traces.append(f"width {width}: {ends[0]:.3g} to {ends[1]:.3g}")
        verdicts.append(
            Verdict(
                f"{_claims.word(all(survives))} ({data}): layerwise noise "
                "survives where noise in all layers does not",
                f"test accuracy, layerwise against all, noise {largest:g}: {'; '.join(texts)}",
            )
        )
        verdicts.append(
            Verdict(
                f"{_claims.word(all(falls))} ({data}): small noise lowers the trace of the Hessian",
                f"none to layerwise, noise {smallest:g}: {'; '.join(traces)}",
            )
        )
    return verdicts


def _draw(records: Sequence[Record], figure: Any) -> str:
    names = {"accuracy": "test accuracy", "trace": "trace of the Hessian"}
    modes = {"layerwise": "one layer at a time", "all": "all layers at once"}
    styles: dict[str, Any] = {
        "layerwise": {},
        "all": {"linestyle": "--", "markerfacecolor": "white"},
    }
    widths = sorted(_claims.groups(records, "width"))
    scales = sorted(_claims.groups(records, "scale"))
    lines = [(width, mode) for width in widths for mode in modes]
    for axes, own, name in _figures.panels(figure, records, names, height=2):
        plain = _claims.select(own, mode="none")
        for i, (width, mode) in enumerate(lines):
            part = [r for r in [*plain, *_claims.select(own, mode=mode)] if r["width"] == width]
            if part:
                _figures.sweep(
                    axes, part, "scale", name, values=scales, index=i, of=len(lines),
                    name=f"width {width}, {modes[mode]}",
                    **{**_figures.look(widths.index(width)), **styles[mode]},
                )  # fmt: skip
        _figures.label(axes, x="standard deviation of the weight noise")
        if name == "trace":
            _figures.logarithmic(axes)
        else:
            axes.set_ylim(0, 1)
    return f"{_figures.BARS} At noise 0 both ways are plain training."


CLAIM = _claims.Claim(
    name="weight_noise",
    paper="Orvieto et al. 2023 (arXiv:2206.04613)",
    statement="small weight noise regularises; in one layer at a time it still does so in wide "
    "networks",
    printed="the abstract states the variance explosion and its remedy; no table was available",
    settings=_settings,
    run=_run,
    judge=_judge,
    draw=_draw,
)

"""Averaged weights are flatter than the last ones, and generalise better."""

from collections.abc import Sequence
from typing import Any

import jax
import optax

from benchmarks import _claims
from benchmarks._claims import Record, Settings, Verdict
from benchmarks.claims import _figures, _networks
from regjax import transforms

_BATCH, _RATE = 30, 0.1
_METHODS = ("last", "decayed", "average")
_NAMES = ("constant rate,\nlast weights", "decayed rate,\nlast weights", "constant rate,\naverage")
_DATA: dict[str, Any] = {
    "digits": (_networks.digits, 5, 3000),
    "fashion_mnist": (_networks.fashion_mnist, 3, 6000),
}


def _settings(preset: str) -> Sequence[Settings]:
    if preset == "smoke":
        return [{"data": "digits", "width": 16, "steps": 40, "seed": seed} for seed in (0, 1)]
    return [
        {"data": data, "width": 128, "steps": steps, "seed": seed}
        for data, (_, num_seeds, steps) in _DATA.items()
        for seed in range(num_seeds)
    ]


def _run(settings: Settings) -> dict[str, float]:
    split, seed, steps = _DATA[settings["data"]][0](), settings["seed"], settings["steps"]
    width = settings["width"]
    start = _networks.he_network((split.x.shape[1], width, width, 10), jax.random.key(seed))
    schedule = optax.join_schedules(
        [optax.constant_schedule(_RATE), optax.linear_schedule(_RATE, 0, steps - steps // 2)],
        [steps // 2],
    )
    average = transforms.average_params(begin=steps // 2, every=len(split.y) // _BATCH)
    train = lambda tx: _networks.train(
        start, tx, split, batch_size=_BATCH, num_steps=steps, seed=seed
    )
    constant = train(optax.chain(optax.sgd(_RATE), average))
    found = {
        "last": constant.params,
        "decayed": train(optax.sgd(schedule)).params,
        "average": transforms.averaged_params(constant.state, constant.params),
    }
    numbers: dict[str, float] = {}
    for name, params in found.items():
        largest, residual = _networks.sharpness(params, split, seed)
        numbers |= {
            f"accuracy_{name}": _networks.accuracy(params, split),
            f"sharpness_{name}": largest,
            f"residual_{name}": residual,
            f"loss_{name}": float(_networks.loss_fn(params, split.x, split.y)),
            f"test_loss_{name}": float(_networks.loss_fn(params, split.x_test, split.y_test)),
        }
    return numbers


def _judge(records: Sequence[Record]) -> list[Verdict]:
    verdicts = []
    for data, own in _claims.groups(records, "data").items():
        for quantity, statement, sign in (
            ("sharpness", "the average is flatter than the last weights", -1),
            ("accuracy", "it generalises better", 1),
        ):
            texts, gains = [], {}
            for other in ("last", "decayed"):
                change = _claims.numbers(own, f"{quantity}_average") - _claims.numbers(
                    own, f"{quantity}_{other}"
                )
                gains[other] = _claims.mean_and_error(change)
                texts.append(f"{gains[other][0]:+.4f} ± {gains[other][1]:.4f} beside {other}")
            gain, error = gains["last"]
            mean = _claims.numbers(own, f"{quantity}_last").mean()
            verdicts.append(
                Verdict(
                    f"{_claims.word(sign * gain > 2 * error)} ({data}): {statement}",
                    f"{quantity} of the average less that of the others: {'; '.join(texts)} "
                    f"(mean over {len(own)} seeds, one standard error; last: {mean:.4f})",
                )
            )
    return verdicts


def _draw(records: Sequence[Record], figure: Any) -> str:
    rows = [
        {
            "data": record["data"],
            "method": method,
            "sharpness": record[f"sharpness_{method}"],
            "accuracy": record[f"accuracy_{method}"],
        }
        for record in records
        for method in _METHODS
    ]
    names = {"sharpness": "largest Hessian eigenvalue", "accuracy": "test accuracy"}
    for axes, own, name in _figures.panels(figure, rows, names):
        _figures.dots(axes, own, "method", name, _NAMES)
        if name == "sharpness":
            axes.set_ylim(bottom=0)
    return _figures.DOTS


CLAIM = _claims.Claim(
    name="weight_averaging",
    paper="Izmailov et al. (2018), arXiv:1803.05407",
    statement="the average of the weights along SGD with a constant rate is flatter than SGD's own "
    "end, and generalises better",
    printed="nothing is quoted: other data and other networks",
    settings=_settings,
    run=_run,
    judge=_judge,
    draw=_draw,
)

"""Anti-correlated noise finds wider valleys than descent, where plain noise drifts away."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import _claims
from benchmarks._claims import Record, Settings, Verdict
from benchmarks.claims import _figures, _networks
from regjax import transforms

_METHODS = ("descent", "plain", "anti-correlated")
_DATA: dict[str, tuple[Callable[[], _networks.Split], int]] = {
    "digits": (_networks.digits, 5),
    "fashion_mnist": (_networks.fashion_mnist, 3),
}
_STEPS = {"valley": 20_000, "digits": 3_000, "fashion_mnist": 3_000}
_RATE = {"valley": 0.01, "digits": 0.05, "fashion_mnist": 0.05}
_SCALE = {"valley": 0.05, "digits": 0.03, "fashion_mnist": 0.03}
_VALLEY_SEEDS, _WIDTH, _BATCH, _PROBES = 10, 128, 30, 20
_QUIET = 0.9  # the share of a network's steps with noise


def _settings(preset: str) -> Sequence[Settings]:
    seeds = {"valley": _VALLEY_SEEDS, **{name: number for name, (_, number) in _DATA.items()}}
    if preset == "smoke":
        seeds = {"valley": 2, "digits": 2}
    return [
        {
            "data": data,
            "method": method,
            "seed": seed,
            "steps": 50 if preset == "smoke" else _STEPS[data],
        }
        for data, number in seeds.items()
        for method in _METHODS
        for seed in range(number)
    ]


def _run(settings: Settings) -> dict[str, float]:
    return (_run_valley if settings["data"] == "valley" else _run_network)(settings)


def _run_valley(settings: Settings) -> dict[str, float]:
    """The loss v^2 |u|^2 / 2 is zero where v is, in a valley that is the wider the smaller u is."""
    start = {"u": jnp.full(20, 0.5), "v": jnp.float32(0.5)}
    tx = _chain(settings, lambda count: _SCALE["valley"])

    def step(carry: Any, _: None) -> tuple[Any, None]:
        params, state = carry
        grads = jax.grad(lambda p: 0.5 * p["v"] ** 2 * jnp.sum(p["u"] ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    scan = functools.partial(jax.lax.scan, step, length=settings["steps"])
    params, state = jax.jit(scan)((start, tx.init(start)))[0]
    if settings["method"] == "anti-correlated":
        params = transforms.denoise_params(params, state[1])
    return {"width": float(jnp.linalg.norm(params["u"]) / jnp.linalg.norm(start["u"]))}


def _run_network(settings: Settings) -> dict[str, float]:
    data, seed, num_steps = settings["data"], settings["seed"], settings["steps"]
    split = _DATA[data][0]()
    trained = _networks.train(
        _networks.he_network((split.x.shape[1], _WIDTH, _WIDTH, 10), jax.random.key(seed)),
        _chain(settings, lambda count: jnp.where(count < _QUIET * num_steps, _SCALE[data], 0.0)),
        split,
        batch_size=_BATCH,
        num_steps=num_steps,
        seed=seed,
    )
    return _networks.flatness(trained, split, seed, _PROBES)


def _chain(settings: Settings, scale: Callable[[Any], Any]) -> Any:
    """Descent, then the noise of standard deviation `scale` that stays, or that is taken back."""
    key, descent = jax.random.key(settings["seed"]), optax.sgd(_RATE[settings["data"]])
    if settings["method"] == "descent":
        return optax.chain(descent)
    if settings["method"] == "anti-correlated":
        return optax.chain(descent, transforms.anticorrelated_noise(scale, key=key))
    variance = lambda count: scale(count) ** 2
    add_noise = optax.inject_hyperparams(optax.add_noise, static_args=("gamma", "key"))
    return optax.chain(descent, add_noise(eta=variance, gamma=0.0, key=key))


def _judge(records: Sequence[Record]) -> list[Verdict]:
    verdicts = []
    for data, own in _claims.groups(records, "data").items():
        name = "width" if data == "valley" else "trace"
        methods = _claims.groups(own, "method")
        descent, plain, ours = (_claims.numbers(methods[method], name) for method in _METHODS)
        texts = [
            f"{method} {value.mean():.3g} ± {value.std(ddof=1):.2g}"
            for method, value in zip(_METHODS, (descent, plain, ours), strict=True)
        ]
        if data == "valley":
            holds = bool(np.all(ours < descent) and np.all(descent < plain))
            said, what = "below descent, plain noise above it", "|u| over its start"
        else:
            # Plain noise adds up until the loss saturates: its trace is not that of a minimum.
            holds = bool(np.all(ours < descent))
            said, what = "a flatter minimum than descent", "trace of the Hessian"
            for label, place in (("test accuracy", "accuracy"), ("training loss", "loss")):
                values = [_claims.numbers(part, place).mean() for part in methods.values()]
                texts.append(f"{label} {', '.join(f'{value:.3g}' for value in values)}")
        verdicts.append(
            Verdict(
                f"{_claims.word(holds)} ({data}): {said}",
                f"{what} in {len(ours)} seeds (standard deviation): {'; '.join(texts)}",
            )
        )
    return verdicts


def _draw(records: Sequence[Record], figure: Any) -> str:
    figure.set_figheight(3.7)
    sets = [data for data in _claims.groups(records, "data") if data != "valley"]
    panels = figure.subplots(2, 1 + len(sets), squeeze=False)
    words = {"descent": "gradient\ndescent", "plain": "plain\nnoise",
             "anti-correlated": "anti-corre-\nlated noise"}  # fmt: skip
    shown = [("valley", "width", "|u| / |u| at the start\n(0: the widest place)")]
    shown += [(data, "trace", "trace of the Hessian") for data in sets]
    shown += [("", "", ""), *((data, "accuracy", "test accuracy") for data in sets)]
    for axes, (data, name, text) in zip(panels.flat, shown, strict=True):
        if not data:
            axes.set_axis_off()
            text = "Low is wide or flat. On images plain\nnoise lowers the trace even more,\n"
            _figures.note(axes, -0.1, 0.5, f"{text}but costs accuracy (beside this).")
            continue
        own = _claims.select(records, data=data)
        _figures.dots(axes, own, "method", name, [words[m] for m in _claims.groups(own, "method")])
        axes.set_title(_figures.NAMES[data], fontsize=8)
        axes.set_ylim(0, 1 if name == "accuracy" else None)
        _figures.label(axes, y=text)
    return _figures.DOTS


CLAIM = _claims.Claim(
    name="anticorrelated_noise",
    paper="Orvieto et al. 2022 (arXiv:2202.02831)",
    statement="noise that is taken back in the next step finds wider valleys; plain noise does not",
    printed="tables of the paper were not checked; none is quoted",
    settings=_settings,
    run=_run,
    judge=_judge,
    draw=_draw,
)

"""Decentralised SGD: learners that only talk to neighbours converge where synchronous SGD fails."""

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
from regjax import diagnostics, transforms

# One learner with the batches of all is synchronous SGD; with noise of a fixed size in its weights
# it is the control.
_ALONE = ("synchronous", "noisy synchronous")
_TOPOLOGIES = ("ring", "random pairs", "exponential")
_METHODS = (*_ALONE, *_TOPOLOGIES)
_EXAMPLES, _HIDDEN, _NOISE = 1440, 50, 0.01
_FIRST, _LAST = 20, 50  # the steps whose effective rate is looked at
_SEEDS = {"digits": 8, "fashion_mnist": 5}
_RATES = {"digits": (0.75, 1.0, 1.25, 1.5), "fashion_mnist": (0.5, 0.75, 1.0, 1.5)}
_CONVERGED = {"digits": 0.9, "fashion_mnist": 0.7}  # test accuracy
_LEARNERS = (16, 6)
# Of the effective over the nominal rate: below is lowered, above is not.
_LOWERED, _KEPT = 0.6, 0.95


def _settings(preset: str) -> Sequence[Settings]:
    is_smoke = preset == "smoke"
    return [
        {
            "data": data,
            "learners": learners,
            "method": method,
            "rate": rate,
            "seed": seed,
            "seeds": 2 if is_smoke else _SEEDS[data],
            "steps": _FIRST + _LAST if is_smoke else 300,
        }
        for data in (("digits",) if is_smoke else _SEEDS)
        for learners in ((6,) if is_smoke else _LEARNERS)
        for method in (("synchronous", "ring") if is_smoke else _METHODS)
        for rate in ((1.25,) if is_smoke else _RATES[data])
        for seed in range(2 if is_smoke else _SEEDS[data])
    ]


def _split(data: str) -> _networks.Split:
    if data == "digits":
        return _networks.digits(_EXAMPLES)
    return _networks.small_fashion_mnist(_EXAMPLES)


def _run(settings: Settings) -> dict[str, float]:
    num = 1 if settings["method"] in _ALONE else settings["learners"]
    names = ("data", "method", "rate", "seeds", "steps")
    found = _all_seeds(num, *(settings[name] for name in names))
    return {name: float(values[settings["seed"]]) for name, values in found.items()}


@functools.cache
def _all_seeds(
    num: int, data: str, method: str, rate: float, seeds: int, steps: int
) -> dict[str, np.ndarray]:
    """The numbers of all seeds, trained side by side; every rate runs the same program."""
    split = _split(data)
    starts = _starts((split.x.shape[1], _HIDDEN, _HIDDEN, 10), seeds)
    ends = _program(num, method, steps)(jnp.arange(seeds), starts, rate, split)
    return {name: np.asarray(value) for name, value in ends.items()}


@functools.cache
def _starts(sizes: tuple[int, ...], seeds: int) -> Any:
    """Initial weights of all seeds; in the programs below they would take half the compilation."""
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    return jax.jit(jax.vmap(functools.partial(_networks.he_network, sizes)))(keys)


@functools.cache
def _program(num: int, method: str, steps: int) -> Any:
    train = functools.partial(_trained, num=num, method=method, num_steps=steps)
    return jax.jit(jax.vmap(train, in_axes=(0, 0, None, None)))


def _trained(
    seed: jax.Array, start: Any, rate: jax.Array, split: Any, *, num: int, method: str,
    num_steps: int,
) -> dict[str, jax.Array]:  # fmt: skip
    """Plain SGD; every learner draws its own batches, together as many images as there are."""
    batch_key, noise_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1))
    tx = _chain(method, rate, noise_key)
    params = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num, *leaf.shape)), start)

    def step(carry: Any, count: jax.Array, is_measured: bool) -> Any:
        params, state = carry
        key = jax.random.fold_in(batch_key, count)
        rows = jax.random.randint(key, (num, _EXAMPLES // num), 0, _EXAMPLES)
        updates, state = jax.vmap(functools.partial(_updates, tx, split), axis_name="learner")(
            params, state, rows
        )
        found = None
        if is_measured:
            # Mixing moves no mean, so what is left of the mean update is the gradients' part.
            grads = jax.tree.map(lambda leaf: -leaf / rate, transforms.mean_params(updates))
            report = diagnostics.landscape_dependent_noise(
                _networks.loss_fn, params, grads, split.x, split.y, learning_rate=rate
            )
            found = report.effective_learning_rate / rate
        return (optax.apply_updates(params, updates), state), found

    measured, plain = (functools.partial(step, is_measured=looks) for looks in (True, False))
    carry = params, jax.vmap(tx.init)(params)
    carry, first = jax.lax.scan(measured, carry, jnp.arange(_FIRST))
    carry, _ = jax.lax.scan(plain, carry, jnp.arange(_FIRST, num_steps - _LAST))
    carry, last = jax.lax.scan(measured, carry, jnp.arange(num_steps - _LAST, num_steps))
    mean = transforms.mean_params(carry[0])
    right = jnp.argmax(_networks.outputs(mean, split.x_test), 1) == split.y_test
    return {
        "accuracy": jnp.mean(right.astype(jnp.float32)),
        "first_rate": jnp.nanmedian(first),
        "last_rate": jnp.nanmedian(last),
    }


def _updates(tx: Any, split: Any, params: Any, state: Any, rows: jax.Array) -> Any:
    def grad_fn(params: Any, i: Any) -> Any:
        del i
        return jax.grad(_networks.loss_fn)(params, split.x[rows], split.y[rows])

    return tx.update(grad_fn(params, 0), state, params, grad_fn=grad_fn)


def _chain(method: str, rate: Any, key: jax.Array) -> Any:
    if method == "synchronous":
        return optax.chain(optax.sgd(rate))
    if method == "noisy synchronous":
        one_group = [{"kernel": 0, "bias": 0}] * 3
        noise = transforms.perturbed_gradient(_NOISE, key=key, groups=one_group)
        return optax.chain(noise, optax.sgd(rate))
    mixing = {
        "ring": transforms.ring_mixing(),
        "random pairs": transforms.random_pair_mixing(key=key),
        "exponential": transforms.exponential_mixing(),
    }[method]
    return optax.chain(optax.sgd(rate), transforms.gossip_average(mixing))


def _judge(records: Sequence[Record]) -> list[Verdict]:
    verdicts = []
    for data, own in _claims.groups(records, "data").items():
        num_seeds = len({record["seed"] for record in own})
        best, gain, tables = own[0], -num_seeds - 1, list[str]()
        for learners, group in _claims.groups(own, "learners").items():
            counts = {
                (record["method"], record["rate"]): _num_converged(_alike(group, record))
                for record in group
            }
            rates = sorted({rate for _, rate in counts})
            tables.append(
                f"{learners} learners: "
                + ", ".join(
                    f"{method} {' '.join(str(counts[method, rate]) for rate in rates)}"
                    for method in _claims.groups(group, "method")
                )
            )
            for record in group:
                more = counts[record["method"], record["rate"]]
                more -= counts["synchronous", record["rate"]]
                if record["method"] in _TOPOLOGIES and more > gain:
                    best, gain = record, more
        place = f"{best['method']}, {best['learners']} learners, rate {best['rate']:g}"
        verdicts.append(
            Verdict(
                f"{_claims.word(2 * gain >= num_seeds)} ({data}): it converges where synchronous "
                "SGD does not",
                f"at best {gain} of {num_seeds} seeds more ({place}); seeds above "
                f"{_CONVERGED[data]:g} test accuracy at rates "
                f"{' '.join(f'{rate:g}' for rate in rates)}: {'; '.join(tables)}",
            )
        )
        verdicts += _judge_rates(data, own, best, place)
    return verdicts


def _judge_rates(data: str, own: Sequence[Record], best: Record, place: str) -> list[Verdict]:
    """Whether the effective rate falls early and recovers, where the topology gains most."""
    first = {
        method: np.median(_claims.numbers(_alike(own, {**best, "method": method}), "first_rate"))
        for method in _claims.groups(own, "method")
    }
    dips = ", ".join(f"{method} {value:.2f}" for method, value in first.items())
    found = [
        Verdict(
            f"{_claims.word(first[best['method']] < _LOWERED and first['synchronous'] > _KEPT)} "
            f"({data}): the effective rate is lowered early",
            f"effective over nominal rate in the first {_FIRST} steps, {best['learners']} learners "
            f"at rate {best['rate']:g}: {dips} (medians over seeds)",
        )
    ]
    # Of runs that failed the rate at the end says nothing.
    ends = [r for r in _alike(own, best) if r["accuracy"] > _CONVERGED[data]]
    if len(ends) > 1:
        last = _claims.numbers(ends, "last_rate")
        rise, error = _claims.mean_and_error(last - _claims.numbers(ends, "first_rate"))
        found.append(
            Verdict(
                f"{_claims.word(rise > 2 * error)} ({data}): later it recovers",
                f"{place}: {np.median(last):.2f} in the last {_LAST} steps, {rise:+.2f} ± "
                f"{error:.2f} (mean over the {len(ends)} runs that converged, one standard error)",
            )
        )
    return found


def _alike(records: Sequence[Record], like: Record) -> list[Record]:
    """All seeds of a run."""
    names = ("learners", "method", "rate")
    return _claims.select(records, **{name: like[name] for name in names})


def _num_converged(records: Sequence[Record]) -> int:
    return sum(record["accuracy"] > _CONVERGED[record["data"]] for record in records)


def _draw(records: Sequence[Record], figure: Any) -> str:
    learners = max(record["learners"] for record in records)
    shown = _claims.select(records, learners=learners)
    names = {
        "converged": "share of seeds\nthat converge",
        "first_rate": f"effective / nominal rate,\nfirst {_FIRST} steps",
        "last_rate": f"effective / nominal rate,\nlast {_LAST} steps",
    }
    methods = list(_claims.groups(shown, "method"))
    for axes, own, name in _figures.panels(figure, shown, names):
        rates = sorted(_claims.groups(own, "rate"))
        for i, method in enumerate(methods):
            each = [_claims.select(own, method=method, rate=rate) for rate in rates]
            found = {place: runs for place, runs in enumerate(each) if runs}
            values = [
                _num_converged(runs) / len(runs) if name == "converged"
                else np.nanmedian(_claims.numbers(runs, name))
                for runs in found.values()
            ]  # fmt: skip
            places = [place + _figures.side(i, len(methods)) for place in found]
            axes.plot(places, values, label=method, **_figures.look(i))
        axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        axes.set_ylim(-0.06, 1.15)
        _figures.label(axes, x="learning rate")
    return (
        f"{learners} learners. Rates: medians over the seeds. Lines stand side by side within a "
        "rate, so that none hides another. Of runs that failed the last rate says nothing."
    )


CLAIM = _claims.Claim(
    name="decentralized",
    paper="Zhang et al. 2021 (arXiv:2112.01433)",
    statement="decentralised SGD converges at rates where synchronous SGD diverges, because its "
    "noise lowers the effective learning rate where the landscape is rough",
    printed="18 models and tasks (abstract); the tables were not available, none is quoted",
    settings=_settings,
    run=_run,
    judge=_judge,
    draw=_draw,
)

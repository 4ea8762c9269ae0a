"""One step with each transformation over the same plain optimiser step; learners all at once."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

from benchmarks._timing import Case
from benchmarks.speed import _problems
from regjax import _loops, curvature, transforms

_RATE, _MOMENTUM, _RHO, _ETA, _ALPHA = 0.1, 0.9, 0.05, 0.01, 0.4
_SCALE, _STEPS, _INNER_RATE, _STRENGTH = 1e-3, 5, 0.01, 1e-3
# How far learners are apart, and the most that a step with mixing may take of one without.
_SPREAD, _GOSSIP = 0.01, 1.15
# Lanczos steps of the controller, its default.
_LANCZOS = 20
# Of the random methods the noise must be seen, and be small beside the update.
_LEAST_NOISE, _MOST_NOISE = 1e-7, 0.5


def cases(preset: str) -> dict[str, Callable[[], Case]]:
    """The cases of a preset by name."""
    has_bars = preset != "smoke"
    sizes = _sizes() if has_bars else (("mlp", 32),)
    found: dict[str, Callable[[], Case]] = {
        f"steps_{name}_{batch}": functools.partial(_steps, name, batch, has_bars)
        for name, batch in sizes
    }
    for name, batch in sizes:
        found[f"average_{name}_{batch}"] = functools.partial(_average, name, batch, has_bars)
    for learners, batch in ((16, 90),) if has_bars else ((4, 8),):
        found[f"gossip_{learners}x{batch}"] = functools.partial(_gossip, learners, batch, has_bars)
    for name, count in _refresh_sizes(preset):
        found[f"refresh_{name}_{count}"] = functools.partial(_refresh, name, count, has_bars)
    return found


def _sizes() -> tuple[tuple[str, int], ...]:
    return tuple((name, batch) for name in ("mlp", "resnet") for batch in (32, 128))


def _refresh_sizes(preset: str) -> tuple[tuple[str, int], ...]:
    # On CPU twenty products of the convolutions on so many examples take minutes.
    sizes = {"smoke": (("mlp", 64),), "cpu": (("mlp", 1024),)}
    return sizes.get(preset, (("mlp", 1024), ("resnet", 1024)))


def _transformations(batch_size: int) -> dict[str, Any]:
    key = jax.random.key(0)
    kernels = lambda params: jax.tree.map(lambda leaf: jnp.ndim(leaf) >= 2, params)
    found = {
        "sam": transforms.sam(_RHO),
        "asam": transforms.sam(_RHO, adaptive=True, eta=_ETA),
        "gsam": transforms.gsam(_RHO, alpha=_ALPHA),
        "perturbed_gradient": transforms.perturbed_gradient(_SCALE, key=key),
        "anticorrelated_noise": transforms.anticorrelated_noise(_SCALE, key=key),
        "entropy_sgd": transforms.entropy_sgd(
            1e-4,
            key=key,
            num_inner_steps=_STEPS,
            learning_rate=_INNER_RATE,
            noise_scale=1e-7,  # it costs what any noise costs, and the answer can be checked
            momentum=0.0,
        ),
        "rescale_weights": transforms.rescale_weights(mask=kernels),
        "coherent_regularization": transforms.coherent_regularization(
            _STRENGTH, gate=transforms.cosine_gate(0.5, hold=50), mask=kernels
        ),
    }
    if batch_size >= 128:
        found["sam, 4 shards"] = transforms.sam(_RHO, num_shards=4)
    return found


_LAST = ("anticorrelated_noise", "rescale_weights")


def _steps(name: str, batch_size: int, has_bars: bool) -> Case:
    problem = _problems.trained(name, 512)
    loss_fn, params = problem.loss_fn, problem.params
    x, y = problem.x[:batch_size], problem.y[:batch_size]
    size = ravel_pytree(params)[0].size
    descent = optax.sgd(_RATE, momentum=_MOMENTUM)
    found = _transformations(batch_size)
    chains = {"plain": optax.chain(descent)}
    for label, tx in found.items():
        chains[label] = optax.chain(descent, tx) if label in _LAST else optax.chain(tx, descent)
    draw = jax.jit(lambda key: jax.random.normal(key, (size,)))
    states = {label: tx.init(params) for label, tx in chains.items()}
    # It draws noise for one leaf in each step: the largest one is its longest step.
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    noisy, *rest = states["perturbed_gradient"]
    noisy = noisy._replace(num_updates=jnp.int32(sizes.index(max(sizes))))
    states["perturbed_gradient"] = (noisy, *rest)
    candidates: dict[str, Callable[[], Any]] = {
        label: functools.partial(
            _step(tx, _num_shards(label)), loss_fn, params, states[label], x, y
        )
        for label, tx in chains.items()
    }
    draw_largest = jax.jit(lambda key: jax.random.normal(key, (max(sizes),)))
    candidates[_LARGEST] = lambda: draw_largest(jax.random.key(0))
    candidates["one normal draw"] = lambda: draw(jax.random.key(0))
    expected = _Expected(loss_fn, params, x, y)

    def facts(answers: Any, seconds: Mapping[str, float]) -> dict[str, float]:
        del answers
        ratio = {label: value / seconds["plain"] for label, value in seconds.items()}
        noise = ratio["one normal draw"]
        rest = {
            f"{label} less {count} draws": ratio[label] - count * noise
            for label, count in _DRAWS.items()
        }
        rest["perturbed_gradient less its draw"] = ratio["perturbed_gradient"] - ratio[_LARGEST]
        copies = {
            f"copies of the parameters kept by {label}": _num_scalars(tx.init(params)) / size
            for label, tx in found.items()
        }
        return {**rest, **{name: round(value, 3) for name, value in copies.items()}}

    return Case(
        candidates=candidates,
        error=expected.error,
        tolerance=1e-2,
        sizes={"parameters": size, "batch": batch_size, "dtype": "float32"},
        facts=facts,
        bars=_bars(name) if has_bars else {},
    )


def _average(name: str, batch_size: int, has_bars: bool) -> Case:
    """A step with averaged weights over the same step without."""
    problem = _problems.trained(name, 512)
    loss_fn, params = problem.loss_fn, problem.params
    x, y = problem.x[:batch_size], problem.y[:batch_size]
    descent = optax.sgd(_RATE, momentum=_MOMENTUM)
    averages = {
        "uniform": transforms.average_params(),
        "decay of 0.999": transforms.average_params(decay=0.999),
        "latest 5": transforms.average_params(num_latest=5),
    }
    chains = {"plain": optax.chain(descent)} | {
        label: optax.chain(descent, average) for label, average in averages.items()
    }
    # From the second step on there is something to add to.
    steps = {label: _step(tx, 1) for label, tx in chains.items()}
    first = {
        label: steps[label](loss_fn, params, tx.init(params), x, y) for label, tx in chains.items()
    }
    expected = ravel_pytree(steps["plain"](loss_fn, *first["plain"], x, y)[0])[0]

    def error(label: str, answer: Any) -> float:
        """Of the weights, and of the mean of the two steps, 0.999 of one and 1 of the other."""
        after = ravel_pytree(answer[0])[0]
        wrong = _relative(after, expected)
        if label == "plain":
            return wrong
        before = ravel_pytree(first[label][0])[0]
        weight = 0.999 if label.startswith("decay") else 1.0
        mean = (weight * before + after) / (weight + 1)
        found = ravel_pytree(transforms.averaged_params(answer[1]))[0]
        return max(wrong, _relative(found, mean))

    return Case(
        candidates={
            label: functools.partial(steps[label], loss_fn, *first[label], x, y) for label in chains
        },
        error=error,
        tolerance=1e-5,
        sizes={"parameters": expected.size, "batch": batch_size, "dtype": "float32"},
        bars={"uniform": 1.05} if has_bars and name == "resnet" else {},
    )


_DRAWS = {"anticorrelated_noise": 1, "entropy_sgd": _STEPS}
_LARGEST = "draw of the largest leaf"


def _bars(name: str) -> dict[str, float]:
    sam = 1.95 if name == "mlp" else 2.08
    return {
        "sam": sam,
        "asam": 1.05 * sam,
        "sam, 4 shards": 2.15,
        "gsam": 2.15,
        "perturbed_gradient less its draw": 1.05,
        "anticorrelated_noise less 1 draws": 1.05,
        "rescale_weights": 1.05,
        "coherent_regularization": 1.15,
        f"entropy_sgd less {_STEPS} draws": 5.3,
    }


def _num_shards(label: str) -> int:
    return 4 if "shards" in label else 1


def _step(tx: Any, num_shards: int) -> Callable[..., Any]:
    """The training step of a user: gradient, update, new parameters."""

    @jax.jit
    def step(loss_fn: Any, params: Any, state: Any, x: Any, y: Any) -> Any:
        shards = [part.reshape(num_shards, -1, *part.shape[1:]) for part in (x, y)]

        def grad_fn(params: Any, i: Any) -> Any:
            batch = (x, y) if num_shards == 1 else [part[i] for part in shards]
            return jax.grad(loss_fn)(params, *batch)

        grads = jax.grad(loss_fn)(params, x, y)
        updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    return step


def _gossip(num_learners: int, batch_size: int, has_bars: bool) -> Case:
    """Vmapped learners, each with a batch of its own, with and without their mixing."""
    num_examples = num_learners * batch_size
    problem = _problems.trained("mlp", max(num_examples, 512))
    loss_fn = problem.loss_fn
    batch = [
        part[:num_examples].reshape(num_learners, batch_size, *part.shape[1:])
        for part in (problem.x, problem.y)
    ]
    noise = lambda leaf: (
        _SPREAD * jax.random.normal(jax.random.key(leaf.size), (num_learners, *leaf.shape))
    )
    params = jax.tree.map(lambda leaf: leaf[None] + noise(leaf), problem.params)
    mixings = {
        "ring": transforms.ring_mixing(),
        "random pairs": transforms.random_pair_mixing(key=jax.random.key(0)),
        "exponential": transforms.exponential_mixing(),
        "full": transforms.full_mixing(),
    }
    descent = optax.sgd(_RATE, momentum=_MOMENTUM)
    chains = {"plain": descent} | {
        label: optax.chain(descent, transforms.gossip_average(mixing))
        for label, mixing in mixings.items()
    }
    candidates = {
        label: functools.partial(
            _learners_step(tx), loss_fn, params, jax.vmap(tx.init)(params), *batch
        )
        for label, tx in chains.items()
    }
    old = jax.vmap(lambda tree: ravel_pytree(tree)[0])(params)
    expected = jax.vmap(lambda tree: ravel_pytree(tree)[0])(candidates["plain"]()[0]) - old

    def error(label: str, answer: Any) -> float:
        """Of the new weights, against the dense matrix times the old ones and the update."""
        found = jax.vmap(lambda tree: ravel_pytree(tree)[0])(answer[0])
        wanted = [
            jnp.matmul(matrix, old, precision="highest") + expected
            for matrix in _matrices(label, num_learners)
        ]
        return min(_relative(found, each) for each in wanted)

    return Case(
        candidates=candidates,
        error=error,
        tolerance=1e-5,
        sizes={
            "parameters": old.shape[1],
            "learners": num_learners,
            "batch": batch_size,
            "dtype": "float32",
        },
        bars=dict.fromkeys(mixings, _GOSSIP) if has_bars else {},
    )


def _learners_step(tx: Any) -> Callable[..., Any]:
    """The training step of all learners on one device."""

    def step(loss_fn: Any, params: Any, state: Any, x: Any, y: Any) -> Any:
        updates, state = tx.update(jax.grad(loss_fn)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(jax.vmap(step, in_axes=(None, 0, 0, 0, 0), axis_name="learner"))


def _matrices(label: str, num: int) -> list[jax.Array]:
    """The matrix of the first step by hand; for random pairs every one that it may be."""
    eye = jnp.eye(num)
    if label == "plain":
        return [eye]
    if label == "ring":
        return [(eye + jnp.roll(eye, 1, 0) + jnp.roll(eye, -1, 0)) / 3]
    if label == "exponential":
        return [(eye + jnp.roll(eye, 1, 0)) / 2]
    if label == "full":
        return [jnp.full((num, num), 1 / num)]
    # Learners on a circle and one in its middle: partners are the mirror images about a diameter.
    around = jnp.arange(num - 1)
    mirrored = [(2 * turn - around) % (num - 1) for turn in range(num - 1)]
    rounds = [
        jnp.append(jnp.where(image == around, num - 1, image), turn)
        for turn, image in enumerate(mirrored)
    ]
    return [(eye + eye[partners]) / 2 for partners in rounds]


def _refresh(name: str, num_examples: int, has_bars: bool) -> Case:
    """The controller's look at the curvature over as many products of the kept Hessian.

    One after the other, as `top_eigenpairs` is measured; beside it, in one compiled loop, the least
    that they could take.
    """
    problem = _problems.trained(name, num_examples)
    params, data = problem.params, (problem.x, problem.y)
    gradient = Partial(_gradient, problem.loss_fn, data)
    state = transforms.spectral_controller(
        key=jax.random.key(0), initial_learning_rate=_RATE, every=None
    ).init(params)
    kept = curvature.hessian(problem.loss_fn, params, *data)
    reference = curvature.top_eigenpairs(
        kept, 1, key=jax.random.key(1), which="LM", tol=1e-4, search=False
    )
    vector = jax.random.normal(jax.random.key(2), (kept.shape[0],))
    refresh = jax.jit(transforms.refresh_spectral_controller)

    def products() -> jax.Array:
        for _ in range(_LANCZOS):
            image = jax.block_until_ready(kept.product(vector))
        return image

    def error(label: str, answer: Any) -> float:
        if label == "refresh":
            return abs(float(answer.largest / jnp.abs(reference.values[0])) - 1)
        return 0.0 if bool(jnp.all(jnp.isfinite(answer))) else 1.0

    def facts(answers: Any, seconds: Mapping[str, float]) -> dict[str, float]:
        del answers
        return {"refresh / products in a loop": seconds["refresh"] / seconds["products in a loop"]}

    return Case(
        candidates={
            "products": products,
            "refresh": lambda: refresh(state, gradient, params),
            "products in a loop": lambda: _power(kept, vector),
        },
        error=error,
        tolerance=1e-2,
        sizes={"parameters": vector.size, "examples": num_examples, "steps": _LANCZOS},
        facts=facts,
        bars={"refresh": 1.10} if has_bars else {},
    )


@jax.jit
def _power(operator: curvature.Operator, vector: jax.Array) -> jax.Array:
    def turn(_: None, vector: jax.Array, i: Any) -> jax.Array:
        return operator.product(vector / jnp.linalg.norm(vector))

    return _loops.scan(turn, vector, _LANCZOS)


def _gradient(loss_fn: Any, batch: Any, params: Any) -> Any:
    return jax.grad(loss_fn)(params, *batch)


class _Expected:
    """What each step should do, written out by hand, as flat vectors."""

    def __init__(self, loss_fn: Any, params: Any, x: jax.Array, y: jax.Array):
        self.flat, self._unravel = ravel_pytree(params)
        self._gradient = jax.jit(
            lambda flat, x, y: ravel_pytree(jax.grad(loss_fn)(self._unravel(flat), x, y))[0]
        )
        self._params, self._x, self._y = params, x, y
        self._plain = -_RATE * self._at(self.flat)

    def _at(self, flat: jax.Array) -> jax.Array:
        return self._gradient(flat, self._x, self._y)

    def error(self, label: str, answer: Any) -> float:
        """Relative error of the update; for a random one whether its noise is there and small."""
        if label in ("one normal draw", _LARGEST):
            return abs(float(answer.std()) - 1)
        params, state = answer
        update = ravel_pytree(params)[0] - self.flat
        if label == "perturbed_gradient":
            noise = _relative(update, self._plain)
            return 0.0 if _LEAST_NOISE < noise < _MOST_NOISE else 1.0
        if label == "anticorrelated_noise":
            params = transforms.denoise_params(params, state[1])
            return _relative(ravel_pytree(params)[0] - self.flat, self._plain)
        return _relative(update, self._update(label))

    def _update(self, label: str) -> jax.Array:
        flat, g = self.flat, self._at(self.flat)
        if label == "plain":
            return self._plain
        if label == "asam":
            scale = jnp.abs(flat) + _ETA
            climb = _RHO * scale**2 * g / jnp.linalg.norm(scale * g)
            return -_RATE * self._at(flat + climb)
        if label == "sam, 4 shards":
            parts = [self._sharded(flat, i) for i in range(4)]
            return -_RATE * sum(parts[1:], start=parts[0]) / 4
        if label == "entropy_sgd":
            position, mean = flat, flat
            for _ in range(_STEPS):
                pull = 1e-4 * (flat - position)
                position = position - _INNER_RATE * (self._at(position) - pull)
                mean = 0.75 * mean + 0.25 * position
            return -_RATE * (flat - mean)
        if label in ("rescale_weights", "coherent_regularization"):
            return self._by_leaf(label, g)
        above = self._at(flat + _RHO * g / jnp.linalg.norm(g))
        if label == "gsam":
            unit = above / jnp.linalg.norm(above)
            above = above - _ALPHA * (g - (g @ unit) * unit)
        return -_RATE * above

    def _sharded(self, flat: jax.Array, i: int) -> jax.Array:
        part = slice(i * len(self._y) // 4, (i + 1) * len(self._y) // 4)
        g = self._gradient(flat, self._x[part], self._y[part])
        climb = _RHO * g / jnp.linalg.norm(g)
        return self._gradient(flat + climb, self._x[part], self._y[part])

    def _by_leaf(self, label: str, g: jax.Array) -> jax.Array:
        grads = self._unravel(g)
        if label == "rescale_weights":

            def rescale(w: jax.Array, d: jax.Array) -> jax.Array:
                if w.ndim < 2:
                    return -_RATE * d
                q = w - _RATE * d
                return q / jnp.linalg.norm(q.reshape(-1, q.shape[-1]), axis=0) - w

            return ravel_pytree(jax.tree.map(rescale, self._params, grads))[0]
        kernels = [leaf.ndim >= 2 for leaf in jax.tree.leaves(self._params)]
        pairs = zip(jax.tree.leaves(self._params), jax.tree.leaves(grads), kernels, strict=True)
        chosen = [(w, d) for w, d, is_kernel in pairs if is_kernel]
        clean = jnp.concatenate([jnp.ravel(d) for _, d in chosen])
        total = jnp.concatenate([jnp.ravel(d + _STRENGTH * w) for w, d in chosen])
        is_on = clean @ total > 0.5 * jnp.linalg.norm(clean) * jnp.linalg.norm(total)

        def penalise(w: jax.Array, d: jax.Array) -> jax.Array:
            return -_RATE * (d + _STRENGTH * w if w.ndim >= 2 and is_on else d)

        return ravel_pytree(jax.tree.map(penalise, self._params, grads))[0]


def _relative(vector: jax.Array, reference: jax.Array) -> float:
    return float(jnp.linalg.norm(vector - reference) / jnp.linalg.norm(reference))


def _num_scalars(state: Any) -> int:
    return sum(
        leaf.size for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)
    )

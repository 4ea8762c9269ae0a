"""Products, Lanczos, eigenpairs and densities against what they are made of and against others."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from benchmarks._timing import Case
from benchmarks.speed import _competitors, _problems
from regjax import curvature

_NUM_STEPS = 80
_NUM_EIGENVALUES = 10


def cases(preset: str) -> dict[str, Callable[[], Case]]:
    """The cases of a preset by name."""
    if preset == "smoke":
        return {
            "product_mlp": functools.partial(_product, "mlp", 64, {}),
            "lanczos": functools.partial(_lanczos, 2_000, 20),
            "rank_deficient": _rank_deficient,
        }
    num_examples = 4096
    return {
        "product_mlp": functools.partial(_product, "mlp", 512, {"recomputed": 1.80, "kept": 1.45}),
        "product_resnet": functools.partial(
            _product, "resnet", 512, {"recomputed": 2.70, "kept": 2.45}
        ),
        "lanczos": functools.partial(_lanczos, 270_000, _NUM_STEPS),
        "rank_deficient": _rank_deficient,
        "top10_mlp": functools.partial(_top, "mlp", num_examples, None, 1.15),
        "top10_resnet": functools.partial(_top, "resnet", 512, 256, 1.25),
        "density": _density,
    }


def _product(name: str, num_examples: int, bars: Mapping[str, float]) -> Case:
    """Hessian product over gradient of the same loss; times beside operation counts."""
    problem = _problems.trained(name, max(num_examples, 512))
    loss_fn, params = problem.loss_fn, problem.params
    batch = problem.x[:num_examples], problem.y[:num_examples]
    vector = _random_like(params)
    operator = curvature.hessian(loss_fn, params, *batch)
    flat = jax.flatten_util.ravel_pytree(vector)[0]

    gradient = jax.jit(lambda loss_fn, params, *batch: jax.grad(loss_fn)(params, *batch))
    recomputed = jax.jit(curvature.hvp)
    oracle = _reverse_over_reverse(loss_fn, params, vector, *batch)
    slope = jax.jvp(lambda p: loss_fn(p, *batch), (params,), (vector,))[1]

    def error(label: str, answer: Any) -> float:
        if label == "gradient":
            return abs(float(_inner(answer, vector) - slope) / float(slope))
        flat_answer = jax.flatten_util.ravel_pytree(answer)[0]
        return float(jnp.linalg.norm(flat_answer - oracle) / jnp.linalg.norm(oracle))

    def facts(answers: Any, seconds: Any) -> dict[str, float]:
        del answers, seconds
        base = _operations(gradient, loss_fn, params, *batch)
        return {
            "operations recomputed / gradient": _operations(
                recomputed, loss_fn, params, vector, *batch
            )
            / base,
            "operations kept / gradient": _operations(_multiply, operator, flat) / base,
        }

    return Case(
        candidates={
            "gradient": lambda: gradient(loss_fn, params, *batch),
            "recomputed": lambda: recomputed(loss_fn, params, vector, *batch),
            "kept": lambda: operator.product(flat),
        },
        error=error,
        tolerance=1e-4,
        sizes={"parameters": flat.size, "examples": num_examples, "dtype": "float32"},
        facts=facts,
        bars=bars,
    )


def _lanczos(size: int, num_steps: int) -> Case:
    """One step beyond its product over classical Gram-Schmidt twice over all rows of that basis.

    From the whole run are taken its (diagonal) products and what every run of any number of steps
    spends on memory: the empty basis and the result, timed beside it.
    """
    diagonal = jnp.linspace(0, 1, size) ** 8 * 10
    operator = curvature.from_matvec(Partial(jnp.multiply, diagonal), diagonal)
    start = jax.random.normal(jax.random.key(0), (size,))
    basis = curvature.lanczos(operator, start, num_steps).basis
    other = jax.random.normal(jax.random.key(1), (size,))

    @jax.jit
    def orthogonalise(basis: jax.Array, vector: jax.Array) -> jax.Array:
        for _ in range(2):
            vector = vector - (basis @ vector) @ basis
        return vector / jnp.linalg.norm(vector)

    def repeat(function: Callable[[], jax.Array]) -> jax.Array:
        for _ in range(num_steps):
            vector = jax.block_until_ready(function())
        return vector

    def memory() -> curvature.LanczosResult:
        solver = curvature.lanczos_solver(operator, start, num_steps)
        return solver.result(solver.init())

    def error(label: str, answer: Any) -> float:
        if label == "lanczos":
            return float(jnp.abs(answer.basis @ answer.basis.T - jnp.eye(num_steps)).max())
        if label == "two-pass Gram-Schmidt":
            return float(jnp.abs(basis @ answer).max())
        return (
            0.0 if jax.tree.all(jax.tree.map(jnp.all, jax.tree.map(jnp.isfinite, answer))) else 1.0
        )

    def facts(answers: Any, seconds: Mapping[str, float]) -> dict[str, float]:
        del answers
        step = seconds["lanczos"] - seconds["its products"] - seconds["its memory"]
        return {"step beyond its product": step / seconds["two-pass Gram-Schmidt"]}

    return Case(
        candidates={
            "two-pass Gram-Schmidt": lambda: repeat(lambda: orthogonalise(basis, other)),
            "lanczos": lambda: curvature.lanczos(operator, start, num_steps),
            "its products": lambda: repeat(lambda: operator.product(other)),
            "its memory": memory,
        },
        error=error,
        tolerance=2e-6,
        sizes={"size": size, "steps": num_steps, "dtype": "float32"},
        facts=facts,
        bars={"step beyond its product": 0.4} if num_steps == _NUM_STEPS else {},
    )


def _rank_deficient() -> Case:
    """Forty steps on a matrix of rank 20 and order 2000: exactly 20 eigenvalues above one half."""
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(2000, 20)))[0]
    matrix = jnp.asarray((basis * np.arange(1, 21)) @ basis.T, jnp.float32)
    start = jax.random.normal(jax.random.key(1), (2000,))
    operator, key = curvature.from_matvec(Partial(jnp.matmul, matrix), start), jax.random.key(2)

    def eigenvalues(result: curvature.LanczosResult) -> np.ndarray:
        betas = np.diag(np.asarray(result.betas), 1)
        return np.linalg.eigvalsh(np.diag(np.asarray(result.alphas)) + betas + betas.T)

    return Case(
        candidates={"lanczos": lambda: curvature.lanczos(operator, start, 40, key=key)},
        error=lambda label, answer: abs(int(np.sum(eigenvalues(answer) > 0.5)) - 20),
        tolerance=0,
        sizes={"size": 2000, "rank": 20, "steps": 40, "dtype": "float32"},
        facts=lambda answers, seconds: {
            "eigenvalues above 0.5": float(np.sum(eigenvalues(answers["lanczos"]) > 0.5))
        },
    )


def _top(name: str, num_examples: int, chunk_size: int | None, bar: float) -> Case:
    """The ten largest eigenvalues over the bare products that they took, and over other tools."""
    problem = _problems.trained(name)
    batch = problem.x[:num_examples], problem.y[:num_examples]

    def solve(tol: float = 1e-3, search: bool = True) -> curvature.EigenResult:
        operator = curvature.hessian(problem.loss_fn, problem.params, *batch, chunk_size=chunk_size)
        return curvature.top_eigenpairs(
            operator, _NUM_EIGENVALUES, key=jax.random.key(0), tol=tol, search=search
        )

    operator = curvature.hessian(problem.loss_fn, problem.params, *batch, chunk_size=chunk_size)
    vector = jax.random.normal(jax.random.key(1), (operator.shape[0],))
    count = int(solve().num_matvecs)
    reference = np.asarray(solve(1e-6 if chunk_size is None else 1e-4).values, np.float64)

    def products() -> jax.Array:
        for _ in range(count):
            image = jax.block_until_ready(operator.product(vector))
        return image

    def error(label: str, answer: Any) -> float:
        if label == "products alone":
            return 0.0 if bool(jnp.all(jnp.isfinite(answer))) else np.inf
        values = answer.values if isinstance(answer, curvature.EigenResult) else answer
        return _competitors.relative_error(values, reference)

    others = (
        _competitors.candidates(problem, batch, _NUM_EIGENVALUES, reference)
        if name == "mlp"
        else {}
    )
    return Case(
        candidates={
            "products alone": products,
            "regjax": solve,
            "regjax, no search": lambda: solve(search=False),
            **others,
        },
        error=error,
        tolerance=1e-3,
        sizes={
            "parameters": operator.shape[0],
            "examples": num_examples,
            "chunk": chunk_size,
            "products": count,
        },
        facts=lambda answers, seconds: {
            "products of the search": float(count - int(answers["regjax, no search"].num_matvecs)),
            **{f"{label} / regjax": seconds[label] / seconds["regjax"] for label in others},
        },
        bars={"regjax": bar},
    )


def _density() -> Case:
    """160 products deflated against 160 plain, medians of 20 seeds, against the dense spectrum."""
    problem = _problems.trained("small_mlp", 1000)
    operator = curvature.hessian(problem.loss_fn, problem.params, problem.x, problem.y)
    exact = np.asarray(curvature.exact_spectrum(operator), np.float64)

    def solve(deflate: int, num_probes: int) -> list[curvature.DensityResult]:
        return [
            curvature.spectral_density(
                operator,
                key=jax.random.key(seed),
                num_steps=40,
                num_probes=num_probes,
                deflate=deflate,
            )
            for seed in range(20)
        ]

    def trace_error(density: curvature.DensityResult) -> float:
        return abs(float(density.trace) - exact.sum()) / abs(exact.sum())

    def facts(answers: Any, seconds: Any) -> dict[str, float]:
        del seconds
        plain, deflated = answers["plain"], answers["deflated"]
        trace = [float(np.median([trace_error(d) for d in ds])) for ds in (plain, deflated)]
        tail = [float(np.median([_tail_error(d, exact) for d in ds])) for ds in (plain, deflated)]
        return {
            "trace error plain": trace[0],
            "trace error deflated": trace[1],
            "trace error deflated / plain": trace[1] / trace[0],
            "tail error plain": tail[0],
            "tail error deflated": tail[1],
            "tail error deflated / plain": tail[1] / tail[0],
        }

    def error(label: str, answer: Any) -> float:
        del label
        scores = [(float(d.trace) - exact.sum()) / float(d.trace_standard_error) for d in answer]
        return float(np.abs(scores).max())

    return Case(
        candidates={"plain": lambda: solve(0, 4), "deflated": lambda: solve(80, 2)},
        error=error,
        tolerance=5,  # standard errors
        sizes={"parameters": operator.shape[0], "products": 160, "seeds": 20},
        facts=facts,
        bars={"trace error deflated / plain": 0.25, "tail error deflated / plain": 0.1},
    )


def _tail_error(density: curvature.DensityResult, exact: np.ndarray) -> float:
    """Wasserstein-1 distance of the masses above the 10th eigenvalue, over that eigenvalue.

    The mass is cut half-way to the 11th eigenvalue, so that rounding moves no atom across, and the
    distance is the area between the survival functions above the cut.
    """
    cut = (exact[-10] + exact[-11]) / 2
    taken = np.asarray(density.eigenvalue_weights) > 0
    places = np.concatenate([np.ravel(density.nodes), np.asarray(density.eigenvalues)[taken]])
    masses = np.concatenate(
        [np.ravel(density.weights), np.asarray(density.eigenvalue_weights)[taken]]
    )
    places = np.concatenate([np.maximum(places, cut), np.maximum(exact, cut)])
    signed = np.concatenate([masses, np.full(exact.size, -1 / exact.size)])
    order = np.argsort(places)
    # Mass above each gap between neighbouring places, ours less the exact one.
    above = -np.cumsum(signed[order])[:-1]
    return float(np.sum(np.abs(above) * np.diff(places[order])) / exact[-10])


def _random_like(tree: Any) -> Any:
    flat, unravel = jax.flatten_util.ravel_pytree(tree)
    return unravel(jax.random.normal(jax.random.key(0), flat.shape, flat.dtype))


def _inner(one: Any, other: Any) -> Any:
    return sum(
        jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


@jax.jit
def _reverse_over_reverse(loss_fn: Any, params: Any, vector: Any, *batch: Any) -> jax.Array:
    gradient = jax.grad(loss_fn)
    product = jax.grad(lambda p: _inner(gradient(p, *batch), vector))(params)
    return jax.flatten_util.ravel_pytree(product)[0]


def _multiply(operator: curvature.Operator, vector: jax.Array) -> jax.Array:
    return operator.product(vector)


def _operations(function: Any, *arguments: Any) -> float:
    analysis: Any = jax.jit(function).lower(*arguments).compile().cost_analysis()
    return float(analysis["flops"])

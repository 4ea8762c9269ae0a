"""Linear systems and functions of a matrix against their products and against other tools."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._timing import Case
from benchmarks.speed import _competitors, _problems
from regjax import curvature

_DAMPING = 1e-2
# A tolerance that no float32 residual meets: all products are made.
_NEVER = 1e-30


def cases(preset: str) -> dict[str, Callable[[], Case]]:
    """The cases of a preset by name."""
    if preset == "smoke":
        return {"solve": functools.partial(_solve, "small_mlp", 64, 6, {})}
    return {
        "solve_mlp": functools.partial(_solve, "mlp", 4096, 30, {"cg": 1.05, "minres": 1.05}),
        "function_mlp": functools.partial(_function, 2048, 30),
    }


def _problem(name: str, num_examples: int) -> tuple[_problems.Problem, curvature.Operator, Any]:
    problem = _problems.trained(name, num_examples)
    operator = curvature.hessian(problem.loss_fn, problem.params, problem.x, problem.y)
    vector = operator.space.unravel(operator.space.normal(jax.random.key(0)))
    return problem, operator, vector


def _solve(name: str, num_examples: int, count: int, bars: dict[str, float]) -> Case:
    """Conjugate gradients and MINRES over as many products with the same matrix."""
    problem, operator, vector = _problem(name, num_examples)
    # A damping that makes the matrix positive definite: the Hessian has negative eigenvalues.
    damping = _DAMPING + float(
        -curvature.top_eigenpairs(operator, 1, key=jax.random.key(1), which="SA").values[0]
    )
    flat = operator.space.ravel(vector)
    damped = operator + damping * curvature.identity(operator.space)

    def products() -> jax.Array:
        for _ in range(count):
            image = jax.block_until_ready(operator.product(flat))
        return image

    def solve(method: str) -> curvature.SolveResult:
        return curvature.solve(
            operator, vector, damping=damping, method=method, tol=_NEVER, max_matvecs=count
        )

    @jax.jit
    def plain(operator: curvature.Operator, vector: jax.Array) -> jax.Array:
        return jax.scipy.sparse.linalg.cg(operator.product, vector, tol=0.0, maxiter=count - 1)[0]

    expected = solve("cg").residual_norm
    peers = {}
    if name == "mlp" and all(map(importlib.util.find_spec, ("torch", "curvlinops"))):
        batch = (problem.x, problem.y)
        peers["curvlinops cg"] = _competitors.solved_by_curvlinops(
            problem, batch, vector, damping, count
        )

    def error(label: str, answer: Any) -> float:
        if label == "products alone":
            return 0.0 if bool(jnp.all(jnp.isfinite(answer))) else np.inf
        is_ours = isinstance(answer, curvature.SolveResult)
        x = operator.space.ravel(answer.solution) if is_ours else jnp.asarray(answer)
        residual = operator.space.norm(flat - damped.product(x))
        if not is_ours:
            # Equal steps of the iteration drift apart by rounding, by a factor of two or three.
            return max(float(residual / (10 * expected)) - 1, 0.0)
        if int(answer.num_matvecs) != count:
            return np.inf
        return float(jnp.abs(residual - answer.residual_norm) / residual)

    return Case(
        candidates={
            "products alone": products,
            "cg": lambda: solve("cg"),
            "minres": lambda: solve("minres"),
            "jax.scipy cg, one product fewer": lambda: plain(damped, flat),
            **peers,
        },
        error=error,
        tolerance=0.05,
        sizes={"parameters": operator.size, "examples": num_examples, "products": count},
        bars=bars,
    )


def _function(num_examples: int, count: int) -> Case:
    """The exponential of a Hessian times a vector, against matfree where it is installed."""
    _, operator, vector = _problem("mlp", num_examples)
    flat = operator.space.ravel(vector)
    function = lambda x: jnp.exp(-0.1 * x)
    reference = curvature.apply_function(function, operator, vector, num_steps=2 * count).value
    expected = operator.space.ravel(reference)

    def products() -> jax.Array:
        for _ in range(count):
            image = jax.block_until_ready(operator.product(flat))
        return image

    def error(label: str, answer: Any) -> float:
        if label == "products alone":
            return 0.0 if bool(jnp.all(jnp.isfinite(answer))) else np.inf
        is_ours = isinstance(answer, curvature.FunctionResult)
        found = operator.space.ravel(answer.value) if is_ours else answer
        return float(operator.space.norm(found - expected) / operator.space.norm(expected))

    return Case(
        candidates={
            "products alone": products,
            "regjax": lambda: curvature.apply_function(function, operator, vector, num_steps=count),
            **_others(function, operator, flat, count),
        },
        error=error,
        tolerance=1e-3,
        sizes={"parameters": operator.size, "examples": num_examples, "products": count},
    )


def _others(
    function: Callable[[jax.Array], jax.Array],
    operator: curvature.Operator,
    vector: jax.Array,
    count: int,
) -> dict[str, Callable[[], jax.Array]]:
    if importlib.util.find_spec("matfree") is None:
        return {}
    from matfree import decomp, funm

    tridiagonalise = decomp.tridiag_sym(count, reortho="full")
    dense_function = funm.dense_funm_sym_eigh(function)
    apply = funm.funm_lanczos_sym(dense_function, tridiagonalise)
    compiled = jax.jit(lambda operator, vector: apply(operator.product, vector))
    return {"matfree": lambda: compiled(operator, vector)}

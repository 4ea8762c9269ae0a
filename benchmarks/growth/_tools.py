"""The same eigenpairs, or nodes of a density, by regjax, matfree and curvlinops.

Every tool makes the same number of products and no test of convergence ends it sooner. What has to
be done again for new parameters is timed, what is compiled once is not; that is reported by itself.
"""

import importlib.util
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from benchmarks import _timing
from benchmarks.growth._points import Point
from benchmarks.speed import _competitors
from benchmarks.speed._problems import Problem
from regjax import curvature

REGJAX, MATFREE, CURVLINOPS = "regjax", "matfree", "curvlinops"


class Answer(NamedTuple):
    """What a run gave.

    Attributes:
      largest: the largest eigenvalue or node.
      products: how many products it took.
      vector: (n,), the eigenvector of the largest, where there is one.
    """

    largest: float
    products: int
    vector: Any = None


class Tool(NamedTuple):
    """A tool that is ready for a point.

    Attributes:
      run: the timed function.
      compile_seconds: what the first call took beyond a later one; None: nothing is compiled.
      num_bytes: () -> memory by the compiler's account, which may compile; None: there is none.
    """

    run: Callable[[], Answer]
    compile_seconds: float | None
    num_bytes: Callable[[], int] | None


def tools(point: Point, problem: Problem, cold: bool) -> Iterator[tuple[str, Tool]]:
    """The installed tools, one after the other, each with nothing compiled before.

    If not `cold` what this process has compiled stays, and the other tools are left out.
    """
    found = {REGJAX: _regjax}
    if cold and importlib.util.find_spec("matfree"):
        found[MATFREE] = _matfree
    if cold and importlib.util.find_spec("torch") and importlib.util.find_spec("curvlinops"):
        found[CURVLINOPS] = _curvlinops
    for name, prepare in found.items():
        if cold:
            jax.clear_caches()
        yield name, prepare(point, problem)


def solver_of(point: Point, operator: curvature.Operator, products: int) -> Any:
    """The solver of a point, which makes so many products."""
    if point.k:
        return curvature.top_eigenpairs_solver(
            operator, point.k, key=jax.random.key(0), tol=0.0, search=False, max_matvecs=products
        )
    return curvature.spectral_density_solver(
        operator, key=jax.random.key(0), num_steps=products, num_probes=1, deflate=0
    )


def _regjax(point: Point, problem: Problem) -> Tool:
    def run(products: int = point.products) -> Answer:
        operator = curvature.hessian(problem.loss_fn, problem.params, problem.x, problem.y)
        found = jax.block_until_ready(curvature.run(solver_of(point, operator, products)))
        if point.k:
            first = jax.tree.map(lambda leaf: leaf[0], found.vectors)
            return Answer(float(found.values[0]), int(found.num_matvecs), first)
        return Answer(float(found.nodes.max()), int(found.num_matvecs))

    # Two products compile all that twenty need; the steps of a density are a size of its programs.
    few = 2 if point.k else point.products
    cold, warm = (_seconds(lambda: run(few)) for _ in range(2))

    def num_bytes() -> int:
        operator = curvature.hessian(problem.loss_fn, problem.params, problem.x, problem.y)
        solver = solver_of(point, operator, point.products)
        return curvature.memory_estimate(solver).total_bytes

    return Tool(run, max(cold - warm, 0.0), num_bytes)


def _matfree(point: Point, problem: Problem) -> Tool:
    """Lanczos with full reorthogonalisation, the eigenvectors too; `custom_vjp` compiles longer."""
    from matfree import decomp

    decompose = decomp.tridiag_sym(point.products, reortho="full", custom_vjp=False)

    def solve(loss_fn: Any, params: Any, x: jax.Array, y: jax.Array, start: Any) -> Any:
        flat, unravel = ravel_pytree(params)
        gradient = jax.grad(lambda flat: loss_fn(unravel(flat), x, y))
        product = lambda vector: jax.jvp(gradient, (flat,), (vector,))[1]
        found = decompose(product, start)
        values, vectors = jnp.linalg.eigh(found.J_small)
        if not point.k:
            return values, vectors[0] ** 2
        return values[-point.k :], vectors[:, -point.k :].T @ found.Q_tall

    start = jax.random.normal(jax.random.key(0), (point.num_parameters,))
    arguments = (problem.loss_fn, problem.params, problem.x, problem.y, start)
    begin = time.perf_counter()
    compiled = jax.jit(solve).lower(*arguments).compile()
    seconds = time.perf_counter() - begin
    total = _timing.bytes_of(compiled)

    def run() -> Answer:
        values, _ = jax.block_until_ready(compiled(*arguments))
        return Answer(float(values[-1]), point.products)

    return Tool(run, seconds, lambda: total["total"])


def _curvlinops(point: Point, problem: Problem) -> Tool:
    """ARPACK on its Hessian, two rounds at most; of a density its Lanczos, not orthogonalised."""
    from curvlinops import HessianLinearOperator
    from curvlinops.papyan2020traces import spectrum
    from scipy.sparse import linalg

    model, criterion, x, y = _competitors.torch_copy(problem, (problem.x, problem.y))
    start = np.random.default_rng(0).normal(size=point.num_parameters).astype(np.float32)
    # The first round makes `ncv` products, the second those that the pairs of the first leave.
    ncv = max(point.k + 2, (point.products + point.k) // 2)

    def run() -> Answer:
        operator = HessianLinearOperator(
            model, criterion, list(model.parameters()), [(x, y)], check_deterministic=False
        )
        if not point.k:
            values, _ = spectrum.fast_lanczos(operator, point.products)
            return Answer(float(values.max()), point.products)
        count = 0
        product = operator.to_scipy()

        def multiply(vector: np.ndarray) -> np.ndarray:
            nonlocal count
            count += 1
            return product @ vector

        counted = linalg.LinearOperator(product.shape, multiply, dtype=np.float32)
        try:
            values = linalg.eigsh(
                counted, point.k, which="LA", ncv=ncv, tol=1e-2, v0=start, maxiter=1
            )[0]
        except linalg.ArpackNoConvergence as error:
            values = error.eigenvalues
        return Answer(float(np.max(values, initial=0)), count)

    return Tool(run, None, None)


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start

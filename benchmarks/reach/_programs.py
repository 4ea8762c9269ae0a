"""The programs of a case: a function and the shapes of its arguments, each with its place."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from benchmarks.reach._chips import AXIS, GROUPS
from benchmarks.reach._models import Problem, Tree
from benchmarks.speed._problems import cross_entropy
from regjax import curvature, transforms
from regjax._sharding import Placement

GRADIENT = "gradient"
PROGRAMS = (
    GRADIENT, "Hessian product", "Gauss-Newton product", "Lanczos step", "SAM step", "density step"
)  # fmt: skip
_NUM_STEPS = 40
_RATE, _RHO = 0.1, 0.05


class Program(NamedTuple):
    """What is compiled.

    Attributes:
      function: of the arguments.
      arguments: shapes with their places.
      donated: which of them the results may take the place of.
      solver: start -> the solver whose step it is; None: it is no solver's.
      init: (operator, start) -> the first state of that solver.
    """

    function: Callable[..., Any]
    arguments: tuple[Tree, ...]
    donated: tuple[int, ...] = ()
    solver: Any = None
    init: Callable[..., Tree] | None = None


def program_of(name: str, problem: Problem, mesh: Mesh, num_steps: int = _NUM_STEPS) -> Program:
    """The program of a case."""
    data = (problem.x, problem.y)
    if name == GRADIENT:
        return Program(
            _placed_as(problem.params, jax.grad(problem.loss_fn)), (problem.params, *data)
        )
    if name == "SAM step":
        step = _placed_as(problem.params, _sam_step(problem.loss_fn))
        return Program(step, (problem.params, *data), (0,))
    if name.endswith("product"):
        operator = operator_of(name, problem, mesh)
        multiply = _placed_as(problem.params, lambda operator, tree: operator.matvec(tree))
        return Program(multiply, (operator, problem.params))
    operator = operator_of("Hessian product", problem, mesh)
    make = functools.partial(_SOLVERS[name], num_steps)
    init = lambda operator, start: make(operator, start).init()
    # Of shapes alone: what a solver makes before its first product is traced.
    state = operator.space.shapes_of(jax.eval_shape(init, operator, problem.params))
    step = lambda operator, start, state: make(operator, start).step(state)
    arguments = (operator, problem.params, state)
    return Program(step, arguments, (2,), functools.partial(make, operator), init)


def _lanczos(num_steps: int, operator: Any, start: Tree) -> Any:
    return curvature.lanczos_solver(operator, start, num_steps)


def _density(num_steps: int, operator: Any, start: Tree) -> Any:
    del start
    return curvature.spectral_density_solver(
        operator, key=jax.random.key(0), num_steps=num_steps, num_probes=1, deflate=0
    )


_SOLVERS: dict[str, Callable[..., Any]] = {"Lanczos step": _lanczos, "density step": _density}


def operator_of(name: str, problem: Problem, mesh: Mesh) -> Any:
    """The operator of shapes: each product recomputes the linearisation."""
    arrays = (problem.params, problem.x, problem.y)
    if name == "Hessian product":
        make = lambda params, *batch: curvature.hessian(problem.loss_fn, params, *batch)
    else:
        make = lambda params, *batch: curvature.gauss_newton(
            problem.model_fn, cross_entropy, params, *batch
        )
    shapes = jax.eval_shape(make, *arrays)
    return dataclasses.replace(
        shapes,
        params=problem.params,
        batch=(problem.x, problem.y),
        linear_map=None,
        placement=_placement(problem, mesh),
    )


def _placement(problem: Problem, mesh: Mesh) -> Placement | None:
    if mesh.size == 1:
        return None
    specs = tuple(leaf.sharding.spec for leaf in jax.tree.leaves(problem.params))
    return Placement(mesh, (GROUPS, AXIS), specs)


def _sam_step(loss_fn: Any) -> Any:
    step = optax.chain(transforms.sam(_RHO), optax.sgd(_RATE))

    def of(params: Tree, x: jax.Array, y: jax.Array) -> Tree:
        grad_fn = lambda params, i: jax.grad(loss_fn)(params, x, y)
        grads = grad_fn(params, 0)
        updates, _ = step.update(grads, step.init(params), params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates)

    return of


def _placed_as(params: Tree, function: Callable[..., Tree]) -> Callable[..., Tree]:
    """`function`, whose result lies as the parameters do."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    return lambda *arguments: jax.lax.with_sharding_constraint(function(*arguments), shardings)

"""The record of a point: every tool, checked and then timed, beside the arithmetic."""

import dataclasses
import functools
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks import _timing
from benchmarks.growth import _tools
from benchmarks.growth._arithmetic import arithmetic
from benchmarks.growth._points import Point, problem_of, shapes_of
from benchmarks.speed._problems import Problem
from regjax import curvature

# The fastest of so many calls, or of those within so many seconds.
_CALLS, _BUDGET = 5, 2.0
# Of the largest eigenvalue: tools that begin elsewhere agree to this after ten products.
_TOLERANCE = 0.03


def record_of(point: Point, *, cold: bool) -> dict[str, Any]:
    """The record of a point, which JSON can write.

    Args:
      point: what to measure.
      cold: whether to forget what this process has compiled, so that it is compiled once more. If
        not, the other tools and the account of the memory, which compiles too, are left out.

    Raises:
      WrongAnswer: a tool is off, or it took another number of products.
    """
    start, load = time.process_time(), os.getloadavg()[0]
    measured = _measured(point, cold) if point.runs else {_tools.REGJAX: {"bytes": _account(point)}}
    return {
        "case": point.name,
        **point._asdict(),
        "parameters": point.num_parameters,
        "runs": point.runs,
        "tools": measured,
        "arithmetic": arithmetic(point),
        "load": [round(load, 1), round(os.getloadavg()[0], 1)],
        "cpu_seconds": round(time.process_time() - start, 1),
        **_timing.environment(),
    }


def _measured(point: Point, cold: bool) -> dict[str, dict[str, Any]]:
    """What each tool takes, timed after its answer was checked."""
    problem = problem_of(point)
    expected = None if point.k else _largest(problem)
    found = {}
    for name, tool in _tools.tools(point, problem, cold):
        begin = time.perf_counter()
        answer = tool.run()
        seconds = [time.perf_counter() - begin]
        if expected is None:  # the first tool is ours
            expected = _rayleigh(problem, answer)
        error = abs(answer.largest / expected - 1)
        is_as_wanted = name == _tools.CURVLINOPS or answer.products == point.products
        if not (error <= _TOLERANCE and is_as_wanted):
            raise _timing.WrongAnswer(
                f"{point.name}: {name} is off by {error:.2g}, allowed {_TOLERANCE}, after "
                f"{answer.products} products, wanted {point.products}."
            )
        while len(seconds) < _CALLS and sum(seconds) < _BUDGET:
            begin = time.perf_counter()
            tool.run()
            seconds.append(time.perf_counter() - begin)
        account = tool.num_bytes if cold else None
        found[name] = {
            "seconds": min(seconds), "slowest": max(seconds), "calls": len(seconds),
            "compile": tool.compile_seconds,
            "bytes": None if account is None else account(),
            "products": answer.products, "error": error,
        }  # fmt: skip
    return found


def _largest(problem: Problem) -> float:
    """The largest eigenvalue, checked like every other."""
    operator = curvature.hessian(problem.loss_fn, problem.params, problem.x, problem.y)
    found = curvature.top_eigenpairs(operator, 1, key=jax.random.key(3), search=False)
    first = jax.tree.map(lambda leaf: leaf[0], found.vectors)
    answer = _tools.Answer(float(found.values[0]), int(found.num_matvecs), first)
    expected = _rayleigh(problem, answer)
    if not abs(answer.largest / expected - 1) <= _TOLERANCE:
        raise _timing.WrongAnswer(f"the largest eigenvalue is {answer.largest}, not {expected}.")
    return expected


def _rayleigh(problem: Problem, answer: _tools.Answer) -> float:
    """The quotient v' H v / v' v, with a product of another kind, reverse over reverse."""
    return float(_quotient(problem, answer.vector))


@jax.jit
def _quotient(problem: Problem, vector: Any) -> jax.Array:
    def inner(one: Any, other: Any) -> jax.Array:
        return jnp.vdot(ravel_pytree(one)[0], ravel_pytree(other)[0])

    gradient = jax.grad(lambda params: problem.loss_fn(params, problem.x, problem.y))
    image = jax.grad(lambda params: inner(gradient(params), vector))(problem.params)
    return inner(vector, image) / inner(vector, vector)


def _account(point: Point) -> int:
    """Bytes on each device by `memory_estimate`; nothing is run but what divides the arrays."""
    if point.devices == 1 and point.axis != "devices":
        return _account_of_shapes(point)
    problem = problem_of(point)
    devices = np.array(jax.devices()[: point.devices])
    mesh = Mesh(devices, ("data",), axis_types=(AxisType.Auto,))
    put = functools.partial(_put, mesh)
    operator = curvature.hessian(
        problem.loss_fn, jax.tree.map(put, problem.params), *jax.tree.map(put, problem[2:])
    )
    return _total(point, operator)


def _account_of_shapes(point: Point) -> int:
    """The same of arrays that are not there; each product recomputes the linearisation."""
    problem = shapes_of(point)
    make = lambda of: curvature.hessian(of.loss_fn, of.params, of.x, of.y)
    operator = dataclasses.replace(jax.eval_shape(make, problem), linear_map=None)
    return _total(point, operator)


def _total(point: Point, operator: curvature.Operator) -> int:
    solver = _tools.solver_of(point, operator, point.products)
    return curvature.memory_estimate(solver).total_bytes


def _put(mesh: Mesh, leaf: jax.Array) -> jax.Array:
    """Divided along its first axis, where that can be done evenly."""
    spec = PartitionSpec("data") if leaf.shape[0] % mesh.size == 0 else PartitionSpec()
    return jax.device_put(leaf, NamedSharding(mesh, spec))

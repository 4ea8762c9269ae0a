"""Functions of a matrix times a vector, f(A) b, from one Lanczos run that begins with b.

With A Q' = Q' T + ..., f(A) b is about |b| Q' f(T) e1 (Druskin, Knizhnerman 1989): exact for
polynomials of degree below m, and for f = 1 / x what conjugate gradients find after m steps.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from regjax import _checks, _numerics
from regjax._arguments import checked
from regjax._base import Callback, Params, Tree
from regjax._printing import legible
from regjax._space import Space
from regjax.curvature._engine import _basis
from regjax.curvature._engine._checkpoint import Checkpoint
from regjax.curvature._engine._driver import run
from regjax.curvature._engine._solver import Solver
from regjax.curvature._krylov import Krylov
from regjax.curvature._lanczos import lanczos_solver
from regjax.curvature._operators._operator import Operator
from regjax.curvature._precision import precisely
from regjax.curvature._ritz import small_pairs

# Steps, unless said otherwise.
_STEPS = 40

Function = Callable[[jax.Array], jax.Array]


@legible
class FunctionResult(NamedTuple):
    """An approximation of f(A) b.

    Attributes:
      value: f(A) b, a tree like the parameters.
      error_estimate: (), the norm of the change that the later half of the steps has made. That is
        about the error of the run without them, so that the error of `value` is smaller as long as
        steps still help. It is no bound: a function may vary where no step has been yet. 0 where
        the Krylov space was exhausted, which leaves rounding alone.
      num_matvecs: (), int32, products used.
    """

    value: Params
    error_estimate: jax.Array
    num_matvecs: jax.Array


@checked
def apply_function(
    function: Function,
    operator: Operator,
    vector: Params,
    *,
    num_steps: int | None = None,
    accumulation: str | None = None,
    callback: Callback | None = None,
    checkpoint: Checkpoint | None = None,
) -> FunctionResult:
    """Computes f(A) b by Lanczos with full re-orthogonalisation.

    For example the flow of a quadratic is `apply_function(lambda x: jnp.exp(-time * x),
    hessian(...), params)`. For 1 / x use `solve`, which needs no more than a few vectors in memory.

    Example:
      >>> loss_fn = lambda w: 0.5 * jnp.sum(jnp.arange(1.0, 9.0) * w**2)  # the diagonal 1, ..., 8
      >>> hessian = curvature.hessian(loss_fn, jnp.zeros(8))
      >>> print(curvature.apply_function(jnp.sqrt, hessian, jnp.ones(8)).value)
      [1.    1.414 1.732 2.    2.236 2.449 2.646 2.828]

    Args:
      function: f, elementwise, of real eigenvalues (m,). It is asked at Ritz values alone
        (estimates of eigenvalues), which lie between the smallest and the largest eigenvalue up to
        rounding. Where it is not finite the value is not.
      operator: A, symmetric, of order n.
      vector: b, a tree like the parameters. Zero gives zero.
      num_steps: number of products m, at most n; as many vectors are in memory. Default: min(n,
        40).
      accumulation: how inner products of vectors (n,) are summed (see `lanczos`).
      callback: called as callback(step, num_steps, progress) after each product, outside of
        `jax.jit`; `progress.result` is the `FunctionResult` so far.
      checkpoint: a `Checkpoint`: the state is saved every few products, and after the process was
        killed the same call goes on from there. Not inside of `jax.jit`.

    Returns:
      A `FunctionResult`.

    Raises:
      ValueError: `num_steps` is not between 1 and n, `vector` does not fit the operator or is not
        finite, `function` does not return the shape that it gets, or the checkpoint is of another
        problem.
      TypeError: `function` cannot be called.
      CheckpointError: a file of the checkpoint cannot be written.
      MemoryError: the device is out of memory; the message says how much is needed, and what to
        lower.
      NotFiniteError: a product is NaN or infinite, outside of `jax.jit`; the message says where to
        look, and `.result` is what there was before.
      Interrupted: Ctrl-C; its `.result` is the result of the steps done.

    References:
      V. Druskin, L. Knizhnerman (1989), Two polynomial methods of calculating functions of
      symmetric matrices, USSR Computational Mathematics and Mathematical Physics 29(6).
    """
    solver = apply_function_solver(
        function, operator, vector, num_steps=num_steps, accumulation=accumulation
    )
    return run(solver, callback=callback, checkpoint=checkpoint)


@checked
def apply_function_solver(
    function: Function,
    operator: Operator,
    vector: Params,
    *,
    num_steps: int | None = None,
    accumulation: str | None = None,
) -> Solver[Tree, FunctionResult]:
    """Makes the solver of `apply_function`, which has the same arguments, to drive by hand.

    Example:
      >>> loss_fn = lambda w: 0.5 * jnp.sum(jnp.arange(1.0, 9.0) * w**2)  # the diagonal 1, ..., 8
      >>> hessian = curvature.hessian(loss_fn, jnp.zeros(8))
      >>> solver = curvature.apply_function_solver(jnp.sqrt, hessian, jnp.ones(8))
      >>> print(curvature.run(solver).value[:4])
      [1.    1.414 1.732 2.   ]
    """
    space = operator.space
    _checks.function("function", function)
    _checks.finite_tree("vector", _checks.same_tree("vector", vector, space.like()))
    if num_steps is None:
        num_steps = min(space.size, _STEPS)
    _checks.integer("num_steps", num_steps, maximum=(space.size, _checks.ORDER))
    _check_elementwise(function, num_steps, space.dtype)
    flat = space.ravel(vector)
    # Of a zero vector nothing is wanted: any direction does.
    start = space.unravel(jnp.where(jnp.any(flat != 0), flat, jnp.ones_like(flat)))
    norm = jnp.where(jnp.any(flat != 0), _numerics.scaled_norm(space.ravel(start)), 0)
    steps: Solver[Any, Any] = lanczos_solver(operator, start, num_steps, accumulation=accumulation)

    def result(krylov: Krylov) -> FunctionResult:
        return _applied(krylov, norm.astype(krylov.projected.dtype), space, function)

    arguments = {name: value for name, value in steps.arguments.items() if name != "start"}
    return dataclasses.replace(
        steps, name="apply_function", arguments=arguments | {"vector": vector}, result=result
    )


def _check_elementwise(function: Function, num_steps: int, dtype: jnp.dtype) -> None:
    found = jax.eval_shape(function, jax.ShapeDtypeStruct((num_steps,), dtype))
    if getattr(found, "shape", None) != (num_steps,):
        raise ValueError(
            f"`function` must map eigenvalues ({num_steps},) to values of this shape, got "
            f"{jax.tree.map(lambda leaf: leaf.shape, found)}."
        )


def _applied(krylov: Krylov, norm: jax.Array, space: Space, function: Function) -> FunctionResult:
    spectra, counts = _spectra(krylov)
    # Not as a part of a program, which would hold what the function has closed over.
    images = [function(spectrum.values).astype(norm.dtype) for spectrum in spectra]
    return _combined(krylov, spectra, images, norm, counts[0], space)


class _Spectrum(NamedTuple):
    """Of the T of some steps: Ritz values (m,), and the parts of e1 along their vectors."""

    values: jax.Array
    parts: jax.Array
    vectors: jax.Array


@jax.jit
@precisely
def _spectra(krylov: Krylov) -> tuple[list[_Spectrum], tuple[jax.Array, jax.Array]]:
    """The spectrum of all steps and that of the first half; their numbers of steps."""
    filled = krylov.filled
    counts = filled, filled // 2
    return [_spectrum(krylov, count) for count in counts], counts


def _spectrum(krylov: Krylov, count: jax.Array) -> _Spectrum:
    inside = jnp.arange(krylov.projected.shape[0], dtype=jnp.int32) < count
    matrix = jnp.where(inside[:, None] & inside[None], krylov.projected, 0)
    pairs = small_pairs(matrix, count)
    # Of steps that were not made copies of one that was, if there is one.
    last = jnp.where(count > 0, pairs.values[-1], 0)
    return _Spectrum(
        values=krylov.unscaled(jnp.where(pairs.valid, pairs.values, last)),
        parts=jnp.where(pairs.valid, pairs.vectors[0], 0),
        vectors=jnp.where(inside[:, None], pairs.vectors, 0),
    )


@functools.partial(jax.jit, static_argnames="space")
@precisely
def _combined(
    krylov: Krylov,
    spectra: list[_Spectrum],
    images: list[jax.Array],
    norm: jax.Array,
    count: jax.Array,
    space: Space,
) -> FunctionResult:
    weights, fewer = [
        spectrum.vectors @ jnp.where(spectrum.parts != 0, image * spectrum.parts, 0)
        for spectrum, image in zip(spectra, images, strict=True)
    ]
    is_exhausted = krylov.broke_down | (count >= space.size)
    change = norm * _numerics.scaled_norm(weights - fewer)
    change = jnp.where(count > 0, change, jnp.inf)  # before the first product
    (value,) = _basis.combine(krylov.basis, weights[:, None])
    value = jnp.where(norm == 0, 0, norm.astype(value.dtype) * value)
    return FunctionResult(
        value=space.unravel(value),
        error_estimate=jnp.where(is_exhausted | (norm == 0), 0, change),
        num_matvecs=count,
    )

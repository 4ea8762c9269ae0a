"""The spectral density: extreme eigenpairs exactly, the rest by stochastic Lanczos quadrature.

Plain quadrature spends its accuracy on the few outliers, which a random probe hardly touches. Here
a first Lanczos run finds the extreme pairs; those that converged are taken out, and the probes see
the complement alone. The mass is split exactly: r eigenvalues weigh 1/n each, the complement the
rest.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from regjax import _checks
from regjax._arguments import checked
from regjax._base import Callback, PRNGKey, Tree
from regjax._on_host import on_host
from regjax.curvature import _probes
from regjax.curvature._deflation import Deflation, taken_out
from regjax.curvature._engine import _basis
from regjax.curvature._engine._accumulation import small_dtype
from regjax.curvature._engine._checkpoint import Checkpoint
from regjax.curvature._engine._driver import run
from regjax.curvature._engine._solver import Solver
from regjax.curvature._krylov import Krylov, charged, empty, expand
from regjax.curvature._measure import DensityResult
from regjax.curvature._operators._operator import Operator

# Where `num_steps` is chosen: the fewest, the most, and the bytes of vectors beyond which there are
# no more than the fewest.
_FEWEST, _MOST, _BUDGET = 40, 320, 2**30


@checked
def spectral_density(
    operator: Operator,
    *,
    key: PRNGKey,
    num_steps: int | None = None,
    num_probes: int = 2,
    deflate: int | None = None,
    accumulation: str | None = None,
    callback: Callback | None = None,
    checkpoint: Checkpoint | None = None,
) -> DensityResult:
    """Estimates a spectral density by deflated stochastic Lanczos quadrature.

    A first Lanczos run finds the extreme eigenpairs; those that converged are taken out
    ("deflated") and counted exactly. The rest of the density comes from random vectors, the probes.
    `density_curve` makes a curve of it to plot, `eigenvalue_count` counts with bounds.

    Example:
      >>> loss_fn = lambda w: 0.5 * jnp.sum(jnp.arange(1.0, 9.0) * w**2)  # eigenvalues 1, ..., 8
      >>> hessian = curvature.hessian(loss_fn, jnp.zeros(8))
      >>> density = curvature.spectral_density(hessian, key=jax.random.key(0))
      >>> print(density.eigenvalues, density.trace)  # a small matrix: all are taken out
      [8. 7. 6. 5. 4. 3. 2. 1.] 36.0

    Args:
      operator: symmetric, of order n.
      key: typed key for the start and the probes.
      num_steps: Lanczos steps m per probe, at most n. None takes as many as it needs to know how
        many eigenvalues lie beyond each of the shares 0.001, 0.003, 0.01, ..., 1 of the largest
        magnitude, on both sides of 0, as well as the draw of the probes lets it: to one standard
        error, or to one eigenvalue. It takes at least 40 and at most 320, and no more than 40 where
        a vector is so long that they would take more than 1 GiB; at most n.
      num_probes: number of probes P, Gaussian directions in the complement of what is taken out.
      deflate: products spent on finding extreme eigenpairs to take out, at most n; the vectors stay
        in memory. 0 gives the plain method. None takes 2 `num_steps`, 80 where that is None, at
        most n.
      accumulation: how inner products of vectors (n,) are summed (see `lanczos`); with "float64"
        nodes, weights, eigenvalues and what follows from them are float64.
      callback: called as callback(products, total, progress) after each product, outside of
        `jax.jit`.
      checkpoint: a `Checkpoint`: the state is saved every few products, and after the process was
        killed the same call goes on from there. Not inside of `jax.jit`.

    Returns:
      A `DensityResult`, after `deflate` + P m products at most. Multiplying the matrix by c > 0 and
      adding d I map all nodes and eigenvalues likewise, up to rounding.

    Raises:
      ValueError: an argument is out of its range, or the checkpoint is of another problem.
      CheckpointError: a file of the checkpoint cannot be written.
      MemoryError: the device is out of memory; the message says how much is needed, and what to
        lower.
      NotFiniteError: a product is NaN or infinite, outside of `jax.jit`; the message says where to
        look, and `.result` is what there was before.
      Interrupted: Ctrl-C; its `.result` is the result of the probes finished so far.

    References:
      S. Ubaru, J. Chen, Y. Saad (2017), Fast estimation of tr(f(A)) via stochastic Lanczos
      quadrature, SIAM J. Matrix Anal. Appl. 38(4). The deflation is our addition.
    """
    solver = spectral_density_solver(
        operator, key=key, num_steps=num_steps, num_probes=num_probes, deflate=deflate,
        accumulation=accumulation,
    )  # fmt: skip
    return run(solver, callback=callback, checkpoint=checkpoint)


@checked
def spectral_density_solver(
    operator: Operator,
    *,
    key: PRNGKey,
    num_steps: int | None = None,
    num_probes: int = 2,
    deflate: int | None = None,
    accumulation: str | None = None,
) -> Solver[Tree, DensityResult]:
    """Makes the solver of `spectral_density`, which has the same arguments, to drive by hand.

    It finds what is taken out; its `then` is the solver of the probes.

    Example:
      >>> loss_fn = lambda w: 0.5 * jnp.sum(jnp.arange(1.0, 9.0) * w**2)  # eigenvalues 1, ..., 8
      >>> hessian = curvature.hessian(loss_fn, jnp.zeros(8))
      >>> solver = curvature.spectral_density_solver(hessian, key=jax.random.key(0))
      >>> print(curvature.run(solver).trace)
      36.0
    """
    space = operator.space
    chosen = num_steps is None
    if num_steps is None:
        fit = _BUDGET // max(space.size * space.dtype.itemsize, 1)
        most, num_steps = min(max(_FEWEST, min(_MOST, fit)), space.size), _FEWEST
    else:
        most = _checks.integer("num_steps", num_steps, maximum=(space.size, _checks.ORDER))
    _checks.integer("num_probes", num_probes)
    num_rows = min(2 * num_steps, space.size) if deflate is None else deflate
    _checks.integer("deflate", num_rows, minimum=0, maximum=(space.size, _checks.ORDER))
    _checks.key("key", key)
    small = small_dtype(space.dtype, accumulation)
    # One at a time on CPU, where a block of vectors costs as much as its members.
    block = num_probes if operator.takes_blocks else 1
    num_rounds = -(-num_probes // block) * most

    def before_deflation() -> Krylov:
        start_key, krylov_key = _keys(key)
        return empty(space, space.normal(start_key), num_rows, krylov_key, accumulation)

    def after_deflation(krylov: Krylov) -> _probes.DensityState:
        return begin(taken_out(krylov, num_rows, operator.eps), krylov.filled)

    def without_deflation() -> _probes.DensityState:
        nothing: Any = np.zeros(0, small)
        rows = _basis.zeros(space, 0, accumulation)
        return begin(space.replicate(Deflation(rows, nothing, nothing)), np.int32(0))

    def begin(deflation: Deflation, num_matvecs: Any) -> _probes.DensityState:
        return _probes.first(deflation, key, num_matvecs, num_probes, most, block)

    probes: Solver[Any, DensityResult] = Solver(
        name="spectral_density",
        operator=operator,
        arguments={
            "key": key, "num_steps": most, "steps are chosen": chosen, "num_probes": num_probes,
            "deflate": num_rows, "probes at once": block, "accumulation": accumulation,
        },
        init=without_deflation,
        vectors=lambda state: state.probes.direction,
        update=functools.partial(_probes.update, chosen=chosen),
        done=lambda state: (state.num_finished >= num_probes) if chosen else False,
        result=lambda state: _probes.result(state, space.size, operator.eps),
        max_steps=num_rounds,
        lower=("num_steps", "deflate", "num_probes"),
        charge=_probes.charge,
    )  # fmt: skip
    if num_rows == 0:
        return probes
    return dataclasses.replace(
        probes,
        init=before_deflation,
        vectors=lambda krylov: krylov.direction,
        update=expand,
        done=lambda krylov: False,
        charge=charged,
        result=lambda krylov: _probes.result(after_deflation(krylov), space.size, operator.eps),
        max_steps=num_rows,
        then=lambda krylov: (probes, after_deflation(krylov)),
        later_steps=num_rounds,
    )


@on_host()
def _keys(key: PRNGKey) -> tuple[PRNGKey, PRNGKey]:
    """Those of the start and of the basis; the third is that of the probes."""
    _, start_key, krylov_key = jax.random.split(key, 3)
    return start_key, krylov_key

"""Influence functions: what the loss of a test example owes to each training example.

Giving training example i the weight 1/N + e moves the minimum of the mean training loss by -e
(A + damping I)^-1 g_i to first order, A the curvature there and g_i the example's gradient. The
loss of test example t then changes by e times

    -g_t' (A + damping I)^-1 g_i

One system is solved for each test example, none for the training examples.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jax.typing import ArrayLike

from regjax import _checks, _chunks, _loops, curvature
from regjax._arguments import checked
from regjax._base import Batch, Callback, LossFn, Mask, Params, Tree, couples_examples
from regjax._printing import legible
from regjax._subsets import part_of


@legible
class InfluenceResult(NamedTuple):
    """Influences of N training examples on T test examples.

    Attributes:
      value: (T, N), the derivative of each test loss with respect to the weight of each training
        example, in units of the loss. It is positive if the training example does harm. Leaving the
        example out lowers its weight by 1/N, which changes the test loss by about -value / N.
      residual_norms: (T,), residual norm of each test example's system, over the norm of the test
        gradient.
      converged: (T,), bool, whether this is at most `tol`. If not, `value` belongs to the best
        solution that was found.
      negative_curvature: (T,), bool, whether negative curvature was met: the parameters are not at
        a minimum of the damped loss, and the influence is not defined.
      num_matvecs: (), int32, number of products per test example.
    """

    value: jax.Array
    residual_norms: jax.Array
    converged: jax.Array
    negative_curvature: jax.Array
    num_matvecs: jax.Array


@checked
def influence(
    loss_fn: LossFn,
    params: Params,
    train: Batch,
    test: Batch,
    *,
    damping: ArrayLike,
    operator: curvature.Operator | None = None,
    method: str = "cg",
    preconditioner: curvature.Operator | None = None,
    tol: ArrayLike = 1e-4,
    max_matvecs: int | None = None,
    chunk_size: int | None = None,
    wrt: Mask = None,
    callback: Callback | None = None,
) -> InfluenceResult:
    """Computes the influence of training examples on the losses of test examples.

        value[t, i] = -g_t' (A + damping I)^-1 g_i

    Here g_t and g_i are the gradients of the losses of test example t and training example i, and A
    is the curvature of the training loss. The value is the derivative of test loss t with respect
    to the weight of training example i: positive if the example does harm. An example with a wrong
    label has a large negative influence on itself (`test=train`), because a larger weight would
    lower its own loss much.

    In linear regression, leaving out example i moves the parameters by exactly 1 / (1 - h_i) times
    what the influence says, where h_i is its leverage.

    Example:
      >>> loss_fn = lambda w, y: 0.5 * jnp.mean((w - y) ** 2)
      >>> train, test = (jnp.array([0.0, 0.0, 3.0]),), (jnp.array([0.0]),)
      >>> params = jnp.array(1.0)  # the mean of the training examples
      >>> result = diagnostics.influence(loss_fn, params, train, test, damping=0.0)
      >>> print(result.value)  # the third example does harm
      [[-1. -1.  2.]]

    Args:
      loss_fn: (params, *batch) -> scalar, the mean over independent examples, or a
        `regjax.WeightedMean`, whose examples have N times their share as their own loss. Put an L2
        penalty into `damping` instead.
      params: tree of parameters, at or near a minimum of the training loss.
      train: tuple of the arguments of the loss after the parameters: arrays with a leading axis of
        N examples.
      test: the same of T examples. T vectors like the parameters, and as many of the solver, are in
        memory: go over many test examples in parts.
      damping: number that is added to the diagonal of A, at least 0, in units of the curvature.
      operator: A, such as the Gauss-Newton matrix, which has no negative eigenvalues, or a
        `curvature.stream` of more data than fit in memory. None: the Hessian of the training loss.
      method: "cg" or "minres", the method of `curvature.solve`.
      preconditioner: operator near the inverse of the damped matrix; None: none.
      tol: the solver stops when residual norms, over those of the test gradients, are at most this.
      max_matvecs: limit of the number of products per test example; None: that of
        `curvature.solve`.
      chunk_size: number of training examples per pass, for bounded memory; None: all at once.
      wrt: which leaves of the parameters may move, such as those of the last layer; None: all.
      callback: called as callback(done, total, progress) while the systems are solved.

    Returns:
      An `InfluenceResult`.

    Raises:
      ValueError: the loss is not a scalar or couples its examples, the gradient of a test example
        is not finite, `operator` has another space, or a number is out of its range.
      TypeError: `train` or `test` is not a tuple of arrays.
      Interrupted: Ctrl-C while the systems are solved.

    References:
      P. W. Koh, P. Liang (2017), Understanding black-box predictions via influence functions,
      arXiv:1703.04730. R. D. Cook, S. Weisberg (1982), Residuals and influence in regression, for
      the exact form of linear regression.
    """
    train, test = _arguments("train", train), _arguments("test", test)
    if couples_examples(loss_fn):
        raise ValueError(
            "`loss_fn` must not couple the examples of a batch (batch norm or dropout in train "
            'mode), got one that does; use mode="evaluation".'
        )
    whole, whole_params = loss_fn, params
    loss_fn, params = part_of(loss_fn, params, wrt)
    own, chunk_size = _chunks.prepared(loss_fn, params, train, chunk_size, single=True)
    of_test, _ = _chunks.prepared(loss_fn, params, test, 1, single=True)
    if operator is None:
        operator = curvature.hessian(whole, whole_params, *train, chunk_size=chunk_size, wrt=wrt)
    elif operator.space.treedef != jax.tree.structure(params):
        raise ValueError(
            f"`operator` must be of the parameters that move, {jax.tree.structure(params)}, got "
            f"{operator.space.treedef}."
        )
    grads = _chunks.each(Partial(_gradient, of_test), params, test, 1)
    found = curvature.solve(
        operator, _finite(grads), damping=damping, method=method, preconditioner=preconditioner,
        tol=tol, max_matvecs=max_matvecs, callback=callback,
    )  # fmt: skip
    slopes = _chunks.each(Partial(_slopes, own, found.solution), params, train, chunk_size)
    sizes = jax.vmap(operator.space.norm)(operator.space.ravel_rows(grads))
    return InfluenceResult(
        value=-slopes.T,
        residual_norms=found.residual_norm / jnp.where(sizes > 0, sizes, 1),
        converged=found.converged,
        negative_curvature=found.negative_curvature,
        num_matvecs=found.num_matvecs,
    )


def _arguments(name: str, batch: Tree) -> Batch:
    if isinstance(batch, Mapping):
        batch = (batch,)
    if not isinstance(batch, (tuple, list)):
        raise TypeError(
            f"`{name}` must be a tuple of arrays, the arguments of the loss after the parameters, "
            f"got {type(batch).__name__}."
        )
    _checks.num_examples(tuple(batch), name)
    return tuple(batch)


def _gradient(loss_fn: Partial, params: Params, *example: Tree) -> Params:
    """The gradient of one example's loss, with a leading axis of one."""
    return jax.tree.map(lambda leaf: leaf[None], jax.grad(loss_fn)(params, *example))


def _finite(grads: Params) -> Params:
    """The gradients.

    Raises:
      ValueError: that of an example is seen not to be finite.
    """
    for leaf in jax.tree.leaves(grads):
        known = _checks.host_value(leaf)
        if known is None or not _loops.is_concrete(leaf):
            continue
        is_finite = np.isfinite(known.reshape(len(known), -1)).all(1)
        if not is_finite.all():
            raise ValueError(
                "`test` must have examples whose losses have finite gradients, got one that has "
                f"not: example {int(np.argmin(is_finite))}."
            )
    return grads


def _slopes(loss_fn: Partial, directions: Params, params: Params, *batch: Tree) -> jax.Array:
    """The derivatives (examples, T) of the examples' losses along T directions."""

    def losses(params: Params) -> jax.Array:
        one = lambda *example: loss_fn(params, *jax.tree.map(lambda leaf: leaf[None], example))
        return jax.vmap(one)(*batch)

    along = lambda direction: jax.jvp(losses, (params,), (direction,))[1]
    return _loops.map(along, directions).T

"""What the data leave uncertain in a model's outputs, and how much each example holds of them.

Of a Laplace approximation the parameters are Gaussian, with the covariance

    (N (A + damping I))^-1

A the curvature of the mean loss over N examples and damping the prior's precision over N. To first
order the outputs of an example, whose Jacobian is J (C, n), have the covariance

    J (A + damping I)^-1 J' / N

and the leverage of a training example with the loss Hessian S (C, C) at the outputs is the trace of
S times that.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial
from jax.typing import ArrayLike

from regjax import _checks, _chunks, _tree
from regjax._arguments import checked
from regjax._base import Mask, ModelFn, OutputLossFn, Params, Tree, as_partial
from regjax._printing import legible
from regjax.curvature._inverse_forms import inverse_forms, least_eigenvalue
from regjax.curvature._operators._gauss_newton import gauss_newton
from regjax.curvature._operators._jacobian import JacobianOperator, example_rows, jacobian
from regjax.curvature._operators._operator import Operator
from regjax.curvature._operators._sandwich import split
from regjax.curvature._precision import precisely

# Units of rounding by which a second derivative may be off, relative to its largest terms.
_ROUNDING = 4


@legible
class OutputCovarianceResult(NamedTuple):
    """Covariances of the C outputs of M examples.

    Attributes:
      value: (M, C, C), in squared units of the outputs.
      error_bound: (M, C, C), of the distance of `value` to the exact form of this matrix; what the
        systems and rounding leave open. Infinite where nothing positive is known of the least
        eigenvalue (see `lower_bound`), or where negative curvature was met.
      converged: (M,), bool, whether all systems of the example did.
      num_matvecs: (), int32, products for each system.
    """

    value: jax.Array
    error_bound: jax.Array
    converged: jax.Array
    num_matvecs: jax.Array


@legible
class LeverageResult(NamedTuple):
    """Leverages of M training examples.

    Attributes:
      value: (M,), from 0 to C; of all N training examples they add up to the effective dimension
        tr A (A + damping I)^-1. NaN where the loss is not convex in the outputs (refused outside of
        `jit`).
      error_bound: (M,), as in `OutputCovarianceResult`.
      converged: (M,), bool, whether all systems of the example did.
      num_matvecs: (), int32, products for each system.
    """

    value: jax.Array
    error_bound: jax.Array
    converged: jax.Array
    num_matvecs: jax.Array


@checked
def output_covariance(
    model_fn: ModelFn,
    params: Params,
    inputs: Tree,
    operator: Operator,
    *,
    damping: ArrayLike,
    num_examples: int,
    lower_bound: ArrayLike | None = None,
    preconditioner: Operator | None = None,
    tol: ArrayLike = 1e-4,
    max_matvecs: int | None = None,
    wrt: Mask = None,
) -> OutputCovarianceResult:
    """Computes the covariance of a model's outputs by a Laplace approximation.

        J (A + damping I)^-1 J' / N

    J is the Jacobian of an example's outputs. The model is linearised at `params`, and the noise of
    the targets is not part of it.

    Example:
      >>> model_fn = lambda w, x: x @ w
      >>> x, x_new = jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.array([[1.0, 1.0]])
      >>> loss_fn = lambda outputs, y: 0.5 * jnp.mean((outputs - y) ** 2)
      >>> matrix = curvature.gauss_newton(model_fn, loss_fn, jnp.zeros(2), x, jnp.zeros(2))
      >>> options = {"damping": 0.5, "num_examples": 2}
      >>> result = curvature.output_covariance(model_fn, jnp.zeros(2), x_new, matrix, **options)
      >>> print(f"{result.value[0, 0, 0]:.3f}")  # (1 / (0.5 + 0.5) + 1 / (2 + 0.5)) / 2
      0.700

    Args:
      model_fn: (params, inputs) -> outputs, C numbers for each example (see `jacobian`).
      params: tree of parameters, at a minimum of the training loss.
      inputs: array or tree with a leading axis of M examples, any. M C vectors like the parameters
        and as many of the solver are in memory: go over many examples in parts.
      operator: A, the curvature of the mean training loss, such as `gauss_newton`.
      damping: positive, in the units of A: the precision of the prior over N.
      num_examples: N, the number of training examples, whose mean loss A belongs to.
      lower_bound: the least that an eigenvalue of A can be (see `solve`): 0 for the Gauss-Newton
        matrix of a loss that is convex in the outputs. None: what is known by construction, which
        may be nothing, and then the bounds are infinite.
      preconditioner: an operator near the inverse of A + damping I, up to a factor (see `solve`).
      tol: relative tolerance of the systems' residuals; the error of a variance is of its square.
      max_matvecs: limit of the number of products of each system.
      wrt: which leaves of the parameters are uncertain (see `hessian`); None: all.

    Returns:
      An `OutputCovarianceResult`.

    Raises:
      ValueError: `damping` is not positive, the model couples its examples, `operator` is of
        another space, or another argument is out of its range.

    References:
      D. MacKay (1992), A practical Bayesian framework for backpropagation networks, Neural
      Computation 4(3). A. Immer, M. Korzepa, M. Bauer (2021), arXiv:2008.08435, for the linearised
      model. The bound is ours.
    """
    _checks.number("damping", damping, above_zero=True)
    _checks.integer("num_examples", num_examples)
    rows_of = jacobian(model_fn, params, inputs, wrt=wrt)
    rows = example_rows(rows_of, rows_of.inputs)
    forms, bounds, converged, num_matvecs = inverse_forms(
        rows, operator, damping=damping, lower_bound=lower_bound, preconditioner=preconditioner,
        tol=tol, max_matvecs=max_matvecs,
    )  # fmt: skip
    return OutputCovarianceResult(
        forms / num_examples, bounds / num_examples, converged, num_matvecs
    )


@checked
def leverage(
    model_fn: ModelFn,
    output_loss_fn: OutputLossFn,
    params: Params,
    inputs: Tree,
    targets: Tree,
    *,
    damping: ArrayLike,
    examples: ArrayLike | None = None,
    operator: Operator | None = None,
    lower_bound: ArrayLike | None = None,
    preconditioner: Operator | None = None,
    tol: ArrayLike = 1e-4,
    max_matvecs: int | None = None,
    chunk_size: int | None = None,
    wrt: Mask = None,
) -> LeverageResult:
    """Computes the leverages of training examples: how much each determines its own outputs.

        h_i = tr S_i J_i (A + damping I)^-1 J_i' / N

    A is the Gauss-Newton matrix, S_i the loss Hessian at the outputs and J_i the Jacobian of
    example i. For a linear model and half the squared error h_i is the diagonal of the hat matrix
    of ridge regression, and with it `diagnostics.influence` is exact: leaving out example i moves
    the parameters by 1 / (1 - h_i) times what its influence says. If h_i is near C, the model
    learns the outputs of example i from that example alone.

    Example:
      >>> model_fn = lambda w, x: x @ w
      >>> loss_fn = lambda outputs, y: 0.5 * jnp.mean((outputs - y) ** 2)
      >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0]])  # of the Gauss-Newton matrix diag(0.5, 2)
      >>> args = (model_fn, loss_fn, jnp.zeros(2), x, jnp.zeros(2))
      >>> print(curvature.leverage(*args, damping=0.5).value)  # 1 / 1 / 2 and 4 / 2.5 / 2
      [0.5 0.8]

    Args:
      model_fn: (params, inputs) -> outputs, C numbers for each example (see `jacobian`).
      output_loss_fn: (outputs, targets) -> scalar, the mean over independent examples, or a
        `regjax.WeightedMean`; convex in the outputs, as cross-entropy and squared error are.
      params: tree of parameters.
      inputs: array or tree with a leading axis of all N training examples.
      targets: array or tree with the same leading axis.
      damping: positive, in the units of the curvature of the mean loss.
      examples: (M,), integers, the places of those whose leverages are computed; None: all. M C
        vectors like the parameters and as many of the solver are in memory.
      operator: A. None: `gauss_newton` of these data.
      lower_bound: the least that an eigenvalue of `operator` can be (see `solve`). Without
        `operator` it is 0 by what `output_loss_fn` must be.
      preconditioner: an operator near the inverse of A + damping I, up to a factor (see `solve`).
      tol: relative tolerance of the systems' residuals; the error of a leverage is of its square.
      max_matvecs: limit of the number of products of each system.
      chunk_size: number of training examples per pass in a product; None: all at once.
      wrt: which leaves of the parameters move (see `hessian`); None: all.

    Returns:
      A `LeverageResult`.

    Raises:
      TypeError: `examples` are no integers.
      ValueError: `damping` is not positive, `examples` are not among the N, the loss is seen not to
        be convex in the outputs, the model or the loss couples its examples, `operator` is of
        another space, or another argument is out of its range.

    References:
      R. D. Cook, S. Weisberg (1982), Residuals and influence in regression. For other losses this
      is the trace of the hat matrix of the linearised model at the minimum.
    """
    _checks.number("damping", damping, above_zero=True)
    num_examples = _checks.num_examples((inputs, targets))
    chosen = _places(examples, num_examples)
    if operator is None:
        operator = gauss_newton(
            model_fn, output_loss_fn, params, inputs, targets, chunk_size=chunk_size, wrt=wrt
        )
        lower_bound = 0.0 if lower_bound is None else lower_bound
    model = _chunks.fixed(model_fn, params, inputs, chunk_size)
    data = (_chunks.each(model, params, (inputs,), chunk_size), targets)
    # A weighted example's own loss is known with those of all others.
    of_outputs = Partial(_of_outputs, as_partial(output_loss_fn))
    own, _ = _chunks.prepared(
        of_outputs, params, data, chunk_size, name="output_loss_fn", single=True
    )
    inputs, outputs, targets = jax.tree.map(lambda leaf: jnp.take(leaf, chosen, 0), (inputs, *data))
    rows_of = jacobian(model_fn, params, inputs, wrt=wrt)
    rows, rounding = _weighted_rows(rows_of, own, params, outputs, targets)
    _check_convex(rows)
    forms, bounds, converged, num_matvecs = inverse_forms(
        rows, operator, damping=damping, lower_bound=lower_bound, preconditioner=preconditioner,
        tol=tol, max_matvecs=max_matvecs,
    )  # fmt: skip
    value, bound = (jnp.trace(each, axis1=1, axis2=2) for each in (forms, bounds))
    # What rounding adds to S, in the direction in which the form can be largest.
    bound = bound + rounding / least_eigenvalue(operator, damping, lower_bound)
    return LeverageResult(value / num_examples, bound / num_examples, converged, num_matvecs)


def _places(examples: ArrayLike | None, num_examples: int) -> ArrayLike:
    """The places of the chosen examples.

    Raises:
      TypeError: they are no integers.
      ValueError: they are no array (M,), M positive, or are seen not to be among the N.
    """
    if examples is None:
        return np.arange(num_examples)
    examples = examples if isinstance(examples, jax.Array) else np.asarray(examples)
    if not jnp.issubdtype(jnp.result_type(examples), jnp.integer):
        raise TypeError(f"`examples` must be integers, got {jnp.result_type(examples)}.")
    if jnp.ndim(examples) != 1 or not jnp.size(examples):
        raise ValueError(
            f"`examples` must have the shape (M,), M positive, got {jnp.shape(examples)}."
        )
    known = _checks.host_value(examples)
    if known is not None and not ((known >= 0) & (known < num_examples)).all():
        raise ValueError(
            f"`examples` must be from 0 to {num_examples - 1}, got {known.min()} to {known.max()}."
        )
    return examples


def _of_outputs(output_loss_fn: Partial, params: Params, outputs: Tree, targets: Tree) -> Tree:
    del params
    return output_loss_fn(outputs, targets)


@jax.jit
@precisely
def _weighted_rows(
    jacobian: JacobianOperator, own: Partial, params: Params, outputs: Tree, targets: Tree
) -> tuple[Params, jax.Array]:
    """The rows (M, C, *leaf) of S_i^1/2 J_i, and (M,) |J_i|^2 times the rounding of S_i."""

    def root(outputs: Tree, target: Tree) -> tuple[jax.Array, jax.Array]:
        floats, others = split(outputs)
        flat, unflat = ravel_pytree(floats)

        def loss(flat: jax.Array) -> jax.Array:
            example = _tree.merge(unflat(flat), others), target
            return own(params, *jax.tree.map(lambda leaf: leaf[None], example))

        values, vectors = jnp.linalg.eigh(jax.hessian(loss)(flat))
        # Where an output saturates only rounding is left, of terms as large as without outputs.
        scale = jnp.maximum(jnp.max(jnp.abs(values)), jnp.abs(jax.hessian(loss)(0 * flat)).max())
        rounding = _ROUNDING * jnp.finfo(values.dtype).eps * scale
        values = jnp.where(values < -len(values) * rounding, jnp.nan, jnp.maximum(values, 0))
        return jnp.sqrt(values)[:, None] * vectors.T, rounding

    roots, roundings = jax.vmap(root)(outputs, targets)
    rows = example_rows(jacobian, jacobian.inputs)
    squares = sum(jnp.sum(leaf**2, range(1, leaf.ndim)) for leaf in jax.tree.leaves(rows))
    rows = jax.tree.map(lambda leaf: jnp.einsum("mce,me...->mc...", roots, leaf), rows)
    return rows, squares * roundings


def _check_convex(rows: Params) -> None:
    """Checks that the loss Hessians at the outputs had roots.

    Raises:
      ValueError: that of an example is seen not to.
    """
    known = _checks.host_value(jax.tree.leaves(rows)[0])
    if known is None or (is_bad := np.isnan(known.reshape(len(known), -1)).any(1)).sum() == 0:
        return
    raise ValueError(
        "`output_loss_fn` must be convex in the outputs, with a finite Hessian, got one that is "
        f"not at the chosen example {int(np.argmax(is_bad))}."
    )

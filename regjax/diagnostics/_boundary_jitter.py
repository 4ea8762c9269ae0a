"""Batch norm and the boundaries of its units: a least-squares fit, which moves with the batch."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jax.typing import ArrayLike

from regjax import _checks, _chunks, _loops, _numerics, _tree
from regjax._arguments import checked
from regjax._base import Params, Tree
from regjax._printing import legible
from regjax.diagnostics._decision_margin import check_classifier, margins
from regjax.diagnostics._spline_partition import check_preactivations, signed_distances


@legible
class JitterResult(NamedTuple):
    """How far the boundaries of units move; trees like the pre-activations, (units...).

    Inputs from which a unit has no boundary in one of the batches are left out; NaN where none is
    left.

    Attributes:
      std: standard deviation over the batches of the signed distance between input and boundary, in
        the units of the inputs: the root of the unbiased variance, averaged over the inputs.
      std_standard_error: over the draw of the batches for these inputs, to first order, good for
        some dozen batches. NaN with two.
      relative_std: `std` over the root mean square over the inputs of the mean distance.
    """

    std: Tree
    std_standard_error: Tree
    relative_std: Tree


@legible
class MarginJitterResult(NamedTuple):
    """How far the decision boundaries move; NaN or infinite where a margin is infinite.

    Attributes:
      mean: (N,), mean over the batches of the margin of each input, in the units of the inputs.
      std: (N,), the standard deviation over the batches, from the unbiased variance.
      std_standard_error: (N,), over the draw of the batches, to first order.
    """

    mean: jax.Array
    std: jax.Array
    std_standard_error: jax.Array


@legible
class LeastSquaresResult(NamedTuple):
    """The best hyperplane of each unit.

    Attributes:
      offset: (k,), in the units of the pre-activations: the hyperplane is <w, z> = offset.
      mean_squared_distance: (k,), that of the inputs from it; infinite for a kernel of zeros.
    """

    offset: jax.Array
    mean_squared_distance: jax.Array


@checked
def boundary_jitter(
    batch_preactivations_fn: Callable[..., Tree],
    params: Params,
    inputs: jax.Array,
    batches: Tree,
    *,
    chunk_size: int | None = None,
) -> JitterResult:
    """Measures how far the boundary of each unit moves between batches with their own statistics.

    The signed distance of an input x from a unit's boundary under the statistics of batch b is

        s_b = h_b / ||grad_x h_b||

    with the pre-activation h_b of the unit. Its standard deviation over b is the jitter. For a
    first layer with the weights w, where <w, x> has the standard deviation sigma, followed by batch
    norm without bias, it is for batches of B examples

        std_b(s_b) = sigma / (||w|| sqrt(B))

    which is 1 / sqrt(B) of the RMS distance of the data, at any weights. With bias beta and scale
    gamma, sigma_b moves the boundary as well: for Gaussian data the variance is, to leading order,
    1 + (beta / gamma)^2 / 2 times this one.

    Draw the batches independently and with replacement. Without replacement, out of n examples, the
    spread of the mean is only sqrt((n - B) / (n - 1)) of it. Running statistics do not jitter. Each
    distance is computed twice, for the mean and for the spread about it.

    Example:
      >>> preactivations_fn = lambda w, x, batch: (x - batch.mean(0)) * w  # a centred layer
      >>> batches = jnp.array([[[0.0], [2.0]], [[2.0], [4.0]]])  # of means 1 and 3
      >>> inputs = jnp.array([[0.0], [5.0]])
      >>> result = diagnostics.boundary_jitter(preactivations_fn, jnp.array([2.0]), inputs, batches)
      >>> print(result.std)
      [1.414]

    Args:
      batch_preactivations_fn: (params, inputs, batch) -> tree of arrays (N, units...): the
        pre-activations at `inputs` with the statistics of `batch` in all layers. Each row must be a
        function of its own example and of the batch. With a `regjax.Model` run it in evaluation
        mode with the state `regjax.population_statistics(model, params, [batch])`.
      params: tree of parameters.
      inputs: (N, ...), real floating point, from which the distances are measured.
      batches: (num_batches, B, ...), at least two, or a tree of such arrays.
      chunk_size: number of inputs per pass; None: all at once. Each pass computes the statistics.

    Returns:
      A `JitterResult`.

    Raises:
      ValueError: the function couples the examples, an array lacks their axis, or there are fewer
        than two batches.
      TypeError: `inputs` or a pre-activation is not real floating point.

    References:
      R. Balestriero, R. Baraniuk (2022), arXiv:2209.14778, on jitter. These measures are ours.
    """
    num_batches = _num_batches(batches)
    name = "batch_preactivations_fn"
    check_preactivations(name, batch_preactivations_fn, params, inputs, _batch(batches, 0))

    fixed = _chunks.fixed(batch_preactivations_fn, params, inputs, chunk_size, _batch(batches, 0))

    def measure(batch: Tree) -> Tree:
        given = Partial(_given, fixed, batch)
        function = Partial(signed_distances, given)
        distances = _chunks.each(function, params, (inputs,), chunk_size)
        # Of one sign, so that the sum stays infinite and a NaN is one of the inputs'.
        return jax.tree.map(lambda d: jnp.where(jnp.isinf(d), jnp.inf, d), distances)

    mean = _mean(measure, batches, num_batches)
    has_boundary = jax.tree.map(lambda m: ~jnp.isinf(m), mean)
    over_inputs = lambda tree: jax.tree.map(_mean_where, tree, has_boundary)
    variance, error = _spread(measure, over_inputs, mean, batches, num_batches)
    distance = over_inputs(jax.tree.map(jnp.square, mean))
    std = jax.tree.map(jnp.sqrt, variance)
    return JitterResult(
        std,
        _error_of_root(error, std),
        jax.tree.map(
            lambda s, d: _numerics.divide(s, jnp.sqrt(d), where=d > 0, otherwise=jnp.nan),
            std,
            distance,
        ),
    )


@checked
def margin_jitter(
    batch_model_fn: Callable[..., jax.Array],
    params: Params,
    inputs: jax.Array,
    targets: jax.Array,
    batches: Tree,
    *,
    chunk_size: int | None = None,
) -> MarginJitterResult:
    """Measures how far the decision boundary moves between batches with their own statistics.

    This is the spread of `decision_margin` over the batches, input by input.

    Example:
      >>> def batch_model_fn(w, x, batch):
      ...     centred = (x - batch.mean(0)) * w
      ...     return jnp.concatenate([centred, -centred], axis=1)  # logits of two classes
      >>> batches = jnp.array([[[0.0], [2.0]], [[2.0], [4.0]]])  # of means 1 and 3
      >>> params, inputs, targets = jnp.array([2.0]), jnp.array([[0.0], [5.0]]), jnp.array([1, 0])
      >>> result = diagnostics.margin_jitter(batch_model_fn, params, inputs, targets, batches)
      >>> print(result.mean, result.std)
      [2. 3.] [1.414 1.414]

    Args:
      batch_model_fn: (params, inputs, batch) -> logits (N, classes) at `inputs` with the statistics
        of `batch` in all layers.
      params: tree of parameters.
      inputs: (N, ...), real floating point.
      targets: (N,), integers from 0 to classes - 1.
      batches: (num_batches, B, ...), at least two, or a tree of such arrays, drawn independently.
      chunk_size: number of inputs per pass; None: all at once.

    Returns:
      A `MarginJitterResult`.

    Raises:
      ValueError: a target is out of range, shapes do not fit, the function couples the examples, or
        there are fewer than two batches.
      TypeError: `targets` are not integers, or `inputs` are not real floating point.

    References:
      R. Balestriero, R. Baraniuk (2022), arXiv:2209.14778, on the jitter of the last boundary. This
      measure is ours.
    """
    num_batches = _num_batches(batches)
    targets = check_classifier(
        "batch_model_fn", batch_model_fn, params, inputs, targets, _batch(batches, 0)
    )

    fixed = _chunks.fixed(batch_model_fn, params, inputs, chunk_size, _batch(batches, 0))

    def measure(batch: Tree) -> jax.Array:
        given = Partial(_given, fixed, batch)
        return _chunks.each(Partial(margins, given), params, (inputs, targets), chunk_size)

    mean = _mean(measure, batches, num_batches)
    variance, error = _spread(measure, lambda squares: squares, mean, batches, num_batches)
    std = jnp.sqrt(variance)
    return MarginJitterResult(mean, std, _error_of_root(error, std))


@checked
def least_squares_offset(kernel: jax.Array, inputs: jax.Array) -> LeastSquaresResult:
    """Computes the offset of each unit's hyperplane that is closest to the inputs.

        argmin_mu  mean_z (<w, z> - mu)^2 / ||w||^2  =  mean_z <w, z>

    The minimum is the biased variance of <w, z> over ||w||^2. Batch norm without bias puts the
    boundary of a unit there, and its output is the signed distance in units of the root of this
    minimum. A bias beta at scale gamma moves the boundary by (sigma / ||w||) (beta / gamma), where
    sigma^2 is that variance.

    Example:
      >>> kernel, inputs = jnp.array([[2.0], [0.0]]), jnp.array([[1.0, 7.0], [3.0, -5.0]])
      >>> print(diagnostics.least_squares_offset(kernel, inputs))
      LeastSquaresResult(offset=[4], mean_squared_distance=[1])

    Args:
      kernel: (d, k), the units' weights w as columns.
      inputs: (N, d), the inputs z of the layer; patches for a convolution.

    Returns:
      A `LeastSquaresResult`, in float32 at least.

    Raises:
      ValueError: the shapes do not fit, or there is no input.
      TypeError: one of them is not an array of real floating point.

    References:
      R. Balestriero, R. Baraniuk (2022), arXiv:2209.14778, the theorem of the abstract.
    """
    kernel = _checks.floating_array("kernel", kernel)
    inputs = _checks.floating_array("inputs", inputs)
    if jnp.ndim(kernel) != 2 or jnp.ndim(inputs) != 2 or kernel.shape[0] != inputs.shape[1]:
        raise ValueError(
            "`kernel` and `inputs` must have shapes (d, k) and (N, d), got "
            f"{jnp.shape(kernel)} and {jnp.shape(inputs)}."
        )
    _checks.num_examples(inputs)
    kernel = _tree.wide(kernel)
    outputs = jnp.matmul(_tree.wide(inputs), kernel, precision="highest")
    squares = jnp.sum(kernel**2, 0)
    distance = _numerics.divide(jnp.var(outputs, 0), squares, otherwise=jnp.inf)
    return LeastSquaresResult(jnp.mean(outputs, 0), distance)


def _given(function: Partial, batch: Tree, params: Params, inputs: jax.Array) -> Tree:
    return function(params, inputs, batch)


def _num_batches(batches: Tree) -> int:
    num_batches = _checks.num_examples(batches)
    if num_batches < 2:
        raise ValueError("`batches` must hold at least two batches, got 1.")
    return num_batches


def _batch(batches: Tree, i: ArrayLike) -> Tree:
    return jax.tree.map(
        lambda array: jax.lax.dynamic_index_in_dim(array, i, keepdims=False), batches
    )


def _mean(measure: Callable[[Tree], Tree], batches: Tree, num_batches: int) -> Tree:
    """Computes the mean over the batches of `measure(batch)`, a tree."""
    shapes = jax.eval_shape(measure, _batch(batches, 0))
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    total = _loops.scan(
        lambda _, total, i: jax.tree.map(jnp.add, total, measure(_batch(batches, i))),
        zeros,
        num_batches,
    )
    return jax.tree.map(lambda leaf: leaf / num_batches, total)


def _spread(
    measure: Callable[[Tree], Tree],
    average: Callable[[Tree], Tree],
    mean: Tree,
    batches: Tree,
    num_batches: int,
) -> tuple[Tree, Tree]:
    """Computes the variance over the batches, averaged over inputs, and its standard error.

    The averages of one batch's squares are one draw: the inputs see the same batch.
    """
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(average, mean))

    def add(_: None, carry: Tree, i: jax.Array) -> Tree:
        values = measure(_batch(batches, i))
        squares = average(jax.tree.map(lambda v, m: (v - m) ** 2, values, mean))
        fourths = jax.tree.map(jnp.square, squares)
        return jax.tree.map(jnp.add, carry, (squares, fourths))

    totals = _loops.scan(add, (zeros, zeros), num_batches)
    variance = jax.tree.map(lambda total: total / (num_batches - 1), totals[0])

    def error(squares: jax.Array, fourths: jax.Array) -> jax.Array:
        if num_batches == 2:  # both squares are the same
            return jnp.full_like(squares, jnp.nan)
        spread = fourths / num_batches - (squares / num_batches) ** 2
        return jnp.sqrt(jnp.maximum(spread, 0) / (num_batches - 2))

    return variance, jax.tree.map(error, *totals)


def _error_of_root(error: Tree, root: Tree) -> Tree:
    divide = lambda e, r: _numerics.divide(e, 2 * r, where=r > 0, otherwise=jnp.nan)
    return jax.tree.map(divide, error, root)


def _mean_where(values: jax.Array, is_defined: jax.Array) -> jax.Array:
    """Computes the mean over the inputs for which the values are defined; NaN without any."""
    total = jnp.sum(jnp.where(is_defined, values, 0), 0)
    return total / jnp.sum(is_defined, 0, dtype=values.dtype)

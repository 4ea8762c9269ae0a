"""Geometric complexity: how fast the outputs of a network move with its inputs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jax.typing import DTypeLike

from regjax import _checks, _chunks, _jacobian, _tree
from regjax._arguments import checked
from regjax._base import ModelFn, Params, PRNGKey
from regjax._printing import legible

_SIDES = ("outputs", "inputs")


@legible
class GeometricComplexityResult(NamedTuple):
    """Geometric complexity from random projections.

    Attributes:
      value: (), unbiased, in squared units of the outputs over those of the inputs.
      standard_error: (), over the draw of the projections, at these inputs; NaN with a single one.
    """

    value: jax.Array
    standard_error: jax.Array


@checked
def geometric_complexity(
    model_fn: ModelFn, params: Params, inputs: jax.Array, *, chunk_size: int | None = None
) -> jax.Array:
    """Computes the mean squared Frobenius norm of the input-output Jacobian.

        GC = (1 / N) sum_x ||d f(x) / d x||_F^2

    The squared norm is the sum over outputs and inputs, without a factor 1/2. The Jacobian takes
    one reverse pass per output, or one forward pass per input if there are fewer inputs, all in one
    vmapped call. As a penalty:

        loss + strength * geometric_complexity(model_fn, params, inputs)

    Dividing the inputs by s multiplies the complexity by s^2. Compare values only at the same
    scaling of the inputs.

    Example:
      >>> model_fn = lambda w, x: x @ w
      >>> w = jnp.array([[3.0], [4.0]])
      >>> print(regularizers.geometric_complexity(model_fn, w, jnp.ones((5, 2))))  # |w|^2
      25.0

    Args:
      model_fn: (params, inputs) -> outputs (N, ...): the network before its softmax, each output a
        function of its own example alone, such as `regjax.model_function(model)`.
      params: parameters of the model; differentiable.
      inputs: (N, ...), real floating point.
      chunk_size: number of examples per pass, for bounded memory; None: all at once.

    Returns:
      The complexity (), in float32 at least.

    Raises:
      ValueError: the model couples the examples, or its outputs lack their axis.
      TypeError: `inputs` is not one array of real floating point.

    References:
      B. Dherin, M. Munn, M. Rosca, D. Barrett (2022), arXiv:2209.13083. The sum over all entries
      without 1/2 is our reading of "discrete Dirichlet energy".
    """
    _jacobian.check_model("model_fn", model_fn, inputs)
    function = Partial(_squared_norms, _chunks.fixed(model_fn, params, inputs, chunk_size))
    norms = _chunks.each(function, params, (inputs,), chunk_size)
    return jnp.mean(norms)


@checked
def geometric_complexity_estimate(
    model_fn: ModelFn,
    params: Params,
    inputs: jax.Array,
    *,
    key: PRNGKey,
    num_probes: int = 1,
    side: str = "outputs",
    chunk_size: int | None = None,
) -> GeometricComplexityResult:
    """Estimates geometric complexity from random projections of the Jacobian, which is cheaper.

        E ||J' v||^2 = E ||J v||^2 = ||J||_F^2,   v ~ N(0, I)

    A vector v is drawn for each example. With `side="outputs"` a probe takes a reverse pass, J' v.
    With `side="inputs"` it takes a forward pass, J v, whose gradient is cheaper with convolutions.

    Example:
      >>> model_fn = lambda w, x: x @ w
      >>> w = jnp.array([[3.0], [4.0]])  # of a complexity of 25
      >>> result = regularizers.geometric_complexity_estimate(
      ...     model_fn, w, jnp.ones((100, 2)), key=jax.random.key(1), num_probes=100
      ... )
      >>> print(f"{result.value:.1f} +- {result.standard_error:.1f}")
      25.1 +- 0.4

    Args:
      model_fn: (params, inputs) -> outputs (N, ...): the network before its softmax, each output a
        function of its own example alone, such as `regjax.model_function(model)`.
      params: parameters of the model; differentiable.
      inputs: (N, ...), real floating point.
      key: typed key of the projections, which do not depend on `chunk_size`.
      num_probes: number of random vectors per example.
      side: "outputs" or "inputs", the space of the random vectors.
      chunk_size: number of examples per pass; None: all at once.

    Returns:
      A `GeometricComplexityResult`.

    Raises:
      ValueError: `side` is unknown, `num_probes` is below 1, the model couples the examples, or its
        outputs lack their axis.
      TypeError: `inputs` is not one array of real floating point, or `key` is not a typed key.

    References:
      M. Hutchinson (1990), Communications in Statistics 19(2), for J J' and J' J.
    """
    _jacobian.check_model("model_fn", model_fn, inputs)
    _checks.integer("num_probes", num_probes)
    project = {"outputs": _reverse, "inputs": _forward}[_checks.choice("side", side, _SIDES)]
    value, error = _chunks.sampled(
        Partial(project, _chunks.fixed(model_fn, params, inputs, chunk_size)), params, inputs,
        key=key, num_samples=num_probes, chunk_size=chunk_size,
    )  # fmt: skip
    return GeometricComplexityResult(value, error)


def _squared_norms(model_fn: Partial, params: Params, inputs: jax.Array) -> jax.Array:
    return _jacobian.squared_norms(lambda x: model_fn(params, x), inputs)


def _reverse(model_fn: Partial, params: Params, inputs: jax.Array, keys: jax.Array) -> jax.Array:
    outputs, pull_back = _jacobian.linearize(lambda x: model_fn(params, x), inputs)
    draws = _draws(keys, outputs.shape[1], outputs.dtype)
    return jnp.sum(_tree.wide(pull_back(draws)) ** 2, 1)


def _forward(model_fn: Partial, params: Params, inputs: jax.Array, keys: jax.Array) -> jax.Array:
    draws = _draws(keys, inputs[0].size, inputs.dtype)
    images = _jacobian.push_forward(lambda x: model_fn(params, x), inputs, draws)
    return jnp.sum(_tree.wide(images) ** 2, 1)


def _draws(keys: jax.Array, size: int, dtype: DTypeLike) -> jax.Array:
    return jax.vmap(lambda key: jax.random.normal(key, (size,), dtype))(keys)

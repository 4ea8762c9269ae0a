"""The covariance of the examples' gradients: their outer products about the mean gradient."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from regjax import _tree
from regjax._arguments import checked
from regjax._base import Mask, ModelFn, OutputLossFn, Params, Tree
from regjax.curvature._operators._curvature import Form
from regjax.curvature._operators._gauss_newton import empirical_fisher_form, form_of_gradients
from regjax.curvature._operators._operator import Composed, Multiply, Operator, subtree
from regjax.curvature._operators._sandwich import of_forms


@checked
def gradient_covariance(
    model_fn: ModelFn,
    output_loss_fn: OutputLossFn,
    params: Params,
    inputs: Tree,
    targets: Tree,
    weights: ArrayLike | None = None,
    *,
    chunk_size: int | None = None,
    wrt: Mask = None,
    differences: bool = False,
) -> Operator:
    """Makes the covariance of the examples' gradients, which is the noise of a batch of one.

        C = mean_i g_i g_i' - G G',   g_i the gradient of example i's loss, G their mean

    `empirical_fisher` is the same without the second term. A batch of B examples drawn with
    replacement has noise of covariance C / B. The mean is over N, not N - 1. Where all gradients
    agree the matrix is rounding: an entry is off by units of rounding of |G|^2. Of a weighted mean
    g_i is the gradient of example i's own weighted mean, and examples count by their weights: sum_i
    w_i (g_i - G) (g_i - G)' / sum_i w_i.

    Example:
      >>> model_fn = lambda w, x: x @ w
      >>> loss_fn = lambda outputs, y: 0.5 * jnp.mean((outputs - y) ** 2)
      >>> x, y = jnp.array([[1.0, 0.0], [1.0, 2.0]]), jnp.array([1.0, 3.0])
      >>> matrix = curvature.gradient_covariance(model_fn, loss_fn, jnp.zeros(2), x, y)
      >>> print(matrix.dense())  # the gradients are (-1, 0) and (-3, -6), their mean (-2, -3)
      [[1. 3.]
       [3. 9.]]

    Args:
      model_fn: (params, inputs) -> outputs: an array, or a tree of arrays, with a leading axis of
        examples.
      output_loss_fn: (outputs, targets) -> loss, as in `gauss_newton`; not a sum of weighted means.
      params: tree of real floating-point parameters, n in all.
      inputs: array or tree with a leading axis of examples.
      targets: array or tree with the same leading axis.
      weights: (examples, ...) of the predictions, as in `gauss_newton`.
      chunk_size: number of examples per pass, None for all at once (see `hessian`).
      wrt: which leaves of the parameters the matrix is of (see `hessian`).
      differences: whether products may be made of central differences where JAX cannot
        differentiate the model, or the loss twice (see `hessian`).

    Returns:
      An `Operator` of shape (n, n), in squared units of the gradient. `stream(gradient_covariance,
      ...)` reads the data once for the mean gradient when it is made.

    Raises:
      ValueError: the output loss is not a scalar or adds up weighted means, the outputs have not
        the examples in front, or as in `hessian`.

    References:
      S. McCandlish, J. Kaplan, D. Amodei (2018), arXiv:1812.06162, where it is called Sigma.
    """
    second, first = of_forms(
        (empirical_fisher_form, mean_gradient_form), model_fn, output_loss_fn, params,
        (inputs, targets), weights, chunk_size=chunk_size, wrt=wrt, differences=differences,
    )  # fmt: skip
    return centered(second, first)


def mean_gradient_form(
    model_fn: ModelFn,
    output_loss_fn: OutputLossFn,
    params: Params,
    *batch: Tree,
    chunk_size: int | None,
    differences: bool = False,
) -> Form:
    """How the mean gradient follows from data, as the image of every vector.

    No matrix, but as one it goes over chunks, streams, weights and devices as `empirical_fisher`.
    """
    return form_of_gradients(
        _score, _score_weighted, model_fn, output_loss_fn, params, batch, chunk_size, differences
    )


def centered(second: Operator, first: Operator) -> Operator:
    """The covariance of what has these second moments, of data whose mean `first` maps all to."""
    return Centered(first.product(first.space.zeros(1)[0]), second)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["center", "operator"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True, repr=False)
class Centered(Composed):
    """A - m m', of second moments A about zero those about m; `center` is a vector of the space."""

    center: jax.Array
    operator: Operator

    @property
    def parts(self) -> tuple[Operator, ...]:
        return (self.operator,)

    def compose(self, multiply: Multiply, vectors: jax.Array) -> jax.Array:
        center = self.center.reshape(*[1] * (vectors.ndim - 1), -1)
        along = jnp.sum(vectors * center, axis=-1, keepdims=True)
        return multiply(self.operator, vectors) - along * center

    def facts(self) -> dict[str, Tree]:
        return super().facts() | {"center": self.center}

    def submatrix(self, inside: tuple[bool, ...]) -> Operator:
        part = self.operator.submatrix(inside)
        own = subtree(self.space.unravel(self.center), inside)
        return Centered(part.space.ravel(own), part)


def _score(loss_fn: Any, floats: Tree, others: Tree, *rest: Tree) -> Tree:
    *data, _ = rest
    return jax.grad(lambda floats: loss_fn(_tree.merge(floats, others), *data))(floats)


def _score_weighted(loss_fn: Any, own: Any, floats: Tree, others: Tree, *rest: Tree) -> Tree:
    del own
    return _score(loss_fn, floats, others, *rest)

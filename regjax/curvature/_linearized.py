"""A model linearised in its parameters."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from regjax import _checks, _tree
from regjax._arguments import checked
from regjax._base import ModelFn, Params, Tree, Wrapper, as_partial
from regjax._differentiation import choose, jaxpr_of, linearized, push
from regjax.curvature._operators._sandwich import split, there_and_back, traced_model
from regjax.curvature._precision import precision


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["model_fn", "params"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class LinearizedModel(Wrapper):
    """f(w0) + J (w - w0) as a function of w and the inputs; a pytree.

    Example:
      >>> linear = curvature.linearized_model(lambda w, x: x * w**2, jnp.array(1.0))
      >>> print(linear(jnp.array(1.5), jnp.array([1.0, 2.0])))  # x (1 + 2 * 0.5)
      [2. 4.]

    Attributes:
      model_fn: f.
      params: w0, a tree.
    """

    model_fn: Callable[..., Tree]
    params: Params

    @property
    def within(self) -> Callable[..., Tree]:
        """The function that is wrapped."""
        return self.model_fn

    def __call__(self, params: Params, inputs: Tree) -> Tree:
        """Computes the outputs.

        Raises:
          ValueError: `params` has another structure or other shapes than w0.
          TypeError: the model cannot be differentiated.
        """
        _checks.same_tree("params", params, self.params)
        model = traced_model(self.model_fn, self.params, ((inputs,),))
        mode = choose(
            there_and_back, jaxpr_of(model), (model, self.params, inputs),
            name="model_fn", differences=False,
        )  # fmt: skip
        step = jax.tree.map(lambda w, w0: (w - w0).astype(w0.dtype), params, self.params)
        function = lambda params: split(model(params, inputs))
        with precision():
            floats, others, jacobian = linearized(mode, function, self.params, 1.0)
            change = push(mode, jacobian, step)
        return _tree.merge(jax.tree.map(jnp.add, floats, change), others)


@checked
def linearized_model(model_fn: ModelFn, params: Params) -> LinearizedModel:
    """Makes the model that is linear in its parameters and agrees with a model to first order.

        f(w0) + J(w0) (w - w0)

    It goes wherever a model goes. Trained from w0 by squared error and small steps it is what the
    neural tangent kernel at w0 learns.

    Example:
      >>> linear = curvature.linearized_model(lambda w, x: x * w**2, jnp.array(1.0))
      >>> print(linear(jnp.array(1.5), jnp.array([1.0, 2.0])))  # x (1 + 2 * 0.5)
      [2. 4.]

    Args:
      model_fn: (params, inputs) -> outputs: an array or a tree of arrays.
      params: w0, tree of real floating-point parameters.

    Returns:
      A `LinearizedModel`, (params, inputs) -> outputs; outputs that are not floating point stay as
      at w0.

    References:
      J. Lee, L. Xiao, S. Schoenholz, Y. Bahri, R. Novak, J. Sohl-Dickstein, J. Pennington (2019),
      Wide neural networks of any depth evolve as linear models under gradient descent,
      arXiv:1902.06720.
    """
    return LinearizedModel(as_partial(model_fn), params)

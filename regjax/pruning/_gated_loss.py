"""A loss of parameters as a loss of gates."""

import dataclasses
import functools

import jax

from regjax import _base
from regjax._arguments import checked
from regjax._base import LossFn, Params, Tree, Wrapper
from regjax.pruning._gates import Units, apply_gates
from regjax.pruning._structure import Structure, check_structure


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["structure", "loss_fn", "params"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class GatedLoss(Wrapper):
    """(gates, *batch) -> scalar; a pytree, to be passed through `jax.jit` as an argument.

    Attributes:
      structure: the `Structure` of the model, a static pytree.
      loss_fn: (params, *batch) -> scalar.
      params: tree of parameters, held fixed.
    """

    structure: Structure
    loss_fn: LossFn
    params: Params

    @property
    def within(self) -> LossFn:
        """The loss of the parameters."""
        return self.loss_fn

    def __call__(self, gates: Units, /, *batch: Tree) -> jax.Array:
        """Computes the mean loss with the gates applied."""
        return self.loss_fn(apply_gates(self.structure, self.params, gates), *batch)


@checked
def gated_loss(structure: Structure, loss_fn: LossFn, params: Params) -> LossFn:
    """Turns a loss of the parameters into a loss of gates at the units.

    The gates multiply the weights that read each unit (`apply_gates`), so that the model itself
    does not change and the optimiser never sees the gates.

    Example:
      >>> params = {"in": jnp.ones((1, 3)), "out": jnp.array([[1.0], [2.0], [0.0]])}
      >>> model_fn = lambda params, x: jax.nn.relu(x @ params["in"]) @ params["out"]
      >>> structure = pruning.find_structure(model_fn, params, jnp.ones((2, 1)))
      >>> gate_loss = pruning.gated_loss(structure, lambda p, x: model_fn(p, x).mean(), params)
      >>> gates = pruning.unit_gates(structure, params)
      >>> print(*jax.grad(gate_loss)(gates, jnp.ones((2, 1))).values())
      [1. 2. 0.]

    Args:
      structure: the `Structure` of the model, from `find_structure`.
      loss_fn: (params, *batch) -> scalar, the mean over the examples, such as
        `regjax.model_loss(model, output_loss_fn)`.
      params: tree of parameters.

    Returns:
      A loss (gates, *batch) -> scalar. It can be an argument of a jitted function, and other
      parameters of the same shapes compile nothing again.

    Raises:
      ValueError: `params` are another tree.
      TypeError: a parameter is not real floating point, or `structure` is not a `Structure`.
    """
    check_structure(structure, params)
    return GatedLoss(structure, _base.as_partial(loss_fn), params)

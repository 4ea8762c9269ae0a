"""Models of any framework as pure functions on plain trees.

Everything else in the library sees `loss_fn(params, *batch)`. The adapters make one of a model:
`from_nnx`, `from_linen`, `from_equinox`, `from_haiku` and `from_keras`, a file for each framework,
and `from_callable` give a `Model`; `model_loss` and `model_function` bind its state, so that it
travels as an argument and is never compiled in.

The batch-norm mode decides what a Hessian means:
  "evaluation": statistics are the stored running ones, constants. The examples do not couple; this
    is the Hessian of the network that is deployed.
  "train": statistics are those of the batch and are differentiated through. This is the Hessian of
    the training loss at full batch; the examples couple, so the data cannot be split. Dropout is
    on, with the mask of `key` on this batch.
  "train_per_chunk": the batch statistics of each chunk, as mini-batch training saw them. Another
    matrix for each chunk size; to be asked for by name.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax

from regjax import _checks, _layouts
from regjax._arguments import checked
from regjax._axes import Layouts
from regjax._base import Loss, ModelFn, OutputLossFn, Params, PRNGKey, State, Tree, Wrapper
from regjax._printing import legible
from regjax._runners import Apply, ApplyFn, CallableRunner, Run

_MODES = ("evaluation", "train", "train_per_chunk")


@legible
class Model(NamedTuple):
    """A model as a pure function on plain trees, from an adapter or made by hand.

    Example:
      >>> def apply(params, state, inputs, *, train, key=None):
      ...     mean = inputs.mean(0) if train else state["mean"]
      ...     new_state = {"mean": 0.9 * state["mean"] + 0.1 * mean} if train else state
      ...     return (inputs - mean) @ params, new_state
      >>> params, state = jnp.array([1.0, 2.0]), {"mean": jnp.zeros(2)}
      >>> model = regjax.Model(apply, params, state, has_batch_statistics=True)
      >>> inputs = jnp.array([[1.0, 0.0], [3.0, 0.0]])
      >>> print(regjax.model_function(model)(params, inputs))  # the stored mean, 0
      [1. 3.]
      >>> print(regjax.model_function(model, mode="train")(params, inputs))  # the batch's mean, 2
      [-1.  1.]

    Attributes:
      apply: (params, state, inputs, *, train, key=None) -> (outputs, new state), a pure function.
        It must be hashable and the same object at each call, or all compiles again. The new state
        has the structure of `state`; in evaluation mode it is `state`. The `apply` of an adapter is
        equal for equal modules, and raises ValueError where `params` or `state` do not have the
        structure of the model's own, or a parameter has another shape.
      params: tree of real floating-point arrays. Adapters make nested dicts; that of Equinox makes
        the module with None for everything else. Lists of nnx layers keep their integer keys: nnx
        takes the leaves in sorted order, and as strings "10" would come before "2".
      state: tree of everything else: batch statistics, generator keys and counts, arrays that are
        carried along; {} for nothing.
      has_batch_statistics: whether in train mode an output depends on the other examples of the
        batch, by batch statistics or otherwise.
      has_generators: whether `state` holds generators of random numbers. Train mode then draws from
        them when it is given no key.
      layout: what the axes of `params` are for (see `guess_layout`), as far as the layers and the
        names tell. Pass it as `layout` to functions that work on filters, layers or blocks.
    """

    apply: ApplyFn
    params: Params
    state: State
    has_batch_statistics: bool = False
    has_generators: bool = False
    layout: Layouts = None


@checked
def from_callable(function: ModelFn, params: Params, state: State = None) -> Model:
    """Turns a pure function into a `Model`.

    Example:
      >>> model = regjax.from_callable(lambda params, inputs: inputs @ params, jnp.ones(2))
      >>> print(regjax.model_function(model)(model.params, jnp.array([[1.0, 2.0]])))
      [3.]

    Args:
      function: (params, inputs) -> outputs; the same object again compiles nothing again.
      params: tree of real floating-point arrays.
      state: tree that travels with the model unread and unchanged; {} if None.

    Returns:
      A `Model`; `train` and `key` change nothing.

    Raises:
      TypeError: `function` is not callable, or a parameter is not real floating point.
    """
    _checks.function("function", function)
    _checks.floating_tree("params", params)
    return model_of(CallableRunner(function), params, {} if state is None else state)


@legible
@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["state", "key"],
    meta_fields=["apply", "mode", "coupled"],
)
@dataclasses.dataclass(frozen=True, eq=False)  # by identity: arrays neither hash nor compare
class ModelFunction:
    """(params, inputs) -> outputs, with the state and the mode of a model bound.

    Attributes:
      state: the model's state.
      key: typed key of dropout, held fixed, or None.
      apply: the model's.
      mode: batch-norm mode.
      coupled: whether the mode couples the examples.
    """

    state: State
    key: PRNGKey | None
    apply: ApplyFn
    mode: str
    coupled: bool

    @property
    def couples_examples(self) -> bool:
        """Tells whether one example's output depends on the others."""
        return self.coupled

    @property
    def differs_by_chunk(self) -> bool:
        """Tells whether each chunk has statistics of its own, as asked for by name."""
        return self.mode == "train_per_chunk"

    def __call__(self, params: Params, inputs: Tree, /) -> Tree:
        """Computes the outputs for `inputs`, leading axis the examples."""
        train = self.mode != "evaluation"
        return self.apply(params, self.state, inputs, train=train, key=self.key)[0]


@legible
@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["function"], meta_fields=["output_loss_fn"]
)
@dataclasses.dataclass(frozen=True)
class ModelLoss(Wrapper):
    """(params, inputs, targets) -> mean loss of a model.

    Attributes:
      function: the `ModelFunction`; its state and key are the leaves, the rest is static.
      output_loss_fn: (outputs, targets) -> scalar mean.
    """

    function: ModelFunction
    output_loss_fn: OutputLossFn

    @property
    def within(self) -> ModelFunction:
        """The model."""
        return self.function

    def __call__(self, params: Params, inputs: Tree, targets: Tree) -> Loss:
        """Computes the mean loss over the examples, or the weighted means of `output_loss_fn`."""
        return self.output_loss_fn(self.function(params, inputs), targets)


@checked
def model_function(
    model: Model, *, mode: str = "evaluation", key: PRNGKey | None = None
) -> ModelFunction:
    """Binds the state and the mode of a model, which gives (params, inputs) -> outputs.

    The mode says which statistics a batch norm uses, and with that which network is looked at:
    "evaluation" takes the stored ones, "train" those of the whole batch, which are differentiated,
    and "train_per_chunk" those of each chunk of the data.

    Example:
      >>> net = nnx.BatchNorm(1, use_fast_variance=False, rngs=nnx.Rngs(0))
      >>> model = regjax.from_nnx(net)
      >>> inputs = jnp.array([[1.0], [3.0]])
      >>> print(regjax.model_function(model)(model.params, inputs).ravel())  # the stored mean, 0
      [1. 3.]
      >>> model_fn = regjax.model_function(model, mode="train")
      >>> print(model_fn(model.params, inputs).ravel())  # the batch's mean, 2
      [-1.  1.]

    Args:
      model: from one of the adapters.
      mode: "evaluation", "train" or "train_per_chunk".
      key: typed key for dropout in train mode: one mask for all products, as a symmetric Hessian
        needs. The mask covers the whole batch, so the examples are coupled. None without dropout.

    Returns:
      A `ModelFunction`, a pytree, to be passed through `jax.jit` as an argument.

    Raises:
      ValueError: `mode` is unknown.
      TypeError: `key` is not a typed key, or `model` is no `Model`.
    """
    check_model(model)
    _checks.choice("mode", mode, _MODES)
    if key is not None:
        _checks.key("key", key)
    # A dropout mask is drawn for the whole batch: a chunk of it would get another one.
    draws = key is not None or model.has_generators
    coupled = mode == "train" and (model.has_batch_statistics or draws)
    return ModelFunction(model.state, key, model.apply, mode, coupled)


@checked
def model_loss(
    model: Model,
    output_loss_fn: OutputLossFn,
    *,
    mode: str = "evaluation",
    key: PRNGKey | None = None,
) -> ModelLoss:
    """Binds the state and the mode of a model to its loss: (params, inputs, targets) -> scalar.

    Example:
      >>> model = regjax.from_callable(lambda params, inputs: inputs @ params, jnp.zeros(2))
      >>> squared_error = lambda outputs, targets: jnp.mean((outputs - targets) ** 2)
      >>> loss_fn = regjax.model_loss(model, squared_error)
      >>> print(loss_fn(model.params, jnp.eye(2), jnp.array([1.0, 2.0])))  # (1 + 4) / 2
      2.5

    Args:
      model: from one of the adapters.
      output_loss_fn: (outputs, targets) -> scalar, the mean over the examples, or a `WeightedMean`;
        hashable and static.
      mode: "evaluation", "train" or "train_per_chunk"; which statistics a batch norm uses (see
        `model_function`).
      key: typed key for dropout in train mode (see `model_function`); None without dropout.

    Returns:
      A `ModelLoss`, a pytree, to be passed through `jax.jit` as an argument.

    Raises:
      ValueError: `mode` is unknown.
      TypeError: `key` is not a typed key, or `output_loss_fn` is not callable.
    """
    _checks.function("output_loss_fn", output_loss_fn)
    return ModelLoss(model_function(model, mode=mode, key=key), output_loss_fn)


def check_model(model: Model) -> None:
    """Raises TypeError if `model` is not from one of the adapters."""
    if not isinstance(model, Model):
        raise TypeError(
            f"`model` must be a regjax.Model, as from `from_nnx` or another adapter, got "
            f"{type(model).__name__}."
        )


def model_of(
    run: Run,
    params: Params,
    state: State,
    *,
    has_batch_statistics: bool = False,
    has_generators: bool = False,
    module: object = None,
) -> Model:
    """Makes the `Model` of an adapter: all that is known of a model comes together here."""
    apply = Apply.of(run, params, state)
    layout = _layouts.of_model(params, module)
    return Model(apply, params, state, has_batch_statistics, has_generators, layout)

"""Keras models as models."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from regjax import _calls, _checks, _parts
from regjax._adapters import Model, model_of
from regjax._arguments import checked
from regjax._base import Mask, Params, PRNGKey, State, Tree
from regjax._calls import Call
from regjax._runners import owned

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A Keras model with its variables; equal for the same model.

    Attributes:
      module: the model.
      paths: of its variables, without its own name.
      seeds: which variables are the state of a generator.
    """

    module: Any
    paths: tuple[Path, ...]
    seeds: tuple[Path, ...]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Network) and self.module is other.module

    def __hash__(self) -> int:
        return id(self.module)


@dataclasses.dataclass(frozen=True)
class KerasRunner:
    """Runs a Keras model in a scope of its own, in which nothing is assigned.

    Attributes:
      network: the model.
      call: (model, inputs, **options) -> outputs; None: the model itself.
    """

    network: Network
    call: Call | None

    def __call__(
        self, params: Params, state: State, inputs: Tree, train: bool, key: PRNGKey | None
    ) -> tuple[Tree, State]:
        keras = _calls.optional("keras", "from_keras")
        values = {**_flat(owned(state)), **_flat(owned(params))}
        if train and key is not None:
            values |= self._seeds(values, key)
        variables = dict(zip(self.network.paths, self.network.module.variables, strict=True))
        mapping = [(variables[path], value) for path, value in values.items()]
        # A `call` may read `module.losses`.
        with keras.StatelessScope(state_mapping=mapping, collect_losses=True) as scope:
            outputs = self._outputs(inputs, train)
            new = {path: scope.get_current_value(variables[path]) for path in _flat(state)}
        return outputs, _nested(new) if train else state

    def _outputs(self, inputs: Tree, train: bool) -> Tree:
        if self.call is None:
            return self.network.module(inputs, training=train)
        return self.call(self.network.module, inputs, **_calls.mode_options(self.call, train))

    def _seeds(self, values: dict[Path, jax.Array], key: PRNGKey) -> dict[Path, jax.Array]:
        """Draws a state for each generator."""
        return {
            path: jax.random.bits(jax.random.fold_in(key, i), values[path].shape, jnp.uint32)
            for i, path in enumerate(self.network.seeds)
        }


@checked
def from_keras(module: Callable[..., Tree], *, call: Call | None = None, wrt: Mask = None) -> Model:
    """Turns a Keras model into a `Model` of nested dicts, by the paths of its variables.

    The penalties of the layers are not part of the outputs. With this `call` they are:

        call = lambda module, x, *, training: (module(x, training=training), module.losses)

    Example:
      >>> import keras
      >>> module = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="dense")])
      >>> model = regjax.from_keras(module)
      >>> print(jax.tree.map(jnp.shape, model.params))
      {'dense': {'bias': (1,), 'kernel': (2, 1)}}
      >>> print(regjax.model_function(model)(model.params, jnp.ones((5, 2))).shape)
      (5, 1)

    Args:
      module: a `keras.Model` or another layer, built, on the backend JAX. It is not changed, and
        its variables are read now: parameters of a model that trains on are passed by the caller.
      call: (module, inputs, **options) -> outputs; None: `module(inputs, training=...)`. `inputs`
        and outputs are any trees of arrays whose leading axis is the examples. It learns the
        mode from those of the keywords `train`, `training`, `is_training`, `is_train`,
        `enable_dropout`, `deterministic`, `use_running_average`, `inference` and `is_eval` that it
        takes.
      wrt: which of the trainable variables are the parameters: a tree of bools like them or an
        upper part of it, or a function (path, leaf) -> bool, a path as ("dense", "kernel"); None:
        all. The others travel in the state, as integers and bools always do.

    Returns:
      A `Model`, of which `params["dense"]["kernel"]` is the variable whose path in Keras is
      "<name of the model>/dense/kernel". The state holds the variables that are not trainable and
      the generators; in train mode a `key` replaces what these hold.

    Raises:
      ImportError: Keras is not installed.
      TypeError: `module` is no Keras layer.
      ValueError: Keras runs on another backend than JAX, the model is not built or has no trainable
        variable, or `wrt` chooses nothing.
    """
    keras = _calls.optional("keras", "from_keras")
    if not isinstance(module, keras.layers.Layer):
        raise TypeError(f"`module` must be a keras.Model, got {type(module).__name__}.")
    backend = keras.backend.backend()
    if backend != "jax":
        raise ValueError(
            "`module` must run on JAX: set KERAS_BACKEND=jax in the environment before Keras is "
            f"imported, got the backend {backend!r}."
        )
    if not module.built:
        raise ValueError(
            f"`module` must be built, as by a call on some inputs: {module.name} has no variables."
        )
    paths = _paths(module)
    variables = dict(zip(paths, module.variables, strict=True))
    trainable = {id(variable) for variable in module.trainable_variables}
    first = {path: v.value for path, v in variables.items() if id(v) in trainable}
    second = {path: v.value for path, v in variables.items() if id(v) not in trainable}
    params, rest = _parts.divided(_nested(first), wrt)
    _checks.floating_tree("params", params)
    seeds = tuple(path for path, v in variables.items() if v.path.endswith("seed_generator_state"))
    runner = KerasRunner(Network(module, paths, seeds), _calls.checked_call(call, module))
    return model_of(
        runner,
        owned(params),
        owned(_parts.joined(rest, _nested(second))),
        has_batch_statistics=any(_couples(layer, keras) for layer in _layers(module)),
        has_generators=bool(seeds),
        module=_nested(_owners(module, variables)),
    )


def _owners(module: Any, variables: dict[Path, Any]) -> dict[Path, Any]:
    """Returns the layer of each variable, which knows what its axes are for."""
    owners = {
        id(variable): layer
        for layer in _layers(module)
        for variable in getattr(layer, "_trainable_variables", [])
    }
    return {path: owners.get(id(variable)) for path, variable in variables.items()}


def _paths(module: Any) -> tuple[Path, ...]:
    """Returns a path of its own for each variable, without the name of the model."""
    paths = [tuple(variable.path.split("/")) for variable in module.variables]
    short = [path[1:] if path[0] == module.name and len(path) > 1 else path for path in paths]
    # Variables of Keras may share a path, or have that of a layer.
    taken = {path[:length] for path in short for length in range(len(path))}
    result = []
    for path in short:
        number, own = 0, path
        while own in taken:
            number, own = number + 1, (*path[:-1], f"{path[-1]}_{number + 1}")
        taken.add(own)
        result.append(own)
    return tuple(result)


def _layers(module: Any) -> list[Any]:
    return list(module._flatten_layers())


def _couples(layer: Any, keras: Any) -> bool:
    """Tells whether a layer may keep statistics of the batch: batch norm, or an unknown one."""
    if isinstance(layer, keras.layers.BatchNormalization):
        return bool(layer.trainable)
    is_theirs = type(layer).__module__.startswith("keras.")
    own = [] if is_theirs else getattr(layer, "_non_trainable_variables", [])
    return any(jnp.issubdtype(variable.value.dtype, jnp.floating) for variable in own)


def _flat(tree: Tree, path: Path = ()) -> dict[Path, jax.Array]:
    if not isinstance(tree, dict):
        return {path: tree}
    pairs = [_flat(value, (*path, name)) for name, value in tree.items()]
    return {key: leaf for part in pairs for key, leaf in part.items()}


def _nested(flat: dict[Path, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree

"""Equinox modules as models."""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from regjax import _calls, _checks, _parts, _tree
from regjax._adapters import Model, model_of
from regjax._arguments import checked
from regjax._base import Mask, Params, PRNGKey, State, Tree
from regjax._calls import Call
from regjax._runners import Static, owned


@dataclasses.dataclass(frozen=True)
class EquinoxRunner:
    """Runs an Equinox module.

    Attributes:
      evaluation: what of the module is no array, in evaluation mode.
      training: the same in train mode.
      call: what is called with the whole batch; None: the module itself, mapped over the examples.
      axis_name: name of the mapped axis.
      drops: whether the module has dropout.
    """

    evaluation: Static
    training: Static
    call: Call | None
    axis_name: Hashable
    drops: bool

    def __call__(
        self, params: Params, state: State, inputs: Tree, train: bool, key: PRNGKey | None
    ) -> tuple[Tree, State]:
        equinox = _calls.optional("equinox", "from_equinox")
        static = self.training if train else self.evaluation
        carried = owned(state.get("params"))
        parts = [] if carried is None else [carried]
        module = equinox.combine(owned(params), *parts, static.value)
        name = type(module).__name__
        if train and key is None and self.drops:
            raise ValueError(f"`key` must be given in train mode: {name} has dropout, got None.")
        # A state that has been written to cannot be read again: it is the caller's.
        leaves, treedef = jax.tree.flatten(state.get("state"))
        run = _mapped if self.call is None else _whole

        def outcome(key: PRNGKey | None) -> tuple[Tree, Tree]:
            own_state = jax.tree.unflatten(treedef, leaves)
            return run(self, module, inputs, own_state, key, train)

        outputs, new = outcome(key if train else None)
        rests = (
            train
            and key is not None
            and self.drops
            and not _calls.reads_key(lambda key: outcome(key)[0], key)
        )
        if rests:
            told = _calls.mode_options(self.call or type(module).__call__, True)
            raise _calls.not_told(name, "dropout that its call turned off", told=list(told))
        if not train:
            return outputs, state
        if leaves and all(a is b for a, b in zip(leaves, jax.tree.leaves(new), strict=True)):
            raise _calls.not_told(name, "a state that its call left as it was")
        return outputs, {**state, **({"state": new} if leaves else {})}

    def settled(self, state: State) -> State:
        """Returns the state with averages that count as many steps old."""
        equinox = _calls.optional("equinox", "from_equinox")
        leaves, treedef = jax.tree.flatten(state.get("state"))
        own_state = jax.tree.unflatten(treedef, leaves)
        for norm in _nodes(self.training.value, equinox.nn.BatchNorm):
            for index, value in (
                (norm.batch_counter, _calls.MANY_STEPS),
                (norm.ema_first_time_index, False),
            ):
                if index is not None:
                    settled = jnp.full_like(own_state.get(index), value)
                    own_state = own_state.set(index, settled)
        return {**state, "state": own_state} if leaves else state


def _mapped(
    runner: EquinoxRunner,
    module: Callable[..., Tree],
    inputs: Tree,
    state: Tree,
    key: PRNGKey | None,
    train: bool,
) -> tuple[Tree, Tree]:
    """Maps the module over the examples, each with a key of its own."""
    function = type(module).__call__
    # Equinox's own layers have old names of `inference` that warn.
    is_theirs = type(module).__module__.startswith("equinox.")
    options = {} if is_theirs else _calls.mode_options(function, train)
    call = lambda example, *rest, **keys: module(example, *rest, **keys, **options)
    keys: dict[str, Any] = {}
    if _calls.needs(function, "key") or (key is not None and _calls.takes(function, "key")):
        number = _checks.num_examples(inputs)
        keys["key"] = None if key is None else jax.random.split(key, number)
    if not jax.tree.leaves(state):
        return jax.vmap(call, axis_name=runner.axis_name)(inputs, **keys), state
    mapped = jax.vmap(call, (0, None), (0, None), axis_name=runner.axis_name)
    return mapped(inputs, state, **keys)


def _whole(
    runner: EquinoxRunner,
    module: Callable[..., Tree],
    inputs: Tree,
    state: Tree,
    key: PRNGKey | None,
    train: bool,
) -> tuple[Tree, Tree]:
    """Calls what the user wrote with the whole batch."""
    call: Any = runner.call
    options: dict[str, Any] = _calls.mode_options(call, train)
    if _calls.takes(call, "key"):
        options["key"] = key
    if not _calls.takes(call, "state"):
        return call(module, inputs, **options), state
    return call(module, inputs, state=state, **options)


@checked
def from_equinox(
    module: Callable[..., Tree],
    state: State = None,
    *,
    call: Call | None = None,
    wrt: Mask = None,
) -> Model:
    """Turns an Equinox module into a `Model`.

    The module sees one example at a time, `module(x)`, `module(x, state)`, with a key of its own as
    `key=` where it takes one, and is mapped over the batch under the axis name of its batch norm. A
    module with an `equinox.nn.State` comes from `equinox.nn.make_with_state(Net)(key)`, and
    `equinox.combine(params, net)` makes a module of parameters again.

    Example:
      >>> import equinox
      >>> net = equinox.nn.Linear(2, 1, key=jax.random.key(0))
      >>> model = regjax.from_equinox(net)
      >>> print(jax.tree.map(jnp.shape, model.params))
      Linear(weight=(1, 2), bias=(1,), in_features=2, out_features=1, use_bias=True)
      >>> print(regjax.model_function(model)(model.params, jnp.ones((5, 2))).shape)
      (5, 1)

    Args:
      module: an `equinox.Module`, whose `inference` flags say that it does not train.
      state: an `equinox.nn.State`, for modules that have one.
      call: what to do with a whole batch instead, for models of several inputs or outputs:
        (module, inputs, **options) -> outputs, or (outputs, new state) if `state` is one of the
        options that it takes; the others are `key` (None in evaluation mode) and `train`,
        `training`, `is_training`, `is_train`, `enable_dropout`, `deterministic`,
        `use_running_average`, `inference` and `is_eval`.
      wrt: which leaves are the parameters: a tree of bools like the module or an upper part of it,
        or a function (path, leaf) -> bool, a path as ("layers", 0, "weight"); None: all arrays of
        floating point. The others travel in the state, as integers and bools always do.

    Returns:
      A `Model`. Its parameters are the module with None for all else, as `equinox.partition` makes
      them; its state has the entries "state", the `equinox.nn.State`, and "params", the arrays
      that are carried along, where there are any.

    Raises:
      ImportError: Equinox is not installed.
      TypeError: `module` is no Equinox module, `state` no `equinox.nn.State`, or a parameter is
        complex.
      ValueError: there is no parameter, `wrt` chooses nothing, or batch norms have several axis
        names. In train mode later: dropout gets no key, or the state did not move.
    """
    equinox = _calls.optional("equinox", "from_equinox")
    if not isinstance(module, equinox.Module):
        raise TypeError(f"`module` must be an equinox.Module, got {type(module).__name__}.")
    if state is not None and not isinstance(state, equinox.nn.State):
        raise TypeError(f"`state` must be an equinox.nn.State, got {type(state).__name__}.")
    function = _calls.checked_call(call, module)
    _calls.check_complete(function or type(module).__call__, ("key", "state"))
    if state is None and _nodes(module, equinox.nn.StateIndex):
        raise ValueError(
            "`state` must be given for a module that has one: `net, state = "
            "equinox.nn.make_with_state(Net)(...)`, got None."
        )
    arrays, static = equinox.partition(module, _is_array)
    params, rest = _tree.partition(arrays, _chosen(wrt, module, arrays))
    _checks.floating_tree("params", params)
    carried: dict[str, Tree] = {"params": rest} if jax.tree.leaves(rest) else {}
    if state is not None and jax.tree.leaves(state):
        carried["state"] = state
    layers = _nodes(module, equinox.nn.Dropout)
    runner = EquinoxRunner(
        Static(equinox.nn.inference_mode(static, True)),
        Static(equinox.nn.inference_mode(static, False)),
        function,
        _axis_name(_nodes(module, equinox.nn.BatchNorm), call),
        any(layer.p > 0 for layer in layers),
    )
    return model_of(
        runner,
        owned(params),
        owned(carried),
        has_batch_statistics=_couples(module, equinox),
    )


def _chosen(wrt: Mask, module: Tree, arrays: Tree) -> list[bool]:
    """Returns for each array whether it is a parameter.

    A tree of bools may be like the whole module, as a filter of Equinox is, or like its arrays.
    """
    bools = jax.tree.leaves(wrt)
    is_tree = bools and all(isinstance(leaf, (bool, np.bool_)) for leaf in bools)
    if is_tree and Static(jax.tree.structure(wrt)) == Static(jax.tree.structure(module)):
        pairs = zip(bools, jax.tree.leaves(module), strict=True)
        inside = [bool(here) for here, leaf in pairs if _is_array(leaf)]
        wrt = jax.tree.unflatten(jax.tree.structure(arrays), inside)
    return _parts.chosen_leaves(wrt, arrays)


def _is_array(leaf: object) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))


def _nodes(module: Tree, kind: type) -> list[Any]:
    """Returns the layers of a kind."""
    is_kind = lambda node: isinstance(node, kind)
    return [node for node in jax.tree.leaves(module, is_leaf=is_kind) if is_kind(node)]


def _axis_name(norms: list[Any], call: Call | None) -> Hashable:
    names: set[Hashable] = set()
    for norm in norms:
        given = norm.axis_name
        names |= set(given) if isinstance(given, (list, tuple)) else {given}
    if len(names) > 1 and call is None:
        raise ValueError(
            f"`module` must have batch norms of one axis name, got {sorted(map(str, names))}: map "
            f"it over the batch by a `call` of your own."
        )
    return next(iter(names)) if len(names) == 1 else "batch"


def _couples(module: Tree, equinox: Any) -> bool:
    """Tells whether a layer keeps what may be statistics of the batch: any but spectral norm."""
    nodes = (equinox.nn.StateIndex, equinox.nn.SpectralNorm)
    return bool(_nodes_outside(module, *nodes))


def _nodes_outside(module: Tree, kind: type, outer: type) -> list[Any]:
    is_node = lambda node: isinstance(node, (kind, outer))
    return [node for node in jax.tree.leaves(module, is_leaf=is_node) if isinstance(node, kind)]

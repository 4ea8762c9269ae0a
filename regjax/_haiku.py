"""Haiku functions as models."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from regjax import _calls, _checks, _parts
from regjax._adapters import Model, model_of
from regjax._arguments import checked
from regjax._base import Mask, Params, PRNGKey, State, Tree
from regjax._calls import Call
from regjax._runners import owned


@dataclasses.dataclass(frozen=True)
class HaikuRunner:
    """Runs a transformed function; equal for the same one.

    Attributes:
      apply: that of the transformed function.
      has_state: whether it takes and returns a state.
      call: (apply, inputs, **options) -> outputs; None: apply itself.
    """

    apply: Call
    has_state: bool
    call: Call | None

    def __call__(
        self, params: Params, state: State, inputs: Tree, train: bool, key: PRNGKey | None
    ) -> tuple[Tree, State]:
        params = _parts.joined(owned(params), owned(state.get("params", {})))
        own_state = new_state = owned(state.get("state", {}))
        # haiku.without_apply_rng leaves no place for a key.
        keys = (key if train else None,) if _calls.takes(self.apply, "rng") else ()
        leading = (params, own_state, *keys) if self.has_state else (params, *keys)

        def apply(*arguments: Tree, **options: Any) -> Tree:
            nonlocal new_state
            result = self.apply(*leading, *arguments, **options)
            outputs, new_state = result if self.has_state else (result, own_state)
            return outputs

        options = _calls.mode_options(self.call or self.apply, train)
        try:
            outputs = self.call(apply, inputs, **options) if self.call else apply(inputs, **options)
        except ValueError as error:
            if type(error).__name__ != "MissingRNGError":
                raise
            raise ValueError(
                "`key` must be given, in train mode, for a function that draws random numbers, got "
                f"{'none' if key is None else 'one in evaluation mode'}."
            ) from error
        if not train:
            return outputs, state
        new_state = _parts.restricted(new_state, own_state)
        self._check_told(own_state, new_state, list(options), has_key=key is not None)
        return outputs, {**state, **({"state": new_state} if own_state else {})}

    @staticmethod
    def settled(state: State) -> State:
        """Returns the state with averages that count as many steps old."""
        own = state.get("state", {})
        counted = {
            name: {**leaves, "counter": jnp.full_like(leaves["counter"], _calls.MANY_STEPS)}
            for name, leaves in _averages(own).items()
        }
        return {**state, "state": {**own, **counted}} if own else state

    def _check_told(self, old: State, new: State, told: Sequence[str], *, has_key: bool) -> None:
        """Raises ValueError where nothing trained."""
        name = getattr(getattr(self.apply, "_original_fn", None), "__qualname__", "the function")
        if told:  # other states may rest on purpose
            old, new = ({k: state[k] for k in _averages(state)} for state in (old, new))
        before, after = jax.tree.leaves(old), jax.tree.leaves(new)
        if before and all(a is b for a, b in zip(before, after, strict=True)):
            what = "a state that its call left as it was"
            raise _calls.not_told(name, what, "is_training", told=told)
        if told:
            return
        if not before and has_key:
            _calls.check_flags(self.call or self.apply, name, "no state that could have moved")


def _averages(state: State) -> dict[str, dict[str, jax.Array]]:
    """Returns the moving averages in a state of Haiku, as batch norm has them."""
    names = {"average", "counter", "hidden"}
    return {name: leaves for name, leaves in state.items() if set(leaves) == names}


@checked
def from_haiku(
    transformed: Any,
    params: Params,
    state: State = None,
    *,
    call: Call | None = None,
    wrt: Mask = None,
) -> Model:
    """Turns a Haiku function and its parameters into a `Model`.

    A function with a state comes from `haiku.transform_with_state`, whose `init` gives `params` and
    `state`; both are passed.

    Example:
      >>> import haiku
      >>> network = haiku.without_apply_rng(haiku.transform(lambda x: haiku.Linear(1)(x)))
      >>> inputs = jnp.ones((5, 2))
      >>> model = regjax.from_haiku(network, network.init(jax.random.key(0), inputs))
      >>> print(jax.tree.map(jnp.shape, model.params))
      {'linear': {'b': (1,), 'w': (2, 1)}}
      >>> print(regjax.model_function(model)(model.params, inputs).shape)
      (5, 1)

    Args:
      transformed: from `haiku.transform` or `haiku.transform_with_state`; the same one again
        compiles nothing again.
      params: from its `init`: dicts by module and name.
      state: from the same `init`, with `transform_with_state`.
      call: (apply, inputs, **options) -> outputs, for functions of several inputs, with `apply` the
        function itself: `lambda apply, x, *, train: apply(x["ids"], x["mask"], is_training=train)`;
        None: the function of the inputs. It learns the mode from those of the keywords
        `train`, `training`, `is_training`, `is_train`, `enable_dropout`, `deterministic`,
        `use_running_average`, `inference` and `is_eval` that it takes.
      wrt: which leaves are the parameters: a tree of bools like `params` or an upper part of it, or
        a function (path, leaf) -> bool, a path as ("mlp/~/linear_0", "w"); None: all. The others
        travel in the state, as integers and bools always do.

    Returns:
      A `Model`; its state has the entries "state", Haiku's own, and "params", what is carried
      along, where there are any. In train mode `key` is the function's generator.

    Raises:
      ImportError: Haiku is not installed.
      TypeError: `transformed` is not from Haiku, `params` or `state` are no mapping, or a parameter
        is complex.
      ValueError: there is no parameter, or `wrt` chooses nothing. In a train mode later: the
        function draws and gets no key, or takes no keyword that tells it the mode.
    """
    haiku = _calls.optional("haiku", "from_haiku")
    if not isinstance(transformed, (haiku.Transformed, haiku.TransformedWithState)):
        raise TypeError(
            "`transformed` must come from haiku.transform or haiku.transform_with_state, got "
            f"{type(transformed).__name__}."
        )
    has_state = isinstance(transformed, haiku.TransformedWithState)
    own_params, own_state = _dicts("params", params), _dicts("state", state or {})
    if own_state and not has_state:
        raise TypeError("`transformed` must come from haiku.transform_with_state: it has a state.")
    chosen, rest = _parts.divided(own_params, wrt)
    _checks.floating_tree("params", chosen)
    carried = {"params": rest, "state": own_state}
    call = _calls.checked_call(call, transformed)
    _calls.check_complete(call or transformed.apply, num_leading=2 if call else 3 + has_state)
    runner = HaikuRunner(transformed.apply, has_state, call)
    is_floating = lambda leaf: jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    return model_of(
        runner,
        owned(chosen),
        {name: owned(tree) for name, tree in carried.items() if tree},
        has_batch_statistics=any(map(is_floating, jax.tree.leaves(own_state))),
    )


def _dicts(name: str, tree: Tree) -> dict[str, Any]:
    """Copies nested mappings, of whatever type, into dicts."""
    if not isinstance(tree, Mapping):
        raise TypeError(f"`{name}` must be a mapping, got {type(tree).__name__}.")
    return {
        key: _dicts(name, value) if isinstance(value, Mapping) else value
        for key, value in tree.items()
    }

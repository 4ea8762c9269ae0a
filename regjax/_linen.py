"""Flax linen modules as models."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import core, errors, linen

from regjax import _calls, _parts
from regjax._adapters import Model, model_of
from regjax._arguments import checked
from regjax._base import Mask, Params, PRNGKey, State, Tree
from regjax._calls import Call
from regjax._runners import owned


@dataclasses.dataclass(frozen=True)
class LinenRunner:
    """Runs a linen module.

    Attributes:
      module: the module.
      call: what is called of it; None: the module itself.
      streams: names of the random streams in train mode.
      sown: collections that a `call` may read and that are no state.
    """

    module: linen.Module
    call: Call | None = None
    streams: tuple[str, ...] = ("dropout",)
    sown: tuple[str, ...] = ()

    def __call__(
        self, params: Params, state: State, inputs: Tree, train: bool, key: PRNGKey | None
    ) -> tuple[Tree, State]:
        own_state = owned(state)
        rest = own_state.pop("params", {})
        variables = {"params": _parts.joined(owned(params), rest), **own_state}
        if not train:
            return self._outputs(variables, inputs, False, None, list(self.sown))[0], state
        seen = _Seen()
        with linen.intercept_methods(seen):
            mutable = [*own_state, *self.sown]
            outputs, new = self._outputs(variables, inputs, True, key, mutable)
        self._check_told(seen, own_state, new, key)
        new_state = _parts.restricted(core.unfreeze(new), own_state)
        return outputs, {**new_state, **({"params": rest} if rest else {})}

    def _outputs(
        self,
        variables: dict[str, Tree],
        inputs: Tree,
        train: bool,
        key: PRNGKey | None,
        mutable: list[str],
    ) -> tuple[Tree, Mapping[str, Tree]]:
        options = _calls.mode_options(self._function, train)
        fields = {} if options else _calls.mode_fields(self.module, train)
        module = self.module.clone(**fields) if fields else self.module
        try:
            return module.apply(
                variables,
                inputs,
                rngs=self._keys(key),
                mutable=mutable,
                method=self.call,
                **options,
            )
        except errors.InvalidRngError as error:
            given = "none" if key is None else f"a key with `rngs` {self.streams}"
            raise ValueError(
                f"`key` must be given, in train mode, for a module that draws random numbers, and "
                f"`rngs` of `from_linen` must name its streams; got {given}: {error}"
            ) from error

    def _keys(self, key: PRNGKey | None) -> dict[str, PRNGKey] | None:
        if key is None:
            return None
        one = len(self.streams) == 1
        return {self.streams[0]: key} if one else _calls.named_keys(key, self.streams)

    @property
    def _function(self) -> Call:
        return self.call or type(self.module).__call__

    def _check_told(
        self, seen: "_Seen", old: State, new: Mapping[str, Tree], key: PRNGKey | None
    ) -> None:
        """Raises ValueError where layers did not train, and no keyword could have told them."""
        name, told = type(self.module).__name__, _calls.mode_options(self._function, True)
        told = told or _calls.mode_fields(self.module, True)
        # Of those that are told some layers may rest on purpose.
        if seen.resting and not (told and seen.training):
            what = f"layers that were not training: {seen.resting[0]}"
            raise _calls.not_told(name, what, told=list(told))
        if told:
            return
        pairs = zip(
            jax.tree.leaves(old.get("batch_stats", {})),
            jax.tree.leaves(_parts.restricted(new, old).get("batch_stats", {})),
            strict=True,
        )
        moved = [before is not after for before, after in pairs]
        if not all(moved):
            raise _calls.not_told(name, "batch statistics that its call left as they were")
        if key is not None and not moved and not seen.training:
            _calls.check_flags(self._function, name, "no layer that is known to draw from a `key`")


class _Seen:
    """What layers with a mode of their own did in a call: an interceptor of linen."""

    def __init__(self) -> None:
        self.resting: list[str] = []
        self.training: list[str] = []

    def __call__(
        self,
        call: Callable[..., Tree],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: Any,
    ) -> Tree:
        module = context.module
        for flag in ("deterministic", "use_running_average"):
            rate = getattr(module, "rate", getattr(module, "dropout_rate", 1.0))
            if context.method_name == "__call__" and hasattr(module, flag) and rate != 0:
                bound = inspect.signature(type(module).__call__).bind_partial(
                    module, *args, **kwargs
                )
                at_call = bound.arguments.get(flag)
                is_off = getattr(module, flag) if at_call is None else at_call
                into = self.resting if is_off else self.training
                into.append("/".join(module.path) or type(module).__name__)
        return call(*args, **kwargs)


@checked
def from_linen(
    module: linen.Module,
    variables: Mapping[str, Tree],
    *,
    call: Call | None = None,
    rngs: Sequence[str] | str | None = None,
    wrt: Mask = None,
) -> Model:
    """Turns a linen module and its variables into a `Model`.

    A module with several inputs, and with a sown loss beside its outputs, takes a `call`:

        def call(module, inputs, *, train):
            logits = module(inputs["ids"], mask=inputs["mask"], deterministic=not train)
            return logits, module.variables["losses"]

        model = regjax.from_linen(module, variables, call=call, rngs=("dropout", "noise"))

    Example:
      >>> module, inputs = linen.Dense(1), jnp.ones((5, 2))
      >>> model = regjax.from_linen(module, module.init(jax.random.key(0), inputs))
      >>> print(jax.tree.map(jnp.shape, model.params))
      {'bias': (1,), 'kernel': (2, 1)}
      >>> print(regjax.model_function(model)(model.params, inputs).shape)
      (5, 1)

    Args:
      module: a linen module.
      variables: from `module.init`; "params" are the parameters, all else is state. Collections
        that `sow` filled hold results and are left out of the state.
      call: (module, inputs, **options) -> outputs, a function or a method of the module's class;
        None: the module's `__call__`. `inputs` and outputs are any trees of arrays whose leading
        axis is the examples. It learns the mode from those of the keywords `train`,
        `training`, `is_training`, `is_train`, `enable_dropout`, `deterministic`,
        `use_running_average`, `inference` and `is_eval` that it takes; where it takes none, from
        such a field of the module.
      rngs: names of the streams of random numbers that the key is split for; None: "dropout", which
        gets the key itself.
      wrt: which leaves of "params" are the parameters: a tree of bools like it or an upper part of
        it, or a function (path, leaf) -> bool, a path as ("encoder", "kernel"); None: all. The
        others travel in the state, as integers and bools always do.

    Returns:
      A `Model`; in train mode the collections of the state are mutable.

    Raises:
      TypeError: `module` is not a linen module, `variables` are no mapping, or a parameter is
        complex.
      ValueError: `variables` hold no "params", or `wrt` chooses nothing. In a train mode later: the
        module has batch norm or dropout and no way to learn the mode, or draws from a stream that
        it was not given.
    """
    if not isinstance(module, linen.Module):
        raise TypeError(
            f"`module` must be a flax.linen.Module, got {type(module).__name__}; from_nnx takes "
            "those of nnx."
        )
    if not isinstance(variables, Mapping):
        raise TypeError(f"`variables` must be a mapping, got {type(variables).__name__}.")
    if "params" not in variables:
        raise ValueError(
            f"`variables` must hold 'params', got {sorted(variables)}: pass what module.init gave."
        )
    call = _calls.checked_call(call, module)
    _calls.check_complete(call or type(module).__call__)
    state = core.unfreeze(variables)
    sown = [name for name, collection in state.items() if _is_sown(name, collection)]
    state = {name: collection for name, collection in state.items() if name not in sown}
    params, rest = _parts.divided(state.pop("params"), wrt)
    if rest:
        state["params"] = rest
    runner = LinenRunner(
        module,
        call,
        _calls.stream_names(rngs) or ("dropout",),
        tuple(sorted({*sown, "intermediates"})) if call is not None else (),
    )
    return model_of(
        runner, owned(params), owned(state), has_batch_statistics="batch_stats" in state
    )


def _is_sown(name: str, collection: Tree) -> bool:
    """Tells whether `sow` made a collection: it stores tuples, which grow with each call."""
    if name == "params":
        return False
    leaves = jax.tree.leaves(collection, is_leaf=lambda node: type(node) is tuple)
    return name == "intermediates" or any(type(leaf) is tuple for leaf in leaves)

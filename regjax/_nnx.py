"""Flax nnx modules as models."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from regjax import _calls, _parts
from regjax._adapters import Model, model_of
from regjax._arguments import checked
from regjax._base import Mask, Params, PRNGKey, State, Tree
from regjax._calls import Call
from regjax._runners import owned

# What a module keeps for itself, and a choice by path does not mean.
_KEPT = (nnx.BatchStat, nnx.RngState, nnx.Cache, nnx.Intermediate, nnx.Perturbation)


@dataclasses.dataclass(frozen=True)
class NnxRunner:
    """Runs an nnx module, by its graph in either mode.

    Attributes:
      evaluation: the graph in evaluation mode.
      training: the graph in train mode.
      call: what is called; None: the module itself.
      streams: the names of the random streams that the key is for; None: all.
    """

    evaluation: nnx.GraphDef
    training: nnx.GraphDef
    call: Call | None = None
    streams: tuple[str, ...] | None = None

    def __call__(
        self, params: Params, state: State, inputs: Tree, train: bool, key: PRNGKey | None
    ) -> tuple[Tree, State]:
        module = self.module(params, state, train)
        if not train:
            return self.outputs(module, inputs, False), state
        rngs = None if key is None else self._reseed(module, key)
        streams = [*_streams(module), *(() if rngs is None else _streams(rngs))]
        counts = [stream.count.get_value() for stream in streams]
        statistics = jax.tree.leaves(nnx.state(module, nnx.BatchStat))
        outputs = self.outputs(module, inputs, True, rngs)
        self._check_told(module, statistics, streams, counts)
        return outputs, _parts.restricted(nnx.to_pure_dict(nnx.state(module)), state)

    def module(self, params: Params, state: State, train: bool) -> nnx.Module:
        """Makes the module in one of its modes.

        Merged from plain dicts: Variables of an outer trace may not be changed in an inner one.
        """
        graph = self.training if train else self.evaluation
        return nnx.merge(graph, owned(params), owned(state))

    def outputs(
        self, module: nnx.Module, inputs: Tree, train: bool, rngs: nnx.Rngs | None = None
    ) -> Tree:
        """Calls the module."""
        function = self._function(module)
        options: dict[str, Any] = _calls.mode_options(function, train)
        if (rngs is not None and _calls.takes(function, "rngs")) or _calls.needs(function, "rngs"):
            options["rngs"] = rngs
        return (self.call or type(module).__call__)(module, inputs, **options)

    def _function(self, module: nnx.Module) -> Call:
        return self.call or type(module).__call__

    def _reseed(self, module: nnx.Module, key: PRNGKey) -> nnx.Rngs:
        """Gives the streams of the module, and those that the call takes, keys of their own."""
        tags = tuple(sorted({stream.key.tag for stream in _streams(module)}))
        at_call = _calls.takes(self._function(module), "rngs")
        strangers = [name for name in self.streams or () if name not in tags]
        if strangers and not at_call:
            raise ValueError(
                f"`rngs` must name streams that {type(module).__name__} holds, {list(tags)}, or "
                f"its call must take `rngs`; got {strangers}."
            )
        keys = _calls.named_keys(key, tags)
        # The layers of a scan have an array of keys.
        wanted = {tag: keys[tag] for tag in tags if self.streams is None or tag in self.streams}
        nnx.reseed(module, policy="match_shape", **wanted)
        names = self.streams or ("default",)
        return nnx.Rngs(**_calls.named_keys(key, names, start=len(tags)))

    def _check_told(
        self,
        module: nnx.Module,
        statistics: list[jax.Array],
        streams: list[nnx.RngStream],
        counts: list[jax.Array],
    ) -> None:
        """Raises ValueError where no layer trained: the call has turned them off."""
        name, told = type(module).__name__, list(_calls.mode_options(self._function(module), True))
        now = jax.tree.leaves(nnx.state(module, nnx.BatchStat))
        stays = bool(now) and all(a is b for a, b in zip(statistics, now, strict=False))
        pairs = zip(streams, counts, strict=True)
        is_still = all(stream.count.get_value() is count for stream, count in pairs)
        drops = any(_drops(node) for _, node in nnx.iter_modules(module))
        if told and ((now and not stays) or (drops and not is_still)):
            return  # others may rest on purpose
        if stays:
            what = "batch statistics that its call left as they were"
            raise _calls.not_told(name, what, told=told)
        if is_still and drops:
            raise _calls.not_told(name, "dropout that its call turned off", told=told)
        if told:
            return
        if is_still and not now and _has_generators(module):
            what = "generators that its call did not use"
            _calls.check_flags(self._function(module), name, what)


@checked
def from_nnx(
    module: nnx.Module,
    *,
    call: Call | None = None,
    rngs: Sequence[str] | str | None = None,
    wrt: Mask = None,
) -> Model:
    """Turns an nnx module into a `Model` of plain dicts.

    `nnx.update(module, params)` puts parameters back into the module. A model of several inputs, of
    which only the LoRA pairs are parameters:

        call = lambda module, inputs: module(inputs["ids"], mask=inputs["mask"])
        model = regjax.from_nnx(module, call=call, wrt=nnx.LoRAParam)

    Example:
      >>> model = regjax.from_nnx(nnx.Linear(2, 1, rngs=nnx.Rngs(0)))
      >>> print(jax.tree.map(jnp.shape, model.params))
      {'bias': (1,), 'kernel': (2, 1)}
      >>> print(regjax.model_function(model)(model.params, jnp.ones((5, 2))).shape)
      (5, 1)

    Args:
      module: an nnx module; `module.train()` and `module.eval()` set its mode. It is not changed.
      call: (module, inputs, **options) -> outputs, a function or a method of the module's class;
        None: the module's `__call__`. `inputs` and outputs are any trees of arrays whose leading
        axis is the examples. It learns the mode from the flags of the layers and from those of the
        keywords `train`, `training`, `is_training`, `is_train`, `enable_dropout`, `deterministic`,
        `use_running_average`, `inference` and `is_eval` that it takes. With a key in train mode it
        gets streams of random numbers as `rngs`, an `nnx.Rngs`, if it takes that.
      rngs: names of the streams that the key is split for, in the module and in the `rngs` of the
        call; None: all those of the module, and one at the call, which stands for any name.
      wrt: which variables are the parameters: a type such as `nnx.LoRAParam` or several; a function
        (path, variable) -> bool, a path as ("layers", 0, "kernel"), or another filter of nnx, asked
        of all variables but statistics, caches and generators; a tree of bools like the plain dicts
        of the `nnx.Param`s, or an upper part of it; None: `nnx.Param`. All others travel in the
        state, as integers and bools always do.

    Returns:
      A `Model`; the state holds batch statistics and generator counters. In train mode `key`
      replaces the keys of the module's generators, so that equal keys give equal dropout masks.

    Raises:
      TypeError: `module` is not an nnx module, or a parameter is complex.
      ValueError: `wrt` chooses nothing. In a train mode later: the module has batch norm or dropout
        that its call turned off, or no stream of the name that `rngs` says.
    """
    if not isinstance(module, nnx.Module):
        raise TypeError(
            f"`module` must be a flax.nnx.Module, got {type(module).__name__}; from_linen takes "
            "those of linen."
        )
    # Train and evaluation flags live in the graph definition: one for each mode.
    function = _calls.checked_call(call, module)
    _calls.check_complete(function or type(module).__call__, ("rngs",))
    evaluation, training = nnx.clone(module), nnx.clone(module)
    for mode in (evaluation, training):
        nnx.pop(mode, nnx.Intermediate)  # results of an earlier call
    evaluation.eval()
    training.train()
    chosen = nnx.filterlib.PathIn(*_paths(evaluation, wrt))
    graph, params, state = nnx.split(evaluation, chosen, ...)
    run = NnxRunner(
        graph,
        nnx.graphdef(training),
        function,
        _calls.stream_names(rngs),
    )
    params, state = (owned(nnx.to_pure_dict(tree)) for tree in (params, state))
    return model_of(
        run,
        params,
        state,
        has_batch_statistics=bool(jax.tree.leaves(nnx.state(module, nnx.BatchStat))),
        has_generators=_has_generators(module),
        module=module,
    )


def plain(tree: Tree) -> Tree:
    """Takes what nnx wraps arrays in off a tree, such as the state that `nnx.Optimizer` holds."""
    is_wrapped = lambda node: isinstance(node, (nnx.State, nnx.Variable))

    def unwrapped(node: Any) -> Any:
        if isinstance(node, nnx.State):
            return nnx.to_pure_dict(node)
        return node.get_value() if isinstance(node, nnx.Variable) else node

    return jax.tree.map(unwrapped, tree, is_leaf=is_wrapped)


def _paths(module: nnx.Module, wrt: Mask) -> list[tuple[Any, ...]]:
    """Returns the paths of the variables that are the parameters."""
    is_tree = isinstance(wrt, (bool, dict, nnx.State))
    types = wrt if isinstance(wrt, (list, tuple)) else (wrt,)
    if wrt is None or is_tree:
        candidates = nnx.state(module, nnx.Param)
    elif all(isinstance(part, type) for part in types):
        candidates = nnx.state(module)
    else:
        candidates = nnx.state(module, nnx.Not(nnx.Any(*_KEPT)))
    if is_tree and not isinstance(wrt, bool):
        candidates = nnx.to_pure_dict(candidates)
        wrt = nnx.to_pure_dict(wrt) if isinstance(wrt, nnx.State) else wrt
    inside = iter(_parts.chosen_leaves(wrt, candidates))
    is_variable = lambda node: isinstance(node, nnx.Variable)
    flat = jax.tree_util.tree_leaves_with_path(candidates, is_leaf=is_variable)
    # A variable may hold several arrays, or none.
    chosen = [(path, [next(inside) for _ in jax.tree.leaves(node)]) for path, node in flat]
    return [tuple(entry.key for entry in path) for path, here in chosen if any(here)]


def _streams(node: Any) -> list[nnx.RngStream]:
    return [part for _, part in nnx.iter_graph(node) if isinstance(part, nnx.RngStream)]


def _drops(node: nnx.Module) -> bool:
    """Tells whether a layer has dropout of its own, as attention may."""
    rate = node.rate if isinstance(node, nnx.Dropout) else getattr(node, "dropout_rate", 0)
    return isinstance(rate, (int, float)) and rate > 0


def _is_idle(node: nnx.Module) -> bool:
    """Tells whether a layer has streams that decide nothing: it drops nothing, or starts at 0."""
    if isinstance(node, nnx.RNN):
        return _is_idle(node.cell)
    if isinstance(node, nnx.RNNCellBase):
        return getattr(node, "carry_init", node) in (None, jax.nn.initializers.zeros)
    return isinstance(node, nnx.Dropout) and not _drops(node)


def _has_generators(module: nnx.Module) -> bool:
    """Tells whether the module may draw: it has streams that decide something."""
    idle = [
        stream
        for _, node in nnx.iter_modules(module)
        if _is_idle(node)
        for stream in _streams(node)
    ]
    return any(all(stream is not other for other in idle) for stream in _streams(module))

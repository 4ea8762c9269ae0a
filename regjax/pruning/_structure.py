"""The groups of units that can be removed from a model, found from its own forward pass."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr

from regjax import _checks
from regjax._arguments import checked
from regjax._base import ModelFn, Params, Tree, as_partial
from regjax.pruning._channels import CONSTANT, DATA, Graph, LeafAxis, components, unlabelled
from regjax.pruning._rules import propagate


class Slice(NamedTuple):
    """The place of a group's units along one axis of one array.

    Example:
      >>> params = {"in": jnp.ones((1, 3)), "out": jnp.ones((3, 1))}
      >>> model_fn = lambda params, x: jax.nn.relu(x @ params["in"]) @ params["out"]
      >>> structure = pruning.find_structure(model_fn, params, jnp.ones((2, 1)))
      >>> (group,) = structure.groups.values()
      >>> (producer,) = group.producers
      >>> print(producer.path, producer.axis, producer.units)
      in 1 [0 1 2]

    Attributes:
      path: readable name of the array.
      leaf: its index in `jax.tree.leaves` of the parameters, or of the state for statistics.
      axis: the axis.
      units: (length of the axis,) int array, the unit that owns each position, or -1 for positions
        that belong to no unit of this group. After H x W positions are flattened, a unit owns H W
        of them.
    """

    path: str
    leaf: int
    axis: int
    units: np.ndarray


class Group(NamedTuple):
    """Units (channels) of one or several layers that exist or are removed together.

    Example:
      >>> params = {"in": jnp.ones((1, 3)), "out": jnp.ones((3, 1))}
      >>> model_fn = lambda params, x: jax.nn.relu(x @ params["in"]) @ params["out"]
      >>> structure = pruning.find_structure(model_fn, params, jnp.ones((2, 1)))
      >>> (group,) = structure.groups.values()
      >>> print(group.num_units, group.producers[0].path, group.consumers[0].path)
      3 in out

    Attributes:
      num_units: number of units.
      producers: the kernels that compute the units, along their output axis.
      scales: vectors that multiply the units: scales of normalizations, lengths of weight norm.
      biases: vectors that are added to the units: biases of layers and of normalizations.
      statistics: arrays of the state along the units.
      consumers: the kernels that read the units, along their input axis.
    """

    num_units: int
    producers: tuple[Slice, ...]
    scales: tuple[Slice, ...]
    biases: tuple[Slice, ...]
    statistics: tuple[Slice, ...]
    consumers: tuple[Slice, ...]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class Structure:
    """The groups of units that can be pruned in a model, from `find_structure`.

    It is a pytree without leaves, so that it can be an argument of a jitted function.

    Example:
      >>> params = {"in": jnp.ones((1, 3)), "out": jnp.ones((3, 2))}
      >>> model_fn = lambda params, x: jax.nn.relu(x @ params["in"]) @ params["out"]
      >>> structure = pruning.find_structure(model_fn, params, jnp.ones((2, 1)))
      >>> print(list(structure.groups), list(structure.fixed))
      ['in'] ['out']

    Attributes:
      groups: the groups by the name of their first producer, in the order of the forward pass.
      fixed: kernels whose units cannot be removed, each with the reason. The name is "name[axis]"
        if the units along another axis of the kernel can be removed.
      params: the parameters as `jax.ShapeDtypeStruct`s.
      state: list of the leaves of the model's state as `jax.ShapeDtypeStruct`s.
      inputs: the inputs as `jax.ShapeDtypeStruct`s.
    """

    groups: dict[str, Group]
    fixed: dict[str, str]
    params: Params = dataclasses.field(repr=False)
    state: list[jax.ShapeDtypeStruct] = dataclasses.field(repr=False)
    inputs: Tree = dataclasses.field(repr=False)


def check_structure(structure: object, params: Params) -> None:
    """Checks a structure, and parameters like those that it was found with."""
    if not isinstance(structure, Structure):
        raise TypeError(
            f"`structure` must come from `find_structure`, got a {type(structure).__name__}."
        )
    _checks.same_tree("params", _checks.floating_tree("params", params), structure.params)


@checked
def find_structure(model_fn: ModelFn, params: Params, inputs: Tree) -> Structure:
    """Finds the groups of units that can be removed, by tracing the forward pass.

    A unit is everything that must be removed together: channels that are joined by additions (a
    residual stage is one group), by elementwise operations or by batched products, with their
    biases, norms and statistics, and the slices of the kernels that read them. Units are followed
    through transposes, pooling, concatenation, slices, flattening, embeddings and scans. Where an
    axis is split, its parts are removed whole: heads of attention, groups of a group norm or of a
    convolution. Each unit of a group can be removed, alone or with others. If layers are stacked in
    one array and scanned over, a unit is that of all layers together.

    Units are fixed, so that they cannot be removed, if they

    - feed the outputs, or meet the inputs or a constant array,
    - are reduced along their axis (layer norm, weight norm of a consumer),
    - are contracted with an array that is not a parameter,
    - pass through a primitive for which there is no rule.

    Example:
      >>> params = {"in": jnp.ones((1, 3)), "out": jnp.ones((3, 2))}
      >>> model_fn = lambda params, x: jax.nn.relu(x @ params["in"]) @ params["out"]
      >>> structure = pruning.find_structure(model_fn, params, jnp.ones((2, 1)))
      >>> print({name: group.num_units for name, group in structure.groups.items()})
      {'in': 3}
      >>> print(structure.fixed)
      {'out': 'feeds the outputs'}

    Args:
      model_fn: (params, inputs) -> outputs, such as `regjax.model_function(model)` in evaluation
        mode, with which statistics are found too.
      params: its parameters.
      inputs: a batch of at least two examples, or of `jax.ShapeDtypeStruct`s; nothing is computed.

    Returns:
      A `Structure`.

    Raises:
      TypeError: a parameter is not real floating point.
      ValueError: there are no parameters.
    """
    _checks.floating_tree("params", params)
    function = as_partial(model_fn)
    # Abstract inputs do: nothing is computed. A new function, since JAX remembers what it traced.
    apply = lambda function, params, inputs: function(params, inputs)
    traced = jax.make_jaxpr(apply)(function, params, inputs)
    state, paths = jax.tree.leaves(function), [*_paths(function), *_paths(params)]
    leaves = [*state, *jax.tree.leaves(params)]
    graph = _graph(traced, leaves, jax.tree.leaves(inputs))
    groups, fixed = _groups(graph, _Leaves(paths, [np.ndim(x) for x in leaves], len(state)))
    abstract = lambda tree: jax.eval_shape(lambda same: same, tree)
    return Structure(groups, fixed, abstract(params), abstract(state), abstract(inputs))


def _graph(traced: ClosedJaxpr, leaves: list[jax.Array], inputs: list[jax.Array]) -> Graph:
    """Follows the channels from the leaves of the model to its outputs.

    Where an axis is split (heads, groups of channels), the first axis of the split is tried, then
    the next one, until its channels are not fixed.
    """
    choices: dict[int, int] = {}
    while True:
        graph = Graph(choices)
        values = [graph.leaf(i, np.shape(leaf)) for i, leaf in enumerate(leaves)]
        values += [unlabelled(np.shape(leaf), DATA) for leaf in inputs]
        constants = [unlabelled(np.shape(array), CONSTANT) for array in traced.consts]
        for output in propagate(graph, traced.jaxpr, constants, values):
            for labels in output.labels:
                graph.fix(labels, "feeds the outputs")
        channel = graph.channels()
        fixed = channel[list(graph.reasons)]
        stuck = [
            equation
            for equation, (labels, lengths) in graph.splits.items()
            if choices.get(equation, 0) + 1 < len(lengths)
            and np.isin(channel[labels[labels >= 0]], fixed).all()
        ]
        if not stuck:
            return graph
        choices |= {equation: choices.get(equation, 0) + 1 for equation in stuck}


def _paths(tree: Tree) -> list[str]:
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in pairs]


class _Leaves(NamedTuple):
    """The leaves of the state, then those of the parameters."""

    paths: list[str]
    ndims: list[int]
    num_state: int

    def name(self, leaf: int) -> str:
        return self.paths[leaf] or "params"

    def slice(self, source: LeafAxis, units: np.ndarray) -> Slice:
        leaf, axis = source
        index = leaf if self.in_state(source) else leaf - self.num_state
        return Slice(self.name(leaf), index, axis, units)

    def in_state(self, source: LeafAxis) -> bool:
        return source[0] < self.num_state

    def is_kernel(self, source: LeafAxis) -> bool:
        return not self.in_state(source) and self.ndims[source[0]] > 1


def _groups(graph: Graph, leaves: _Leaves) -> tuple[dict[str, Group], dict[str, str]]:
    """Finds the groups, and the reasons of what is no group, by the first producer."""
    for source, roles in graph.roles.items():
        if "consumed" in roles and len(roles) > 1:
            graph.fix(graph.atoms[source], "goes into a kernel along an axis with another use")
        if "consumed" in roles and leaves.in_state(source):
            graph.fix(graph.atoms[source], "goes into an array of the state")
    channel = graph.channels()
    channels = {source: channel[atoms] for source, atoms in graph.atoms.items()}
    consumed = [channels[source] for source, roles in graph.roles.items() if roles == {"consumed"}]
    reasons = dict.fromkeys(set(channel.tolist()).difference(*map(set, consumed)), _NOT_CONSUMED)
    reasons |= {int(channel[atom]): reason for atom, reason in reversed(graph.reasons.items())}
    groups: dict[str, Group] = {}
    fixed: dict[LeafAxis, str] = {}
    for kernels in _stages(graph, channels, leaves):
        members = list(dict.fromkeys(np.concatenate([channels[s] for s in kernels]).tolist()))
        reason = next((reasons[member] for member in members if member in reasons), None)
        if reason is not None:
            fixed |= dict.fromkeys(kernels, reason)
            continue
        leaf, axis = kernels[0]
        name = leaves.name(leaf)
        groups[f"{name}[{axis}]" if name in groups else name] = _group(
            graph, channels, leaves, np.array(members)
        )
    # A kernel of several such axes has the one in the groups, the others here.
    grouped = {part.path for group in groups.values() for part in group.producers}
    names: dict[str, str] = {}
    for (leaf, axis), reason in fixed.items():
        name = leaves.name(leaf)
        names.setdefault(f"{name}[{axis}]" if name in grouped else name, reason)
    return groups, names


_NOT_CONSUMED = "goes into no kernel"


def _stages(
    graph: Graph, channels: dict[LeafAxis, np.ndarray], leaves: _Leaves
) -> list[list[LeafAxis]]:
    """Gathers the output axes of kernels that share channels, in the order of the forward pass."""
    kernels = [
        source
        for source, roles in graph.roles.items()
        if roles != {"consumed"} and leaves.is_kernel(source)
    ]
    size = 1 + max((int(labels.max()) for labels in channels.values()), default=0)
    edges = [np.stack([channels[s][:-1], channels[s][1:]]) for s in kernels]
    stage = components(size, np.concatenate([np.zeros((2, 0), int), *edges], axis=1))
    found: dict[int, list[LeafAxis]] = {}
    for source in kernels:
        found.setdefault(int(stage[channels[source][0]]), []).append(source)
    return list(found.values())


def _group(
    graph: Graph, channels: dict[LeafAxis, np.ndarray], leaves: _Leaves, members: np.ndarray
) -> Group:
    """Gathers all that runs along the channels `members`, the units in this order."""
    unit = np.full(1 + max(int(labels.max()) for labels in channels.values()), -1)
    unit[members] = np.arange(len(members))
    slices: dict[str, list[Slice]] = {name: [] for name in Group._fields[1:]}
    for source, labels in channels.items():
        units, roles = unit[labels], graph.roles.get(source, {"carried"})
        if (units < 0).all():
            continue
        if roles == {"consumed"}:
            kind = "consumers"
        elif leaves.in_state(source):
            kind = "statistics"
        elif leaves.is_kernel(source):
            kind = "producers"
        else:
            kind = "scales" if "scale" in roles else "biases"
        slices[kind].append(leaves.slice(source, units))
    return Group(len(members), **{name: tuple(found) for name, found in slices.items()})

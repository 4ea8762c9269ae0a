"""Two passes of a function like `jax.value_and_grad`'s: a clean one, and one at other parameters.

The parameters are the leaves of an argument for which a gradient comes out: all of a tree of
arrays, the floating-point arrays of a module of Equinox, the variables of an nnx module that the
filter of `nnx.value_and_grad` chooses. What else the argument holds goes along. A second pass gets
a copy of whatever flax could change (batch statistics, counts of random numbers, metrics), made
before the first one: what it changes is lost with the copy, and it draws the same dropout masks.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
from flax import nnx

from regjax import _checks
from regjax._base import Params, Tree
from regjax.transforms import _given

ValueAndGradFn: TypeAlias = Callable[..., tuple[Any, Params]]
"""(params, *batch) -> (loss, gradient) or ((loss, aux), gradient), as of `jax.value_and_grad`."""


class Passes(NamedTuple):
    """What the clean pass gave, and what a pass elsewhere needs.

    Attributes:
      value: the loss, or the pair of it and what comes with it.
      raw_grads: the gradient as it came.
      grads: the gradient as a tree of arrays, None where there is none.
      params: tree like `grads`, the parameters of the clean pass.
      at: tree like `params` -> tree like `grads`, the gradient at other parameters.
      restored: tree like `grads` -> the same gradient as it came.
    """

    value: Tree
    raw_grads: Tree
    grads: Params
    params: Params
    at: Callable[[Params], Params]
    restored: Callable[[Params], Tree]


def passes(
    value_and_grad_fn: ValueAndGradFn,
    arguments: tuple[Tree, ...],
    options: Mapping[str, Tree],
    argnums: int | Sequence[int],
) -> Passes:
    """Makes the clean pass.

    Raises:
      ValueError: there is no argument `argnums`, or the function does not give a loss and a
        gradient with the structure of that argument.
      TypeError: a parameter is not real floating point.
    """
    before = copied((arguments, dict(options)))
    places, is_single = _places(argnums, len(arguments))
    value, raw_grads = value_and_grads(value_and_grad_fn, arguments, options)
    each_raw = [raw_grads] if is_single else list(raw_grads)
    each = list(map(arrays_of, each_raw))
    together = lambda trees: trees[0] if is_single else tuple(trees)
    apart = lambda tree: [tree] if is_single else list(tree)
    params = [
        _params_of(before[0][place], grads) for place, grads in zip(places, each, strict=True)
    ]

    _checks.floating_leaves("params", together(params))

    def at(point: Params) -> Params:
        anew, anew_options = copied(before)
        moved = list(anew)
        for place, own in zip(places, apart(point), strict=True):
            moved[place] = with_params(anew[place], own)
        _, found = value_and_grads(value_and_grad_fn, tuple(moved), anew_options)
        return together(list(map(arrays_of, apart(found))))

    def restored(grads: Params) -> Tree:
        return together(list(map(as_it_came, each_raw, apart(grads))))

    return Passes(value, raw_grads, together(each), together(params), at, restored)


def value_and_grads(
    value_and_grad_fn: ValueAndGradFn, arguments: tuple[Tree, ...], options: Mapping[str, Tree]
) -> tuple[Tree, Tree]:
    """Calls the function, and checks that a loss and a gradient come out."""
    found = value_and_grad_fn(*arguments, **options)
    if not (isinstance(found, tuple) and len(found) == 2 and _given.is_value(found[0])):
        raise ValueError(
            "`value_and_grad_fn` must return (loss, gradient) or ((loss, aux), gradient), as "
            f"jax.value_and_grad(loss_fn) does, got {_given.shown(found)}."
        )
    return found


def copied(tree: Tree) -> Tree:
    """Copies what flax changes in place; whatever is shared stays shared."""
    leaves, treedef = jax.tree.flatten(tree, is_leaf=_is_changeable)
    places = [i for i, leaf in enumerate(leaves) if _is_changeable(leaf)]
    if places:
        copies = nnx.clone(tuple(leaves[i] for i in places))
        for i, copy in zip(places, copies, strict=True):
            leaves[i] = copy
    return jax.tree.unflatten(treedef, leaves)


def has_changeable(tree: Tree) -> bool:
    """Tells whether there is a module or a variable of nnx in a tree."""
    return any(map(_is_changeable, jax.tree.leaves(tree, is_leaf=_is_changeable)))


@contextlib.contextmanager
def mapped(params: Tree, function: Callable[[Any], Any]) -> Iterator[Tree]:
    """Gives parameters of which each array is another, for as long as the block is.

    Modules stay the same objects, so that what changes in them is kept.
    """
    modules = list(filter(_is_module, jax.tree.leaves(params, is_leaf=_is_module)))
    if not modules:
        yield jax.tree.map(function, params)
        return
    before = [nnx.as_pure(nnx.state(module, nnx.Param)) for module in modules]
    for module, own in zip(modules, before, strict=True):
        nnx.update(module, jax.tree.map(function, own))
    try:
        yield params
    finally:
        for module, own in zip(modules, before, strict=True):
            nnx.update(module, own)


def _is_changeable(node: object) -> bool:
    return isinstance(node, nnx.Pytree | nnx.Variable)


def _is_none(node: object) -> bool:
    return node is None


def _places(argnums: int | Sequence[int], length: int) -> tuple[list[int], bool]:
    """Lists the arguments that are meant; `nnx.DiffState` stands for its own."""
    each = list(argnums) if isinstance(argnums, Sequence) else [argnums]
    places = []
    for argnum in each:
        place = _checks.integer("argnums", getattr(argnum, "argnum", argnum), minimum=None)
        if not -length <= place < length:
            raise ValueError(
                f"`argnums` must be positional arguments, got {place} of {length}: parameters are "
                "passed by position."
            )
        places.append(place % length)
    return places, not isinstance(argnums, Sequence)


def arrays_of(grads: Tree) -> Params:
    """Makes arrays of flax's variables, and None of the float0 of integer leaves."""
    if isinstance(grads, nnx.Pytree):
        grads = nnx.state(grads)
    if has_changeable(grads):
        grads = nnx.as_pure(grads)
    return jax.tree.map(lambda leaf: None if leaf.dtype == jax.dtypes.float0 else leaf, grads)


def as_it_came(raw: Tree, grads: Params) -> Tree:
    leaves, treedef = jax.tree.flatten(raw)
    new = iter(jax.tree.leaves(grads))
    put = [leaf if leaf.dtype == jax.dtypes.float0 else next(new) for leaf in leaves]
    return jax.tree.unflatten(treedef, put)


def _params_of(argument: Tree, grads: Params) -> Params:
    if has_changeable(argument):
        leaves = _given.named_leaves(nnx.state(argument)) if _is_module(argument) else None
        leaves = _given.named_leaves(argument) if leaves is None else leaves
        names = _known(list(_given.named_leaves(grads)), list(leaves))
        return jax.tree.unflatten(jax.tree.structure(grads), [leaves[name] for name in names])
    parts, treedef = _parts(argument, grads)
    chosen = jax.tree.leaves(grads, is_leaf=_is_none)
    own = [None if grad is None else part for part, grad in zip(parts, chosen, strict=True)]
    return jax.tree.unflatten(treedef, own)


def with_params(argument: Tree, params: Params) -> Tree:
    """Puts parameters into an argument: into a module in place, else into a copy.

    Args:
      argument: a tree of arrays, or a module.
      params: tree of all its parameters or of some: None where it keeps its own.

    Raises:
      ValueError: `params` are not those of `argument`.
    """
    if _is_module(argument):
        state = nnx.to_flat_state(nnx.state(argument))
        paths = {tuple(map(str, path)): path for path, _ in state}
        new = _given.named_leaves(params)
        _known(list(new), list(paths))
        nnx.update(argument, nnx.from_flat_state([(paths[name], new[name]) for name in new]))
        return argument
    if has_changeable(argument):
        own, treedef = jax.tree.flatten(argument)
        names, new = list(_given.named_leaves(argument)), _given.named_leaves(params)
        _known(list(new), names)
        return jax.tree.unflatten(treedef, map(new.get, names, own))
    parts, treedef = _parts(argument, params)
    chosen = jax.tree.leaves(params, is_leaf=_is_none)
    return jax.tree.unflatten(
        treedef, [part if new is None else new for part, new in zip(parts, chosen, strict=True)]
    )


def _is_module(argument: object) -> bool:
    return isinstance(argument, nnx.Pytree)


def _known(names: list[tuple[str, ...]], known: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    strangers = sorted(set(names) - set(known))
    if strangers:
        raise ValueError(
            f"`params` must hold what there is a gradient for, got none with the name "
            f"{'/'.join(strangers[0])}."
        )
    return names


def _parts(argument: Tree, like: Tree) -> tuple[list[Any], Any]:
    """Cuts an argument where a tree has leaves, None included."""
    treedef: Any = jax.tree.structure(like, is_leaf=_is_none)
    try:
        return treedef.flatten_up_to(argument), treedef
    except (ValueError, TypeError):
        raise ValueError(
            f"`params` must have the structure of the gradient, {treedef}, got "
            f"{jax.tree.structure(argument)}."
        ) from None

"""Which axes of the parameters are a stack of layers, and which are those of the units, by itself.

Certain is what layers and metadata say (`_layout_known.py`), and what the user says. Else the names
that the libraries give their arrays tell: a bias with two axes beside a kernel with three is one of
a stack, or one of heads, and their lengths say which. A stack has all arrays below some place of
the tree along the same axis; where more than one axis would do, the user is asked.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp

from regjax import _layout_known
from regjax._base import Params
from regjax._selection import Path, part_of

VECTORS = frozenset({"bias", "scale", "offset", "gamma", "beta"})
KERNELS = ("kernel", "weight", "w", "embedding", "embeddings")
_ATTENTION = frozenset({"query", "key", "value", "q", "k", "v", "q_proj", "k_proj", "v_proj"})
_PLAIN: frozenset[int] = frozenset()
# Containers of layers, and what linen calls the modules that `nn.scan` and `nn.vmap` make.
CONTAINERS = re.compile(r"(\w+_)?(layers|blocks|stack|stacked|scan|encoderblock)$|(Scan|Vmap)[A-Z]")
# Norms, whose scale many call "weight" or "kernel"; what normalises weights has a true one.
_NORMS = re.compile(
    r"(?i)((?<!weight)(?<!weight_)(?<!spectral)(?<!spectral_)norm(alization)?|^rms|(^|_)ln)(_?\w)?$"
)
_EXPERTS = re.compile(r"(?i)(^|_)(moe|experts?)(_|block|$)")
Shape: TypeAlias = tuple[int, ...]


@dataclasses.dataclass
class Leaf:
    """An array of the tree.

    Attributes:
      label: its path, as errors show it.
      names: the path in parts, the array's own name last.
      shape: its shape.
      form: what its layer says of it, None where it is not known.
      owner: the name of its layer's type, "" where it is not known.
      said: the axes of its stack where they are known, None where they are not.
      stack: the axes of the stack found so far.
      is_torn: whether its shape may be that of a stack as well as another.
      is_unknown: whether there is a stack along an axis that is not known.
    """

    label: str
    names: tuple[str, ...]
    shape: Shape
    form: _layout_known.Form | None
    owner: str = ""
    said: Shape | None = None
    stack: Shape = ()
    is_torn: bool = False
    is_unknown: bool = False
    siblings: "dict[str, Leaf]" = dataclasses.field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """Its own name."""
        return self.names[-1] if self.names else ""

    @property
    def axes(self) -> Shape:
        """The axes that are not of the stack."""
        return tuple(axis for axis in range(len(self.shape)) if axis not in self.stack)

    @property
    def layer(self) -> Shape:
        """The shape of one layer's array."""
        return tuple(self.shape[axis] for axis in self.axes)

    @property
    def kernel(self) -> "Leaf | None":
        """The kernel of its layer."""
        return next((self.siblings[n] for n in KERNELS if n in self.siblings), None)

    @property
    def vector(self) -> "Leaf | None":
        """The bias of its layer."""
        return self.siblings.get("bias") or self.siblings.get("b")

    @property
    def is_vector(self) -> bool:
        """Tells whether it is a bias or a scale by its name, or as the scale of a norm."""
        if self.name not in KERNELS:
            return self.name in VECTORS or (self.name == "b" and "w" in self.siblings)
        if self.vector is not None:
            return len(self.shape) > 1 and self.vector.shape == self.shape
        module = self.names[-2] if len(self.names) > 1 else ""
        return bool(_NORMS.search(module) or _NORMS.search(self.owner))


def leaves_of(params: Params, module: object = None) -> list[Leaf]:
    """Lists the arrays of a tree, with what the layers that own them say."""
    root = params if module is None else module
    boxed = jax.tree_util.tree_leaves_with_path(params, is_leaf=_layout_known.is_box)
    found = [leaf for path, node in boxed for leaf in _leaves_at(root, path, node)]
    modules: dict[tuple[str, ...], dict[str, Leaf]] = {}
    for leaf in found:
        leaf.siblings = modules.setdefault(leaf.names[:-1], {})
        leaf.siblings[leaf.name] = leaf
    return found


def _leaves_at(root: object, path: Path, node: object) -> Iterator[Leaf]:
    """The arrays of a leaf of the tree, or of flax's metadata around some."""
    keys = [_key(entry) for entry in path]
    parent = root
    for key in keys[:-1]:
        parent = _layout_known.child(parent, key)
    names = tuple(part for key in keys for part in str(key).split("/"))
    axes = _layout_known.names_of(node) if _layout_known.is_box(node) else ()
    is_module = not isinstance(parent, (Mapping, list, tuple, type(None)))
    owner = type(parent).__name__ if is_module else ""
    form = _layout_known.form_of_names(parent, axes)
    form = form or _layout_known.form_of(parent, names[-1] if names else "")
    for below, array in jax.tree_util.tree_leaves_with_path(node):
        leaf = Leaf(jax.tree_util.keystr((*path, *below)), names, jnp.shape(array), form, owner)
        stacks = [] if form is None else form.stacks(leaf.shape)
        leaf.form = form if stacks else None
        leaf.said = _said(leaf, stacks, axes)
        yield leaf


def _said(leaf: Leaf, stacks: Sequence[Shape], axes: Sequence[str | None]) -> Shape | None:
    """The axes of the stack as names of axes, the layer or Haiku tell; None where none does."""
    named = tuple(i for i, name in enumerate(axes) if name in _layout_known.STACKS)
    if named and len(axes) == len(leaf.shape):
        return named
    if len(stacks) == 1:
        return stacks[0]
    depth = sum("layer_stack" in name for name in leaf.names[:-1])  # Haiku's
    return tuple(range(depth)) if 0 < depth <= len(leaf.shape) else None


def _key(entry: object) -> str | int:
    key = part_of(entry)
    return key if isinstance(key, int) else str(key)


def find_stacks(leaves: Sequence[Leaf]) -> None:
    """Finds the stack of each array, or that there is one which is not known."""
    _unify(list(leaves), 0)
    for leaf in leaves:
        if leaf.said is not None:
            leaf.stack, leaf.is_unknown, leaf.is_torn = leaf.said, False, False
    for leaf in leaves:
        is_known = leaf.said is not None or leaf.form is not None
        is_expert = any(_EXPERTS.search(name) for name in leaf.names[:-1]) and len(leaf.layer) > 2
        if (leaf.is_torn and not leaf.stack) or (is_expert and not is_known):
            leaf.is_unknown = True


def _unify(leaves: list[Leaf], depth: int) -> None:
    """Finds the stack that all arrays below a place of the tree share, else looks further down."""
    while True:
        evidence = [_evidence(leaf) for leaf in leaves]
        # Without evidence the name of a container may still speak for a stack.
        is_hint = not any(evidence) and _is_container(leaves, depth)
        if any(axes == _PLAIN for axes in evidence) or not (any(evidence) or is_hint):
            break
        pairs = zip(leaves, evidence, strict=True)
        each = [
            {(axis, n) for axis, n in enumerate(leaf.layer) if axes is None or axis in axes}
            for leaf, axes in pairs
        ]
        shared = set.intersection(*each)
        if not shared:
            break
        speaking = [leaf for leaf, axes in zip(leaves, evidence, strict=True) if axes]
        is_torn = all(leaf.is_torn or _is_of_heads(leaf, leaves) for leaf in speaking)
        if len(shared) > 1 or is_hint or is_torn:
            for leaf in leaves:
                leaf.is_unknown = True
            return
        ((axis, _),) = shared
        for leaf in leaves:
            leaf.stack = (*leaf.stack, leaf.axes[axis])
    below: dict[str, list[Leaf]] = {}
    for leaf in leaves:
        below.setdefault("/".join(leaf.names[depth : depth + 1]), []).append(leaf)
    for part in below.values():
        if all(depth >= len(leaf.names) for leaf in part):
            for leaf in part:
                leaf.is_unknown = bool(_evidence(leaf))
        else:
            _unify(part, depth + 1)


def _is_of_heads(vector: Leaf, leaves: Sequence[Leaf]) -> bool:
    """Tells whether a scale or a bias may be one of heads and features, as a kernel beside it."""
    return any(
        leaf.layer[1:] == vector.layer and _ATTENTION.intersection(leaf.names[-2:-1])
        for leaf in leaves
        if leaf.kernel is leaf and len(leaf.layer) == 3
    )


def _is_container(leaves: Sequence[Leaf], depth: int) -> bool:
    """Tells whether a place of the tree has a name that stacks of kernels have."""
    name = leaves[0].names[depth - 1] if depth else ""
    is_list = any(part.isdigit() for leaf in leaves for part in leaf.names[depth : depth + 1])
    has_kernels = all(leaf.name in KERNELS for leaf in leaves)
    has_arrays = any(len(leaf.layer) > 2 for leaf in leaves)
    is_open = not is_list and not any(leaf.stack for leaf in leaves)
    return is_open and (has_kernels or has_arrays) and bool(CONTAINERS.match(name))


def _evidence(leaf: Leaf) -> frozenset[int] | None:
    """Says along which axes of `layer` an array is stacked; none: it is not; None: who knows."""
    if leaf.said is not None:
        rest = [axis for axis in leaf.said if axis not in leaf.stack][:1]
        return frozenset(leaf.axes.index(axis) for axis in rest)
    if leaf.form is not None:
        fitting = [axes for axes in leaf.form.stacks(leaf.shape) if {*leaf.stack} <= {*axes}]
        either = {axis for axes in fitting for axis in axes}.difference(leaf.stack)
        return frozenset(leaf.axes.index(axis) for axis in either)
    shape, kernel = leaf.layer, leaf.kernel
    if not shape:
        return _PLAIN
    if leaf.is_vector and (kernel is None or kernel.is_vector):
        plain = len(shape) < 2 or all(n == 1 for n in shape[:-1])
        return _PLAIN if plain else frozenset(range(len(shape)))
    if leaf.is_vector and kernel is not None:
        return _of_pair(leaf, kernel)
    if leaf.name in KERNELS:
        if leaf.vector is not None and leaf.vector is not leaf:
            return _of_pair(leaf.vector, leaf)
        if len(shape) < 3:  # in a layer of the user's it may be anything
            return None if leaf.owner and len(shape) == 2 else _PLAIN
        return frozenset(range(len(shape))) if leaf.name.startswith("embedding") else None
    return None


def _of_pair(vector: Leaf, kernel: Leaf) -> frozenset[int] | None:
    """Says along which axes a kernel and its bias are stacked together."""
    bias, whole = vector.layer, kernel.layer
    if len(bias) < 2 or len(bias) >= len(whole):
        return _PLAIN
    without = lambda shape, axis: shape[:axis] + shape[axis + 1 :]
    shared = [axis for axis, length in enumerate(bias) if whole[axis] == length]
    found = {axis: _outputs(without(whole, axis), without(bias, axis), "") for axis in shared}
    # Outputs that are last, as with most libraries, before all others.
    last = {axis for axis, axes in found.items() if axes[-1:] == (len(whole) - 2,)}
    stacked = frozenset(last or {axis for axis, axes in found.items() if axes})
    is_plain = bool(_outputs(whole, bias, ""))
    if not is_plain:
        return stacked or None
    if not stacked or _ATTENTION.intersection(kernel.names[-2:-1]):
        return _PLAIN
    vector.is_torn = kernel.is_torn = True
    return stacked


def _outputs(kernel: Shape, bias: Shape, module: str) -> Shape:
    """Returns the axes of a kernel that its bias has, () if there are none such."""
    ndim, length = len(kernel), len(bias)
    if not bias or ndim <= length:
        return (ndim - 1,) if bias and ndim == length == 1 else ()
    if kernel[-length:] == bias:
        is_transposed = "_transpose" in module and length == 1 and kernel[-2] == bias[0]
        return (ndim - 2,) if is_transposed else tuple(range(ndim - length, ndim))
    first, *others = bias
    if all(n == 1 for n in others) and length == ndim - 1 and kernel[0] == first:
        return (0,)  # Equinox's convolutions
    if length == 1:
        if kernel[-2] == first:
            return (ndim - 2,)
        if kernel[-1] * kernel[-2] == first:
            return (ndim - 2, ndim - 1)
        if kernel[0] == first:
            return (0,)
    return ()


def unknown(leaf: Leaf) -> str:
    """Says that the axes of an array have to be told, and how."""
    place = "/".join(leaf.names[:-1])
    return (
        f"`layout` must say what the axes of `params{leaf.label}` of shape {leaf.shape} are for: "
        "by its name it may be a stack of layers, along an axis that its shape does not tell. Give "
        f"regjax.guess_layout(params, stack={{{place!r}: axis}}), or regjax.Layout() in its place "
        "where it is no stack."
    )


def units(leaf: Leaf, are_first: bool) -> Shape:
    """Returns the axes of the units of an array whose stack is known, among all of its axes.

    Args:
      leaf: the array.
      are_first: as `outputs_first` tells of the tree.
    """
    return tuple(leaf.axes[axis] for axis in _units(leaf, are_first))


def _units(leaf: Leaf, are_first: bool) -> Shape:
    shape = leaf.layer
    if leaf.form is not None and len(leaf.form.shape) == len(shape):
        return leaf.form.outputs
    everything, last = tuple(range(len(shape))), (len(shape) - 1,)
    if leaf.is_vector or len(shape) < 2:
        return everything
    module = leaf.names[-2] if len(leaf.names) > 1 else ""
    if leaf.name == "depthwise_kernel":
        return everything[-2:]
    if leaf.name not in KERNELS:
        return last
    if leaf.name == "weight" and are_first:
        return (0,)
    if leaf.vector is not None:
        return _outputs(shape, leaf.vector.layer, module) or last
    is_depthwise = "depthwise" in module.lower() and shape[-2] > 1  # Keras' own
    if (module in _ATTENTION and len(shape) == 3) or (is_depthwise and len(shape) > 2):
        return everything[-2:]
    if module in ("q_einsum", "kv_einsum", "qkv_einsum"):  # Gemma's, heads in front
        return (*everything[:-2], everything[-1])
    return everything[-2:-1] if "_transpose" in module and len(shape) > 2 else last


def outputs_first(leaves: Sequence[Leaf]) -> bool:
    """Tells whether the arrays named "weight" have their outputs in front, as in Equinox."""
    found = set()
    for leaf in leaves:
        shape = leaf.layer
        if leaf.name == "weight" and leaf.vector is not None and shape[:1] != shape[-1:]:
            found.add(_outputs(shape, leaf.vector.layer, ""))
    return found != set() and (0,) in found and not any(o and 0 not in o for o in found)

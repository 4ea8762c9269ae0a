"""What layers of flax and Equinox say of the arrays that they own, stacked or not."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flax import nnx
from flax.core import meta

# What flax's users call an axis of layers or of experts in their metadata (PARTITION_NAME).
STACKS = frozenset(
    (
        "layers", "layer", "blocks", "block", "stack", "stacked", "stages", "stage", "scan",
        "repeats", "experts", "expert", "exp", "num_layers", "num_experts",
    )
)  # fmt: skip
_NNX_NORMS = (nnx.BatchNorm, nnx.LayerNorm, nnx.RMSNorm, nnx.GroupNorm, nnx.InstanceNorm)


class Form(NamedTuple):
    """An array of one layer, without a stack.

    Attributes:
      shape: its lengths, None for one that is not known.
      outputs: its axes of outputs; the others are those of inputs.
      leading: whether a stack can only stand in front.
    """

    shape: tuple[int | None, ...]
    outputs: tuple[int, ...]
    leading: bool = False

    def stacks(self, shape: Sequence[int]) -> list[tuple[int, ...]]:
        """Lists the axes that a stack may have in an array of this shape."""
        ndim, extra = len(shape), len(shape) - len(self.shape)
        if extra < 0:
            return []
        if self.leading:
            return [tuple(range(extra))]
        return [
            axes
            for axes in itertools.combinations(range(ndim), extra)
            if _fits([n for axis, n in enumerate(shape) if axis not in axes], self.shape)
        ]


def _fits(shape: Sequence[int], known: Sequence[int | None]) -> bool:
    return all(want is None or n == want for n, want in zip(shape, known, strict=True))


def form_of(parent: object, name: str) -> Form | None:
    """Returns the form of an array from the layer that owns it, if it is one that is known."""
    if isinstance(parent, nnx.Module):
        return _of_nnx(parent, name)
    if type(parent).__module__.startswith("equinox.nn"):
        return _of_equinox(parent, name)
    if isinstance(parent, Mapping):
        return _of_keras(parent.get(name), name)
    return None


def _of_keras(layer: Any, name: str) -> Form | None:
    """Keras, whose adapter gives the layer of each variable: those with other outputs than last."""
    kind = type(layer).__name__
    if not (type(layer).__module__.startswith("keras.") and name.startswith("kernel")):
        return None
    if kind == "EinsumDense":
        rest, _, result = layer.equation.replace(" ", "").partition("->")
        letters = rest.rpartition(",")[2]
        units = tuple(i for i, letter in enumerate(letters) if letter in result)
        return Form((None,) * len(letters), units)
    ndim = getattr(layer, "rank", 0) + 2
    if kind.startswith("DepthwiseConv"):
        return Form((None,) * ndim, (ndim - 2, ndim - 1))
    if kind.startswith("Conv") and kind.endswith("Transpose"):
        return Form((None,) * ndim, (ndim - 2,))
    return None


def _of_nnx(layer: Any, name: str) -> Form | None:
    if isinstance(layer, nnx.LinearGeneral):
        batch = tuple(layer.batch_axis.values())
        shape = (*batch, *layer.in_features, *layer.out_features)
        return _kernel_or_bias(name, shape, len(batch), len(layer.in_features))
    if isinstance(layer, nnx.Linear):
        return _kernel_or_bias(name, (layer.in_features, layer.out_features), 0, 1)
    if isinstance(getattr(layer, "einsum_str", None), str):
        return _of_einsum(layer, name)
    if isinstance(layer, (nnx.Conv, nnx.ConvTranspose)):
        shape, last = tuple(layer.kernel_shape), len(layer.kernel_shape) - 1
        units = last - 1 if getattr(layer, "transpose_kernel", False) else last
        return {"kernel": Form(shape, (units,)), "bias": _vector((shape[units],))}.get(name)
    if isinstance(layer, nnx.Embed):
        return Form((layer.num_embeddings, layer.features), (1,)) if name == "embedding" else None
    if isinstance(layer, nnx.LoRA) and name.startswith("lora_"):
        return Form((None, None), (1,))
    if isinstance(layer, _NNX_NORMS) and isinstance(getattr(layer, "num_features", None), int):
        return _vector((layer.num_features,))
    return None


def _of_einsum(layer: Any, name: str) -> Form | None:
    """Einsum of flax, and those of Gemma and of tunix, whose kernel is the last operand."""
    shape: Any = getattr(layer, "kernel_shape", None) or getattr(layer, "shape", ())
    rest, _, result = layer.einsum_str.replace(" ", "").partition("->")
    letters = rest.rpartition(",")[2]
    if name == "bias":
        return _vector(getattr(layer, "bias_shape", None) or ())
    if len(letters) != len(shape):  # an ellipsis, or no shape
        return None
    return Form(tuple(shape), tuple(i for i, letter in enumerate(letters) if letter in result))


def _kernel_or_bias(
    name: str, shape: tuple[int, ...], num_batch: int, num_inputs: int
) -> Form | None:
    batch = tuple(range(num_batch))
    units = tuple(range(num_batch + num_inputs, len(shape)))
    bias = (*shape[:num_batch], *shape[num_batch + num_inputs :])
    return {"kernel": Form(shape, batch + units), "bias": _vector(bias)}.get(name)


def _vector(shape: Sequence[int | None], *, leading: bool = False) -> Form:
    return Form(tuple(shape), tuple(range(len(shape))), leading)


def _of_equinox(layer: Any, name: str) -> Form | None:
    """Equinox: kernels with the outputs in front, stacks (of `filter_vmap`) in front of all."""
    kind, spatial = type(layer).__name__, getattr(layer, "num_spatial_dims", 0)
    if kind == "Linear" or kind.endswith("Cell") or (kind.startswith("Conv") and spatial):
        if name.startswith("weight"):
            return Form((None,) * (2 + spatial), (0,), True)
        if name.startswith("bias"):
            return _vector((None,) * (1 + spatial), leading=True)
    if kind == "Embedding":
        return Form((None, None), (1,), True)
    if kind in ("LayerNorm", "RMSNorm"):
        return _vector((None,) * len(layer.shape), leading=True)
    if kind in ("GroupNorm", "BatchNorm"):
        return _vector((None,), leading=True)
    return None


def form_of_names(parent: object, names: Sequence[str | None]) -> Form | None:
    """Returns the form of an array with named axes of haliax, whose layer names `In` and `Out`."""
    if not hasattr(parent, "In") or not hasattr(parent, "Out") or not names:
        return None
    into, out = ({axis.name for axis in _tuple(getattr(parent, side))} for side in ("In", "Out"))
    own = [name for name in names if name in into | out]
    return Form((None,) * len(own), tuple(i for i, name in enumerate(own) if name in out))


def _tuple(axes: Any) -> tuple[Any, ...]:
    return axes if isinstance(axes, tuple) else (axes,)


def names_of(box: object) -> tuple[str | None, ...]:
    """Returns the names of the axes of an array in flax's metadata; () where there are none."""
    if isinstance(box, nnx.Variable):
        found = box.get_metadata()
        names = found.get("out_sharding") or found.get("sharding_names") or found.get("sharding")
    elif _is_haliax(box):
        names = tuple(axis.name for axis in getattr(box, "axes", ()))
    else:
        names = getattr(box, "names", None)
    return tuple(names) if isinstance(names, (tuple, list)) else ()


def is_box(node: object) -> bool:
    """Tells whether a node of a tree is an array with metadata of flax, or with named axes."""
    return isinstance(node, (nnx.Variable, meta.AxisMetadata)) or _is_haliax(node)


def _is_haliax(node: object) -> bool:
    kind = type(node)
    return kind.__name__ == "NamedArray" and kind.__module__.startswith("haliax")


def child(node: object, key: str | int) -> object:
    """Returns a part of a module or of a container by its key in a path; None if it has none."""
    if isinstance(node, Mapping):
        return node.get(key)
    if isinstance(key, int) and hasattr(node, "__getitem__"):
        try:
            return node[key]
        except (KeyError, IndexError, TypeError):
            return None
    return getattr(node, str(key), None)

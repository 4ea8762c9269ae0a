"""The models whose programs are compiled: shapes alone, divided over all chips."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import regjax
from benchmarks.reach._chips import AXIS, GROUPS
from benchmarks.speed._problems import cross_entropy
from regjax.models import GPT, ResNet

Tree = Any


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and its batch.

    Attributes:
      kind: "gpt" or "resnet".
      options: of the model.
      per_chip: examples of a batch on each chip: sequences, or images.
      most_shards: of a parameter, so that a shard is no narrower than what a chip moves at once;
        None: as many as there are chips.
    """

    kind: str
    options: Mapping[str, Any]
    per_chip: int = 1
    most_shards: int | None = None


def _gpt(width: int, depth: int, num_heads: int, **options: Any) -> Size:
    # GPT-2's 50,257 tokens filled up to a multiple of 256.
    sizes = {"num_tokens": 50_432, "context": 1024, "width": width, "depth": depth}
    return Size("gpt", {**sizes, "num_heads": num_heads, **options})


SIZES = {
    "tiny": _gpt(128, 2, 4, num_tokens=512, context=128),
    "ResNet 11M": Size(
        "resnet", {"image_size": 32, "widths": (64, 64, 128, 128, 256, 256, 512, 512)}, 128
    ),
    "GPT 124M": dataclasses.replace(_gpt(768, 12, 12), most_shards=4),
    "GPT 1.3B": _gpt(2048, 24, 16),
    "decoder 8B": _gpt(4096, 39, 32),
}


class Problem(NamedTuple):
    """A classifier of images or tokens, as shapes with their places.

    Attributes:
      model_fn: (params, x) -> logits.
      loss_fn: (params, x, y) -> mean cross-entropy.
      params: tree of shapes, divided over the mesh.
      x: images or tokens, divided along the examples.
      y: classes, or the tokens that follow.
    """

    model_fn: Any
    loss_fn: Any
    params: Tree
    x: jax.ShapeDtypeStruct
    y: jax.ShapeDtypeStruct

    @property
    def num_params(self) -> int:
        """Number of parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))


def problem_on(mesh: Mesh, size: Size) -> Problem:
    """The model and a batch on a mesh; nothing is allocated."""
    by_example = NamedSharding(mesh, PartitionSpec((GROUPS, AXIS)))
    count = size.per_chip * mesh.size
    make = _abstract_gpt if size.kind == "gpt" else _abstract_resnet
    module, x, y = make(count, by_example, **size.options)
    model = regjax.from_nnx(module)
    # Running statistics are constants of the programs: numbers, whichever.
    state = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), model.state)
    model = model._replace(state=state)
    params = jax.tree.map(functools.partial(_divided, mesh), model.params)
    struct = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=by_example)
    loss_fn = regjax.model_loss(model, cross_entropy)
    return Problem(regjax.model_function(model), loss_fn, params, struct(x), struct(y))


def _abstract_gpt(count: int, sharding: NamedSharding, **options: Any) -> tuple[Any, Any, Any]:
    module = nnx.eval_shape(
        lambda: GPT(scan=True, remat=True, feature_sharding=sharding, rngs=nnx.Rngs(0), **options)
    )
    tokens = jax.ShapeDtypeStruct((count, options["context"]), jnp.int32)
    return module, tokens, tokens


def _abstract_resnet(
    count: int, sharding: NamedSharding, *, image_size: int, widths: tuple[int, ...]
) -> tuple[Any, Any, Any]:
    del sharding  # the examples alone are divided, and the compiler keeps them so
    shape = (image_size, image_size, 3)
    make = lambda: ResNet(shape, 10, widths=widths, normalization="batch", rngs=nnx.Rngs(0))
    images = jax.ShapeDtypeStruct((count, *shape), jnp.float32)
    return nnx.eval_shape(make), images, jax.ShapeDtypeStruct((count,), jnp.int32)


def _divided(mesh: Mesh, leaf: Any) -> jax.ShapeDtypeStruct:
    """Divided along its longest axis that a group can share, but not along a stack of layers."""
    is_stack, size = leaf.ndim == 3, mesh.shape[AXIS]
    axes = [i for i in range(is_stack, leaf.ndim) if leaf.shape[i] % size == 0]
    names: list[str | None] = [None] * leaf.ndim
    if axes:
        names[max(axes, key=lambda i: leaf.shape[i])] = AXIS
    sharding = NamedSharding(mesh, PartitionSpec(*names))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

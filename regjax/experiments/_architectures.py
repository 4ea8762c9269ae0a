"""The networks of the command line, and the sizes that each usually has."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from flax import nnx

from regjax import models


class Architecture(NamedTuple):
    """A network that is built from a width and a depth.

    Attributes:
      build: called as build(input_shape, num_classes, width=, depth=, normalization=, rngs=).
      width: the usual one.
      depth: the usual one.
      least_depth: with which the network can be built.
    """

    build: Callable[..., nnx.Module]
    width: int
    depth: int
    least_depth: int = 1


def _resnet(
    input_shape: tuple[int, ...],
    num_classes: int,
    *,
    width: int,
    depth: int,
    normalization: str,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """Builds a network of blocks with twice the channels at each of two reductions, as is usual."""
    widths = tuple(width * min(2**i, 4) for i in range(depth))
    return models.ResNet(
        input_shape, num_classes, widths=widths, normalization=normalization, rngs=rngs
    )


ARCHITECTURES = {
    "mlp": Architecture(models.MLP, width=64, depth=2, least_depth=0),
    "convnet": Architecture(models.ConvNet, width=16, depth=2),
    "resnet": Architecture(_resnet, width=16, depth=4),
}

if TYPE_CHECKING:
    Name: TypeAlias = str
else:
    Name = Literal[tuple(ARCHITECTURES)]

"""The points of each axis: what a perceptron, its data and a solver have there."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from benchmarks.speed import _problems

SIDE, NUM_CLASSES = 8, 10
# From so many parameters on nothing is run: the account is made of shapes.
_MOST_RUN = 3e7


class Point(NamedTuple):
    """One size of one axis.

    Attributes:
      axis: one of `AXES`.
      value: the size on that axis.
      width: units of each hidden layer.
      depth: number of hidden layers.
      examples: number of examples.
      k: number of eigenpairs; 0: the density of one probe instead.
      products: Hessian products, one for each Lanczos step.
      devices: over how many the examples and the parameters are divided.
    """

    axis: str
    value: int
    width: int = 280  # 100,000 parameters
    depth: int = 2
    examples: int = 512
    k: int = 10
    products: int = 20
    devices: int = 1

    @property
    def name(self) -> str:
        """As in the records."""
        return f"{self.axis} / {self.value}"

    @property
    def runs(self) -> bool:
        """Whether it is run, and not only accounted for."""
        return self.axis != "devices" and self.num_parameters < _MOST_RUN

    @property
    def num_parameters(self) -> int:
        """Weights and biases of the perceptron."""
        return sum((rows + 1) * columns for rows, columns in _layers(self))

    @property
    def num_units(self) -> int:
        """Numbers that the layers make of one example."""
        return self.width * self.depth + NUM_CLASSES


AXES = {
    "parameters": "parameters", "examples": "examples", "k": "eigenpairs k",
    "m": "Lanczos steps m of a probe", "depth": "hidden layers", "devices": "devices",
}  # fmt: skip


def points(preset: str) -> Iterator[Point]:
    """The points of a preset, axis by axis, the small ones first."""
    if preset == "smoke":
        yield Point("parameters", 10**3, width=_width(10**3), examples=64)
        return
    for size in (10**4, 10**5, 10**6, 10**7, 10**8):
        yield Point("parameters", size, width=_width(size))
    for count in (256, 1024, 4096, 16384):
        yield Point("examples", count, examples=count)
    for k in (1, 4, 16, 64):
        # The basis has 2 k + 20 rows, at least 48, and is never compressed. With more products the
        # pair of k = 1 would be exact before the last.
        yield Point("k", k, k=k, products=2 * k + 6)
    for steps in (10, 20, 40, 80):
        yield Point("m", steps, k=0, products=steps)
    for depth in (2, 4, 8, 16, 32):
        yield Point("depth", depth, width=64, depth=depth)
    for count in (1, 2, 4, 8):
        yield Point("devices", count, width=960, examples=4096, devices=count)


def problem_of(point: Point) -> _problems.Problem:
    """A perceptron with random weights on random data: seconds do not depend on them."""
    random = np.random.default_rng(0)
    return _build(
        point,
        lambda *shape: jnp.asarray(random.standard_normal(shape, np.float32)),
        jnp.asarray(random.integers(NUM_CLASSES, size=point.examples), jnp.int32),
    )


def shapes_of(point: Point) -> _problems.Problem:
    """The same with shapes in the place of arrays."""
    zeros = lambda *shape: jnp.zeros(shape)
    labels = jax.ShapeDtypeStruct((point.examples,), jnp.int32)
    shapes: _problems.Problem = jax.eval_shape(lambda y: _build(point, zeros, y), labels)
    return shapes


def _build(point: Point, normal: Callable[..., jax.Array], y: jax.Array) -> _problems.Problem:
    params: dict[str, Any] = {}
    for i, (rows, columns) in enumerate(_layers(point)):
        kernel = normal(rows, columns) * math.sqrt(2 / rows)
        weights = {"kernel": kernel, "bias": jnp.zeros(columns)}
        is_last = i == point.depth
        params["head" if is_last else f"layer_{i}"] = weights if is_last else {"layer": weights}
    return _problems.Problem(Partial(_loss), params, normal(point.examples, SIDE**2), y)


def _loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    for i in range(len(params) - 1):
        x = jax.nn.relu(_linear(params[f"layer_{i}"]["layer"], x))
    return _problems.cross_entropy(_linear(params["head"], x), y)


def _linear(weights: Any, x: jax.Array) -> jax.Array:
    return x @ weights["kernel"] + weights["bias"][None]


def _layers(point: Point) -> list[tuple[int, int]]:
    """Inputs and outputs of each."""
    return list(itertools.pairwise([SIDE**2, *[point.width] * point.depth, NUM_CLASSES]))


def _width(num_parameters: int) -> int:
    """Of two hidden layers that have so many parameters."""
    half = (SIDE**2 + NUM_CLASSES + 2) / 2
    return round(math.sqrt(half**2 + num_parameters - NUM_CLASSES) - half)

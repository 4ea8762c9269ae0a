"""The trained networks whose curvature is measured, the same in every benchmark."""

import itertools
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import regjax
from regjax.experiments import load
from regjax.models import MLP, ResNet

NETWORKS = ("mlp", "resnet", "small_mlp")
_CACHE = pathlib.Path(__file__).parents[1] / ".cache"


class Problem(NamedTuple):
    """A trained classifier.

    Attributes:
      loss_fn: (params, x, y) -> mean cross-entropy; a pytree, so that it passes through `jax.jit`.
      params: nested dicts of float32 arrays.
      x: (N, height, width, 1), float32 in [0, 1].
      y: (N,), int32.
    """

    loss_fn: Any
    params: Any
    x: jax.Array
    y: jax.Array


def network(name: str) -> tuple[regjax.Model, str]:
    """An untrained network by name, and the data set that goes with it.

    "mlp" is 784-256-256-10 (269,322 parameters) and "resnet" has 11 convolutions without
    normalization (150,810 parameters), both on Fashion-MNIST; "small_mlp" is 64-32-32-10 (3,466
    parameters) on the digits of scikit-learn, small enough for a dense Hessian.
    """
    rngs = nnx.Rngs(0)
    if name == "mlp":
        return regjax.from_nnx(MLP((28, 28, 1), 10, rngs=rngs)), "fashion_mnist"
    if name == "resnet":
        return regjax.from_nnx(ResNet((28, 28, 1), 10, rngs=rngs)), "fashion_mnist"
    if name == "small_mlp":
        return regjax.from_nnx(MLP((8, 8, 1), 10, width=32, rngs=rngs)), "digits"
    raise ValueError(f"`name` must be one of {NETWORKS}, got {name!r}.")


def trained(
    name: str,
    num_examples: int = 4096,
    *,
    num_steps: int = 200,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
) -> Problem:
    """A network after some hundred steps of Adam on the examples whose loss it comes with.

    The same call gives the same weights; they are kept in `benchmarks/.cache`, which git ignores.

    Args:
      name: one of `NETWORKS`.
      num_examples: number of examples, the first ones of the data set.
      num_steps: steps of Adam.
      batch_size: examples a step (all, if there are fewer); each pass leaves the ragged rest out.
      learning_rate: Adam's.

    Returns:
      A `Problem`.
    """
    model, data_name = network(name)
    data = load(data_name, num_train=num_examples)
    x = jnp.asarray(data.train_inputs, jnp.float32) / 255
    y = jnp.asarray(data.train_targets)
    loss_fn = regjax.model_loss(model, cross_entropy)
    file = _CACHE / f"{name}-{num_examples}-{num_steps}-{batch_size}-{learning_rate}.npz"
    if file.exists():
        with np.load(file) as arrays:
            leaves = [jnp.asarray(arrays[f"arr_{i}"]) for i in range(len(arrays.files))]
        params = jax.tree.unflatten(jax.tree.structure(model.params), leaves)
        return Problem(loss_fn, params, x, y)
    params = model.params
    optimizer = optax.adam(learning_rate)
    state = optimizer.init(params)

    @jax.jit
    def step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any]:
        updates, state = optimizer.update(jax.grad(loss_fn)(params, x, y), state)
        return optax.apply_updates(params, updates), state

    # The host loops: in a scan, XLA on CPU runs convolutions an order of magnitude slower.
    for batch in itertools.islice(_batches(num_examples, min(batch_size, num_examples)), num_steps):
        params, state = step(params, state, x[batch], y[batch])
    _save(file, jax.tree.leaves(params))
    return Problem(loss_fn, params, x, y)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over the examples."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def _batches(num_examples: int, batch_size: int) -> Iterator[np.ndarray]:
    random = np.random.default_rng(0)
    while True:
        order = random.permutation(num_examples)
        yield from order[: num_examples - num_examples % batch_size].reshape(-1, batch_size)


def _save(file: pathlib.Path, leaves: list[jax.Array]) -> None:
    """Atomically: a killed run leaves no half-written weights behind."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".npz", delete=False) as temporary:
        np.savez(temporary, *leaves)
    os.replace(temporary.name, file)

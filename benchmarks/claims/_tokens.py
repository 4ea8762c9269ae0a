"""Images as sequences of grey levels, and transformers that predict the next one."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.claims import _networks
from regjax import Model, from_nnx, models

BATCH, WIDTH = 16, 32
_LEVELS = 17  # of the digits, 0 to 16; the same for the other images
_START = _LEVELS  # the token in front of the first pixel


class Images(NamedTuple):
    """Grey levels, row by row, each sequence with the start token in front.

    Attributes:
      x: of the training images (N, 1 + pixels), int32. x_test: of the test images.
      by_position: test cross-entropy (nats per pixel) of the training frequencies of the levels at
        each position: what is possible without a look at other pixels.
    """

    x: jax.Array
    x_test: jax.Array
    by_position: float


@functools.cache
def digits() -> Images:
    """scikit-learn's digits as they are, 8 x 8: 1437 training and 360 test images."""
    split = _networks.digits(1437)
    return _images(split.x, split.x_test)


@functools.cache
def fashion_mnist() -> Images:
    """Fashion-MNIST at 7 x 7, means of 16 pixels: 3000 training and 1000 test images."""
    split = _networks.fashion_mnist()

    def pool(x: jax.Array) -> jax.Array:
        return x.reshape(-1, 7, 4, 7, 4).mean((2, 4)).reshape(len(x), -1)

    return _images(pool(split.x), pool(split.x_test[:1000]))


def _images(x: jax.Array, x_test: jax.Array) -> Images:
    levels, test_levels = (np.rint(16 * np.asarray(part)).astype(np.int32) for part in (x, x_test))
    # Every level counted half a time more: one that is new in the test has a probability too.
    counts = np.stack([(levels == level).sum(0) + 0.5 for level in range(_LEVELS)])
    shares = counts / counts.sum(0)
    by_position = -np.log(shares[test_levels, np.arange(levels.shape[1])]).mean()
    start = lambda part: jnp.asarray(np.pad(part, ((0, 0), (1, 0)), constant_values=_START))
    return Images(start(levels), start(test_levels), float(by_position))


@functools.cache
def transformer(length: int, depth: int, seed: int, post_norm: bool = True) -> Model:
    """A GPT of width 32 with four heads, its initial parameters drawn with the seed."""
    return from_nnx(
        models.GPT(
            _LEVELS + 1, context=length, width=WIDTH, depth=depth, post_norm=post_norm,
            rngs=nnx.Rngs(seed),
        )
    )  # fmt: skip


def cross_entropy(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Mean over sequences and positions, in nats."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens))


def warm_up(rate: float, num_steps: int, num_rising: int) -> np.ndarray:
    """The rates of all steps: linear from 0 over `num_rising` of them, then constant."""
    rising = (1 + np.arange(num_steps)) / max(1, num_rising)
    return (rate * np.minimum(1, rising)).astype(np.float32)


def train(
    loss_fn: Callable[..., Any], params: Any, images: Images, rates: np.ndarray, seed: int
) -> tuple[Any, np.ndarray]:
    """Parameters after Adam with these rates, and the loss of the batch before each step.

    `loss_fn` is a pytree of (params, tokens, next tokens): the same structure again compiles
    nothing again.
    """
    random, num_images = np.random.default_rng(seed), len(images.x)
    num_batches = num_images // BATCH
    epochs = [
        random.permutation(num_images)[: num_batches * BATCH].reshape(-1, BATCH)
        for _ in range(math.ceil(len(rates) / num_batches))
    ]
    rows = np.concatenate(epochs)[: len(rates)]
    params, losses = _steps(loss_fn, params, images.x, rows, rates)
    return params, np.asarray(losses)


_ADAM = optax.scale_by_adam(b2=0.98)  # of the authors' transformer runs


@jax.jit
def _steps(loss_fn: Any, params: Any, x: jax.Array, rows: Any, rates: Any) -> Any:
    def step(carry: Any, now: Any) -> Any:
        (params, state), (chosen, rate) = carry, now
        loss, grads = jax.value_and_grad(loss_fn)(params, *inputs_and_targets(x[chosen]))
        directions, state = _ADAM.update(grads, state)
        return (jax.tree.map(lambda p, d: p - rate * d, params, directions), state), loss

    (params, _), losses = jax.lax.scan(step, (params, _ADAM.init(params)), (rows, rates))
    return params, losses


def inputs_and_targets(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """All tokens but the last, and all but the first."""
    return x[..., :-1], x[..., 1:]


def smoothed(losses: np.ndarray, num_points: int) -> dict[str, float]:
    """Means over equal parts of the training, as numbers of a record."""
    parts = np.array_split(losses, num_points)
    return {f"loss_{i}": float(part.mean()) for i, part in enumerate(parts)}

"""Data, network and training that the claims share: small, plain, and the same for everybody.

Perceptrons train in plain `lax` loops, which slow nothing down without convolutions; `train_model`
takes any flax model, and there the host drives.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from regjax import Model, curvature
from regjax.experiments import load


class Split(NamedTuple):
    """Images (N, pixels) in float32 and labels (N,) of both parts.

    Attributes:
      x: training images. y: their labels. x_test: test images. y_test: their labels.
    """

    x: jax.Array
    y: jax.Array
    x_test: jax.Array
    y_test: jax.Array


class Trained(NamedTuple):
    """The end of a training run.

    Attributes:
      params: list of layers. loss: mean training loss. num_steps: updates done.
      state: of the optimiser.
    """

    params: Any
    loss: float
    num_steps: int
    state: Any


@functools.cache
def digits(num_train: int = 300) -> Split:
    """scikit-learn's digits, divided once and for all seeds: 300 training and 1497 test images."""
    data = load("digits")
    images = np.concatenate([data.train_inputs, data.test_inputs])
    labels = np.concatenate([data.train_targets, data.test_targets])
    order = np.random.default_rng(0).permutation(len(labels))
    return _split(images[order], labels[order], num_train)


@functools.cache
def fashion_mnist(num_train: int = 3000) -> Split:
    """Fashion-MNIST: the first 3000 training images and all test images."""
    data = load("fashion_mnist")
    images = np.concatenate([data.train_inputs[:num_train], data.test_inputs])
    labels = np.concatenate([data.train_targets[:num_train], data.test_targets])
    return _split(images, labels, num_train)


@functools.cache
def small_fashion_mnist(num_train: int = 300) -> Split:
    """The first training images and all test images at 14 x 14 pixels, means of four."""
    split = fashion_mnist(num_train)

    def pool(x: jax.Array) -> jax.Array:
        return x.reshape(-1, 14, 2, 14, 2).mean((2, 4)).reshape(len(x), -1)

    return split._replace(x=pool(split.x), x_test=pool(split.x_test))


def _split(images: np.ndarray, labels: np.ndarray, num_train: int) -> Split:
    x = jnp.asarray(images.reshape(len(images), -1), jnp.float32) / float(images.max())
    y = jnp.asarray(labels, jnp.int32)
    return Split(x[:num_train], y[:num_train], x[num_train:], y[num_train:])


def he_network(sizes: tuple[int, ...], key: jax.Array) -> Any:
    """Layers of a ReLU perceptron, weights N(0, 2 / inputs), biases zero."""
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {
            "kernel": jnp.sqrt(2 / n) * jax.random.normal(k, (n, m)),
            "bias": jnp.zeros(m),
        }
        for n, m, k in zip(sizes[:-1], sizes[1:], keys, strict=True)
    ]


def outputs(params: Any, x: jax.Array) -> jax.Array:
    """Logits of the perceptron."""
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ params[-1]["kernel"] + params[-1]["bias"]


def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """Mean cross-entropy."""
    return cross_entropy(outputs(params, x), y)


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    """The mean over the examples."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


def train(
    params: Any,
    tx: optax.GradientTransformationExtraArgs,
    split: Split,
    *,
    batch_size: int,
    num_steps: int,
    seed: int,
    stop_below: float = 0.0,
) -> Trained:
    """Steps on batches of a new order each epoch, until the full training loss is small.

    `grad_fn(params, i)` is given the i-th batch from the current one on, for inner loops; a step
    moves on by one batch. The loss is looked at after each epoch.
    """
    state, done = tx.init(params), 0
    loss = float(loss_fn(params, split.x, split.y))
    for order in epochs(len(split.y), batch_size, seed):
        if done >= num_steps or not loss >= stop_below:
            break
        order = order[: num_steps - done]
        params, state, last = epoch(tx.update, params, state, split.x, split.y, order)
        done, loss = done + len(order), float(last)
    return Trained(params, loss, done, state)


@functools.partial(jax.jit, static_argnums=0)
def epoch(update: Callable[..., Any], params: Any, state: Any, x: Any, y: Any, order: Any) -> Any:
    def step(carry: Any, i: jax.Array) -> Any:
        params, state = carry

        def grad_fn(params: Any, j: Any) -> Any:
            batch = order[(i + j) % len(order)]
            return jax.grad(loss_fn)(params, x[batch], y[batch])

        updates, state = update(grad_fn(params, 0), state, params, grad_fn=grad_fn)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.lax.scan(step, (params, state), jnp.arange(len(order)))
    return params, state, loss_fn(params, x, y)


def epochs(num_examples: int, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    random = np.random.default_rng(seed)
    while True:
        order = random.permutation(num_examples)
        yield order[: num_examples - num_examples % batch_size].reshape(-1, batch_size)


def accuracy(params: Any, split: Split) -> float:
    """Share of the test images with the right label."""
    return float(jnp.mean(jnp.argmax(outputs(params, split.x_test), 1) == split.y_test))


def flatness(trained: Trained, split: Split, seed: int, num_probes: int) -> dict[str, float]:
    """Test accuracy, training loss, and the trace of the Hessian with its standard error."""
    hessian = curvature.hessian(loss_fn, trained.params, split.x, split.y)
    trace = curvature.trace(hessian, key=jax.random.key(seed), num_matvecs=num_probes)
    return {
        "accuracy": accuracy(trained.params, split),
        "loss": trained.loss,
        "trace": float(trace.value),
        "trace_error": float(trace.standard_error),
    }


def sharpness(params: Any, split: Split, seed: int) -> tuple[float, float]:
    """The largest Hessian eigenvalue of the training loss, and its residual norm."""
    hessian = curvature.hessian(loss_fn, params, split.x, split.y)
    top = curvature.top_eigenpairs(hessian, 1, key=jax.random.key(seed), search=False)
    return float(top.values[0]), float(top.residual_norms[0])


class Net(nnx.Module):
    """Hidden layers, each followed by a normalization or None and an activation; a linear head.

    Args:
      layers: (layer, what is behind it or None), in order.
      head: the last layer.
      activation: the same function again compiles nothing again.
    """

    def __init__(self, layers: Any, head: Any, activation: Callable[[jax.Array], jax.Array]):
        self.layers = nnx.List([layer for layer, _ in layers])
        self.norms = nnx.List([nnx.identity if norm is None else norm for _, norm in layers])
        self.head = head
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of inputs (batch, ...)."""
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = self.activation(norm(layer(x)))
        return self.head(x)


def train_model(
    model: Model, tx: optax.GradientTransformation, split: Split, *,
    batch_size: int, num_steps: int, seed: int,
) -> tuple[Model, np.ndarray]:  # fmt: skip
    """The model after so many steps, and the loss before each. The host drives: convolutions."""
    params, model_state, state = model.params, model.state, tx.init(model.params)
    losses, key = list[jax.Array](), jax.random.key(seed)
    for order in epochs(len(split.y), batch_size, seed):
        for rows in order[: num_steps - len(losses)]:
            step_key = jax.random.fold_in(key, len(losses))
            params, model_state, state, loss = _model_step(
                model.apply, tx.update, params, model_state, state, split.x, split.y, rows, step_key
            )
            losses.append(loss)
        if len(losses) == num_steps:
            break
    return model._replace(params=params, state=model_state), np.asarray(jnp.stack(losses))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _model_step(
    apply: Any, update: Any, params: Any, model_state: Any, state: Any, x: Any, y: Any,
    rows: Any, key: jax.Array,
) -> Any:  # fmt: skip
    def loss(params: Any) -> tuple[jax.Array, Any]:
        logits, new = apply(params, model_state, x[rows], train=True, key=key)
        return cross_entropy(logits, y[rows]), new

    (value, new), grads = jax.value_and_grad(loss, has_aux=True)(params)
    updates, state = update(grads, state, params)
    return optax.apply_updates(params, updates), new, state, value


def model_accuracy(model: Model, split: Split, batch_size: int = 2048) -> float:
    """Share of the test images with the right label, in evaluation mode."""
    right = 0
    for start in range(0, len(split.y_test), batch_size):
        part = slice(start, start + batch_size)
        outputs = _evaluate(model.apply, model.params, model.state, split.x_test[part])
        right += int(jnp.sum(jnp.argmax(outputs, 1) == split.y_test[part]))
    return right / len(split.y_test)


@functools.partial(jax.jit, static_argnums=0)
def _evaluate(apply: Any, params: Any, state: Any, x: jax.Array) -> jax.Array:
    return apply(params, state, x, train=False)[0]


def as_images(split: Split) -> Split:
    """The split with images (N, height, width, 1)."""
    side = round(split.x.shape[1] ** 0.5)
    return split._replace(
        x=split.x.reshape(-1, side, side, 1), x_test=split.x_test.reshape(-1, side, side, 1)
    )

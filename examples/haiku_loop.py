"""Haiku's own loop: a network with batch norm, SAM and the curvature."""

import haiku as hk
import jax
import optax

from examples.images import images
from regjax import curvature, from_haiku, model_loss, transforms  # regjax


def network_fn(x, is_training):
    """Computes logits (images, classes) of images (images, height, width, 1)."""
    x = hk.Conv2D(4, 3, with_bias=False)(x)
    x = hk.BatchNorm(True, True, 0.9)(x, is_training)
    return hk.Linear(3)(jax.nn.relu(x).mean((1, 2)))


def cross_entropy(logits, labels):
    """Returns the mean over the images."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def main(num_steps=3):
    """Returns parameters and state after some steps and the largest eigenvalue there."""
    x, y = images()
    network = hk.without_apply_rng(hk.transform_with_state(network_fn))
    params, state = network.init(jax.random.key(0), x, is_training=True)
    tx = optax.sgd(0.1, momentum=0.9)
    opt_state = tx.init(params)

    def loss_fn(params, state, x, y):
        logits, state = network.apply(params, state, x, is_training=True)
        return cross_entropy(logits, y), state

    loss_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    loss_and_grad = transforms.sharpness_aware_gradient(loss_and_grad, 0.05)  # regjax

    @jax.jit
    def train_step(params, state, opt_state, x, y):
        (_, state), grads = loss_and_grad(params, state, x, y)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), state, opt_state

    for _ in range(num_steps):
        params, state, opt_state = train_step(params, state, opt_state, x, y)

    model = from_haiku(network, params, state)  # regjax
    hessian = curvature.hessian(model_loss(model, cross_entropy), model.params, x, y)  # regjax
    top = curvature.top_eigenpairs(hessian, 1, key=jax.random.key(1))  # regjax
    return params, state, float(top.values[0])


if __name__ == "__main__":
    print(f"largest eigenvalue {main()[-1]:.4g}")

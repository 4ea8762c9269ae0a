"""Equinox's own loop: a perceptron, SAM and the curvature."""

import equinox as eqx
import jax
import optax

from examples.images import images
from regjax import curvature, from_equinox, model_loss, transforms  # regjax


def cross_entropy(logits, labels):
    """Returns the mean over the images."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def main(num_steps=3):
    """Returns the network after some steps and the largest eigenvalue of the Hessian there."""
    x, y = images()
    x = x.reshape(len(x), -1)
    net = eqx.nn.MLP(x.shape[1], 3, 8, 2, activation=jax.nn.tanh, key=jax.random.key(0))
    tx = optax.sgd(0.1, momentum=0.9)
    state = tx.init(eqx.filter(net, eqx.is_inexact_array))

    def loss_fn(net, x, y):
        return cross_entropy(jax.vmap(net)(x), y)

    loss_and_grad = eqx.filter_value_and_grad(loss_fn)
    loss_and_grad = transforms.sharpness_aware_gradient(loss_and_grad, 0.05)  # regjax

    @eqx.filter_jit
    def train_step(net, state, x, y):
        _, grads = loss_and_grad(net, x, y)
        updates, state = tx.update(grads, state, eqx.filter(net, eqx.is_inexact_array))
        return eqx.apply_updates(net, updates), state

    for _ in range(num_steps):
        net, state = train_step(net, state, x, y)

    model = from_equinox(net)  # regjax
    hessian = curvature.hessian(model_loss(model, cross_entropy), model.params, x, y)  # regjax
    top = curvature.top_eigenpairs(hessian, 1, key=jax.random.key(1))  # regjax
    return net, float(top.values[0])


if __name__ == "__main__":
    print(f"largest eigenvalue {main()[1]:.4g}")

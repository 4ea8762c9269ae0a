"""`nnx.Optimizer`: an image classifier with batch norm and dropout, SAM and the curvature."""

import jax
import optax
from flax import nnx

from examples.images import images
from regjax import curvature, from_nnx, model_loss, transforms  # regjax


class Net(nnx.Module):
    """Logits (images, classes)."""

    def __init__(self, rngs):
        """Makes the layers."""
        self.conv = nnx.Conv(1, 4, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        """Computes the logits of images (images, height, width, 1)."""
        return self.head(self.dropout(nnx.relu(self.norm(self.conv(x))).mean((1, 2))))


def cross_entropy(logits, labels):
    """Returns the mean over the images."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def main(num_steps=3):
    """Returns the network after some steps and the largest eigenvalue of the Hessian there."""
    x, y = images()
    net = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(net, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)

    def loss_fn(net, x, y):
        logits = net(x)
        return cross_entropy(logits, y), logits

    loss_and_grad = nnx.value_and_grad(loss_fn, has_aux=True)
    loss_and_grad = transforms.sharpness_aware_gradient(loss_and_grad, 0.05)  # regjax

    @nnx.jit
    def train_step(net, optimizer, x, y):
        (loss, _), grads = loss_and_grad(net, x, y)
        optimizer.update(net, grads)
        return loss

    net.train()
    for _ in range(num_steps):
        train_step(net, optimizer, x, y)

    model = from_nnx(net)  # regjax
    hessian = curvature.hessian(model_loss(model, cross_entropy), model.params, x, y)  # regjax
    top = curvature.top_eigenpairs(hessian, 1, key=jax.random.key(1))  # regjax
    return net, float(top.values[0])


if __name__ == "__main__":
    print(f"largest eigenvalue {main()[1]:.4g}")

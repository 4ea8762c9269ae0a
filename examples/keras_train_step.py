"""Keras' `train_step` on JAX, called by `fit`: SAM and the curvature. Needs KERAS_BACKEND=jax."""

import jax
import keras
import optax

from examples.images import images
from regjax import curvature, from_keras, model_loss, transforms  # regjax


class Classifier(keras.Model):
    """A model with a training step of its own, as in Keras' guide for JAX."""

    def compute_loss_and_updates(self, trainable, non_trainable, x, y, training=False):
        """Returns the loss, and (outputs, variables that are not trained)."""
        outputs, non_trainable = self.stateless_call(trainable, non_trainable, x, training=training)
        return self.compute_loss(x, y, outputs), (outputs, non_trainable)

    def train_step(self, state, data):
        """Takes one step; `fit` calls it inside of `jit`."""
        trainable, non_trainable, optimizer_variables, metrics_variables = state
        x, y = data
        loss_and_grad = jax.value_and_grad(self.compute_loss_and_updates, has_aux=True)
        loss_and_grad = transforms.sharpness_aware_gradient(loss_and_grad, 0.05)  # regjax
        (loss, (_, non_trainable)), grads = loss_and_grad(
            trainable, non_trainable, x, y, training=True
        )
        trainable, optimizer_variables = self.optimizer.stateless_apply(
            optimizer_variables, grads, trainable
        )
        return {"loss": loss}, (trainable, non_trainable, optimizer_variables, metrics_variables)


def cross_entropy(logits, labels):
    """Returns the mean over the images."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def make():
    """Returns a compiled model with fixed weights."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4, 4, 1))
    hidden = keras.layers.Conv2D(4, 3, padding="same", use_bias=False)(inputs)
    hidden = keras.layers.BatchNormalization(momentum=0.9)(hidden)
    hidden = keras.layers.GlobalAveragePooling2D()(keras.layers.ReLU()(hidden))
    net = Classifier(inputs, keras.layers.Dense(3)(hidden))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    net.compile(optimizer=keras.optimizers.SGD(0.1, momentum=0.9), loss=loss)
    return net


def main(num_steps=3):
    """Returns the model after some steps and the largest eigenvalue of the Hessian there."""
    x, y = images()
    net = make()
    net.fit(x, y, batch_size=len(x), epochs=num_steps, shuffle=False, verbose=0)

    model = from_keras(net)  # regjax
    hessian = curvature.hessian(model_loss(model, cross_entropy), model.params, x, y)  # regjax
    top = curvature.top_eigenpairs(hessian, 1, key=jax.random.key(1))  # regjax
    return net, float(top.values[0])


if __name__ == "__main__":
    print(f"largest eigenvalue {main()[1]:.4g}")

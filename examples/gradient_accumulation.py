"""A masked loss in micro-batches: one ascent with the gradient of the whole batch, in parts."""

import jax
import jax.numpy as jnp
import optax

from examples import decoder
from regjax import WeightedMean, curvature, transforms  # regjax


def main(num_steps=3, num_micro_batches=4):
    """Returns the parameters after some steps and the largest eigenvalue of the Hessian there."""
    batch = decoder.texts()
    model = decoder.Decoder()
    params = model.init(jax.random.key(0), batch[0])["params"]
    tx = optax.sgd(0.1, momentum=0.9)
    state = tx.init(params)

    def sums_fn(params, tokens, targets, mask):
        return decoder.masked_nll(model.apply({"params": params}, tokens), targets, mask)

    def accumulated(params, *batch):
        """Adds up the sums of micro-batches and divides at the end."""
        parts = jax.tree.map(lambda a: a.reshape(num_micro_batches, -1, *a.shape[1:]), batch)

        def add(carry, part):
            (total, count), grads = jax.value_and_grad(sums_fn, has_aux=True)(params, *part)
            return jax.tree.map(jnp.add, carry, (total, count, grads)), None

        zeros = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        (total, count, grads), _ = jax.lax.scan(add, zeros, parts)
        return total / count, jax.tree.map(lambda g: g / count, grads)

    loss_and_grad = transforms.sharpness_aware_gradient(accumulated, 0.05)  # regjax

    @jax.jit
    def train_step(params, state, *batch):
        _, grads = loss_and_grad(params, *batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(num_steps):
        params, state = train_step(params, state, *batch)

    loss_fn = lambda *arguments: WeightedMean(*sums_fn(*arguments))  # regjax
    hessian = curvature.hessian(loss_fn, params, *batch, chunk_size=4)  # regjax
    top = curvature.top_eigenpairs(hessian, 1, key=jax.random.key(1))  # regjax
    return params, float(top.values[0])


if __name__ == "__main__":
    print(f"largest eigenvalue {main()[1]:.4g}")

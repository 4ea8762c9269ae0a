"""A masked loss in micro-batches: one ascent with the gradient of the whole batch, in parts."""

import jax
import optax

import regjax  # regjax
from examples import decoder


def main(num_steps=3, num_micro_batches=4):
    """Returns the parameters after some steps and the largest eigenvalue of the Hessian there."""
    batch = decoder.texts()
    model = decoder.Decoder()
    params = model.init(jax.random.key(0), batch[0])["params"]
    tx = optax.adamw(1e-2)
    state = tx.init(params)

    def loss_fn(params, tokens, targets, mask):
        logits = model.apply({"params": params}, tokens)
        return regjax.WeightedMean(*decoder.masked_nll(logits, targets, mask))  # regjax

    def mean_loss(params, *micro_batch):
        total, count = loss_fn(params, *micro_batch)
        return total / count

    accumulated = regjax.transforms.mean_gradient(  # regjax
        jax.value_and_grad(mean_loss),
        num_shards=num_micro_batches,
        weight_fn=lambda tokens, targets, mask: mask.sum(),
    )
    loss_and_grad = regjax.transforms.sharpness_aware_gradient(accumulated, 0.05)  # regjax

    @jax.jit
    def train_step(params, state, *batch):
        _, grads = loss_and_grad(params, *batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(num_steps):
        params, state = train_step(params, state, *batch)

    hessian = regjax.curvature.hessian(loss_fn, params, *batch, chunk_size=4)  # regjax
    top = regjax.curvature.top_eigenpairs(hessian, 1, key=jax.random.key(1))  # regjax
    return params, float(top.values[0])


if __name__ == "__main__":
    print(f"largest eigenvalue {main()[1]:.4g}")

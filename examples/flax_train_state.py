"""flax's `TrainState`: a decoder with scanned layers, its masked loss, SAM and the curvature."""

import jax
import optax
from flax.training.train_state import TrainState

from examples import decoder
from regjax import curvature, transforms  # regjax


def main(num_steps=3):
    """Returns the parameters after some steps and the largest eigenvalue of the Hessian there."""
    batch = decoder.texts()
    model = decoder.Decoder()
    params = model.init(jax.random.key(0), batch[0])["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.sgd(0.1, momentum=0.9))

    def loss_fn(params, tokens, targets, mask):
        logits = state.apply_fn({"params": params}, tokens)
        total, count = decoder.masked_nll(logits, targets, mask)
        return total / count

    loss_and_grad = jax.value_and_grad(loss_fn)
    loss_and_grad = transforms.sharpness_aware_gradient(loss_and_grad, 0.05)  # regjax

    @jax.jit
    def train_step(state, *batch):
        loss, grads = loss_and_grad(state.params, *batch)
        return state.apply_gradients(grads=grads), loss

    for _ in range(num_steps):
        state, _ = train_step(state, *batch)

    hessian = curvature.hessian(loss_fn, state.params, *batch)  # regjax
    top = curvature.top_eigenpairs(hessian, 1, key=jax.random.key(1))  # regjax
    return state.params, float(top.values[0])


if __name__ == "__main__":
    print(f"largest eigenvalue {main()[1]:.4g}")

"""Parameters and data divided over four devices (FSDP): the same lines as on one.

On a machine without them: NPROC=16 JAX_NUM_CPU_DEVICES=4 JAX_PLATFORMS=cpu
"""

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from examples import decoder
from regjax import curvature, transforms  # regjax


def divided(leaf, mesh):
    """Puts an array on the devices, divided along the first axis that they divide."""
    for axis, size in enumerate(leaf.shape):
        if size % mesh.size == 0:
            spec = PartitionSpec(*[None] * axis, "data")
            return jax.device_put(leaf, NamedSharding(mesh, spec))
    return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec()))


def main(num_steps=3, num_devices=4):
    """Returns the parameters after some steps and the largest eigenvalue of the Hessian there."""
    kind = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((num_devices,), ("data",), axis_types=(kind,))
    whole = decoder.texts()
    model = decoder.Decoder()
    params = model.init(jax.random.key(0), whole[0])["params"]
    params = jax.tree.map(lambda leaf: divided(leaf, mesh), params)
    batch = jax.device_put(whole, NamedSharding(mesh, PartitionSpec("data")))
    tx = optax.sgd(0.1, momentum=0.9)
    state = tx.init(params)

    def loss_fn(params, tokens, targets, mask):
        logits = model.apply({"params": params}, tokens)
        total, count = decoder.masked_nll(logits, targets, mask)
        return total / count

    loss_and_grad = jax.value_and_grad(loss_fn)
    loss_and_grad = transforms.sharpness_aware_gradient(loss_and_grad, 0.05)  # regjax

    @jax.jit
    def train_step(params, state, *batch):
        _, grads = loss_and_grad(params, *batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(num_steps):
        params, state = jax.block_until_ready(train_step(params, state, *batch))

    hessian = curvature.hessian(loss_fn, params, *batch)  # regjax
    top = curvature.top_eigenpairs(hessian, 1, key=jax.random.key(1))  # regjax
    return params, float(top.values[0])


if __name__ == "__main__":
    print(f"largest eigenvalue {main()[1]:.4g}")

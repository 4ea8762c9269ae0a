"""Learners on a mesh against the same ones under `jax.vmap`; a program of its own, or several.

    python -m tests.transforms.learners NAMES DEVICES [PROCESSES INDEX PORT]

The number of devices is fixed when JAX starts, and so are the processes. On eight devices each has
one learner; on four, or the first four of a single process, each has a block of two.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from regjax import transforms

NUM = 8
STEPS = 20
SPEC = PartitionSpec("device")


def trained(tx, params, state, inputs, targets):
    """One learner's params after momentum steps on its own batch."""

    def loss_fn(params):
        return jnp.mean((jnp.tanh(inputs @ params["kernel"]) * params["scale"] - targets) ** 2)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), length=STEPS)[0][0]


def problem():
    random = np.random.default_rng(0)
    normal = lambda *shape: np.asarray(random.normal(size=shape), np.float32)
    params = {"kernel": normal(NUM, 3, 2), "scale": normal(NUM)}
    return params, normal(NUM, 5, 3), normal(NUM, 5, 2)


@functools.cache
def mixings():
    key = jax.random.key(5)
    matrix = sum(np.roll(np.eye(NUM), k, 0) * share for k, share in ((0, 0.5), (1, 0.2), (3, 0.3)))
    return {
        "ring": transforms.ring_mixing(),
        "exponential": transforms.exponential_mixing(),
        "full": transforms.full_mixing(),
        "dense": transforms.dense_mixing(matrix),
        "pairs": transforms.random_pair_mixing(key=key),
    }


def chain(mixing, axis_name):
    mix = transforms.gossip_average(mixing, axis_name=axis_name)
    return optax.chain(optax.sgd(0.1, momentum=0.9), mix)


@functools.cache
def vmapped(mixing):
    """All learners on one device."""
    tx = chain(mixing, "learner")
    params, *batch = problem()
    state = jax.vmap(tx.init)(params)
    run = jax.vmap(lambda *own: trained(tx, *own), axis_name="learner")
    return jax.jit(run)(params, state, *batch)


def on_mesh(mixing, num_devices):
    """One learner a device, or a block of them."""
    mesh = jax.make_mesh(
        (num_devices,),
        ("device",),
        axis_types=(AxisType.Auto,),
        devices=jax.devices()[:num_devices],
    )
    in_blocks = num_devices < NUM
    tx = chain(mixing, ("device", "block") if in_blocks else "device")
    run = lambda *own: trained(tx, *own)
    if in_blocks:
        local = jax.vmap(run, axis_name="block")
    else:
        alone = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)
        local = lambda *own: jax.tree.map(lambda leaf: leaf[None], run(*map(alone, own)))
    run_all = jax.shard_map(
        local, mesh=mesh, in_specs=SPEC, out_specs=SPEC, check_vma=not in_blocks
    )
    params, *batch = problem()
    state = jax.vmap(tx.init)(params)
    sharding = NamedSharding(mesh, SPEC)

    def divided(leaf):
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.jit(run_all)(*jax.tree.map(divided, (params, state, *batch)))


def check(mixing, num_devices):
    reference = jax.tree.leaves(jax.tree.map(np.asarray, vmapped(mixing)))
    for leaf, expected in zip(
        jax.tree.leaves(on_mesh(mixing, num_devices)), reference, strict=True
    ):
        for shard in leaf.addressable_shards:
            np.testing.assert_allclose(shard.data, expected[shard.index], rtol=1e-5, atol=1e-5)


def main(names, devices, processes=1, index=0, port=0):
    jax.config.update("jax_num_cpu_devices", int(devices))
    if int(processes) > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(index))
    for name in names.split(","):
        for num_devices in {len(jax.devices()), *([4] if int(processes) == 1 else [])}:
            if name != "pairs" or num_devices == NUM:
                check(mixings()[name], num_devices)
                print(f"{name} on {num_devices} devices is as under vmap")


if __name__ == "__main__":
    main(*sys.argv[1:])

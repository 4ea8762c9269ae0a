"""Every transformation on a mesh: a batch divided over devices gives the numbers of one device."""

import os
import subprocess
import sys
import textwrap

from tests.registry import ROWS

PROGRAM = """
    import jax
    jax.config.update("jax_num_cpu_devices", 4)
    import jax.numpy as jnp, numpy as np, optax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec
    from tests.registry import ROWS
    from tests.test_transform_contract import DATA, LABELS, chain, loss_fn, parameters

    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    divided = NamedSharding(mesh, PartitionSpec("data"))
    copied = NamedSharding(mesh, PartitionSpec())

    for name, row in ROWS.items():
        tx = chain(row, row.make())

        @jax.jit
        def step(params, state, x, y):
            shards = [part.reshape(2, -1, *part.shape[1:]) for part in (x, y)]
            def grad_fn(p, i):
                batch = [s[i] for s in shards] if name == "m_sharpness" else (x, y)
                return jax.grad(loss_fn)(p, *batch)
            grads = jax.grad(loss_fn)(params, x, y)
            updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
            return optax.apply_updates(params, updates), state

        def run(place_params, place_data):
            params = place_params(parameters())
            state = place_params(tx.init(params))
            for _ in range(2):
                params, state = step(params, state, place_data(DATA), place_data(LABELS))
            return params

        alone = run(lambda tree: tree, lambda array: array)
        together = run(
            lambda tree: jax.device_put(tree, copied), lambda array: jax.device_put(array, divided)
        )
        assert all(len(leaf.sharding.device_set) == 4 for leaf in jax.tree.leaves(together)), name
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=name)
    print("same on", len(ROWS), "rows")
"""


def test_a_divided_batch_gives_the_numbers_of_one_device():
    # In a process of its own: the number of devices is fixed when JAX starts. NPROC: see the
    # deadlock of fake CPU devices, which more threads prevent.
    environment = {**os.environ, "NPROC": "16", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"same on {len(ROWS)} rows" in done.stdout

"""Every transformation on a mesh: divided batches and parameters give the numbers of one device."""

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


DIVIDED_PARAMETERS = """
    import re
    import jax
    jax.config.update("jax_num_cpu_devices", 8)
    import jax.numpy as jnp, numpy as np, optax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec
    from tests.registry import ROWS

    kinds = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
    meshes = {name: jax.make_mesh((8,), ("x",), axis_types=(kind,)) for name, kind in kinds.items()}
    random = np.random.default_rng(0)
    weights = {"w": random.normal(size=(512, 256)), "b": random.normal(size=64)}
    specs = {"w": PartitionSpec("x"), "b": PartitionSpec()}
    grad_fn = lambda params, i: jax.tree.map(jnp.sin, params)

    def place(tree, mesh):
        lay = lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec))
        return jax.tree.map(lay, tree, specs)

    def step(tx):
        def update(params, state):
            return tx.update(grad_fn(params, 0), state, params, grad_fn=grad_fn)
        return jax.jit(update)

    for name, row in ROWS.items():
        tx, params = row.make(), jax.tree.map(jnp.float32, weights)
        alone = step(tx)(params, tx.init(params))[0]
        there = place(params, meshes["auto"])
        program = step(tx).lower(there, tx.init(there)).compile()
        divided = program(there, tx.init(there))[0]
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(divided), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=name)
        if "divided" not in row.skipped:
            shard = params["w"].nbytes / 8
            used = program.memory_analysis().temp_size_in_bytes / shard
            # Eight are a whole copy, of which a noise drawn as one vector takes four.
            assert used < row.num_temporaries, (name, used)
            assert divided["w"].sharding.spec == specs["w"], name
            # Messages: sums, and the small leaf, which each device has. No parameters are gathered.
            sent = re.findall(r"= (.*) all-(?:gather|to-all)(?:-start)?\\(", program.as_text())
            for shape in re.findall(r"\\[([0-9,]+)\\]", " ".join(sent)):
                assert np.prod([int(size) for size in shape.split(",")]) <= 512, (name, sent)
        if "explicit" not in row.skipped:
            with jax.set_mesh(meshes["explicit"]):
                half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), params)
                half = place(half, meshes["explicit"])
                states = [tx.init(half), jax.jit(tx.init)(half)]
                states.append(tx.update(half, states[0], half, grad_fn=grad_fn)[1])
                states.append(step(tx)(half, states[0])[1])
                first, *others = [jax.tree.map(jax.typeof, state) for state in states]
                for other in others:
                    assert other == first, (name, first, other)
        jax.clear_caches()
    print("same on", len(ROWS), "rows")
"""


def test_divided_parameters_give_the_numbers_of_one_device_and_take_no_whole_copy():
    run(DIVIDED_PARAMETERS)


def test_a_divided_batch_gives_the_numbers_of_one_device():
    run(PROGRAM)


def run(program):
    """Runs a program in a process of its own: the number of devices is fixed when JAX starts."""
    # NPROC: see the deadlock of fake CPU devices, which more threads prevent.
    environment = {**os.environ, "NPROC": "16", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"same on {len(ROWS)} rows" in done.stdout

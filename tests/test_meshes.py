"""Meshes with explicit axes, as `jax.make_mesh` makes them: the numbers of one device, there."""

import os
import subprocess
import sys
import textwrap

PROGRAM = """
    import jax
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_numpy_rank_promotion", "allow")
    import jax.numpy as jnp, numpy as np, pytest
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
    from regjax import _meshes, curvature, diagnostics, regularizers
    from tests import quick
    from tests.curvature.sharded import loss_fn, model_fn, output_loss_fn, problem

    quick.share_context()
    mesh = jax.make_mesh((4,), ("data",))
    assert _meshes.is_explicit(mesh)
    key = jax.random.key(0)
    params, inputs, targets = problem(width=8)
    on = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
    batch = on((inputs, targets), P("data"))
    copied = on(params, P())
    divided = jax.tree.map(lambda x: on(x, P("data") if x.shape[0] % 4 == 0 else P()), params)
    one = curvature.hessian(loss_fn, params, jnp.asarray(inputs), jnp.asarray(targets))
    dense = np.asarray(one.dense())
    largest = np.linalg.eigvalsh(dense)[-1]

    def same(found, expected, tol=1e-4):
        np.testing.assert_allclose(found, expected, rtol=tol, atol=1e-5)

    def ours(tree):
        assert all(x.sharding.mesh == mesh for x in jax.tree.leaves(tree)), tree
        return tree

    # Nothing is copied on the way to automatic axes.
    moved = _meshes.automatic(batch[0])
    pairs = zip(moved.addressable_shards, batch[0].addressable_shards)
    assert all(a.data.unsafe_buffer_pointer() == b.data.unsafe_buffer_pointer() for a, b in pairs)

    def top(params, *batch, chunk_size=None):
        matrix = curvature.hessian(loss_fn, params, *batch, chunk_size=chunk_size)
        return curvature.top_eigenpairs(matrix, 1, key=key)

    def everything(params):
        matrix = curvature.hessian(loss_fn, params, *batch)
        # Each device has its own examples, and its part of a vector.
        assert matrix.placement.num_parts == 4
        same(ours(matrix.dense()), dense)
        image = jax.tree.map(jnp.add, ours(matrix.matvec(copied)), copied)
        same(image[0]["bias"], one.matvec(params)[0]["bias"] + params[0]["bias"])
        ours(matrix.matvec(jax.tree.map(np.asarray, params)))
        for chunk_size in (None, 3):
            found = top(params, *batch, chunk_size=chunk_size)
            same(found.values[0], largest)
            jax.tree.map(lambda w, v: w + v[0], copied, ours(found.vectors))
        same(ours((2.0 * matrix + matrix).matvec(copied))[0]["bias"],
             3 * one.matvec(params)[0]["bias"])

    everything(copied)
    with jax.set_mesh(mesh):
        everything(divided)
        same(top(params, *map(jnp.asarray, (inputs, targets))).values[0], largest)
        solver = curvature.lanczos_solver(curvature.hessian(loss_fn, copied, *batch), copied, 4)
        state = solver.init()
        while not solver.done(state):
            state = solver.step(state)
        same(curvature.ritz_pairs(solver.result(state)).values[-1],
             curvature.ritz_pairs(curvature.lanczos(one, params, 4)).values[-1])
        # What a function closes over stays explicit.
        same(curvature.top_eigenpairs(
            curvature.hessian(lambda p: loss_fn(p, *batch), copied), 1, key=key).values[0], largest)

    # Inside of jit, under the mesh or not, from parameters that are copied, divided, or nowhere.
    for where, chunk_size in ((copied, 4), (divided, None), (params, 4)):
        run = jax.jit(lambda p, *b: top(p, *b, chunk_size=chunk_size).values[0])
        same(run(where, *batch), largest)
        with jax.set_mesh(mesh):
            same(run(where, *batch), largest)

    vector = jax.tree.map(jnp.cos, params)
    expected = one.matvec(vector)
    found = curvature.hvp(loss_fn, copied, vector, *batch)
    jax.tree.map(same, ours(found), expected)
    jax.tree.map(same, ours(jax.jit(lambda p, v, *b: curvature.hvp(loss_fn, p, v, *b))(
        copied, vector, *batch)), expected)
    penalty = regularizers.gradient_norm_penalty
    plain = jnp.asarray(inputs), jnp.asarray(targets)
    slope = jax.grad(lambda p: penalty(loss_fn, p, *plain))(params)
    same(penalty(loss_fn, copied, *batch), penalty(loss_fn, params, *plain))
    found = jax.jit(jax.grad(lambda p, *b: penalty(loss_fn, p, *b)))(copied, *batch)
    jax.tree.map(same, ours(found), slope)
    with jax.set_mesh(mesh):
        jax.tree.map(same, ours(jax.grad(lambda p: penalty(loss_fn, p, *batch))(copied)), slope)

    matrix = curvature.gauss_newton(model_fn, output_loss_fn, copied, *batch)
    same(matrix.dense(), curvature.gauss_newton(model_fn, output_loss_fn, params, *plain).dense())
    matrix = curvature.empirical_fisher(model_fn, output_loss_fn, copied, *batch, chunk_size=4)
    same(curvature.trace(matrix, key=key, num_matvecs=3).value, curvature.trace(
        curvature.empirical_fisher(model_fn, output_loss_fn, params, *plain), key=key,
        num_matvecs=3).value)
    parts = [on((inputs[i:j], targets[i:j]), P("data")) for i, j in ((0, 24), (24, 64))]
    for where in (copied, params):
        streamed = curvature.stream(curvature.hessian, loss_fn, where, parts)
        same(curvature.top_eigenpairs(streamed, 1, key=key).values[0], largest)
    sharpness = diagnostics.spherical_sharpness
    same(sharpness(loss_fn, copied, *batch, key=key).value,
         sharpness(loss_fn, params, *plain, key=key).value)
    density = curvature.spectral_density(one, key=key, num_steps=6, num_probes=1)
    same(curvature.spectral_density(curvature.hessian(loss_fn, copied, *batch), key=key,
                                    num_steps=6, num_probes=1).trace, density.trace)

    # A mesh of mixed axes, one of size 1, and axes that the caller divides by the compiler.
    mixed = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto, AxisType.Explicit))
    there = jax.device_put((inputs, targets), NamedSharding(mixed, P("b")))
    same(top(params, *there).values[0], largest)
    single = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    there = jax.device_put((params, inputs, targets), NamedSharding(single, P()))
    same(top(*there).values[0], largest)
    auto = _meshes.automatic_mesh(mesh)
    there = jax.device_put((inputs, targets), NamedSharding(auto, P("data")))
    with jax.set_mesh(auto):
        assert top(params, *there, chunk_size=4).values.sharding.mesh == auto
        constrained = lambda p, x, y: loss_fn(p, jax.lax.with_sharding_constraint(x, P("data")), y)
        matrix = curvature.hessian(constrained, params, *there)
        same(curvature.top_eigenpairs(matrix, 1, key=key).values[0], largest)

    # What cannot be is an error that says why.
    named = lambda p, x, y: jnp.mean(jnp.dot(x, p[0]["kernel"], out_sharding=P("data")) ** 2)
    with pytest.raises(Exception) as caught:
        curvature.hessian(named, copied, *batch)
    assert "pass such arrays as arguments" in "".join(caught.value.__notes__)
    print("same")
"""


def test_explicit_axes_give_the_numbers_of_one_device():
    # The pool of XLA's CPU client has one thread for each processor, and collectives wait in it.
    environment = os.environ | {"NPROC": "16", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)],
        capture_output=True, text=True, env=environment, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("same\n")

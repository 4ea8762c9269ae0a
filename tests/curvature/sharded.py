"""Curvature of data divided over devices against that on one; a program of its own, or several.

    python -m tests.curvature.sharded CHECKS DEVICES [PROCESSES INDEX PORT]

The number of devices is fixed when JAX starts, and so are the processes.
"""

import functools
import logging
import re
import sys
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from regjax import WeightedMean, curvature, diagnostics
from regjax._space import Space
from regjax.curvature import _assessment, _eigen
from regjax.curvature._engine import _basis
from regjax.curvature._operators import _curvature, _traced
from regjax.experiments import SpectrumSettings, _analysis, _inputs, _network
from tests import quick
from tests.experiments.test_training import make_dataset

# Rows lie in several blocks, as those of large networks do.
_basis._SMALL = _basis._MIDDLE = 0
NUM_EXAMPLES, INPUTS, OUTPUTS = 64, 6, 3
key = functools.partial(jax.random.key, 1)


def mesh_of(shape=None, names=("data",), kind=AxisType.Auto):
    shape = (len(jax.devices()),) if shape is None else shape
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


def problem(width=9):
    random = np.random.default_rng(0)
    normal = lambda *shape: np.asarray(random.normal(size=shape), np.float32)
    sizes = [(INPUTS, width), (width, width), (width, OUTPUTS)]
    params = [
        {"kernel": jnp.asarray(normal(*size) / np.sqrt(size[0])), "bias": jnp.zeros(size[1])}
        for size in sizes
    ]
    return params, normal(NUM_EXAMPLES, INPUTS), normal(NUM_EXAMPLES, OUTPUTS)


def divided(array, mesh, *axes):
    sharding = NamedSharding(mesh, PartitionSpec(*(axes or ("data",))))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def model_fn(params, inputs):
    for layer in params[:-1]:
        inputs = jnp.tanh(inputs @ layer["kernel"] + layer["bias"])
    return inputs @ params[-1]["kernel"] + params[-1]["bias"]


def output_loss_fn(outputs, targets):
    return jnp.mean((outputs - targets) ** 2)


def loss_fn(params, inputs, targets):
    return output_loss_fn(model_fn(params, inputs), targets)


def coupled_loss_fn(params, inputs, targets):
    outputs = model_fn(params, inputs)
    return output_loss_fn(outputs - jnp.mean(outputs, 0, keepdims=True), targets)


coupled_loss_fn.couples_examples = True


def convolutional_loss_fn(kernel, inputs, targets):
    images = inputs.reshape(-1, 3, 2, 1)
    outputs = jax.lax.conv_general_dilated(
        images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return output_loss_fn(jnp.mean(jnp.tanh(outputs), (1, 2)), targets)


def fisher(params, inputs, targets, *, chunk_size=None):
    del targets
    return curvature.fisher(
        model_fn, params, inputs, key=key(), likelihood="normal", chunk_size=chunk_size
    )


def whole_and_block(params, inputs, targets, *, chunk_size=None):
    operator = curvature.hessian(loss_fn, params, inputs, targets, chunk_size=chunk_size)
    return curvature.by_block(operator)["1"]


OPERATORS = {
    "hessian": functools.partial(curvature.hessian, loss_fn),
    "gauss_newton": functools.partial(curvature.gauss_newton, model_fn, output_loss_fn),
    "empirical_fisher": functools.partial(curvature.empirical_fisher, model_fn, output_loss_fn),
    "fisher": fisher,
    "block": whole_and_block,
}


def close(found, expected, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.nanmax(np.abs(b)), 1e-6))


def vector_of(operator):
    return jax.random.normal(key(), (operator.shape[0],))


def both(make=OPERATORS["hessian"], chunk_size=None, mesh=None):
    """The same operator on one device and on all."""
    params, *batch = problem()
    mesh = mesh_of() if mesh is None else mesh
    alone = make(params, *map(jnp.asarray, batch), chunk_size=chunk_size)
    return alone, make(params, *(divided(a, mesh) for a in batch), chunk_size=chunk_size)


def product(operator, vector):
    """The product with a whole vector."""
    space = operator.space
    return space.gather(operator.product(space.shard(vector)))


def compiled_product(operator):
    """Of trees, which are whole on each device."""
    tree = operator.space.unravel(operator.space.shard(vector_of(operator)))
    return jax.jit(lambda o, v: o.matvec(v)).lower(operator, tree).compile()


def flat(operator, tree):
    return operator.space.gather(operator.space.ravel(tree))


def collectives(compiled):
    """What the devices say to each other, as the compiler wrote it."""
    names = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    return re.findall(rf" ({names})(?:-start)?\(", compiled.as_text())


def check_products():
    """The numbers of one device with one message, also in chunks of three of eight examples."""
    for name, make in OPERATORS.items():
        alone, _ = both(make)
        expected = product(alone, vector_of(alone))
        assert not np.allclose(expected, 0)
        for chunk_size in (None, 3) if name in ("hessian", "fisher") else (None,):
            _, operator = both(make, chunk_size)
            assert operator.placement.num_parts == 8
            compiled = compiled_product(operator)
            assert collectives(compiled) == ["all-reduce"], (name, chunk_size)
            tree = operator.space.unravel(operator.space.shard(vector_of(operator)))
            found = compiled(operator, tree)
            assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(found))
            close(flat(operator, found), expected)
            close(product(operator, vector_of(operator)), expected)


def check_recomputed_products():
    """Nothing is kept: the product goes over the data anew."""
    _curvature.CACHE_BYTES, kept = 0, _curvature.CACHE_BYTES
    _, operator = both()
    _curvature.CACHE_BYTES = kept
    assert operator.linear_map is None
    assert collectives(compiled_product(operator)) == ["all-reduce"]


def check_convolutions():
    """On CPU the host goes from chunk to chunk."""
    _, *batch = problem()
    make = functools.partial(
        curvature.hessian, convolutional_loss_fn, jax.random.normal(key(), (2, 2, 1, 3))
    )
    alone = make(*map(jnp.asarray, batch))
    expected = product(alone, vector_of(alone))
    batch = [divided(a, mesh_of()) for a in batch]
    assert collectives(compiled_product(make(*batch))) == ["all-reduce"]
    close(product(make(*batch), vector_of(alone)), expected)
    close(product(make(*batch, chunk_size=3), vector_of(alone)), expected)


def check_memory():
    """Each device holds an eighth of the basis, and besides it less than a product takes."""
    params, *batch = problem(width=256)
    mesh, num_rows = mesh_of(), 32
    operator = curvature.hessian(loss_fn, params, *(divided(a, mesh) for a in batch))
    state = curvature.top_eigenpairs_solver(operator, 8, key=key(), max_basis=num_rows).init()
    size, vector = operator.size, operator.space.shard(vector_of(operator))
    padded = operator.space.length
    assert 0 < padded - size < 8 * len(operator.space.shapes)  # less than a column of each leaf
    blocks = state.krylov.basis.blocks
    assert {shard.data.shape[1] for b in blocks for shard in b.addressable_shards} == {padded // 8}
    held = num_rows * padded // 8 * 4

    def others(function, *arguments):
        memory = function.lower(*arguments).compile().memory_analysis()
        whole = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        return whole + memory.output_size_in_bytes - memory.alias_size_in_bytes

    of_product = others(_traced._product, operator, vector)
    image = operator.product(vector)
    advance, begin_search, restart = (
        jax.jit(step, donate_argnums=0)
        for step in (_eigen._advance, _assessment.begin_search, _assessment.restart)
    )
    assert others(advance, state, image) - held < of_product
    assert others(begin_search, state) - held < of_product
    # Compression takes a slab of the columns twice: no more than two shares of a small basis.
    assert others(restart, state) - held < of_product + 2 * held


def check_coupled_examples():
    params, *batch = problem()
    parts = [divided(a, mesh_of()) for a in batch]
    alone = curvature.hessian(coupled_loss_fn, params, *map(jnp.asarray, batch))
    together = curvature.hessian(coupled_loss_fn, params, *parts)
    close(product(together, vector_of(alone)), product(alone, vector_of(alone)))
    with pytest.raises(ValueError, match="must not split"):
        curvature.hessian(coupled_loss_fn, params, *parts, chunk_size=8)


def check_weighted_means():
    params, inputs, targets = problem()
    # The weights are data: what a chunk would number anew belongs to the example.
    numbers = np.arange(NUM_EXAMPLES, dtype=np.float32) % 7 * (targets[:, 0] > 0.2)

    def loss_fn(params, inputs, targets, numbers):
        losses = jnp.mean((model_fn(params, inputs) - targets) ** 2, 1)
        return WeightedMean(jnp.sum(numbers * losses), jnp.sum(numbers))

    plain = lambda params, *batch: loss_fn(params, *batch).sum / loss_fn(params, *batch).weight
    expected = curvature.hessian(plain, params, inputs, targets, numbers)
    batch = [divided(array, mesh_of()) for array in (inputs, targets, numbers)]
    sizes = [slice(0, 16), slice(16, 48), slice(48, 64)]
    source = [
        tuple(divided(array[part], mesh_of()) for array in (inputs, targets, numbers))
        for part in sizes
    ]
    operators = [curvature.hessian(loss_fn, params, *batch, chunk_size=c) for c in (None, 2, 3)]
    operators.append(curvature.stream(curvature.hessian, loss_fn, params, source))
    for operator in operators:
        vector = vector_of(expected)
        close(product(operator, vector), product(expected, vector))
    of_predictions = functools.partial(
        curvature.gauss_newton, model_fn, lambda o, y: jnp.mean((o - y) ** 2, 1), params
    )
    expected = of_predictions(inputs, targets, numbers)
    close(product(of_predictions(*batch, chunk_size=3), vector), product(expected, vector))


def check_two_axes():
    """Data along one axis, parameters along the other; the basis along both."""
    params, *batch = problem(width=10)
    mesh = mesh_of((4, 2), ("data", "model"))
    expected = eigenvalues(curvature.hessian(loss_fn, params, *map(jnp.asarray, batch)))
    params = jax.tree.map(np.asarray, params)
    place = lambda leaf: divided(leaf, mesh, *[None] * (leaf.ndim - 1), "model")
    split = jax.tree.map(place, params[:2])
    split.append(jax.tree.map(lambda leaf: divided(leaf, mesh, None), params[2]))
    for chunk_size in (None, 3):
        operator = curvature.hessian(
            loss_fn, split, *(divided(a, mesh) for a in batch), chunk_size=chunk_size
        )
        assert operator.placement.example_axes == ("data",)
        assert operator.space.mesh.size == 8
        close(eigenvalues(operator), expected)


def eigenvalues(operator):
    result = curvature.top_eigenpairs(operator, 3, key=key(), max_basis=12, tol=1e-5)
    assert bool(result.complete)
    return result.values


def check_eigenpairs():
    alone, together = both()
    result = curvature.top_eigenpairs(together, 3, key=key(), max_basis=12, tol=1e-5)
    assert int(result.num_matvecs) > 12  # the basis was compressed
    close(result.values, eigenvalues(alone))
    assert bool(result.complete)
    assert float(result.residual_norms.max()) < 1e-4
    vectors = jax.vmap(lambda tree: alone.matvec(tree))(result.vectors)
    scaled = jax.tree.map(
        lambda leaf: leaf * result.values.reshape(-1, *[1] * (leaf.ndim - 1)), result.vectors
    )
    close(vectors, scaled, 1e-3)


def check_lanczos():
    alone, together = both()
    start, steps = problem()[0], 20
    for accumulation in (None, "compensated"):
        solve = functools.partial(curvature.lanczos, num_steps=steps, accumulation=accumulation)
        runs = [solve(operator, start) for operator in (alone, together)]
        shapes = [jax.tree.map(lambda leaf: leaf.shape, run.basis) for run in runs]
        assert shapes[0] == shapes[1] == jax.tree.map(lambda leaf: (steps, *leaf.shape), start)
        close(runs[1], runs[0], 1e-3)


def check_density():
    alone, together = both()
    found, expected = (
        curvature.spectral_density(operator, key=key(), num_steps=8)
        for operator in (alone, together)
    )
    # These are at rounding level.
    close(found._replace(residual_norms=0), expected._replace(residual_norms=0), 1e-4)
    state = curvature.spectral_density_solver(together, key=key(), num_steps=8).init()
    (block,) = {shard.data.shape for shard in state.basis.blocks[0].addressable_shards}
    assert block[1] == together.space.length // 8


def check_trace_and_diagonal():
    alone, together = both()
    for method in ("hutchinson", "hutch++"):
        for estimate in (curvature.trace, curvature.diagonal):
            run = lambda operator: estimate(operator, key=key(), num_matvecs=12, method=method)  # noqa: B023
            close(run(together), run(alone), 1e-4)
    solver = curvature.trace_solver(together, key=key(), num_matvecs=12, method="hutch++")
    state = solver.init()
    assert {shard.data.shape for shard in state.rows.addressable_shards} == {
        (4, together.space.length // 8)
    }


def check_solves():
    """Preconditioned systems, as influence solves them."""
    alone, together = both(OPERATORS["gauss_newton"])
    params, *batch = problem()

    def found(operator, *batch):
        norm = operator.space.norm(operator.space.ravel(params))
        one = jax.tree.map(lambda leaf: leaf[None] / norm, params)
        known = {"values": jnp.full(1, 2.0), "vectors": one, "converged": jnp.full(1, True)}
        pairs = curvature.EigenResult(**dict.fromkeys(curvature.EigenResult._fields) | known)
        preconditioner = curvature.low_rank_preconditioner(operator, pairs, damping=0.1)
        influence = diagnostics.influence(
            loss_fn, params, batch, tuple(array[:2] for array in problem()[1:]), damping=0.1,
            operator=operator, preconditioner=preconditioner,
        )  # fmt: skip
        assert bool(jnp.all(influence.converged))
        return influence.value

    parts = (divided(array, mesh_of()) for array in batch)
    close(found(together, *parts), found(alone, *map(jnp.asarray, batch)), 2e-3)


def check_inside_jit():
    alone, together = both(chunk_size=3)

    @jax.jit
    def values(operator, key):
        return curvature.top_eigenpairs(operator, 2, key=key, max_basis=12).values

    close(values(together, key()), values(alone, key()))
    text = values.lower(together, key()).compile().as_text()
    space = together.space
    assert f"f32[12,{space.length // 8}]" in text
    assert not {f"f32[12,{space.length}]", f"f32[12,{space.size}]"} & set(text.split("{"))


def check_from_matvec():
    matrix = np.diag(np.arange(21, dtype=np.float32))
    product_of = lambda matrix, vector: matrix @ vector
    rows = NamedSharding(mesh_of(), PartitionSpec())
    matvec = jax.tree_util.Partial(product_of, jax.device_put(matrix, rows))
    operator = curvature.from_matvec(matvec, jnp.zeros(21))
    assert operator.space == Space.of(jnp.zeros(21), mesh_of())
    assert operator.space.length == 24
    close(eigenvalues(operator), jnp.asarray([20.0, 19.0, 18.0]))


def check_algebra():
    """Of operators that are divided, as on one device."""
    alone, together = both(chunk_size=3)
    scales = jax.tree.map(lambda leaf: 1 + 0.1 * leaf, problem()[0])
    make = lambda a: (2 * a.scaled(scales) + 0.5 * curvature.identity(a.space)).restricted(
        jax.tree.map(lambda leaf: leaf.ndim == 2, scales)
    )
    assert make(together).space.mesh.size == 8
    close(eigenvalues(make(together)), eigenvalues(make(alone)))
    close(make(together).dense(), make(alone).dense(), 1e-4)


def check_rows():
    """What is done to divided rows, deficient ones too, is as on one device."""
    rows = np.random.default_rng(0).normal(size=(5, 21)).astype(np.float32)
    rows[4] = rows[0]
    space = Space.of(jnp.zeros(21), mesh_of())
    parts = space.shard(jnp.asarray(rows))
    close(space.gather(parts), rows)
    basis = np.asarray(space.gather(jax.jit(space.orthonormal)(parts)))
    close(basis @ basis.T, np.eye(5))
    close((rows @ basis.T) @ basis, rows)
    # Joined, they are on each device, also where they would divide evenly.
    even = Space.of(jnp.zeros(24), mesh_of())
    whole = jax.jit(lambda rows: even.gather(2 * even.shard(rows)))(jnp.ones(24))
    assert whole.sharding.is_fully_replicated


def check_compilations():
    """A second product and a second step compile nothing."""
    _, operator = both()
    solver = curvature.top_eigenpairs_solver(operator, 3, key=key(), max_basis=12)
    state = solver.step(solver.init())
    messages, handler = [], logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("jax").addHandler(handler)
    with jax.log_compiles():
        for _ in range(3):
            state = solver.step(state)
        assert not any("XLA compilation" in message for message in messages), messages
        jax.jit(lambda x: x + 1)(jnp.ones(3))
    assert any("XLA compilation" in message for message in messages)


def check_errors():
    params, *batch = problem()
    mesh = mesh_of()
    whole = divided(batch[1], mesh, None)
    with pytest.raises(ValueError, match="divided alike"):
        curvature.hessian(loss_fn, params, divided(batch[0], mesh), whole)


def check_command_line():
    """`--mesh data=8` takes 16 of 23 examples, and the numbers are those of these alone."""
    dataset = make_dataset()
    options = {"width": 2, "depth": 1, "num_eigenvalues": 1, "num_steps": 1}
    settings = SpectrumSettings(**options, mesh="data=8", chunk_size=1)
    model = _network.build_model(settings, dataset)
    subject = _analysis.Subject(model, dataset, _inputs.measure_scaling(dataset, "float32"))
    found = _analysis.operators(subject, settings)["network"]
    assert found.placement.num_parts == 8
    assert found.chunk_size == 1
    settings = SpectrumSettings(**options, curvature_examples=16)
    expected = _analysis.operators(subject, settings)["network"]
    vector = vector_of(found)
    close(product(found, vector), product(expected, vector))


OPTIMIZED = ("products", "recomputed_products", "memory")
QUICK = (
    "eigenpairs", "convolutions", "coupled_examples", "weighted_means", "two_axes", "lanczos",
    "density", "trace_and_diagonal", "solves", "inside_jit", "from_matvec", "algebra", "rows",
    "compilations", "errors", "command_line",
)  # fmt: skip


def check_processes():
    """The single process's answer, which each finds by itself on its own device."""
    for chunk_size in (None, 3):
        alone, together = both(chunk_size=chunk_size)
        assert together.placement.mesh.size == len(jax.devices()) > len(jax.local_devices())
        close(eigenvalues(together), curvature.exact_spectrum(alone)[:-4:-1])


def main(names, devices, processes=1, index=0, port=0):
    quick.share_context()
    jax.config.update("jax_num_cpu_devices", int(devices))
    if int(processes) > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(index))
    for name in names.split(","):
        # What the compiler makes of a product is only told by all of its optimisations.
        jax.config.update("jax_disable_most_optimizations", name not in OPTIMIZED)
        try:
            globals()[f"check_{name}"]()
            print(f"{name} passed", flush=True)
        except Exception:
            print(f"{name} failed\n{traceback.format_exc()}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

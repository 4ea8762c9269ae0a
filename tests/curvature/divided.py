"""Curvature of parameters divided over devices against that on one; a program like `sharded`.

python -m tests.curvature.divided CHECKS DEVICES [PROCESSES INDEX PORT]
"""

import contextlib
import functools
import os
import pathlib
import re
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from regjax import curvature
from regjax._space import Space
from regjax.curvature import _assessment, _eigen
from regjax.curvature._engine import _basis
from regjax.curvature._operators import _traced
from tests.curvature import sharded
from tests.curvature.sharded import close, key, mesh_of

P = PartitionSpec


def divided(array, mesh, *axes):
    sharding = NamedSharding(mesh, P(*axes))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def problem(width=16, num_examples=32):
    """Kernels, a bias of odd size and a scalar."""
    random = np.random.default_rng(0)
    normal = lambda *shape: np.asarray(random.normal(size=shape), np.float32)
    params = {
        "in": {"kernel": normal(6, width) / 3, "bias": normal(width) / 9},
        "mid": {"kernel": normal(width, width) / 4, "scale": np.float32(1.5)},
        "out": {"kernel": normal(width, 3) / 4, "bias": normal(3) / 9},
    }
    return params, normal(num_examples, 6), normal(num_examples, 3)


def model_fn(params, inputs):
    first, mid, last = params["in"], params["mid"], params["out"]
    hidden = jnp.tanh(inputs @ first["kernel"] + first["bias"])
    hidden = jnp.tanh(mid["scale"] * (hidden @ mid["kernel"]))
    return hidden @ last["kernel"].astype(jnp.float32) + last["bias"]


def loss_fn(params, inputs, targets):
    return sharded.output_loss_fn(model_fn(params, inputs), targets)


# Mesh, how kernels and the first bias lie, how the examples do.
def largest(names, leaf, parts):
    """The largest axis that divides evenly, over these axes of the mesh."""
    sizes = [size if size % parts == 0 else 0 for size in leaf.shape]
    if not any(sizes):
        return P()
    return P(*[None] * int(np.argmax(sizes)), names)


def layouts():
    devices = len(jax.devices())
    rows, columns = P("model"), P(None, "model")
    tensor = {"in": {"kernel": columns, "bias": rows}, "mid": {"kernel": rows}}
    tensor["out"] = {"kernel": rows}
    every = {"in": {"kernel": columns, "bias": rows}, "mid": {"kernel": P("data", "model")}}
    every["out"] = {"kernel": P(("model", "data"))}
    line, half = mesh_of(), mesh_of((devices // 2, 2), ("data", "model"))
    fsdp = lambda leaf: largest("data", leaf, devices)
    return {
        "fsdp": (line, fsdp, "data"),
        "tensor": (mesh_of(names=("model",)), tensor, None),
        "tensor_data": (half, tensor, "data"),
        "both": (half, every, "data"),
    }


def spread(name, params, batch):
    """Parameters and batch as a layout says."""
    mesh, specs, axis = layouts()[name]

    def put(path, leaf):
        if callable(specs):
            return divided(leaf, mesh, *specs(leaf))
        spec = specs.get(path[0].key, {}).get(path[1].key, P())
        return divided(leaf, mesh, *spec)

    placed = jax.tree_util.tree_map_with_path(put, params)
    return placed, [divided(array, mesh, axis) for array in batch]


hessian = functools.partial(curvature.hessian, loss_fn)


def pair(name, make=hessian, **options):
    params, *batch = problem()
    alone = make(jax.tree.map(jnp.asarray, params), *map(jnp.asarray, batch), **options)
    params, batch = spread(name, params, batch)
    return alone, make(params, *batch, **options)


def lies_as(tree, params, leading=0):
    for leaf, like in zip(jax.tree.leaves(tree), jax.tree.leaves(params), strict=True):
        spec = P(*[None] * leading, *like.sharding.spec)
        expected = NamedSharding(like.sharding.mesh, spec)
        assert leaf.sharding.is_equivalent_to(expected, leaf.ndim), (leaf.sharding, expected)


def same_product(alone, together):
    """The numbers of one device, as the parameters lie."""
    vector = sharded.vector_of(alone)
    expected = sharded.product(alone, vector)
    assert not np.allclose(expected, 0)
    image = together.matvec(together.space.unravel(together.space.shard(vector)))
    specs = [NamedSharding(together.space.mesh, spec) for spec in together.space.specs]
    for leaf, place in zip(jax.tree.leaves(image), specs, strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    close(sharded.flat(together, image), expected)


def gauss_newton(params, inputs, targets, **options):
    return curvature.gauss_newton(
        model_fn, sharded.output_loss_fn, params, inputs, targets, **options
    )


def fisher(params, inputs, targets, **options):
    del targets
    likelihood = {"key": key(), "likelihood": "normal"}
    return curvature.fisher(model_fn, params, inputs, **likelihood, **options)


def check_products():
    for name, make, chunk_size in (
        ("fsdp", hessian, None),
        ("fsdp", hessian, 3),
        ("tensor", gauss_newton, None),
        ("tensor_data", fisher, 3),
        ("both", hessian, None),
    ):
        same_product(*pair(name, make, chunk_size=chunk_size))


def check_algebra():
    """Parts and sums of operators lie as theirs do."""
    alone, together = pair("both")
    kernels = lambda tree: jax.tree.map(lambda leaf: leaf.ndim == 2, tree)
    scales = jax.tree.map(lambda leaf: 1 + 0.1 * leaf, alone.params)
    make = lambda a: 2 * a.scaled(scales) + 0.5 * curvature.identity(a.space)
    same_product(*(make(a).restricted(kernels(scales)) for a in (alone, together)))
    assert make(together).space == together.space
    same_product(*(curvature.by_block(a)["in"] for a in (alone, together)))
    same_product(*pair("fsdp", wrt=lambda path, leaf: path[0] == "mid"))
    # A matrix given by its product; half precision, of sizes that do not divide.
    half = {"a": jnp.arange(5, dtype=jnp.bfloat16), "b": jnp.ones((16, 3), jnp.bfloat16)}
    place = {"a": NamedSharding(mesh_of(), P()), "b": NamedSharding(mesh_of(), P("data"))}
    double = lambda tree: jax.tree.map(lambda leaf: 2 * leaf, tree)
    alone, together = (
        curvature.from_matvec(double, like) for like in (half, jax.device_put(half, place))
    )
    same_product(alone, together)


def check_places():
    """What somebody put on one device goes where the rest lies."""
    alone, together = pair("fsdp")
    vector = sharded.vector_of(alone)
    tree = alone.space.unravel(vector)
    expected = sharded.product(alone, vector)
    at_home = functools.partial(jax.device_put, device=jax.devices()[0])
    close(sharded.flat(together, together.matvec(at_home(tree))), expected)
    close(together.space.gather(together.space.shard(at_home(vector))), vector)
    rows = jax.tree.map(lambda leaf: leaf[None], at_home(tree))
    close(together.space.gather(together.space.ravel_rows(rows)), vector[None])
    _, batch = spread("fsdp", *problem()[:1], problem()[1:])
    # Tested for examples that the loss couples: another program than any test before it.
    loss = lambda *arguments: 2 * loss_fn(*arguments)
    operator = curvature.hessian(loss, at_home(alone.params), *batch, chunk_size=2)
    close(sharded.flat(operator, operator.matvec(at_home(tree))), 2 * expected)
    jacobian = curvature.jacobian(model_fn, at_home(alone.params), batch[0])
    images = curvature.jacobian(model_fn, alone.params, problem()[1]).matvec(tree)
    close(jacobian.matvec(at_home(tree)), images)
    # Results and states lie as the parameters do, also what begins as zeros.
    images = jax.device_put(images, batch[0].sharding)
    lies_as(
        curvature.jacobian(model_fn, together.params, batch[0]).rmatvec(images), together.params
    )
    state = curvature.solve_solver(together, tree, method="minres").init()
    shape = (1, together.space.length)
    (places,) = {leaf.sharding.spec for leaf in jax.tree.leaves(state) if leaf.shape == shape}
    assert places == P(None, ("data",)), places
    # An operator of explicit axes in somebody's program.
    explicit = mesh_of(kind=jax.sharding.AxisType.Explicit)
    batch = [jax.device_put(np.asarray(leaf), NamedSharding(explicit, P("data"))) for leaf in batch]
    operator = curvature.hessian(loss_fn, alone.params, *batch)
    product = jax.jit(lambda operator, tree: operator.matvec(tree))
    close(sharded.flat(operator, product(operator, tree)), expected)


def check_draws():
    """Those of one device, each device its own columns; what fills up is zero and stays so."""
    mesh = mesh_of((4, 2), ("data", "model"))
    shapes = {
        "a": (8, 6),
        "b": (5, 4),
        "c": (3,),
        "d": (),
        "e": (16, 3),
        "g": (2, 8, 3),
        "z": (0, 4),
    }
    specs = {
        "a": P("data", "model"), "b": P(None, "model"), "c": P(), "d": P(),
        "e": P(("model", "data")), "g": P("model", "data"), "z": P(),
    }  # fmt: skip
    tree = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    place = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    alone, together = Space.of(tree), Space.of(jax.device_put(tree, place), mesh)
    for seed in (key(), jax.random.key(0, impl="rbg")):
        for draw in (lambda space: space.normal(seed, 3), lambda space: space.signs(seed, 2)):  # noqa: B023
            rows = draw(together)
            np.testing.assert_array_equal(together.gather(rows), draw(alone))
            assert int(jnp.sum(rows != 0)) == draw(alone).size
    np.testing.assert_array_equal(together.shard(draw(alone)), rows)
    np.testing.assert_array_equal(together.ravel_rows(together.unravel_rows(rows)), rows)
    rows = together.normal(key(), 4).at[3].set(together.normal(key(), 4)[0])
    basis = np.asarray(jax.jit(together.orthonormal)(rows))
    close(basis @ basis.T, np.eye(4))
    close(basis @ np.asarray(rows).T @ np.asarray(rows) @ basis.T, basis @ rows.T @ rows @ basis.T)
    whole = np.asarray(together.gather(jnp.asarray(basis)))
    close(whole @ whole.T, np.eye(4))
    # Divided leaves go in and out without a message.
    own = Space.of({"a": jax.device_put(tree["a"], place["a"])}, mesh)
    vector = own.normal(key())
    there_and_back = jax.jit(lambda v: own.ravel(jax.tree.map(jnp.sin, own.unravel(v))))
    assert not messages(there_and_back.lower(vector).compile())


def check_solvers():
    alone, together = pair("both")
    run = lambda operator, key: curvature.lanczos(operator, start, 4, key=key)
    start = alone.params
    for solve in (
        run,
        functools.partial(curvature.top_eigenpairs, k=2, max_basis=12, tol=1e-5),
        functools.partial(curvature.spectral_density, num_steps=6),
        functools.partial(curvature.diagonal, num_matvecs=9, method="hutch++"),
    ):
        found, expected = (solve(operator, key=key()) for operator in (together, alone))
        if hasattr(found, "residual"):
            lies_as(found.basis, together.params, 1)
            lies_as(found.residual, together.params)
        if hasattr(found, "vectors"):
            lies_as(found.vectors, together.params, 1)
            sign = functools.partial(jax.tree.map, jnp.abs)
            found, expected = ((r.values, sign(r.vectors)) for r in (found, expected))
        elif hasattr(found, "residual_norms"):
            found, expected = (r._replace(residual_norms=0) for r in (found, expected))
        close(found, expected, 1e-3)


def messages(compiled):
    """Sizes of what the devices say to each other, in scalars."""
    names = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    sent = re.findall(rf"= (.*?) (?:{names})(?:-start)?\(", compiled.as_text())
    shapes = [re.findall(r"\[([0-9,]*)\]", shape) for shape in sent]
    size = lambda shape: int(np.prod([int(n) for n in shape.split(",") if n] or [1]))
    return [sum(map(size, found)) for found in shapes]


def held(compiled):
    """Bytes on a device while a program runs."""
    memory = compiled.memory_analysis()
    whole = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return whole + memory.output_size_in_bytes - memory.alias_size_in_bytes


def check_bars():
    """What a Lanczos step of divided parameters takes of a device, and what it sends."""
    for name in ("fsdp", "tensor"):
        params, *batch = problem(width=512, num_examples=8)
        params, batch = spread(name, params, batch)
        operator = curvature.hessian(loss_fn, params, *batch)
        space, most = operator.space, 40
        assert space.length - space.size < 8 * len(space.shapes)
        product = _traced._product.lower(operator, space.ravel(params)).compile()
        place = jax.tree.map(lambda leaf: leaf.sharding, params)
        gradient = jax.jit(jax.grad(loss_fn), out_shardings=place).lower(params, *batch).compile()
        # What each device has of the parameters is gathered, and activations of few examples.
        more = sum(messages(product)) - 2 * sum(messages(gradient))
        assert more < space.size / 50, (name, messages(product), messages(gradient))
        if name == "tensor":  # what follows is the same of all vectors
            return
        solver = curvature.top_eigenpairs_solver(operator, 8, key=key(), max_basis=most)
        state = solver.init()
        vector = space.length // 8 * 4
        blocks = [b.addressable_data(0).nbytes for b in state.krylov.basis.blocks]
        assert blocks == [8 * vector] * (most // 8)
        image = solver.vectors(state)  # lies as one does
        for step, arguments, own in (
            (_eigen._advance, (state, image), vector),
            (_assessment.begin_search, (state,), 0),
            (_assessment.restart, (state,), 0),
        ):
            compiled = jax.jit(step, donate_argnums=0).lower(*arguments).compile()
            assert held(compiled) - own <= (most + 8) * vector, (name, step)
            # Inner products with the rows, and scalars.
            assert max(messages(compiled), default=0) <= most, (name, messages(compiled))
        start = jax.jit(lambda: space.normal(key())).lower().compile()  # noqa: B023
        assert held(start) <= 8 * vector
        assert not messages(start)
        # Rows that are returned lie as the parameters do, beside the basis and nothing else.
        compiled = _basis.to_trees.lower(state.krylov.basis, most).compile()
        assert held(compiled) <= (2 * most + 1) * vector
        # Two leaves are replicated, each smaller than eight slices.
        assert sum(messages(compiled)) <= most * 2 * 8
        # In somebody's own program, at parameters of which it knows nothing.
        rows = 6
        run = jax.jit(lambda operator, here: curvature.lanczos(operator.at(here), here, rows))  # noqa: B023
        compiled = run.lower(operator, params).compile()
        assert held(compiled) <= held(product) + (2 * rows + 8) * vector
        estimate = curvature.memory_estimate(solver)
        on_one = [leaf.addressable_data(0) for leaf in jax.tree.leaves(state)]
        assert estimate.state_bytes == space.num_bytes(on_one)
        assert estimate.update_bytes < 12 * vector


class Stopped(Exception):
    pass


def until(steps, solve, **options):
    """The step at which a run begins that ends after so many."""
    seen = []

    def callback(count, *_):
        seen.append(count)
        if count == steps:
            raise Stopped

    with contextlib.suppress(Stopped):
        solve(callback=callback, **options)
    return seen[0]


def check_checkpoints():
    """Each process writes its own shards; they go on from what all of them have."""
    folder = pathlib.Path(os.environ["REGJAX_TEST_FOLDER"])
    checkpoint = curvature.Checkpoint(folder / "a", every=3)
    params, *batch = problem()
    params, batch = spread("both", params, batch)
    operator = curvature.hessian(loss_fn, params, *batch)
    solve = functools.partial(
        curvature.top_eigenpairs, operator, 2, key=key(), max_basis=7, tol=1e-5
    )
    own = lambda result: [
        np.asarray(shard.data).tobytes()
        for leaf in jax.tree.leaves((result.values, result.vectors))
        for shard in leaf.addressable_shards
    ]
    expected = own(solve())
    assert until(11, solve, checkpoint=checkpoint) == 1
    count, index = jax.process_count(), jax.process_index()
    mine = folder / "a" / ("" if count == 1 else f"process-{index}-of-{count}")
    files = sorted(mine.glob("*.npz"))
    assert [path.name[:8] for path in files][-2:] == ["00000006", "00000009"]
    # A process that was killed while it wrote has one state less.
    if index == 0:
        files[-1].write_bytes(files[-1].read_bytes()[:-100])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert until(8, solve, checkpoint=checkpoint) == 7
    assert own(solve(checkpoint=checkpoint)) == expected
    # As many processes, and the same division, or none.
    params, *batch = problem()
    params, batch = spread("tensor_data", params, batch)
    other = curvature.hessian(loss_fn, params, *batch)
    with pytest.raises(ValueError, match=r"`shardings of the parameters` must be .*, got "):
        curvature.top_eigenpairs(other, 2, key=key(), max_basis=7, tol=1e-5, checkpoint=checkpoint)
    if index == 0:
        (folder / "a" / "process-0-of-9").mkdir()
        (folder / "a" / "process-0-of-9" / files[0].name).touch()
    multihost_utils.sync_global_devices("made")
    with pytest.raises(ValueError, match=r"`number of processes` must be ., got 9"):
        solve(checkpoint=checkpoint)


OPTIMIZED = ("bars",)
QUICK = ("products", "algebra", "places", "draws", "solvers", "checkpoints")


def check_processes():
    """Products of several processes, and what they lie as."""
    same = pair("both")
    vector = sharded.vector_of(same[0])
    found = sharded.product(same[1], vector)
    close(found.addressable_data(0), sharded.product(same[0], vector))
    close(sharded.eigenvalues(same[1]), sharded.eigenvalues(same[0]))


def main(names, *arguments):
    sharded.OPTIMIZED = OPTIMIZED
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            setattr(sharded, name, check)
    sharded.main(names, *arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])

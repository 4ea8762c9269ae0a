"""Curvature of parameters divided over devices against that on one; a program like `sharded`.

python -m tests.curvature.divided CHECKS DEVICES [PROCESSES INDEX PORT]
"""

import contextlib
import functools
import os
import pathlib
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from regjax import curvature
from tests.curvature import sharded
from tests.curvature.sharded import close, key, mesh_of

P = PartitionSpec


def divided(array, mesh, *axes):
    sharding = NamedSharding(mesh, P(*axes))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def problem():
    """Kernels, a bias of odd size, a scalar, and a layer in half precision."""
    random = np.random.default_rng(0)
    normal = lambda *shape: np.asarray(random.normal(size=shape), np.float32)
    params = {
        "in": {"kernel": normal(6, 16) / 3, "bias": normal(16) / 9},
        "mid": {"kernel": normal(16, 16) / 4, "scale": np.float32(1.5)},
        "out": {"kernel": normal(16, 3) / 4, "bias": normal(3) / 9},
    }
    return params, normal(32, 6), normal(32, 3)


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


def check_products():
    for name in layouts():
        for chunk_size in (None, 3):
            alone, together = pair(name, chunk_size=chunk_size)
            vector = sharded.vector_of(alone)
            expected = sharded.product(alone, vector)
            close(sharded.product(together, vector), expected)
            image = together.matvec(together.space.unravel(together.space.shard(vector)))
            lies_as(image, together.params)
            close(sharded.flat(together, image), expected)


def check_solvers():
    for name in ("both", "fsdp"):
        alone, together = pair(name)
        for solve in (
            functools.partial(curvature.top_eigenpairs, k=2, max_basis=12, tol=1e-5),
            functools.partial(curvature.spectral_density, num_steps=6),
            functools.partial(curvature.trace, num_matvecs=9),
            functools.partial(curvature.diagonal, num_matvecs=9, method="hutch++"),
        ):
            found, expected = (solve(operator, key=key()) for operator in (together, alone))
            if hasattr(found, "vectors"):
                lies_as(found.vectors, together.params, 1)
                sign = lambda tree: jax.tree.map(jnp.abs, tree)
                found, expected = ((r.values, sign(r.vectors)) for r in (found, expected))
            elif hasattr(found, "residual_norms"):
                found, expected = (r._replace(residual_norms=0) for r in (found, expected))
            close(found, expected, 1e-3)


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


def main(names, *arguments):
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            setattr(sharded, name, check)
    sharded.main(names, *arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])

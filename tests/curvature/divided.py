"""Curvature of parameters divided over devices against that on one; a program like `sharded`.

python -m tests.curvature.divided CHECKS DEVICES [PROCESSES INDEX PORT]
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from regjax import curvature
from tests.curvature import sharded
from tests.curvature.sharded import close, divided, key, mesh_of

P = PartitionSpec


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
            return divided(leaf, mesh, *(specs(leaf) or (None,)))
        spec = specs.get(path[0].key, {}).get(path[1].key, P())
        return divided(leaf, mesh, *(spec or (None,)))

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


def main(names, *arguments):
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            setattr(sharded, name, check)
    sharded.main(names, *arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Curvature of a language model's masked loss in every way of going over the data; a program.

    python -m tests.curvature.decoder_runs [all]

On four virtual devices, in float64. The oracle is the dense Hessian of the network with its layers
apart, on the whole batch at once. Each line says a combination and how far its matrix, the spectrum
of it and the ends that a solver finds are from the oracle's, relative to the largest |eigenvalue|.
"""

import functools
import itertools
import sys
import traceback

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import regjax
from examples import decoder
from regjax import curvature
from tests import quick

LAYERS = ("scanned", "apart")
WAYS = ("whole", "chunks of 3", "chunks of 4", "stream of 4")
PLACES = ("one device", "data on 4", "parameters on 4", "data and explicit axes on 4")
ALL = [", ".join(parts) for parts in itertools.product(LAYERS, WAYS, PLACES)]
# A program is compiled for each, ten seconds long: the tests run these.
NAMES = [
    *(f"scanned, {way}, {place}" for way in ("whole", "chunks of 3") for place in PLACES[:2]),
    "scanned, stream of 4, data on 4",
    "apart, stream of 5, one device",
    "scanned, chunks of 4, parameters on 4",
    "scanned, chunks of 4, data and explicit axes on 4",
]
SOLVED = ("scanned, chunks of 3, data on 4",)


def loss_fn(module, params, tokens, targets, mask):
    logits = module.apply({"params": params}, tokens)
    return regjax.WeightedMean(*decoder.masked_nll(logits, targets, mask))


@functools.cache
def subject(layers):
    """(module, params in float64); the two networks compute one function."""
    scanned = decoder.Decoder()
    params = jax.jit(scanned.init)(jax.random.key(0), decoder.texts()[0])["params"]
    # A step down, so that the norms' scales are not all one.
    params = jax.tree.map(
        lambda leaf: jnp.asarray(
            np.asarray(leaf, np.float64) + 0.1 * np.cos(np.arange(leaf.size)).reshape(leaf.shape)
        ),
        params,
    )
    if layers == "scanned":
        return scanned, params
    return decoder.Decoder(scan=False), decoder.unrolled(params)


def oracle():
    """(dense Hessian, order of the flat parameters of the scanned network in it)."""
    module, params = subject("apart")
    flat, unravel = ravel_pytree(params)
    batch = decoder.texts()

    def mean(vector):
        total, count = decoder.masked_nll(
            module.apply({"params": unravel(vector)}, batch[0]), *batch[1:]
        )
        return total / count

    hessian = np.asarray(jax.jit(jax.hessian(mean))(flat))
    numbers = unravel(jnp.arange(float(flat.size)))
    stacked = {k: v for k, v in numbers.items() if not k.startswith("layer_")}
    layers = [numbers[f"layer_{i}"] for i in range(decoder.Decoder.num_layers)]
    stacked["layers"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    return hessian, np.asarray(ravel_pytree(stacked)[0], int)


def placed(tree, place, spec_of):
    if place == "one device":
        return tree
    kind = AxisType.Explicit if "explicit" in place else AxisType.Auto
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    return jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, spec_of(leaf))), tree)


def fsdp(leaf):
    """The first axis that four divides lies on the devices."""
    for axis, size in enumerate(leaf.shape):
        if size % 4 == 0:
            return PartitionSpec(*[None] * axis, "data")
    return PartitionSpec()


def operator(layers, way, place):
    module, params = subject(layers)
    loss = functools.partial(loss_fn, module)
    if way != "chunks of 3":  # whether the loss may be split is looked at there, for seconds
        loss = regjax.assume_separable(loss)
    if place == "parameters on 4":
        params = placed(params, place, fsdp)
    divide = lambda batch: placed(batch, place, lambda leaf: PartitionSpec("data"))
    batch = decoder.texts()
    kind, _, size = way.partition(" of ")
    if kind == "stream":
        cuts = range(0, len(batch[0]), int(size))
        parts = [divide(tuple(a[i : i + int(size)] for a in batch)) for i in cuts]
        return curvature.stream(curvature.hessian, loss, params, parts)
    chunk_size = int(size) if size else None
    return curvature.hessian(loss, params, *divide(batch), chunk_size=chunk_size)


def distance(name, expected, order):
    layers, way, place = name.split(", ", 2)
    found = operator(layers, way, place)
    if layers == "scanned":
        expected = expected[np.ix_(order, order)]
    values = np.linalg.eigvalsh(expected)
    size = np.abs(values).max()
    dense = np.asarray(found.dense())
    differences = [
        np.abs(dense - expected).max(),
        np.abs(np.linalg.eigvalsh(dense) - values).max(),
    ]
    if name in SOLVED:
        ends = curvature.top_eigenpairs(found, 2, key=jax.random.key(1), tol=1e-9, which="BE")
        differences.append(np.abs(np.sort(ends.values) - values[[0, -1]]).max())
    return max(differences) / size


def main():
    quick.share_context()
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_enable_x64", True)
    expected, order = oracle()
    for name in ALL if sys.argv[1:] == ["all"] else NAMES:
        try:
            print(f"{name}: {distance(name, expected, order):.1e}", flush=True)
        except Exception:
            print(f"{name}: failed\n{traceback.format_exc()}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

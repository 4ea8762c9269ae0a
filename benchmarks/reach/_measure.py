"""The same programs run on the machine at hand, beside what their compiler says of them."""

import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.reach import _chips
from benchmarks.reach._programs import Program

_ROUNDS = 7
# Weights of about the size of a trained network's; seconds do not depend on it.
_SCALE = 0.02


def devices_here() -> tuple[str | None, int]:
    """The name of the chip of this machine, if its rates are known, and how many there are.

    Another process is asked: one that sees a GPU keeps most of its memory.
    """
    ask = "import jax; print(jax.device_count(), jax.devices()[0].device_kind)"
    answer = subprocess.run(
        [sys.executable, "-c", ask], capture_output=True, text=True, check=True
    ).stdout.splitlines()[-1]
    number, _, kind = answer.partition(" ")
    return next((name for name in _chips.CHIPS if name in kind), None), int(number)


def measured(program: Program, compiled: Any) -> dict[str, Any]:
    """Seconds and peak memory of a program on real arrays.

    Args:
      program: whose arguments lie on the devices of this machine.
      compiled: the same, compiled for them.

    Returns:
      The median of the seconds of a call and their range, the bytes that were in use at most where
      the device tells, and what device it is.
    """
    arguments = _arrays(program)
    seconds = []
    for _ in range(_ROUNDS + 1):  # the first one warms up
        start = time.perf_counter()
        outputs = jax.block_until_ready(compiled(*arguments))
        seconds.append(time.perf_counter() - start)
        for place in program.donated:  # its memory is that of the result now
            arguments[place] = outputs
        del outputs
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "seconds": statistics.median(seconds[1:]),
        "fastest": min(seconds[1:]),
        "slowest": max(seconds[1:]),
        "peak_bytes": stats.get("peak_bytes_in_use"),
    }


def _arrays(program: Program) -> list[Any]:
    """Arguments: random numbers, and a solver's state as it begins."""
    arguments = [_random(argument) for argument in program.arguments]
    if program.init is not None:
        (place,) = program.donated
        arguments[place] = None  # its memory first
        like = jax.tree.map(lambda leaf: leaf.sharding, program.arguments[place])
        arguments[place] = jax.jit(program.init, out_shardings=like)(*arguments[:place])
    return arguments


def _random(tree: Any) -> Any:
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(treedef, [_leaf(leaf, i) for i, leaf in enumerate(leaves)])


def _leaf(leaf: jax.ShapeDtypeStruct, number: int) -> Any:
    key = jax.random.key(number)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(key, leaf.shape)
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        make = lambda: _SCALE * jax.random.normal(key, leaf.shape, leaf.dtype)
    else:
        make = lambda: jax.random.randint(key, leaf.shape, 0, 2).astype(leaf.dtype)
    return jax.jit(make, out_shardings=leaf.sharding)()

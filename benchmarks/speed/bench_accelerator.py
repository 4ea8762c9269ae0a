"""Products, a SAM step and Lanczos on networks of a size that an accelerator is for.

Each beside the arithmetic that it needs and what this device reaches in the same process. Without
an accelerator the same code runs on small networks, as a test of itself.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks._timing import Case
from benchmarks.speed import _programs, _rates
from regjax import curvature
from regjax.curvature._engine import _basis
from regjax.curvature._krylov import Krylov

_TOLERANCE = 1e-4
# Of the device's memory, for what the compiler adds and for fragments of freed memory.
_USABLE = 0.9
# Beside the rows of the steps: those that fill up a block, and the vectors of a step.
_SPARE_ROWS = 24


class _Sizes(NamedTuple):
    """How large everything is.

    Attributes:
      resnet: arguments of `_programs.resnet`.
      gpt: arguments of `_programs.gpt`.
      num_steps: of Lanczos, if the memory is enough.
      order: of the matrices that are multiplied.
      num_bytes: of the array that is copied.
    """

    resnet: Mapping[str, Any]
    gpt: Mapping[str, Any]
    num_steps: int
    order: int
    num_bytes: int


_SIZES = {
    "smoke": _Sizes(
        resnet={"num_examples": 4, "image_size": 8, "widths": (8,)},
        gpt={"num_examples": 2, "context": 16, "width": 16, "depth": 1},
        num_steps=10,
        order=256,
        num_bytes=2**24,
    ),
    "cpu": _Sizes(
        resnet={"num_examples": 64, "image_size": 16, "widths": (16, 32, 64, 64)},
        gpt={"num_examples": 16, "remat": True},
        num_steps=20,
        order=1024,
        num_bytes=2**28,
    ),
    # ResNet-18 as for images of 32 x 32 (11.2 million parameters), and the smallest GPT-2 with its
    # 50,257 tokens filled up to a multiple of 64 (124.5 million).
    "gpu": _Sizes(
        resnet={
            "num_examples": 512,
            "image_size": 32,
            "widths": (64, 64, 128, 128, 256, 256, 512, 512),
        },
        gpt={
            "num_examples": 4,
            "num_tokens": 50_304,
            "context": 1024,
            "width": 768,
            "depth": 12,
            "num_heads": 12,
            "remat": True,
        },
        num_steps=80,
        order=8192,
        num_bytes=2**31,
    ),
}


def cases(preset: str) -> dict[str, Callable[[], Case]]:
    """The cases of a preset by name."""
    sizes = _SIZES[preset]
    problems = {
        "resnet": functools.partial(_programs.resnet, **sizes.resnet),
        "gpt": functools.partial(_programs.gpt, **sizes.gpt),
    }
    found: dict[str, Callable[[], Case]] = {}
    for name, problem in problems.items():
        found[f"products_{name}"] = functools.partial(_products, problem, sizes)
        found[f"lanczos_{name}"] = functools.partial(_lanczos, problem, sizes)
    return found


def _products(build: Callable[[], _programs.Problem], sizes: _Sizes) -> Case:
    """Gradient, products and a SAM step, all at one precision, over the gradient."""
    problem = build()
    programs = _programs.products(problem, with_step=True)
    error = _programs.Oracle(problem, programs).error

    def facts(answers: Any, seconds: Mapping[str, float]) -> dict[str, float]:
        del answers
        rates = _rates.measured(sizes.order, sizes.num_bytes)
        shares = {
            f"{label}: share of the matmul rate": program.operations / seconds[label] / rates.matmul
            for label, program in programs.items()
        }
        total = programs[_programs.GRADIENT].operations
        return {
            **_of_device(rates),
            "gradient: operations, 1e9": total / 1e9,
            **shares,
            **_programs.over_gradient(programs, seconds),
        }

    return Case(
        candidates=programs, error=error, tolerance=_TOLERANCE, sizes=_named(problem), facts=facts
    )


def _lanczos(build: Callable[[], _programs.Problem], sizes: _Sizes) -> Case:
    """Steps of Lanczos on the Hessian over as many bare products; beside the basis' traffic."""
    problem = build()
    operator = curvature.hessian(problem.loss_fn, problem.params, problem.x, problem.y)
    start, row = problem.vector, operator.shape[0] * operator.dtype.itemsize
    num_steps, limit = sizes.num_steps, (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is not None:
        needed = curvature.memory_estimate(curvature.lanczos_solver(operator, start, num_steps))
        num_steps = steps_that_fit(needed, row, limit, num_steps)
    vector = jax.flatten_util.ravel_pytree(start)[0]

    def products() -> jax.Array:
        for _ in range(num_steps):
            image = jax.block_until_ready(operator.product(vector))
        return image

    def lanczos() -> Any:
        # `curvature.lanczos` itself ends with a copy of the basis, half of an accelerator's memory.
        solver = curvature.lanczos_solver(operator, start, num_steps)
        state = solver.init()
        for _ in range(num_steps):
            state = jax.block_until_ready(solver.step(state))
        return probe(state, jax.random.normal(jax.random.key(3), (num_steps,)))

    def error(label: str, answer: Any) -> float:
        if label == "products":
            return 0.0 if bool(jnp.all(jnp.isfinite(answer))) else 1.0
        return probe_error(operator, answer)

    def facts(answers: Any, seconds: Mapping[str, float]) -> dict[str, float]:
        del answers
        rates = _rates.measured(sizes.order, sizes.num_bytes)
        # Step k reads its k rows twice, once for the coefficients and once to take them out.
        traffic = row * num_steps * (num_steps + 1) / rates.copy
        return {
            **_of_device(rates),
            "steps asked for": sizes.num_steps,
            "basis, GB": num_steps * row / 1e9,
            "basis traffic at the copy rate over products": traffic / seconds["products"],
            "beyond the products over that traffic": (seconds["lanczos"] - seconds["products"])
            / traffic,
        }

    return Case(
        candidates={"products": products, "lanczos": lanczos},
        error=error,
        tolerance=_TOLERANCE,
        sizes={**_named(problem), "steps": num_steps},
        facts=facts,
    )


class Probe(NamedTuple):
    """A Lanczos factorisation seen through random weights z, without its basis.

    Attributes:
      weights: z (m,).
      vector: Q' z (n,).
      image: Q' T z + residual z_m (n,), which is A Q' z.
    """

    weights: jax.Array
    vector: jax.Array
    image: jax.Array


@jax.jit
def probe(state: Krylov, weights: jax.Array) -> Probe:
    """Two passes over the basis."""
    projected = state.unscaled(state.projected[: weights.size, : weights.size])
    betas = jnp.diagonal(projected, 1)
    moved = jnp.diagonal(projected) * weights
    moved = moved.at[:-1].add(betas * weights[1:])
    moved = moved.at[1:].add(betas * weights[:-1])
    both = (
        jnp.zeros((state.basis.num_rows, 2)).at[: weights.size].set(jnp.stack([weights, moved], 1))
    )
    with jax.default_matmul_precision(_programs.PRECISION):
        vector, image = _basis.combine(state.basis, both)
    return Probe(
        weights, vector, image + weights[-1] * state.unscaled(state.beta) * state.direction
    )


def probe_error(operator: curvature.Operator, probe: Probe) -> float:
    """Of A Q' z = Q' T z + residual z_m and of |Q' z| = |z|, the larger relative error."""
    image = operator.product(probe.vector)
    relation = jnp.linalg.norm(image - probe.image) / jnp.linalg.norm(image)
    length = jnp.linalg.norm(probe.vector) / jnp.linalg.norm(probe.weights)
    return float(jnp.maximum(relation, abs(length - 1)))


def steps_that_fit(needed: curvature.MemoryResult, row: int, limit: int, num_steps: int) -> int:
    """As many steps as asked for, or as a device has room for, without a copy of the basis.

    Args:
      needed: of `curvature.lanczos` with `num_steps`.
      row: bytes of a row of the basis.
      limit: bytes of the device.
      num_steps: asked for.

    Returns:
      The number of steps, one at least.
    """
    room = int(_USABLE * limit) - needed.operator_bytes - needed.product_bytes
    if needed.state_bytes <= room:
        return num_steps
    return max(1, min(num_steps, room // row - _SPARE_ROWS))


def _of_device(rates: _rates.Rates) -> dict[str, float]:
    return {
        "matmul rate, 1e9/s": rates.matmul / 1e9,
        "matmul rate at default precision, 1e9/s": rates.default_matmul / 1e9,
        "copy rate, GB/s": rates.copy / 1e9,
    }


def _named(problem: _programs.Problem) -> dict[str, Any]:
    return {
        "parameters": problem.size,
        "inputs": "x".join(map(str, problem.x.shape)),
        "dtype": "float32",
        "precision": _programs.PRECISION,
    }

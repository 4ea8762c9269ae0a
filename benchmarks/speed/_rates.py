"""What a device reaches, measured, and the arithmetic that a program asks of it, counted."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import partial_eval

from regjax import _jaxprs

_ROUNDS = 5


class Rates(NamedTuple):
    """What the default device reached, the best of five tries.

    Attributes:
      matmul: operations a second of a float32 matrix product at precision "highest", at which
        curvature products run; a multiplication and an addition count as two.
      default_matmul: the same at JAX's default precision: on recent GPUs TF32.
      copy: bytes a second, those read and those written together, of a copy into memory that is
        there already. New memory is much slower on CPU, where the system clears it first.
    """

    matmul: float
    default_matmul: float
    copy: float


@functools.cache
def measured(order: int, num_bytes: int) -> Rates:
    """The rates of this device, measured once in a process.

    Args:
      order: rows and columns of the matrices.
      num_bytes: of the array that is copied; several times what the caches hold.

    Returns:
      The `Rates`.
    """
    return Rates(_matmul_rate(order, "highest"), _matmul_rate(order, None), _copy_rate(num_bytes))


def _matmul_rate(order: int, precision: str | None) -> float:
    one, other = jax.random.normal(jax.random.key(0), (2, order, order))
    multiply = jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision))
    return 2 * order**3 / _best_seconds(lambda: multiply(one, other))


def _copy_rate(num_bytes: int) -> float:
    source = jnp.ones(num_bytes // 4)
    target = jnp.zeros_like(source)
    # The donated array is not read: it is where the result goes.
    copy = jax.jit(lambda source, target: -source, donate_argnums=1, keep_unused=True)

    def run() -> jax.Array:
        nonlocal target
        target = copy(source, target)
        return target

    return 2 * source.nbytes / _best_seconds(run)


def _best_seconds(run: Callable[[], Any]) -> float:
    jax.block_until_ready(run())  # compiles
    seconds = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def num_operations(closed: Any) -> int:
    """Multiplications and additions in the matrix products and convolutions of a jaxpr.

    Counted on what was traced, less what no output needs: the compiler's own account is missing on
    GPUs before and wrong there after compilation (library calls), and takes a loop for one turn.
    Products with padding and with the zeros between dilated entries are not counted. Everything
    else is not either: sums, activations, softmax and norms cost memory traffic.

    Args:
      closed: `jax.jit(f).trace(...).jaxpr` or `jax.make_jaxpr(f)(...)`.

    Returns:
      Their number; a product (m, k) times (k, n) counts 2 m k n.

    Raises:
      NotImplementedError: products in a `while` loop, whose turns are not known.
    """
    needed, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return _count(needed)


def _count(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            total += _of_product(equation)
        elif name == "conv_general_dilated":
            total += _of_convolution(equation)
        inner = [_count(each) for each in _jaxprs.inner_jaxprs(equation)]
        if name == "while" and any(inner):
            raise NotImplementedError("`jaxpr` must have no products in a while loop, got one.")
        if name == "cond":
            total += max(inner)
        else:
            total += sum(inner) * equation.params.get("length", 1)
    return total


def _of_product(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    summed = int(np.prod([shape[axis] for axis in contracted], dtype=np.int64))
    return 2 * equation.outvars[0].aval.size * summed


def _of_convolution(equation: Any) -> int:
    options = equation.params
    numbers = options["dimension_numbers"]
    inputs, kernel = (variable.aval.shape for variable in equation.invars)
    outputs = equation.outvars[0].aval.shape
    total = 2 * outputs[numbers.out_spec[0]] * outputs[numbers.out_spec[1]]
    # The kernel holds the input features of one group alone.
    total *= kernel[numbers.rhs_spec[1]]
    axes = zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:], strict=True)
    for i, (of_input, of_kernel, of_output) in enumerate(axes):
        place = np.arange(outputs[of_output])[:, None] * options["window_strides"][i]
        place = place - options["padding"][i][0]
        place = place + np.arange(kernel[of_kernel]) * options["rhs_dilation"][i]
        spread = options["lhs_dilation"][i]
        is_inside = (place >= 0) & (place <= (inputs[of_input] - 1) * spread)
        total *= int(np.sum(is_inside & (place % spread == 0)))
    return total

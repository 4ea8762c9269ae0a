"""What a point asks for at least: operations, bytes moved and bytes held.

Of the programs only one product is looked at, for its multiplications. Rates of the machine turn
operations and bytes into seconds; how the sum grows depends little on them.
"""

from typing import Any

import jax

from benchmarks.growth._points import SIDE, Point, shapes_of
from benchmarks.speed import _rates
from benchmarks.speed._problems import Problem
from regjax import _jaxprs

_ORDER, _NUM_BYTES = 1024, 2**26
_WORD = 4  # bytes of a float32


def arithmetic(point: Point) -> dict[str, float]:
    """Operations, bytes moved, the seconds of both, equations to compile, and bytes held.

    Orthogonalisation reads the rows so far twice in each step, once for the inner products and once
    to subtract; the result reads them all once and writes k vectors. A product reads weights and
    vector and writes its image, and makes all features twice. Held are parameters, examples, the
    rows, the k eigenvectors and three more vectors, and for each feature its value, its tangent and
    the derivative by it; each divided over the devices.
    """
    problem = shapes_of(point)
    product = jax.make_jaxpr(_product)(problem, problem.params)
    steps, row = point.products, _WORD * point.num_parameters
    features = _WORD * point.examples * point.num_units
    operations = steps * _rates.num_operations(product)
    orthogonalisation = row * steps * (steps + 1)
    moved = orthogonalisation + row * (steps + point.k) + steps * (3 * row + 2 * features)
    rates = _rates.measured(_ORDER, _NUM_BYTES)
    examples = _WORD * point.examples * (SIDE**2 + 1)
    held = row + examples + 3 * features + (_rows(point) + point.k + 3) * row
    return {
        "operations": float(operations),
        "bytes_moved": float(moved),
        "seconds": operations / rates.matmul + moved / rates.copy,
        "compile": float(sum(1 for _ in _jaxprs.equations(product.jaxpr))),
        "bytes": held / point.devices,
        "matmul_rate": rates.matmul,
        "copy_rate": rates.copy,
    }


def _product(problem: Problem, vector: Any) -> Any:
    """Forward over reverse."""
    gradient = jax.grad(lambda params: problem.loss_fn(params, problem.x, problem.y))
    return jax.jvp(gradient, (problem.params,), (vector,))[1]


def _rows(point: Point) -> int:
    """Of the basis; of `top_eigenpairs` the default, room for restarts included."""
    return max(48, 2 * point.k + 20) if point.k else point.products

"""What an iterative method on an operator consists of.

A method says which vectors it wants multiplied and what it makes of the images. Who makes the
products, in which loop, with how much memory, and what survives a kill, is the same for all of
them (`_driver.py`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp

from regjax._finite import check_product
from regjax._meshes import on_one_mesh
from regjax.curvature._operators._operator import Operator
from regjax.curvature._operators._products import Products

State = TypeVar("State")
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Solver(Generic[State, Result]):
    """An iterative method on an operator; drive it yourself, or let `run` do it.

    All functions can be traced by `jax.jit`. A state is a tree of arrays; called from Python, a
    step uses it up. Some methods have two parts: when one is done, `solver, state =
    solver.then(state)` goes on.

    Example:
      >>> loss_fn = lambda w: 0.5 * jnp.sum(jnp.arange(1.0, 9.0) * w**2)  # eigenvalues 1, ..., 8
      >>> hessian = curvature.hessian(loss_fn, jnp.zeros(8))
      >>> solver = curvature.lanczos_solver(hessian, jnp.ones(8), 8)
      >>> state = solver.init()
      >>> while not solver.done(state):
      ...     state = solver.step(state)
      >>> print(solver.result(state).num_steps, solver.max_steps)
      8 8

    Attributes:
      name: of the method.
      operator: the matrix.
      arguments: name -> what else decides the answer (numbers, words, arrays), by which a
        checkpoint knows its problem.
      init: () -> state before the first product.
      vectors: state -> what is multiplied next, one vector of the operator's space or rows.
      update: (state, images) -> state.
      done: state -> whether nothing more is to be done.
      result: state -> result so far.
      max_steps: limit of the number of steps.
      lower: names of the arguments that make the state smaller.
      then: state at the end -> (the solver that goes on, its first state); None: none.
      later_steps: number of steps of what goes on.
      block: number of products in a step.
      charge: (state, images, errors) -> state, before the `update`, of products that are not exact:
        errors are the norms of what they are off by, (), or (rows,). None: the result's errors are
        statistical alone.
    """

    name: str
    operator: Operator
    arguments: dict[str, Any]
    init: Callable[[], State]
    vectors: Callable[[State], jax.Array]
    update: Callable[[State, jax.Array], State]
    done: Callable[[State], jax.Array | bool]
    result: Callable[[State], Result]
    max_steps: int
    lower: tuple[str, ...]
    then: "Callable[[State], tuple[Solver[Any, Result], Any]] | None" = None
    later_steps: int = 0
    block: int = 1
    charge: Callable[[State, jax.Array, jax.Array], State] | None = None

    def __post_init__(self) -> None:
        for name in ("init", "result"):
            object.__setattr__(self, name, on_one_mesh(getattr(self, name)))

    @on_one_mesh
    def step(self, state: State) -> State:
        """Makes one product, or one of each row, and what follows from it."""
        return self.follow(self.operator, state, *self.multiplied(self.operator, state))

    def multiplied(self, operator: Operator, state: State) -> tuple[jax.Array, jax.Array]:
        """What is multiplied next, and its images.

        Raises:
          NotFiniteError: an image is not finite, where it is known.
        """
        vectors = self.vectors(state)
        images = multiply(operator, vectors)
        check_product(operator, images, vectors=vectors, result=lambda: self.result(state))
        return vectors, images

    def follow(
        self, operator: Operator, state: State, vectors: jax.Array, images: jax.Array
    ) -> State:
        """The state after products of the operator."""
        coarser = operator.coarser if self.charge is not None else None
        if self.charge is not None and coarser is not None:
            off = images - multiply(coarser, vectors)
            state = self.charge(state, images, jnp.linalg.norm(off, axis=-1) / 3)
        return self.update(state, images)

    def beside(self, state: State) -> Any:
        """The largest tree that is made while the state is still there."""
        return self.result(state) if self.then is None else self.then(state)[1]


def multiply(operator: Products, vectors: jax.Array) -> jax.Array:
    """The images of a vector, or of rows."""
    if vectors.ndim == 1:
        images = operator.product(vectors)
    elif vectors.shape[0] == 1:
        images = operator.product(vectors[0])[None]
    else:
        images = operator.block_product(vectors)
    return _without_derivative(images) if isinstance(images, jax.core.Tracer) else images


@jax.custom_jvp
def _without_derivative(images: jax.Array) -> jax.Array:
    """Returns the images; a loop that ends when it has converged has no derivative of its own."""
    return images


@_without_derivative.defjvp
def _refuse(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    raise TypeError(
        "`operator` must not be differentiated through this solver: differentiate the values of "
        "`top_eigenpairs`, or `trace` and `diagonal` by Hutchinson's estimator, or put "
        "`jax.lax.stop_gradient` around the operator."
    )

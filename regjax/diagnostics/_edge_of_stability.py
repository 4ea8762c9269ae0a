"""Where training stands to the edge of stability of its optimiser."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from regjax import _checks, _numerics, curvature
from regjax._arguments import checked
from regjax._base import LossFn, Params, PRNGKey, Tree
from regjax._printing import legible
from regjax.diagnostics._optimizers import (
    Hyperparams,
    numbers_of,
    optimizer_of,
    threshold_of,
)
from regjax.diagnostics._preconditioner import check_chain, preconditioner, stated_numbers


@legible
class EdgeResult(NamedTuple):
    """The largest eigenvalue of the preconditioned Hessian beside the largest stable one.

    Attributes:
      stability_ratio: (), sharpness over threshold. It is 1 at the edge of stability, and below 1
        if the optimiser would converge on a quadratic loss. Its error is `residual_norm` over
        `threshold`.
      threshold: (), the largest stable eigenvalue (`stability_threshold`).
      sharpness: (), the largest eigenvalue of P^(-1/2) H P^(-1/2), or of H without preconditioner.
      residual_norm: (), *some* eigenvalue lies within it of `sharpness`.
      converged: (), bool: the residual norm is within the tolerance.
      complete: (), bool: converged, and a search found no larger eigenvalue.
      floor_mass: (), share of the squared norm of the eigenvector on parameters whose second moment
        is so small that epsilon matters (`PreconditionerResult.at_floor`). 0 without
        preconditioner.
      covers_all: (), bool: the optimiser moves all leaves; if not, the others are held.
      vectors: tree like the parameters with a leading axis of 1, the eigenvector. Pass the result
        as `start` of the next call.
      num_matvecs: (), int32, Hessian products.
    """

    stability_ratio: jax.Array
    threshold: jax.Array
    sharpness: jax.Array
    residual_norm: jax.Array
    converged: jax.Array
    complete: jax.Array
    floor_mass: jax.Array
    covers_all: jax.Array
    vectors: Params
    num_matvecs: jax.Array


@checked
def stability_threshold(
    *,
    optimizer: str,
    learning_rate: ArrayLike,
    hyperparams: Hyperparams | None = None,
) -> jax.Array:
    """Computes the largest eigenvalue at which an optimiser is stable on a quadratic loss.

    The eigenvalue is one of the Hessian H, or of P^(-1/2) H P^(-1/2) if the optimiser has a
    preconditioner P (`preconditioner`), whose second moments are held. With the learning rate r and
    the momentum b, or b1, the thresholds are

        plain, RMSProp, Adagrad             2 / r
        heavy ball                          (2 + 2 b) / r
        Nesterov                            (2 + 2 b) / ((1 + 2 b) r)
        Adam and its like                   (2 + 2 b1) / ((1 - b1) r), which is 38 / r at b1 = 0.9
        with Nesterov's momentum            (2 + 2 b1) / ((1 - b1) (1 + 2 b1) r)

    With decoupled weight decay d of all parameters, replace 2 / r by 2 / r - d. Coupled decay is
    part of the loss. Momentum is that of optax: a sum of gradients without dampening for `sgd` and
    `rmsprop`, a mean of gradients for Adam.

    Example:
      >>> threshold = diagnostics.stability_threshold(optimizer="adam", learning_rate=0.01)
      >>> print(f"{threshold:.0f}")  # 38 / 0.01
      3800

    Args:
      optimizer: name of its function in optax: "sgd", "rmsprop", "adagrad", "adam", "adamw",
        "nadam", "nadamw", "amsgrad", "adabelief", "yogi", "adamax" or "adamaxw".
      learning_rate: r, positive.
      hyperparams: the numbers that it was made with, by optax's names, such as
        {"momentum": 0.9, "nesterov": True}. Missing ones have optax's defaults.

    Returns:
      The threshold ().

    Raises:
      ValueError: the optimiser is not known, or it follows signs, for which no rate is stable; or
        it has no such number, or a number is out of its range.
      TypeError: `hyperparams` is not a mapping of numbers.

    References:
      J. Cohen et al. (2021), arXiv:2103.00065, for descent and momentum; J. Cohen et al. (2022),
      arXiv:2207.14484, for Adam. We derived all thresholds from optax's update rules.
    """
    _checks.number("learning_rate", learning_rate, above_zero=True)
    return threshold_of(optimizer, learning_rate, numbers_of(optimizer, {}, hyperparams))


@checked
def edge_of_stability(
    loss_fn: LossFn,
    params: Params,
    *batch: Tree,
    key: PRNGKey,
    optimizer: str,
    optimizer_state: Tree = None,
    learning_rate: ArrayLike | None = None,
    hyperparams: Hyperparams | None = None,
    start: Tree = None,
    search: bool = True,
    max_matvecs: int = 100,
    tol: ArrayLike = 1e-3,
    chunk_size: int | None = None,
) -> EdgeResult:
    """Compares the sharpness of the loss with the largest one at which the optimiser is stable.

    The sharpness is the largest eigenvalue of the Hessian H, or of P^(-1/2) H P^(-1/2) for an
    optimiser with a preconditioner P, such as Adam. On a quadratic loss the optimiser diverges if
    the sharpness is above the threshold (`stability_threshold`). In training the ratio of the two
    often rises to about 1 and stays there: the edge of stability. The second moments in P are held
    at their present values. Directions of negative curvature do not count.

    Example:
      >>> loss_fn = lambda w: 0.5 * jnp.sum(jnp.array([9.0, 1.0]) * w**2)
      >>> result = diagnostics.edge_of_stability(
      ...     loss_fn, jnp.ones(2), key=jax.random.key(0), optimizer="sgd", learning_rate=0.2
      ... )
      >>> print(f"{result.sharpness:.2f} {result.threshold:.2f} {result.stability_ratio:.2f}")
      9.00 10.00 0.90

    Args:
      loss_fn: (params, *batch) -> scalar, the mean over the examples. With coupled weight decay it
        must contain the penalty.
      params: tree of parameters.
      *batch: arrays with a leading axis of examples.
      key: typed key of the random start.
      optimizer: name of the optimiser's function in optax, such as "sgd" or "adam"; all are listed
        in `stability_threshold`.
      optimizer_state: state of optax after an update, alone or within a chain; not needed for
        "sgd".
      learning_rate: learning rate of the last update; None: the one that `inject_hyperparams` keeps
        in the state.
      hyperparams: the numbers that the optimiser was made with, by optax's names, such as
        {"momentum": 0.9}. Missing ones are read from the state or have optax's defaults.
      start: an earlier `EdgeResult`, or a tree like its `vectors`, with which the eigenvector is
        found sooner.
      search: whether to look for a larger eigenvalue after convergence. Without it an eigenvalue
        that has overtaken that of `start` can be missed, and `complete` is False.
      max_matvecs: limit of the number of Hessian products.
      tol: relative tolerance: the residual norm over the largest magnitude of an eigenvalue.
      chunk_size: number of examples per pass, for bounded memory; None: all at once.

    Returns:
      An `EdgeResult`.

    Raises:
      ValueError: the learning rate is neither given nor in the state; the optimiser is not known;
        its state is missing, has seen no update or belongs to other parameters; or an argument is
        out of its range.
      TypeError: an argument has the wrong type.

    References:
      J. Cohen et al. (2021), arXiv:2103.00065; J. Cohen et al. (2022), arXiv:2207.14484.
      `floor_mass` is ours.
    """
    found = stated_numbers(optimizer_state, optimizer)
    numbers = numbers_of(optimizer, found, hyperparams)
    if learning_rate is None:
        learning_rate = found.get("learning_rate")
    if learning_rate is None:
        raise ValueError(
            "`learning_rate` must be given where `inject_hyperparams` does not keep it in "
            "`optimizer_state`, got None."
        )
    _checks.number("learning_rate", learning_rate, above_zero=True)
    threshold = threshold_of(optimizer, learning_rate, numbers)
    if optimizer_state is not None:
        check_chain(optimizer_state, optimizer, hyperparams)
    operator: curvature.Operator = curvature.hessian(loss_fn, params, *batch, chunk_size=chunk_size)
    floors, covers_all = None, jnp.bool_(True)
    if optimizer_of(optimizer).root is not None:
        if optimizer_state is None:
            raise ValueError(f"`optimizer_state` must be given for {optimizer}, got None.")
        inverse_root, floors, covers_all = preconditioner(
            optimizer_state, params, optimizer=optimizer, hyperparams=hyperparams
        )
        operator = operator.scaled(inverse_root)
    top = curvature.top_eigenpairs(
        operator, 1, key=key, tol=tol, max_matvecs=max_matvecs, search=search,
        start=start.vectors if isinstance(start, EdgeResult) else start,
    )  # fmt: skip
    return EdgeResult(
        stability_ratio=top.values[0] / threshold.astype(top.values.dtype),
        threshold=threshold,
        sharpness=top.values[0],
        residual_norm=top.residual_norms[0],
        converged=top.converged[0],
        complete=top.complete,
        floor_mass=_share(top.vectors, floors),
        covers_all=covers_all,
        vectors=top.vectors,
        num_matvecs=top.num_matvecs,
    )


def _share(vectors: Params, inside: Params | None) -> jax.Array:
    """The share of the squared norm of the first vector that lies inside."""
    first = jax.tree.map(lambda leaf: leaf[0], vectors)
    if inside is None:
        return jnp.zeros((), _numerics.scaled_norm(first).dtype)
    part = jax.tree.map(lambda leaf, here: jnp.where(here, leaf, 0), first, inside)
    return (_numerics.scaled_norm(part) / _numerics.scaled_norm(first)) ** 2

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
      stability_ratio: (), sharpness over threshold: 1 at the edge, below it where the optimiser
        with its second moments held would converge on the quadratic model. Its error is the
        residual norm over the threshold.
      threshold: (), as in `stability_threshold`.
      sharpness: (), the largest eigenvalue of P^(-1/2) H P^(-1/2), or of H where there is no P.
      residual_norm: (), of the sharpness.
      converged: (), bool, of the sharpness: *some* eigenvalue is there.
      complete: (), bool: converged, and a search found no larger eigenvalue.
      floor_mass: (), share of the squared norm of the eigenvector on parameters whose second moment
        is at the floor (`PreconditionerResult.at_floor`): where it is large, epsilon decides. 0
        without P.
      covers_all: (), bool: the optimiser moves all leaves; if not, the others are held.
      vectors: tree like the parameters with a leading axis of 1, the eigenvector: a warm start of
        the next call.
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

    With the rate r and momentum b, in the eigenvalues of H, or of P^(-1/2) H P^(-1/2) where there
    is a preconditioner (`preconditioner`), whose second moments are held:

        plain, RMSProp, Adagrad             2 / r
        heavy ball                          (2 + 2 b) / r
        Nesterov                            (2 + 2 b) / ((1 + 2 b) r)
        Adam and its like                   (2 + 2 b1) / ((1 - b1) r), which is 38 / r at b1 = 0.9
        with Nesterov's momentum            (2 + 2 b1) / ((1 - b1) (1 + 2 b1) r)

    Decoupled weight decay d, of all parameters, puts 2 / r - d in the place of 2 / r: without
    momentum it adds d to the eigenvalues. Coupled decay is part of the loss. Momentum is as in
    optax: the sum of gradients for `sgd` and `rmsprop`, without dampening, their mean for Adam.

    Example:
      >>> threshold = diagnostics.stability_threshold(optimizer="adam", learning_rate=0.01)
      >>> print(f"{threshold:.0f}")  # 38 / 0.01
      3800

    Args:
      optimizer: its function in optax: "sgd", "rmsprop", "adagrad", "adam", "adamw", "nadam",
        "nadamw", "amsgrad", "adabelief", "yogi", "adamax" or "adamaxw".
      learning_rate: r, positive.
      hyperparams: the numbers that it was made with, by optax's names, such as
        {"momentum": 0.9, "nesterov": True}; those that are missing have optax's defaults.

    Returns:
      The threshold ().

    Raises:
      ValueError: the optimiser is not known, it is one of signs, for which no rate is stable, or
        has no such number, or a number is out of its range.
      TypeError: `hyperparams` is no mapping, or holds what is no number.

    References:
      J. Cohen et al. (2021), arXiv:2103.00065, for descent and momentum; J. Cohen et al. (2022),
      arXiv:2207.14484, for Adam. All were derived again from optax's update rules, by the
      companion matrix.
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
    """Compares the largest eigenvalue of the preconditioned Hessian with the optimiser's threshold.

    The optimiser is linearised with its second moments held. In training they follow, so that the
    ratio hovers about 1 at the edge; it says nothing of directions of negative curvature.

    Example:
      >>> loss_fn = lambda w: 0.5 * jnp.sum(jnp.array([9.0, 1.0]) * w**2)
      >>> result = diagnostics.edge_of_stability(
      ...     loss_fn, jnp.ones(2), key=jax.random.key(0), optimizer="sgd", learning_rate=0.2
      ... )
      >>> print(f"{result.sharpness:.2f} {result.threshold:.2f} {result.stability_ratio:.2f}")
      9.00 10.00 0.90

    Args:
      loss_fn: (params, *batch) -> scalar, the mean over the examples. For coupled weight decay
        with its penalty.
      params: tree of parameters.
      *batch: arrays with a leading axis of examples.
      key: typed key of the random start.
      optimizer: as in `stability_threshold`.
      optimizer_state: of optax, after an update, as in `preconditioner`; not needed for "sgd".
      learning_rate: of the last update; None: that which `inject_hyperparams` keeps in the state.
      hyperparams: as in `stability_threshold`.
      start: an earlier `EdgeResult`, or a tree of vectors like its `vectors`, from which the
        eigenvector is found sooner; see `curvature.top_eigenpairs`.
      search: whether to look for a larger eigenvalue after convergence. Without it one that has
        overtaken that of `start` can be passed over: `complete` is False.
      max_matvecs: limit of the number of Hessian products.
      tol: relative tolerance, as in `curvature.top_eigenpairs`.
      chunk_size: number of examples per pass, for bounded memory; None: all at once.

    Returns:
      An `EdgeResult`.

    Raises:
      ValueError: the learning rate is not given nor in the state, an argument is out of its range,
        or as in `stability_threshold`, `preconditioner` and `curvature.top_eigenpairs`.
      TypeError: as in `stability_threshold` and `preconditioner`.

    References:
      As for `stability_threshold`. The mass at the floor is ours.
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

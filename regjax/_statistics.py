"""Running batch statistics: one more step of them, or those of many batches at given weights."""

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from regjax import _checks, _loops
from regjax._adapters import Model, check_model
from regjax._arguments import checked
from regjax._base import Params, PRNGKey, State, Tree
from regjax._numerics import divide
from regjax._printing import noted
from regjax._runners import ApplyFn


@checked
def updated_statistics(
    model: Model,
    params: Params,
    inputs: Tree,
    *,
    state: State = None,
    key: PRNGKey | None = None,
) -> State:
    """Returns the model's state after one forward pass in train mode at `params`.

    Some transformations evaluate the gradient at other weights than `params` (`perturbed_gradient`,
    `entropy_sgd`). The state that comes out of their `grad_fn` has the batch statistics of those
    weights: drop it, and call this function once after the update. Where the loss is computed at
    the parameters anyway, its new state serves as well.

    Example:
      >>> model = regjax.from_nnx(nnx.BatchNorm(1, momentum=0.9, rngs=nnx.Rngs(0)))
      >>> inputs = jnp.array([[1.0], [3.0]])  # of mean 2; the stored mean is 0
      >>> state = regjax.updated_statistics(model, model.params, inputs)
      >>> print(state["mean"])  # 0.9 * 0 + 0.1 * 2
      [0.2]

    Args:
      model: from one of the adapters.
      params: tree of parameters.
      inputs: the inputs of the step's batch, leading axis the examples.
      state: the state before; None: the model's own.
      key: typed key for dropout, or None.

    Returns:
      The new state, whose running statistics have taken one step towards those of the batch.

    Raises:
      ValueError: `params` or `state` are not like the model's.
      TypeError: `model` is no `regjax.Model`, or `key` is not a typed key.
    """
    _check(model, key)
    state = model.state if state is None else state
    return model.apply(params, state, inputs, train=True, key=key)[1]


@checked
def population_statistics(
    model: Model,
    params: Params,
    batches: Iterable[Tree],
    *,
    state: State = None,
    key: PRNGKey | None = None,
    weight_fn: Callable[[Tree], ArrayLike] | None = None,
) -> State:
    """Returns the model's state with the mean of the batch statistics of many batches at `params`.

    Running averages lag behind the weights, and they belong to other weights after the weights were
    averaged, perturbed or rescaled. A leaf of the state counts as such an average if a pass in
    train mode moves it from s to

        m s + (1 - m) b

    for some momentum m. It is replaced by the mean of b over the batches, each weighted by its
    number of examples. With `unbiased_running_variance` that is the paper's population variance;
    flax's own batch norm leaves out the factor n / (n - 1) (see
    `normalization.exact_population_statistics`).

    Example:
      >>> model = regjax.from_nnx(nnx.BatchNorm(1, rngs=nnx.Rngs(0)))
      >>> batches = [jnp.array([[1.0], [3.0]]), jnp.array([[5.0], [7.0]])]
      >>> state = regjax.population_statistics(model, model.params, batches)
      >>> print(state["mean"])  # the mean of 2 and 6
      [4.]

    Args:
      model: from one of the adapters.
      params: tree of parameters.
      batches: inputs of each batch, leading axis the examples; any iterable.
      state: the state before, whose leaves stay as they are where they are no such averages; None:
        the model's own.
      key: typed key for dropout, or None.
      weight_fn: inputs of a batch -> number of values behind its statistics, where masks leave some
        out; one without values counts nothing. None: the number of examples.

    Returns:
      A state like `state`.

    Raises:
      ValueError: there is no batch, its arrays share no leading axis, a weight is negative or not
        finite, all are zero, or an output is NaN (under `jit` the statistics are NaN then).
      TypeError: `model` is no `regjax.Model`, `batches` are no iterable, or `key` is not a typed
        key.

    References:
      S. Ioffe, C. Szegedy (2015), arXiv:1502.03167, algorithm 2, lines 8 to 10.
    """
    _check(model, key)
    if not isinstance(batches, Iterable):
        raise TypeError(f"`batches` must be an iterable, got {type(batches).__name__}.")
    state = _settled(model.apply, model.state if state is None else state)
    zero = _on_floating(jnp.zeros_like, state)
    total, weight, is_nan, is_empty = zero, 0.0, jnp.bool_(False), True
    rests: dict[int, Tree] = {}  # 1 - m, which may depend on the number of ghost batches
    for inputs in batches:
        size, is_empty = _checks.num_examples(inputs), False
        own = size if weight_fn is None else _weight_of(weight_fn, inputs)
        if own == 0:
            continue
        # (1 - m) b, and from a start of its size m times that start more.
        with noted(params, inputs):
            moved, found_nan = _train_pass(model.apply, params, zero, inputs, key)
        if size not in rests:
            # Counts and generators are those of the first pass.
            start = _on_floating(lambda _, s: 1 + jnp.abs(s), zero, moved)
            other, _ = _train_pass(model.apply, params, start, inputs, key)
            rests[size] = _on_floating(lambda s, a, b: 1 - (a - b) / s, start, other, moved)
        seen = _on_floating(_statistic, state, moved, rests[size])
        total = _on_floating(lambda a, b: a + own * b, total, seen)  # noqa: B023
        weight, is_nan = weight + own, is_nan | found_nan
    if is_empty:
        raise ValueError("`batches` must hold at least one batch, got none.")
    if weight == 0:
        raise ValueError("`weight_fn` must be positive for one of the batches, got 0 for all.")
    if _loops.is_concrete(is_nan) and is_nan:
        raise ValueError("`batches` must give outputs without NaN, which have no statistics.")
    return _on_floating(lambda _, a: jnp.where(is_nan, jnp.nan, a / weight), state, total)


def _weight_of(weight_fn: Callable[[Tree], ArrayLike], inputs: Tree) -> float:
    weight = _checks.number("weight_fn(inputs)", weight_fn(inputs))
    if not _loops.is_concrete(weight):
        raise ValueError("`weight_fn` must give numbers that are known, got a tracer.")
    return float(np.asarray(weight))


# A leaf that moves by less of the way than this, 1 - m, is rounding about one that stays.
_FROZEN = 1e-5


def _check(model: Model, key: PRNGKey | None) -> None:
    check_model(model)
    if key is not None:
        _checks.key("key", key)


def _settled(apply: ApplyFn, state: State) -> State:
    """Takes the correction for their start off running averages of Haiku and Equinox.

    It would be applied to means over batches, which have none.
    """
    while not hasattr(apply, "run") and hasattr(apply, "apply"):
        apply = apply.apply  # of a model without some of its units
    settle = getattr(getattr(apply, "run", None), "settled", None)
    return state if settle is None else settle(state)


def _statistic(old: jax.Array, moved: jax.Array, rest: jax.Array) -> jax.Array:
    """Returns b of (1 - m) b; what does not move stays."""
    return divide(moved, rest, where=rest > _FROZEN, otherwise=old)


def _on_floating(function: Callable[..., jax.Array], tree: State, *others: State) -> State:
    """Maps the floating-point leaves, and keeps those of `tree` elsewhere."""
    floating = lambda leaf: jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    return jax.tree.map(
        lambda leaf, *rest: function(leaf, *rest) if floating(leaf) else leaf, tree, *others
    )


@functools.partial(jax.jit, static_argnums=0)
def _train_pass(
    apply: ApplyFn, params: Params, state: State, inputs: Tree, key: PRNGKey | None
) -> tuple[State, jax.Array]:
    """Returns the new state, and whether an output is NaN: such a batch moves no running mean."""
    outputs, new = apply(params, state, inputs, train=True, key=key)
    is_nan = [jnp.any(leaf != leaf) for leaf in jax.tree.leaves(outputs)]
    return new, functools.reduce(jnp.logical_or, is_nan, jnp.bool_(False))

"""Decentralised SGD: learners step along their own gradients and mix weights with neighbours."""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from regjax import _checks, _tree
from regjax._adapters import Model
from regjax._arguments import checked
from regjax._base import Params, PRNGKey, Tree
from regjax._statistics import population_statistics
from regjax.transforms import _gradients
from regjax.transforms._mixing import AxisName, Mixing, num_learners
from regjax.transforms._static_args import static_args


class GossipAverageState(NamedTuple):
    """State of `gossip_average`.

    Attributes:
      num_updates: (), int32, updates so far.
    """

    num_updates: jax.Array


@static_args("mixing", "axis_name")
def gossip_average(
    mixing: Mixing, *, axis_name: AxisName = "learner"
) -> optax.GradientTransformationExtraArgs:
    """Averages each learner's weights with those of its neighbours, next to the update.

        updates = (sum_k W_jk w_k - w_j) + u_j,   so   w_j <- sum_k W_jk w_k - lr grad L_j(w_j)

    for plain SGD with learning rate lr. W is the mixing matrix, and the gradient is taken at the
    learner's own weights before mixing. The spread of the learners' weights acts as noise that
    depends on the landscape: it lowers the effective learning rate where the loss is rough
    (`diagnostics.landscape_dependent_noise`).

    Place it last in the chain. Momentum stays with the learner. Give each learner its own batches:
    with equal batches the learners stay equal. Evaluate the network at `mean_params`, or at
    `consensus_model` if it has batch statistics, never at a single learner's weights.

    `update` sees one learner and is called under a named axis. Stack the learners' trees along a
    leading axis and make the states with `jax.vmap(tx.init)`. The same trees work on one device and
    on a mesh, which may span processes:

        jax.vmap(step, axis_name="learner")                               # axis_name="learner"
        jax.shard_map(jax.vmap(step, axis_name="block"), mesh=mesh, in_specs=spec,
                      out_specs=spec, check_vma=False)              # axis_name=("device", "block")

    with spec = PartitionSpec("device"). The second form holds n / devices learners on each device,
    in blocks of neighbours. With one learner per device, leave out `jax.vmap` and name the mesh's
    axis alone. On a mesh all devices must reach this transformation: do not call it in a branch
    that only some devices take.

    Example:
      >>> params = jnp.array([0.0, 3.0, 6.0, 9.0])  # one weight of each of four learners
      >>> grads = jnp.array([0.0, 0.0, 0.0, 10.0])
      >>> tx = optax.chain(optax.sgd(0.1), transforms.gossip_average(transforms.ring_mixing()))
      >>> step = jax.vmap(tx.update, axis_name="learner")
      >>> updates, state = step(grads, jax.vmap(tx.init)(params), params)
      >>> print(params + updates)
      [4. 3. 6. 4.]

    Args:
      mixing: `ring_mixing()`, `random_pair_mixing(key=...)`, `exponential_mixing()`,
        `full_mixing()`, `dense_mixing(matrix)`, or any function (params, count, axis_name) ->
        params. Which one works best depends on the problem (benchmarks/claims/decentralized.py).
      axis_name: name of the learners' axis, or (axis of the mesh, axis of the vmap inside it).

    Returns:
      A transformation whose `update` needs `params`. With a single learner, or with a mixing that
      returns `params` unchanged, the updates pass through bit for bit.

    Raises:
      TypeError: `mixing` is not callable, or `axis_name` is no name or pair of names.
      ValueError: in `update`: `params` is missing, the axis is not bound, or the number of learners
        does not suit the mixing.

    References:
      X. Lian et al. (2017), arXiv:1705.09056, algorithm 1; W. Zhang et al. (2021),
      arXiv:2112.01433. Averaging after the step, W (w - lr g), is another method, which is stable
      at larger learning rates. Not mixing the momentum is our choice.
    """
    if not callable(mixing):
        raise TypeError(f"`mixing` must be a function such as ring_mixing(), got {mixing!r}.")
    names = axis_name if isinstance(axis_name, tuple) and len(axis_name) == 2 else (axis_name,)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"`axis_name` must be a name or a pair of names, got {axis_name!r}.")

    def init(params: Params) -> GossipAverageState:
        _checks.floating_leaves("params", params)
        return GossipAverageState(jnp.int32(0))

    def update(
        updates: Params, state: GossipAverageState, params: Params | None = None, **extra: object
    ) -> tuple[Params, GossipAverageState]:
        del extra
        params = _gradients.check_params(updates, params)
        num_learners(axis_name)
        # The same on all learners anyway; now `jax.vmap` knows it and takes one branch, not all.
        count = lax.pmax(state.num_updates, axis_name)
        mixed = mixing(params, count, axis_name)
        if mixed is not params:
            _checks.same_tree("mixing(params, count, axis_name)", mixed, params)
            updates = jax.tree.map(_added, updates, mixed, params)
        return updates, GossipAverageState(state.num_updates + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def _added(update: jax.Array, mixed: jax.Array, param: jax.Array) -> jax.Array:
    change = _tree.wide(mixed) - _tree.wide(param)
    update_too = _tree.wide(update).astype(change.dtype)
    return (change + update_too).astype(_gradients.sum_dtype(update, param))


@checked
def mean_params(params: Params) -> Params:
    """Computes the mean of the learners' weights, at which a decentralised run is evaluated.

    Example:
      >>> params = {"w": jnp.array([[1.0, 2.0], [3.0, 6.0]])}  # two learners with two weights each
      >>> print(transforms.mean_params(params)["w"])
      [2. 4.]

    Args:
      params: stacked tree, leaves (n, ...) with a leading axis of learners.

    Returns:
      A tree of leaves (...), in the dtypes of `params`. Sums are taken in float32 at least.

    Raises:
      ValueError: the leaves have no common leading axis.
    """
    _num_stacked(params)
    return jax.tree.map(
        lambda leaf: _tree.mean_rows(_tree.wide(leaf)).astype(jnp.result_type(leaf)), params
    )


@checked
def consensus_model(
    model: Model, params: Params, batches: Iterable[Tree], *, key: PRNGKey | None = None
) -> Model:
    """Moves a model to the mean of the learners' weights, and estimates its batch statistics there.

    The learners' own running statistics belong to their own weights, and the mean of these
    statistics belongs to no weights at all.

    Example:
      >>> model = regjax.from_callable(lambda params, x: params * x, jnp.array(0.0))
      >>> params = jnp.array([1.0, 2.0, 6.0])  # of three learners
      >>> model = transforms.consensus_model(model, params, [jnp.ones(4)])
      >>> print(model.params)
      3.0

    Args:
      model: model of one learner, whose parameters and batch statistics are replaced.
      params: stacked tree, leaves (n, ...) with a leading axis of learners.
      batches: iterable of the inputs of batches. Not read if there are no batch statistics.
      key: typed key of dropout, or None.

    Returns:
      A `Model` like `model`, for evaluation mode.

    Raises:
      ValueError: the leaves have no common leading axis, their other axes are not those of the
        model's parameters, or there is no batch although the model has batch statistics.
    """
    _checks.same_tree("params", params, model.params, leading=(_num_stacked(params),))
    if key is not None:
        _checks.key("key", key)
    mean, state = mean_params(params), model.state
    if model.has_batch_statistics:
        state = population_statistics(model, mean, batches, state=state, key=key)
    return model._replace(params=mean, state=state)


def _num_stacked(params: Params) -> int:
    """Returns the length of the leading axis that all leaves share."""
    leaves = jax.tree.leaves(_checks.floating_tree("params", params))
    lengths = {jnp.shape(leaf)[:1] for leaf in leaves}
    if len(lengths) != 1 or () in lengths or (0,) in lengths:
        found = ", ".join(str(jnp.shape(leaf)) for leaf in leaves)
        raise ValueError(
            "`params` must have one leading axis of learners, one at least, in all leaves, got "
            f"shapes {found}."
        )
    return int(next(iter(lengths))[0])

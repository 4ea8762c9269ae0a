"""Spherical sharpness of one array at a time, or of one layer of those that stack some."""

import dataclasses
import functools

import jax
from jax.tree_util import Partial
from jax.typing import ArrayLike

from regjax import _checks, _slices
from regjax._arguments import checked
from regjax._axes import Layouts
from regjax._base import LossFn, Mask, Params, PRNGKey, Tree, Wrapper, as_partial
from regjax.diagnostics._sharpness import SharpnessResult
from regjax.diagnostics._spherical_sharpness import chosen_leaves, spherical_sharpness


@checked
def spherical_sharpness_by_group(
    loss_fn: LossFn,
    params: Params,
    *batch: Tree,
    key: PRNGKey,
    mask: Mask = None,
    tangent: bool = False,
    max_matvecs: int = 50,
    tol: ArrayLike = 1e-3,
    chunk_size: int | None = None,
    layout: Layouts = None,
) -> dict[str, SharpnessResult]:
    """Finds the spherical sharpness of each masked leaf alone, with all others held constant.

        ||w||^2 lambda_max(H(w))

    for each leaf w, or for each layer of a leaf in which layers are stacked, with the Hessian H in
    that leaf. See `spherical_sharpness` for all leaves together.

    Example:
      >>> def loss_fn(params):
      ...     a, b = (w / jnp.linalg.norm(w) for w in (params["a"], params["b"]))
      ...     return 0.5 * (3.0 * a[1] ** 2 + 7.0 * b[1] ** 2)
      >>> params = {"a": jnp.array([2.0, 0.0]), "b": jnp.array([5.0, 0.0])}
      >>> results = diagnostics.spherical_sharpness_by_group(loss_fn, params, key=jax.random.key(0))
      >>> print({name: round(float(result.value), 2) for name, result in results.items()})
      {'a': 3.0, 'b': 7.0}

    Args:
      loss_fn: (params, *batch) -> scalar, the mean over the examples, in train mode for batch norm.
      params: tree of parameters.
      *batch: arrays with a leading axis of examples.
      key: typed key of the random starts.
      mask: the leaves whose scales do not change the loss, each for itself; None: all.
      tangent: whether to take the Hessian on the sphere. At a minimum it makes no difference.
      max_matvecs: limit of the number of Hessian products for each leaf.
      tol: relative tolerance: the residual norm over the largest magnitude of an eigenvalue.
      chunk_size: number of examples per pass, for bounded memory; None: all at once.
      layout: which axes of the leaves stack layers (`regjax.Layout`); None: a guess.

    Returns:
      `SharpnessResult`s by the path of the leaf, such as {"layers/0/kernel": ...}, also if layer 0
      is a slice of a stack.
    """
    _checks.key("key", key)
    chosen, leaves, reports = chosen_leaves(mask, params), jax.tree.leaves(params), {}
    for part in _slices.parts(params, layout, chosen=chosen):
        if chosen[part.leaf]:
            numbers = (part.leaf, *(index for _, index in part.where))
            reports[part.name] = spherical_sharpness(
                _OfPart(as_partial(loss_fn), params, part.leaf, part.where),
                _slices.take(leaves[part.leaf], part.where), *batch,
                key=functools.reduce(jax.random.fold_in, numbers, key),
                tangent=tangent, max_matvecs=max_matvecs, tol=tol, chunk_size=chunk_size,
            )  # fmt: skip
    return reports


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["loss_fn", "params"],
    meta_fields=["leaf", "where"],
)
@dataclasses.dataclass(frozen=True)
class _OfPart(Wrapper):
    """The loss of one leaf, or of a slice of it, all else held constant."""

    loss_fn: Partial
    params: Params
    leaf: int
    where: _slices.Where

    @property
    def within(self) -> Partial:
        return self.loss_fn

    def __call__(self, weights: jax.Array, *batch: Tree) -> jax.Array:
        leaves, treedef = jax.tree.flatten(self.params)
        leaves[self.leaf] = _slices.put(leaves[self.leaf], self.where, weights)
        return self.loss_fn(jax.tree.unflatten(treedef, leaves), *batch)

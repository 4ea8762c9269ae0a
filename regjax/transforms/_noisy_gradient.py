"""Noise before the gradient for trainers that call `tx.update(grads, state, params)` alone."""

from collections.abc import Sequence

from jax.typing import ArrayLike

from regjax import _checks
from regjax._arguments import checked
from regjax._axes import Layouts
from regjax._base import Mask, Params, PRNGKey, ScalarOrSchedule, Tree
from regjax.transforms import _gradients, _perturbation, _schedules
from regjax.transforms._passes import ValueAndGradFn, passes


@checked
def noisy_gradient(
    value_and_grad_fn: ValueAndGradFn,
    std: ScalarOrSchedule,
    *,
    key: PRNGKey,
    layerwise: bool = True,
    cyclic: bool = True,
    groups: Tree = None,
    mask: Mask = None,
    layout: Layouts = None,
    argnums: int | Sequence[int] = 0,
) -> ValueAndGradFn:
    """Turns `jax.value_and_grad(loss_fn)` into a function that gives the gradient at noisy weights.

        (L(w), grad L(w + sigma eps))

    Here sigma eps is Gaussian noise. Use this function instead of `value_and_grad_fn` in a training
    step, and leave the optimiser as it is:

        loss_and_grad = noisy_gradient(jax.value_and_grad(loss_fn), 0.03, key=key)
        loss, grads = loss_and_grad(params, inputs, targets, num_updates=step)

    The noise follows from `key` and `num_updates`, so that it is fresh in each step. With the same
    key `perturbed_gradient` gives the same numbers. Loss and aux are those of the pass at the clean
    weights. The micro-batches of a step have the same noise, and so have several devices.

    Example:
      >>> loss_and_grad = jax.value_and_grad(lambda params: 0.5 * jnp.sum(params**2))
      >>> loss_and_grad = transforms.noisy_gradient(loss_and_grad, 0.1, key=jax.random.key(0))
      >>> loss, grads = loss_and_grad(jnp.zeros(10_000), num_updates=0)
      >>> print(loss, f"{grads.std():.2f}")  # the clean loss, the gradient at noise of this size
      0.0 0.10

    Args:
      value_and_grad_fn: (params, *batch) -> (loss, gradient) or ((loss, aux), gradient).
      std: standard deviation sigma, in units of the parameters, or a schedule of `num_updates`.
      key: typed key of the noise.
      layerwise: True: one group of leaves per step, with `std`. False: all groups in every step,
        with std / sqrt(number of groups).
      cyclic: True: the groups take turns. False: the group is drawn uniformly.
      groups: tree of ints like the gradient, or like its upper part: the number of the group of
        each leaf. None: each leaf is a group.
      mask: leaves that may be perturbed.
      layout: which axes of the gradient's leaves stack layers (`regjax.Layout`); None: a guess.
      argnums: which positional arguments are differentiated, as in `value_and_grad_fn`.

    Returns:
      A function with the arguments of `value_and_grad_fn` and `num_updates`, the number of updates
      so far. It returns the same kind of pair.

    Raises:
      ValueError: an argument is out of its range; `num_updates` is missing.
      TypeError: an argument has the wrong type.

    References:
      A. Orvieto, A. Raj, H. Kersting, F. Bach (2023), arXiv:2206.04613.
    """
    _schedules.check_size("std", std)
    _checks.key("key", key)
    _checks.boolean("layerwise", layerwise)
    _checks.boolean("cyclic", cyclic)

    def gradient(
        *arguments: Tree, num_updates: ArrayLike | None = None, **options: Tree
    ) -> tuple[Tree, Params]:
        count = _schedules.check_count("the noise", num_updates)
        clean = passes(value_and_grad_fn, arguments, options, argnums)
        noisy = _perturbation.perturbed(
            clean.params,
            std=_schedules.value_at("std", std, count),
            key=key,
            count=count,
            layerwise=layerwise,
            cyclic=cyclic,
            groups=groups,
            mask=mask,
            layout=layout,
        )
        if noisy is clean.params:
            return clean.value, clean.raw_grads
        return clean.value, clean.restored(_gradients.like(clean.at(noisy), clean.grads))

    return gradient

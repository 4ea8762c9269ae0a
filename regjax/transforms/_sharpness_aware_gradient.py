"""SAM for trainers that call `tx.update(grads, state, params)` and hand on nothing else."""

from collections.abc import Sequence

from jax.typing import ArrayLike

from regjax import _checks
from regjax._arguments import checked
from regjax._base import Mask, Params, ScalarOrSchedule, Tree
from regjax.transforms import _gradients, _schedules
from regjax.transforms._passes import ValueAndGradFn, passes
from regjax.transforms._sam import ascend


@checked
def sharpness_aware_gradient(
    value_and_grad_fn: ValueAndGradFn,
    rho: ScalarOrSchedule,
    *,
    adaptive: bool | Mask = False,
    eta: float = 0.01,
    mask: Mask = None,
    argnums: int | Sequence[int] = 0,
) -> ValueAndGradFn:
    """Makes of `jax.value_and_grad(loss_fn)` a function that gives the gradient at the top.

        (L(w), grad L(w + e)),   e as in `sam`

    It takes the place of `value_and_grad_fn` in a training step, and the optimiser stays as it is:

        loss_and_grad = sharpness_aware_gradient(jax.value_and_grad(loss_fn), 0.05)
        loss, grads = loss_and_grad(params, inputs, targets)

    The loss and what comes with it (`has_aux`) are those of the clean pass, so that batch
    statistics tick once; both passes have the same arguments, and with them the same dropout key.
    The gradient is that of `transforms.sam`, by the same operations, in the form and the dtypes of
    the clean one. With `nnx.value_and_grad` what the second pass changes in a module is dropped,
    and with `equinox.filter_value_and_grad` what has no gradient stays as it is. Weights of
    bfloat16 climb as a copy in float32, which the second pass is given. What is differentiated
    climbs: `nnx.DiffState`, `argnums` or `mask` says which part.

    Each call climbs by itself. With accumulated gradients each micro-batch does, and with several
    devices under `jax.pmap` or `jax.shard_map` each device, which is m-sharpness: average what
    comes out, by `mean_gradient(sharpness_aware_gradient(...), ...)`. For one ascent of the whole
    batch average what goes in, by `sharpness_aware_gradient(mean_gradient(...), rho)`.

    Example:
      >>> loss_and_grad = jax.value_and_grad(lambda params: 0.5 * jnp.sum(params**2))
      >>> loss_and_grad = transforms.sharpness_aware_gradient(loss_and_grad, 1.0)
      >>> loss, grads = loss_and_grad(jnp.array([3.0, 4.0]))
      >>> print(loss, grads)  # the loss at the weights, the gradient at the top
      12.5 [3.6 4.8]

    Args:
      value_and_grad_fn: (params, *batch) -> (loss, gradient) or ((loss, aux), gradient).
      rho: radius as in `sam`; of a schedule the value at `num_updates`, the number of updates so
        far, which has to be passed by that name: `loss_and_grad(params, x, num_updates=step)`.
      adaptive: as in `sam`: a bool, or a tree of bools like the gradient.
      eta: as in `sam`.
      mask: as in `sam`; a tree like the gradient, its upper part, or a function that makes one.
      argnums: which positional arguments are differentiated, as `value_and_grad_fn` has it: the
        gradients of several are a tuple, and climb together.

    Returns:
      A function that is called as `value_and_grad_fn` is, and gives the same pair. `num_updates` is
      its own argument and is not handed on.

    Raises:
      ValueError: an argument is out of its range; `value_and_grad_fn` gives no loss and gradient; a
        schedule has no `num_updates`.
      TypeError: an argument has the wrong type.

    References:
      P. Foret, A. Kleiner, H. Mobahi, B. Neyshabur (2021), arXiv:2010.01412; see `sam`.
    """
    _schedules.check_size("rho", rho)
    _checks.number("eta", eta)

    def gradient(
        *arguments: Tree, num_updates: ArrayLike | None = None, **options: Tree
    ) -> tuple[Tree, Params]:
        radius = _schedules.value_at_given("rho", rho, num_updates)
        clean = passes(value_and_grad_fn, arguments, options, argnums)
        if _schedules.is_zero(radius):
            return clean.value, clean.raw_grads
        top = ascend(clean.params, clean.grads, rho=radius, adaptive=adaptive, eta=eta, mask=mask)
        return clean.value, clean.restored(_gradients.like(clean.at(top), clean.grads))

    return gradient

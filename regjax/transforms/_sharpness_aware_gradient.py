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
    """Turns `jax.value_and_grad(loss_fn)` into a function that gives SAM's gradient.

        (L(w), grad L(w + e)),   e = rho g / ||g||,   g = grad L(w)

    Use it instead of `value_and_grad_fn` in a training step, and leave the optimiser as it is:

        loss_and_grad = sharpness_aware_gradient(jax.value_and_grad(loss_fn), 0.05)
        loss, grads = loss_and_grad(params, inputs, targets)

    The loss and its aux are those of the pass at w, so that batch statistics are updated once. Both
    passes have the same arguments, and therefore the same dropout key. The gradient is that of
    `transforms.sam`, in the form and the dtypes of the clean gradient. With `nnx.value_and_grad`
    changes of the module in the second pass are dropped, and with `equinox.filter_value_and_grad`
    parts without a gradient stay as they are. Weights in bfloat16 climb as a float32 copy, which
    the second pass gets. The part that is differentiated climbs, as `nnx.DiffState`, `argnums` or
    `mask` says.

    Each call climbs by itself. So each micro-batch climbs by itself with accumulated gradients, and
    each device under `jax.pmap` or `jax.shard_map` (m-sharpness). Average the results of these with
    `mean_gradient(sharpness_aware_gradient(...), ...)`. For a single ascent of the whole batch
    average the inner gradient: `sharpness_aware_gradient(mean_gradient(...), rho)`.

    Example:
      >>> loss_and_grad = jax.value_and_grad(lambda params: 0.5 * jnp.sum(params**2))
      >>> loss_and_grad = transforms.sharpness_aware_gradient(loss_and_grad, 1.0)
      >>> loss, grads = loss_and_grad(jnp.array([3.0, 4.0]))
      >>> print(loss, grads)  # the loss at the weights, the gradient at the top
      12.5 [3.6 4.8]

    Args:
      value_and_grad_fn: (params, *batch) -> (loss, gradient) or ((loss, aux), gradient).
      rho: length of the step, in units of the parameters (relative to them on adaptive leaves), or
        a schedule of the number of updates so far. With a schedule pass this number by name:
        `loss_and_grad(params, x, num_updates=step)`.
      adaptive: whether the step is relative to each weight: a bool, or a tree of bools like the
        gradient.
      eta: added to |w| on adaptive leaves, in units of the parameters.
      mask: leaves that climb: a tree like the gradient or its upper part, or a function that makes
        one.
      argnums: which positional arguments are differentiated, as in `value_and_grad_fn`. With
        several, the gradients are a tuple, and the arguments climb together.

    Returns:
      A function with the arguments of `value_and_grad_fn` and `num_updates`, which is not passed
      on. It returns the same kind of pair.

    Raises:
      ValueError: an argument is out of its range; `value_and_grad_fn` gives no loss and gradient; a
        schedule has no `num_updates`.
      TypeError: an argument has the wrong type.

    References:
      P. Foret, A. Kleiner, H. Mobahi, B. Neyshabur (2021), arXiv:2010.01412; further ones in `sam`.
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

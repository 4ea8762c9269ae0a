"""The chain of optax transformations that the options describe; the one place to extend."""

import dataclasses
from typing import Any

import jax
import optax

from regjax import _checks, schedules, transforms
from regjax.experiments._settings import TrainSettings, UsageError, learning_rate, momentum
from regjax.experiments._transformations import CoherentRegularization

# Folded into the key of the seed for the noise of the transformations.
_NOISE = 1


def optimizer(settings: TrainSettings) -> optax.GradientTransformationExtraArgs:
    """The chain of optax transformations that the options describe; the one place to extend.

    Gradient-replacing transformations go in front of `descent`, corrections of the update behind.

    Args:
      settings: `optimizer`, its options, and `transformation`.

    Returns:
      A transformation whose update takes extra arguments, `grad_fn` among them.
    """
    rate = learning_rate(settings)
    decay = optax.add_decayed_weights(settings.weight_decay)
    if settings.transformation == "spectral_controller":
        return optax.chain(decay, _controller(settings, rate))
    if settings.optimizer == "sgd":
        # optax keeps a buffer for a momentum of zero, and none for None.
        descent = optax.chain(decay, optax.sgd(rate, momentum=momentum(settings) or None))
    else:
        descent = optax.chain(optax.scale_by_adam(), decay, optax.scale_by_learning_rate(rate))
    name = settings.transformation
    options = getattr(settings, name, None)
    key = jax.random.fold_in(jax.random.key(settings.seed), _NOISE)
    return _wrap(name, options, descent, key, _masks)


def _controller(settings: TrainSettings, rate: float) -> optax.GradientTransformationExtraArgs:
    """The controller, which takes the place of sgd.

    Raises:
      UsageError: another optimiser, or a momentum, is asked for.
    """
    name = "--transformation spectral_controller"
    if settings.optimizer != "sgd":
        raise UsageError(f"{name} must have --optimizer sgd, got {settings.optimizer}.")
    if momentum(settings):
        raise UsageError(
            f"{name} must have no --momentum, which it finds, got {settings.momentum}."
        )
    options = settings.spectral_controller
    return transforms.spectral_controller(
        key=jax.random.fold_in(jax.random.key(settings.seed), _NOISE),
        initial_learning_rate=rate,
        every=options.refresh_every,
        num_steps=options.num_steps,
        rule=getattr(schedules, f"{options.rule}_rule"),
        nesterov=options.rule != "polyak",
        smallest_ratio=options.smallest_ratio,
        max_momentum=options.max_momentum,
    )


def denoised(settings: TrainSettings, params: Any, state: Any) -> Any:
    """The parameters to evaluate: without the noise that `anticorrelated_noise` keeps on them."""
    if settings.transformation != "anticorrelated_noise":
        return params
    return transforms.denoise_params(params, state[-1])


def _masks(params: Any) -> tuple[Any, Any]:
    """Masks of the kernels, and of those with a normalization behind them."""

    def is_kernel(path: Any, leaf: Any) -> bool:
        del leaf
        return bool(path[-1].key == "kernel")

    def is_normalized(path: Any, leaf: Any) -> bool:
        module = params
        for entry in path[:-2]:
            module = module[entry.key]
        return is_kernel(path, leaf) and "norm" in module

    with_path = jax.tree_util.tree_map_with_path
    return with_path(is_kernel, params), with_path(is_normalized, params)


def _wrap(
    name: str, options: Any, descent: optax.GradientTransformation, key: jax.Array, masks: Any
) -> optax.GradientTransformationExtraArgs:
    """The optimiser with a transformation at its place in the chain.

    Args:
      name: of the transformation; "plain" is none.
      options: its options, of the class above.
      descent: the optimiser.
      key: typed key of its noise.
      masks: params -> masks of (the kernels, the kernels that feed a normalization).

    Returns:
      The chain.
    """
    if name == "plain":
        return optax.chain(descent)
    kernels, normalized = (lambda p: masks(p)[0]), (lambda p: masks(p)[1])
    arguments = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    if name in ("sam", "gsam"):
        return optax.chain(getattr(transforms, name)(**arguments), descent)
    if name == "perturbed_gradient":
        return optax.chain(
            transforms.perturbed_gradient(arguments.pop("scale"), **arguments, key=key), descent
        )
    if name == "entropy_sgd":
        growth, gamma = arguments.pop("growth"), arguments.pop("gamma")
        arguments["num_inner_steps"] = arguments.pop("num_steps")
        arguments["learning_rate"] = arguments.pop("step_size")
        gamma = schedules.scoping_schedule(_checks.non_negative("gamma", gamma), growth)
        return optax.chain(transforms.entropy_sgd(gamma, **arguments, key=key), descent)
    if name == "anticorrelated_noise":
        return optax.chain(descent, transforms.anticorrelated_noise(options.scale, key=key))
    if name == "rescale_weights":
        arguments["target_norm"] = arguments.pop("target")
        return optax.chain(descent, transforms.rescale_weights(**arguments, mask=normalized))
    if name == "soft_threshold":
        return optax.chain(descent, transforms.soft_threshold(**arguments, mask=kernels))
    penalty = transforms.coherent_regularization(
        options.strength,
        gate=_gate(options),
        penalty_gradient=getattr(transforms, f"{options.penalty}_gradient"),
        mask=kernels,
    )
    return optax.chain(penalty, descent)


def _gate(options: CoherentRegularization) -> transforms.Gate:
    if options.gate == "always":
        return transforms.always_gate()
    if options.gate == "delayed":
        return transforms.delayed_gate(options.num_steps)
    make = transforms.cosine_gate if options.gate == "cosine" else transforms.ratio_gate
    return make(options.threshold, hold=options.hold)

"""The chain of optax transformations that the options describe."""

import jax
import optax

from regjax.experiments._settings import TrainSettings, learning_rate, momentum, transformation
from regjax.experiments._transformation import Descent

# Folded into the key of the seed for the noise of the transformations.
_NOISE = 1


def optimizer(settings: TrainSettings) -> optax.GradientTransformationExtraArgs:
    """Makes the chain of optax transformations that the options describe.

    Args:
      settings: `optimizer`, its options, and `transformation`.

    Returns:
      A transformation whose update takes extra arguments, `grad_fn` among them.

    Raises:
      UsageError: the transformation does not fit the optimiser, the batch or the network.
      ValueError: an option of the transformation is out of its range.
    """
    method, descent = transformation(settings), _descent(settings)
    links = method.chain(descent)
    method.check(descent)
    return optax.chain(*links)


def _descent(settings: TrainSettings) -> Descent:
    rate, own = learning_rate(settings), momentum(settings)
    decay = optax.add_decayed_weights(settings.weight_decay)
    if settings.optimizer == "sgd":
        # optax keeps a buffer for a momentum of zero, and none for None.
        steps = optax.chain(decay, optax.sgd(rate, momentum=own or None))
    else:
        steps = optax.chain(optax.scale_by_adam(), decay, optax.scale_by_learning_rate(rate))
    return Descent(
        steps=steps,
        decay=decay,
        optimizer=settings.optimizer,
        learning_rate=rate,
        momentum=own,
        batch_size=settings.batch_size,
        normalization=settings.normalization,
        key=jax.random.fold_in(jax.random.key(settings.seed), _NOISE),
    )

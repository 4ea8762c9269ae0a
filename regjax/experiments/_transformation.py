"""What a transformation of the command line is, and the descent that it joins."""

import abc
from typing import ClassVar, NamedTuple, TypeAlias

import optax

from regjax._base import Params, PRNGKey
from regjax.experiments._options import Options

Links: TypeAlias = tuple[optax.GradientTransformation, ...]
"""The links of a chain, in the order in which updates pass through them."""


class Descent(NamedTuple):
    """The descent that a transformation joins.

    Attributes:
      steps: weight decay and optimiser.
      decay: the weight decay alone.
      optimizer: name of the optimiser.
      learning_rate: in use.
      momentum: of sgd, in use.
      batch_size: examples a step.
      normalization: name of the network's normalization.
      key: typed key of the transformation's noise.
    """

    steps: optax.GradientTransformation
    decay: optax.GradientTransformation
    optimizer: str
    learning_rate: float
    momentum: float
    batch_size: int
    normalization: str
    key: PRNGKey


class Transformation(Options, abc.ABC):
    """What changes where or how the gradient is taken.

    Attributes:
      usual_learning_rate: of sgd with it where none is given; None: as without it.
      usual_momentum: of sgd with it where none is given; None: as without it.
    """

    usual_learning_rate: ClassVar[float | None] = None
    usual_momentum: ClassVar[float | None] = None

    @abc.abstractmethod
    def make(self, descent: Descent) -> optax.GradientTransformation:
        """Makes the transformation.

        Raises:
          ValueError: an option is out of its range; the message has its name in backticks.
          TypeError: an option has the wrong type.
        """

    def chain(self, descent: Descent) -> Links:
        """Returns the transformation at its place: unless a class says otherwise in front."""
        return self.make(descent), descent.steps

    def check(self, descent: Descent) -> None:
        """Checks that the transformation can join `descent`; raises UsageError if it cannot."""

    def count_shards(self) -> int:
        """Returns the number of parts of a batch that `grad_fn` tells apart."""
        return 1

    def params_to_evaluate(self, params: Params, state: optax.OptState) -> Params:
        """Returns the parameters without what the transformation, last in `state`, left on them."""
        del state
        return params

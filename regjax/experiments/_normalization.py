"""The normalizations of the command line, and what a run has to know of each."""

from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

GHOST_SIZE = 16  # of the models' "ghost"


class Normalization(NamedTuple):
    """What a run has to know of a normalization.

    Attributes:
      frees_filters: makes the scale of each filter of the kernel before it immaterial.
      frees_kernels: makes the scale of that kernel as a whole immaterial.
      has_batch_statistics: takes statistics of the batch in train mode, and running ones else.
      batch_multiple: a batch holds a multiple of so many examples.
    """

    frees_filters: bool = False
    frees_kernels: bool = False
    has_batch_statistics: bool = False
    batch_multiple: int = 1


_OF_FILTERS = Normalization(frees_filters=True, frees_kernels=True, has_batch_statistics=True)
_OF_KERNELS = Normalization(frees_kernels=True)

NORMALIZATIONS = {
    "none": Normalization(),
    "batch": _OF_FILTERS,
    "layer": _OF_KERNELS,
    "group": _OF_KERNELS,
    "ghost": _OF_FILTERS._replace(batch_multiple=GHOST_SIZE),
    "noisy": _OF_FILTERS,
    "lp1": _OF_FILTERS,
    "lp2": _OF_FILTERS,
    "lpinf": _OF_FILTERS,
    "group_plus": _OF_KERNELS._replace(has_batch_statistics=True),
    "mean_only": Normalization(has_batch_statistics=True),
    "weight": Normalization(),
    "weight_standardized": Normalization(),
    "weight_mean_only": Normalization(has_batch_statistics=True),
}

if TYPE_CHECKING:
    Name: TypeAlias = str
else:
    Name = Literal[tuple(NORMALIZATIONS)]

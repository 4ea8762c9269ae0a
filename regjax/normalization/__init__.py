"""Normalization layers as pure functions, modules of Flax in `linen` and `nnx`, and statistics.

A layer such as `BatchNorm` holds no arrays; `normalization.nnx.BatchNorm` and
`normalization.linen.BatchNorm` do. Functions on kernels and on batch statistics:

    weight_normalize  split_weights  join_weights  standardize_weight
    exact_population_statistics  fold_batch_norm  rescale_statistics
"""

from regjax.normalization import linen as linen
from regjax.normalization import nnx as nnx
from regjax.normalization._batch_norm import BatchNorm as BatchNorm
from regjax.normalization._batch_norm import GhostBatchNorm as GhostBatchNorm
from regjax.normalization._batch_norm import MeanOnlyBatchNorm as MeanOnlyBatchNorm
from regjax.normalization._batch_norm import NoisyBatchNorm as NoisyBatchNorm
from regjax.normalization._group_norm import GroupNormPlus as GroupNormPlus
from regjax.normalization._lp_norm import LpNorm as LpNorm
from regjax.normalization._population import (
    exact_population_statistics as exact_population_statistics,
)
from regjax.normalization._population import fold_batch_norm as fold_batch_norm
from regjax.normalization._population import rescale_statistics as rescale_statistics
from regjax.normalization._weight_norm import SplitWeightResult as SplitWeightResult
from regjax.normalization._weight_norm import join_weights as join_weights
from regjax.normalization._weight_norm import split_weights as split_weights
from regjax.normalization._weight_norm import standardize_weight as standardize_weight
from regjax.normalization._weight_norm import weight_normalize as weight_normalize

__all__ = [name for name in dir() if not name.startswith("_")]  # what help() lists

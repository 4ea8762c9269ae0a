"""Optax transformations that change where or how a gradient is taken.

Sharpness-aware minimisation, and gradients of several batches or parts:

    sam  gsam  sharpness_aware_gradient  gradient_function  mean_gradient  assume_joined

Flat minima by walks and averages:

    entropy_sgd  average_params  averaged_params

Noise in the weights:

    perturbed_gradient  noisy_gradient  anticorrelated_noise  denoise_params

Penalties, with gates that decide when they count:

    coherent_regularization  always_gate  delayed_gate  cosine_gate  ratio_gate  l1_gradient
    l2_gradient  soft_threshold

Weights whose scale does not change the loss:

    rescale_weights  rescale_velocity  remove_radial

Learning rates from curvature:

    spectral_controller  refresh_spectral_controller

Several learners:

    gossip_average  consensus_model  mean_params  full_mixing  ring_mixing  exponential_mixing
    random_pair_mixing  dense_mixing

Pruned weights, and wrappers:

    hold_masks  apply_gradients  only_extra  skip_nonfinite
"""

from regjax.transforms._apply_gradients import apply_gradients as apply_gradients
from regjax.transforms._average_params import LatestAverageState as LatestAverageState
from regjax.transforms._average_params import RunningAverageState as RunningAverageState
from regjax.transforms._average_params import average_params as average_params
from regjax.transforms._average_params import averaged_params as averaged_params
from regjax.transforms._decentralized import consensus_model as consensus_model
from regjax.transforms._decentralized import gossip_average as gossip_average
from regjax.transforms._decentralized import mean_params as mean_params
from regjax.transforms._entropy_sgd import entropy_sgd as entropy_sgd
from regjax.transforms._given import assume_joined as assume_joined
from regjax.transforms._gradient_coherence import coherent_regularization as coherent_regularization
from regjax.transforms._gradient_coherence import l1_gradient as l1_gradient
from regjax.transforms._gradient_coherence import l2_gradient as l2_gradient
from regjax.transforms._gradient_coherence import soft_threshold as soft_threshold
from regjax.transforms._mean_gradient import gradient_function as gradient_function
from regjax.transforms._mean_gradient import mean_gradient as mean_gradient
from regjax.transforms._mixing import dense_mixing as dense_mixing
from regjax.transforms._mixing import exponential_mixing as exponential_mixing
from regjax.transforms._mixing import full_mixing as full_mixing
from regjax.transforms._mixing import random_pair_mixing as random_pair_mixing
from regjax.transforms._mixing import ring_mixing as ring_mixing
from regjax.transforms._noise import AnticorrelatedNoiseState as AnticorrelatedNoiseState
from regjax.transforms._noise import anticorrelated_noise as anticorrelated_noise
from regjax.transforms._noise import denoise_params as denoise_params
from regjax.transforms._noise import perturbed_gradient as perturbed_gradient
from regjax.transforms._noisy_gradient import noisy_gradient as noisy_gradient
from regjax.transforms._penalty_gates import Gate as Gate
from regjax.transforms._penalty_gates import always_gate as always_gate
from regjax.transforms._penalty_gates import cosine_gate as cosine_gate
from regjax.transforms._penalty_gates import delayed_gate as delayed_gate
from regjax.transforms._penalty_gates import ratio_gate as ratio_gate
from regjax.transforms._pruning import hold_masks as hold_masks
from regjax.transforms._remove_radial import remove_radial as remove_radial
from regjax.transforms._sam import gsam as gsam
from regjax.transforms._sam import sam as sam
from regjax.transforms._sharpness_aware_gradient import (
    sharpness_aware_gradient as sharpness_aware_gradient,
)
from regjax.transforms._spectral_controller import (
    SpectralControllerState as SpectralControllerState,
)
from regjax.transforms._spectral_controller import (
    refresh_spectral_controller as refresh_spectral_controller,
)
from regjax.transforms._spectral_controller import spectral_controller as spectral_controller
from regjax.transforms._weight_rescaling import rescale_velocity as rescale_velocity
from regjax.transforms._weight_rescaling import rescale_weights as rescale_weights
from regjax.transforms._wrappers import only_extra as only_extra
from regjax.transforms._wrappers import skip_nonfinite as skip_nonfinite

__all__ = [name for name in dir() if not name.startswith("_")]  # what help() lists

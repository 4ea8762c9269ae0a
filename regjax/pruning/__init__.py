"""Scores and masks of the units that a network can do without, and networks without these units.

What can be pruned, and gates at the units:

    find_structure  unit_gates  apply_gates  gate_gradients  gated_loss  gates_from_masks

Scores of units or weights, from gradients and from weights alone:

    taylor_importance  taylor_scores  taylor_scores_second_order  oracle_importance
    group_importance  filter_groups  incoming_norm  outgoing_norm  scale_magnitude
    weight_magnitude  random_scores

Redundancy of units:

    gradient_matrix  gradient_redundancy  redundancy_saliency  numerical_rank  energy_rank
    stable_rank  effective_rank

Masks, and when to remove how much:

    full_masks  mask_lowest  parameter_masks  mask_planned  hierarchical_plan  linear_removal
    cubic_removal  num_missing  average_scores

Smaller networks and what they cost:

    remove_units  count_cost
"""

from regjax.pruning._gated_loss import gated_loss as gated_loss
from regjax.pruning._gates import apply_gates as apply_gates
from regjax.pruning._gates import gate_gradients as gate_gradients
from regjax.pruning._gates import parameter_masks as parameter_masks
from regjax.pruning._gates import unit_gates as unit_gates
from regjax.pruning._group_importance import FilterGroupsResult as FilterGroupsResult
from regjax.pruning._group_importance import filter_groups as filter_groups
from regjax.pruning._group_importance import group_importance as group_importance
from regjax.pruning._hierarchical import hierarchical_plan as hierarchical_plan
from regjax.pruning._hierarchical import mask_planned as mask_planned
from regjax.pruning._magnitude import incoming_norm as incoming_norm
from regjax.pruning._magnitude import outgoing_norm as outgoing_norm
from regjax.pruning._magnitude import random_scores as random_scores
from regjax.pruning._magnitude import scale_magnitude as scale_magnitude
from regjax.pruning._magnitude import weight_magnitude as weight_magnitude
from regjax.pruning._masks import full_masks as full_masks
from regjax.pruning._masks import gates_from_masks as gates_from_masks
from regjax.pruning._masks import mask_lowest as mask_lowest
from regjax.pruning._oracle import oracle_importance as oracle_importance
from regjax.pruning._redundancy import RedundancyResult as RedundancyResult
from regjax.pruning._redundancy import effective_rank as effective_rank
from regjax.pruning._redundancy import energy_rank as energy_rank
from regjax.pruning._redundancy import gradient_matrix as gradient_matrix
from regjax.pruning._redundancy import gradient_redundancy as gradient_redundancy
from regjax.pruning._redundancy import numerical_rank as numerical_rank
from regjax.pruning._redundancy import redundancy_saliency as redundancy_saliency
from regjax.pruning._redundancy import stable_rank as stable_rank
from regjax.pruning._removal import CostResult as CostResult
from regjax.pruning._removal import count_cost as count_cost
from regjax.pruning._removal import remove_units as remove_units
from regjax.pruning._schedule import average_scores as average_scores
from regjax.pruning._schedule import cubic_removal as cubic_removal
from regjax.pruning._schedule import linear_removal as linear_removal
from regjax.pruning._schedule import num_missing as num_missing
from regjax.pruning._structure import Group as Group
from regjax.pruning._structure import Slice as Slice
from regjax.pruning._structure import Structure as Structure
from regjax.pruning._structure import find_structure as find_structure
from regjax.pruning._taylor import TaylorScoresResult as TaylorScoresResult
from regjax.pruning._taylor import taylor_importance as taylor_importance
from regjax.pruning._taylor import taylor_scores as taylor_scores
from regjax.pruning._taylor import taylor_scores_second_order as taylor_scores_second_order

__all__ = [name for name in dir() if not name.startswith("_")]  # what help() lists

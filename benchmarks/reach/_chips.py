"""Chips as their makers publish them, and descriptions for which a compiler needs none.

Rates are those of data sheets, which no program reaches.
"""

import dataclasses
import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

# Chips in groups: examples are divided over all chips, parameters over those of each group.
GROUPS, AXIS = "groups", "chips"


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of chip.

    Attributes:
      platform: for which JAX lowers.
      matmul: operations a second of products of float32 arrays at JAX's default precision, which is
        one product in bfloat16 on TPUs and in TF32 on GPUs.
      highest: the same at precision "highest": six products in bfloat16, or float32 itself.
      memory: bytes.
      bandwidth: bytes of it a second.
      network: bytes that a chip sends to others in a second; by the largest number of chips for
        which it holds.
      topologies: number of chips -> name of an arrangement that the compiler knows.
      source: of the rates.
    """

    platform: str
    matmul: float
    highest: float
    memory: float
    bandwidth: float
    network: dict[int, float]
    topologies: dict[int, str]
    source: str

    def rate(self, precision: str) -> float:
        """Operations a second of products at a precision."""
        return self.highest if precision == "highest" else self.matmul

    def sent_per_second(self, num_chips: int) -> float:
        """Bytes that each of so many chips sends in a second."""
        return next(rate for most, rate in sorted(self.network.items()) if num_chips <= most)


CHIPS = {
    "v5e": Chip(
        platform="tpu", matmul=197e12, highest=197e12 / 6, memory=16e9, bandwidth=819e9,
        network={256: 200e9},  # 1600 Gbit/s
        topologies={4: "v5e:2x2", 16: "v5e:4x4", 64: "v5e:8x8", 256: "v5e:16x16"},
        source="Google Cloud documentation, TPU v5e, key chip specifications",
    ),
    "v5p": Chip(
        platform="tpu", matmul=459e12, highest=459e12 / 6, memory=95e9, bandwidth=2765e9,
        network={8960: 600e9},  # 4800 Gbit/s
        topologies={64: "v5p:4x4x4"},
        source="Google Cloud documentation, TPU v5p, key chip specifications",
    ),
    "H100": Chip(
        platform="cuda", matmul=494.7e12, highest=66.9e12, memory=80e9, bandwidth=3350e9,
        # NVLink's 900 GB/s count both ways; between machines 400 Gbit/s a chip.
        network={8: 450e9, 64: 50e9},
        topologies={1: "1x1x1", 8: "1x1x8", 64: "1x8x8"},
        source="NVIDIA H100 SXM5 data sheet, dense rates; DGX H100, one 400 Gbit/s adapter a chip",
    ),
}  # fmt: skip

# What XLA asks of a GPU, as its own description of an H100 SXM has it.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def missing(chip: Chip) -> str | None:
    """The package without which nothing can be compiled for a chip; None: it is there."""
    needed = {"tpu": "libtpu", "cuda": "jax_cuda13_plugin"}[chip.platform]
    return None if importlib.util.find_spec(needed) else needed


def has_cudnn() -> bool:
    """Whether NVIDIA's library of convolutions is there, which XLA asks how to run them."""
    try:
        return importlib.util.find_spec("nvidia.cudnn") is not None
    except ModuleNotFoundError:  # there is nothing of NVIDIA at all
        return False


def compiler(chip: Chip) -> str:
    """The package that compiles for a chip, with its version."""
    name = {"tpu": "libtpu", "cuda": "jax-cuda13-pjrt"}[chip.platform]
    return f"{name} {importlib.metadata.version(name)}"


def mesh_of(chip: Chip, num_chips: int, most_shards: int | None = None) -> Mesh:
    """Chips that are not here, in groups; arrays on them have shapes alone.

    Args:
      chip: their kind.
      num_chips: how many, in all groups.
      most_shards: the largest size of a group; None: all chips are one.
    """
    name = chip.topologies[num_chips]
    if chip.platform == "tpu":
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no machine to ask
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nor one to be shared
        found: Any = topologies.get_topology_desc(platform="tpu", topology_name=name)
    else:
        found = topologies.get_topology_desc(
            "", platform="cuda", topology=name, target_config=_H100
        )
    return _in_groups(found.devices, most_shards)


def mesh_here(most_shards: int | None = None) -> Mesh:
    """The devices of this machine, in groups."""
    return _in_groups(jax.devices(), most_shards)


def _in_groups(devices: Sequence[Any], most_shards: int | None) -> Mesh:
    size = min(len(devices), most_shards or len(devices))
    kinds = (AxisType.Auto,) * 2
    return Mesh(np.array(devices).reshape(-1, size), (GROUPS, AXIS), axis_types=kinds)

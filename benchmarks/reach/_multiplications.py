"""Operations of what multiplies: the libraries' matrix products, and convolutions however named."""

import functools
import json
import math
import re
from collections.abc import Callable

import numpy as np

from benchmarks.reach._text import Instruction


def of_library(line: Instruction, left: tuple[int, ...]) -> float:
    """Of a matrix product of cuBLAS."""
    found = re.search(r"backend_config=(\{.*\})", line.attributes)
    config = json.loads(found[1])["gemm_backend_config"] if found else {}
    axes = config.get("dot_dimension_numbers", {}).get("lhs_contracting_dimensions", [])
    summed = math.prod(left[int(axis)] for axis in axes)
    return 2.0 * math.prod(line.arrays[0].shape) * summed


def of_cudnn(line: Instruction, first: tuple[int, ...], second: tuple[int, ...]) -> float:
    """Its three kinds multiply alike: each is described by the convolution that goes forward."""
    third = line.arrays[0].shape
    if "BackwardInput" in line.attributes:  # of the output and the kernel
        return of_convolution(line, third, second, first)
    if "BackwardFilter" in line.attributes:  # of the input and the output
        return of_convolution(line, first, third, second)
    return of_convolution(line, first, second, third)


def of_convolution(
    line: Instruction, left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...]
) -> float:
    """Of the products that meet no padding; a TPU's compiler writes matrix products so as well."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line.attributes)
    assert labels is not None, line.attributes
    inputs, kernel, outputs = labels[1], labels[2], labels[3]
    window = re.search(r"window=\{([^}]*)\}", line.attributes)
    options = dict(part.split("=") for part in window[1].split()) if window else {}
    of = lambda label, labels, shape: shape[labels.index(label)]
    # Of groups the kernel holds the inputs of one.
    total = 2.0 * of("b", outputs, out) * of("f", outputs, out) * of("i", kernel, right)
    for place, label in enumerate(sorted(set(inputs) - {"b", "f"})):
        option = functools.partial(_option, options, place)
        lengths = of(label, inputs, left), of(label, kernel, right), of(label, outputs, out)
        total *= _num_valid(*lengths, option)
    return total


def _option(options: dict[str, str], place: int, name: str, default: str) -> str:
    return options[name].split("x")[place] if name in options else default


def _num_valid(length: int, width: int, given: int, option: Callable[[str, str], str]) -> int:
    stride, spread = int(option("stride", "1")), int(option("lhs_dilate", "1"))
    low, step = int(option("pad", "0_0").split("_")[0]), int(option("rhs_dilate", "1"))
    taps = np.arange(width)
    if option("rhs_reversal", "0") == "1":
        taps = taps[::-1]
    place = np.arange(given)[:, None] * stride - low + taps * step
    inside = (place >= 0) & (place <= (length - 1) * spread) & (place % spread == 0)
    return int(np.sum(inside))

"""Initial parameters for a model, made with some of its data."""

from regjax.initializers._data_dependent import data_dependent as data_dependent
from regjax.initializers._gradinit import GradInitResult as GradInitResult
from regjax.initializers._gradinit import gradinit as gradinit

__all__ = [name for name in dir() if not name.startswith("_")]  # what help() lists

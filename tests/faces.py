"""Where users take public names from, and the names, for the tests that go over all of them."""

import importlib
import types

FACES = (
    "regjax", "regjax.curvature", "regjax.diagnostics", "regjax.experiments",
    "regjax.initializers", "regjax.models", "regjax.models.linen", "regjax.normalization",
    "regjax.normalization.linen", "regjax.normalization.nnx", "regjax.plots", "regjax.pruning",
    "regjax.regularizers", "regjax.regularizers.linen", "regjax.regularizers.nnx",
    "regjax.schedules", "regjax.transforms",
)  # fmt: skip


def public_names(face):
    """Name -> value of what a face says that it has, without modules."""
    module = importlib.import_module(face)
    found = {name: getattr(module, name) for name in module.__all__}
    return {n: value for n, value in found.items() if not isinstance(value, types.ModuleType)}

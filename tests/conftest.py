"""One setting for all tests: CPU, quick compilation, strict promotion.

A fresh machine has no compilation cache; without XLA's optimisations the suite takes half as long.
What is numerically delicate runs in a second session with REGJAX_TEST_OPTIMIZED=1, in which XLA
rewrites as it does for users: the tests marked `optimized`, which the first session leaves out.
"""

import os

_OPTIMIZED = os.environ.get("REGJAX_TEST_OPTIMIZED") == "1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")
if not _OPTIMIZED:
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_configure(config):
    config.addinivalue_line("markers", "optimized: runs with XLA's optimisations, in session two")


def pytest_collection_modifyitems(config, items):
    kept = [
        item for item in items if (item.get_closest_marker("optimized") is not None) == _OPTIMIZED
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept

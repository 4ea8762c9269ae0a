"""What tests of curvature share: rows in several blocks although the networks are small."""

import jax
import pytest

from regjax.curvature._engine import _basis


@pytest.fixture(scope="module")
def in_blocks():
    """Bases lie in several blocks, as those of large networks do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_basis, "_SMALL", 0)
        patch.setattr(_basis, "_MIDDLE", 0)
        # How many blocks there are is found when a program is traced.
        jax.clear_caches()
        yield
    jax.clear_caches()

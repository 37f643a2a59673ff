"""The laws of layers hold without what JAX would mend in silence."""

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_promotion():
    """Types and ranks that do not agree are errors."""
    with jax.numpy_dtype_promotion('strict'), jax.numpy_rank_promotion('raise'):
        yield

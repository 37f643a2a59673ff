"""The laws of layers hold under strict promotion of types, and where no rank is promoted."""

import jax
import pytest


@pytest.fixture(scope='module', autouse=True)
def strict():
    with jax.numpy_dtype_promotion('strict'), jax.numpy_rank_promotion('raise'):
        yield

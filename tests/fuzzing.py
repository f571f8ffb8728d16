"""How many mutations a test of random input makes: few in CI, where seeds are fixed, and as many more as asked for."""

from __future__ import annotations

import os

LONGER = "LUNGKIT_TEST_FUZZ"
"""Environment variable with a factor: ``LUNGKIT_TEST_FUZZ=100 pytest -k fuzz`` makes a hundred times as many tries."""


def tries(count: int) -> int:
    """``count``, times the factor of the long mode. The first ones are the same there."""
    return count * int(os.environ.get(LONGER, "1"))

"""How much a property is tested."""

from __future__ import annotations

from hypothesis import settings


def examples(count: int) -> int:
    """How many examples a test tries: ``count``, or those of the profile "long" (conftest.py)."""
    return settings().max_examples if settings.get_current_profile_name() == "long" else count

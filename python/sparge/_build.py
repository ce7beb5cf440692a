"""What this build is."""

from __future__ import annotations

from typing import Any

from . import _sparge


def build_info() -> dict[str, Any]:
    """Version, target, block geometry (128×64), instruction sets, the default's thresholds."""
    return dict(_sparge.info())

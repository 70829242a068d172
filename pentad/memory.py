"""The machine's memory."""

from __future__ import annotations

import os


def physical_memory() -> int | None:
    """Bytes that the machine has, where the system says so."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None

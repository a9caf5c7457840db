"""Sizes of memory as text."""

from __future__ import annotations

import re

__all__ = ["format_bytes", "parse_bytes"]

_PREFIXES = "KMGT"
_UNITS = {
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate(_PREFIXES, start=1)},
    **{f"{prefix}B": 1000**power for power, prefix in enumerate(_PREFIXES, start=1)},
}


def parse_bytes(text: str, *, name: str) -> int:
    """The number of bytes that "80GiB" (2^30 each), "80GB" (10^9 each) and the like say.

    Args:
        text: a positive number and a unit: KB, MB, GB, TB, KiB, MiB, GiB or TiB.
        name: of the setting, for the message.

    Raises:
        ValueError: if it is something else; it says what was given and what is allowed.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+) ?([A-Za-z]+)", text.strip())
    size = round(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if size < 1:
        raise ValueError(
            f"{name} is {text!r}, but must be a positive number and one of {', '.join(sorted(_UNITS))}, such as 80GiB"
        )
    return size


def format_bytes(size: float) -> str:
    """In the largest binary unit of which there is one: "1.50 GiB"; three digits or more."""
    for power, prefix in reversed(list(enumerate(_PREFIXES, start=1))):
        if abs(size) >= 1024**power:
            number = size / 1024**power
            return f"{number:.{2 if abs(number) < 100 else 1}f} {prefix}iB"
    return f"{size:.0f} B"

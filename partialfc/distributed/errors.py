"""How an error of one rank is told to the others."""

from __future__ import annotations

__all__ = ["describe"]


def describe(error: BaseException) -> str:
    """The text of an error; of those that were not written for users, their kind too."""
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"

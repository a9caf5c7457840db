"""What can be wrong with data: one sample, which is masked and counted, or the storage of it, which ends a run."""

from __future__ import annotations

__all__ = ["REASONS", "DataError", "SampleError"]

REASONS = ("truncated", "checksum", "not an image", "damaged image", "too large", "unreadable")
"""Why a sample can be bad. What is counted under each:

truncated      the data shard ends before the sample does
checksum       the bytes are not those that were indexed
not an image   no format that can be decoded begins like this
damaged image  an image file that cannot be decoded to its end
too large      more pixels than any picture of a person or product has: a decompression bomb
unreadable     the operating system reports an error of the disk at this place
"""


class DataError(OSError):
    """A data set or its storage cannot be used, or a loader process died: the run has to stop."""


class SampleError(ValueError):
    """One sample is bad. A loader keeps its slot, with a zero image and the label -1, and counts it.

    Attributes:
        reason: one of `REASONS`.
    """

    def __init__(self, reason: str, message: str) -> None:
        assert reason in REASONS, reason
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[SampleError], tuple[str, str]]:
        return SampleError, (self.reason, str(self))

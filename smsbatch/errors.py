"""Every exception smsbatch raises on purpose. Catch `SmsbatchError` to catch them all.

SmsbatchError                 exit code
├── RequestError              2   the request was wrong; nothing was started
│   ├── ManifestError             a key of the manifest, with its file and line
│   ├── SourceError               the source is missing, empty or has clashing keys
│   ├── WeightsError              a model or LoRA file is missing or not understood
│   └── DriftError                the run's manifest, input or weights changed since it was planned
├── StorageError              3   the store refused a read or a write
├── RunError                  1   the run stopped or ended short: failures over budget, units lost
└── SampleError               -   one sample's failure; it becomes that sample's row
"""

from __future__ import annotations

from smsbatch.text import hidden

__all__ = [
    "ERROR_CODES",
    "DriftError",
    "ManifestError",
    "RequestError",
    "RunError",
    "SampleError",
    "SmsbatchError",
    "SourceError",
    "StorageError",
    "WeightsError",
]

ERROR_CODES = (
    "read_error",
    "timeout",
    "bad_caption",
    "decode_error",
    "too_small",
    "too_large",
    "diverged",
    "oom",
    "encode_error",
    "worker_lost",
)
"""All values of a row's `error_code`; stable."""


class SmsbatchError(Exception):
    """Base of all. The message is one line for the user and says what to do next."""

    exit_code = 1

    def __str__(self) -> str:
        """The message, without the values that a manifest has from the environment."""
        return hidden(super().__str__())


class RequestError(SmsbatchError):
    exit_code = 2


class ManifestError(RequestError):
    """An invalid manifest; the message begins with `file:line: key:` as far as they are known."""


class SourceError(RequestError):
    pass


class WeightsError(RequestError):
    pass


class DriftError(RequestError):
    pass


class StorageError(SmsbatchError):
    exit_code = 3


class RunError(SmsbatchError):
    exit_code = 1


class SampleError(SmsbatchError):
    """One sample's failure: `code`, one of ERROR_CODES, is the row's `error_code`, the message its `error_message`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[type[SampleError], tuple[str, str]]:  # both arguments survive a process boundary
        return type(self), (self.code, str(self))

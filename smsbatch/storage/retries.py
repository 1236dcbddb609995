"""The retry policy of storage that is not a local disk: every read, write and listing on S3, http or another backend.

`storage/backend.py` makes each call through `with_retries`. A create-only put to S3 whose answer was lost is recognized
in `storage/s3.py`.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from typing import TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from smsbatch.manifest import SECRET, is_named
from smsbatch.text import hidden

T = TypeVar("T")

WAIT = wait_random_exponential(multiplier=0.5, max=20)  # seconds: at most 0.5, 1, 2, 4 ... 20
_BUGS = (TypeError, KeyError, AttributeError, MemoryError, AssertionError)


def redact(text: str) -> str:
    """The text on one line, with `***` for every secret that `manifest.SECRET` matches.

    A value that a manifest has from the environment is `${NAME}`.
    """
    return SECRET.sub(_covered, " ".join(hidden(text).split()))


def _covered(secret: re.Match[str]) -> str:
    return secret[0] if is_named(secret) else f"{secret['shown'] or ''}***"


class RemoteError(OSError):
    """A failure that disks do not have. `advice` is what the user can do.

    `again`: a temporary failure that outlasted the retries. `fatal`: every other object would be refused too, for
    example without credentials.
    """

    def __init__(self, text: str, advice: str, *, again: bool = False, fatal: bool = False) -> None:
        super().__init__(errno.EIO, redact(text))
        self.advice, self.again, self.fatal = advice, again, fatal


def with_retries(action: Callable[[], T], retries: int, translate: Callable[[Exception], Exception]) -> T:
    """Call `action`; repeat it up to `retries` times while `translate` gives a RemoteError with `again` for its error.

    Raises the error that `translate` gives; errors that show a bug are not translated.
    """

    def once() -> T:
        try:
            return action()
        except _BUGS:
            raise
        except Exception as error:
            known = translate(error)
            if known is error:
                raise
            raise known from error

    retrying = Retrying(
        stop=stop_after_attempt(retries + 1),
        wait=WAIT,
        retry=retry_if_exception(lambda error: isinstance(error, RemoteError) and error.again),
        reraise=True,
    )
    return retrying(once)

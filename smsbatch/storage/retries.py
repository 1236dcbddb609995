"""The retry policy of storage that is not a local disk: every read, write and listing on S3, http or another backend.

The wait before a repetition grows and is random, and is at least what the server asked for in `Retry-After`, up to a
minute.
`storage/backend.py` makes each call through `with_retries`. A create-only put to S3 whose answer was lost is recognized
in `storage/s3.py`.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from smsbatch.manifest import SECRET, is_named
from smsbatch.text import hidden, shortened

T = TypeVar("T")

WAIT = wait_random_exponential(multiplier=0.5, max=20)  # seconds: at most 0.5, 1, 2, 4 ... 20
LONGEST_WAIT = 60.0  # seconds; a server that asks for more in `Retry-After` is asked again after these
SHOWN = 200  # characters of an address in a message
_BUGS = (TypeError, KeyError, AttributeError, MemoryError, AssertionError)


def redact(text: str) -> str:
    """The text on one line, with `***` for every secret that `manifest.SECRET` matches.

    A value that a manifest has from the environment is `${NAME}`.
    """
    return SECRET.sub(_covered, " ".join(hidden(text).split()))


def _covered(secret: re.Match[str]) -> str:
    return secret[0] if is_named(secret) else f"{secret['shown'] or ''}***"


def shown(address: str) -> str:
    """An address as messages show it: without secrets and not too long, for a `data:` URL may have megabytes."""
    return shortened(redact(address), SHOWN)


class RemoteError(OSError):
    """A failure that disks do not have. `advice` is what the user can do.

    `again`: a temporary failure that outlasted the retries; `after_s` are the seconds that the server asked to wait.
    `fatal`: every other object would be refused too, for example without credentials.
    """

    def __init__(
        self,
        text: str,
        advice: str,
        *,
        again: bool = False,
        fatal: bool = False,
        after_s: float = 0.0,
        number: int = errno.EIO,
    ) -> None:
        super().__init__(number, redact(text))
        self.advice, self.again, self.fatal, self.after_s = advice, again, fatal, after_s


def seconds_to_wait(retry_after: str | None) -> float:
    """The seconds of a `Retry-After` header, which has a number or an HTTP date; 0 without or with another value."""
    text = (retry_after or "").strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        moment = parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    now = datetime.now(UTC)
    return max(0.0, (moment.replace(tzinfo=moment.tzinfo or UTC) - now).total_seconds())


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
        wait=_wait,
        retry=retry_if_exception(lambda error: isinstance(error, RemoteError) and error.again),
        reraise=True,
    )
    return retrying(once)


def _wait(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    asked = error.after_s if isinstance(error, RemoteError) else 0.0
    return max(WAIT(state), min(asked, LONGEST_WAIT))

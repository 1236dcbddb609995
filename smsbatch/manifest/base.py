"""The base class of all sections of a manifest: frozen, without unknown keys, without secrets."""

from __future__ import annotations

import re
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

FILLED = "filled in"  # context of a validation: the values of the environment, which are not recorded, are filled in

Beta = Annotated[float, Field(ge=0, lt=1)]

SECRET = re.compile(
    # Any userinfo of http(s), but elsewhere only a password: `abfs://container@account` is no secret.
    r"(?:(?<=http://)|(?<=https://))[^/\s]+(?=@)|(?<=://)[^/\s:]*:[^/\s]*(?=@)"
    # The first lookahead keeps the time linear in the length of the text, which may come from anywhere.
    r"|(?P<shown>[?&#](?=[^?#=&\s]*=)(?:(?:[^?#=&\s]*[-_.])?(?:sig|auth|pwd|authorization)|key|[^?#=&\s]*"
    r"(?:signature|token|secret|credential|passw|passphrase|jwt|(?:api|access|private)[-_]?key)[^?#=&\s]*)=)[^&\s'\"]*"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    re.IGNORECASE,
)
"""Secrets anywhere in a text: userinfo of a URL, a signature or token in its query (the group `shown` is all but the
value), an AWS access key. Manifests may not contain them, and messages do not show them."""


PLACEHOLDER = re.compile(r"\$\{(\w+)\}")
"""A value of the environment, as manifests are recorded."""


def is_named(secret: re.Match[str]) -> bool:
    """True if a match of SECRET has its value from the environment, so that it can be shown as it is written."""
    return PLACEHOLDER.fullmatch(secret[0].removeprefix(secret["shown"] or "").rpartition(":")[2]) is not None


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, populate_by_name=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false where a number is expected: they would be 1 and 0."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        kinds = {annotation, *get_args(annotation)}
        if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
            raise PydanticCustomError("truth", "is a number; YAML reads yes, no, on and off as true and false")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _no_secret(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse secrets: a manifest is stored with the run, readable for everybody; but not values of `${NAME}`."""
        if info.context == FILLED:
            return value
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, str) and not all(map(is_named, SECRET.finditer(item))):
                raise PydanticCustomError(
                    "secret",
                    "holds a secret, which a manifest must not: credentials come from the environment "
                    "(AWS_PROFILE, ~/.aws, the machine's role, or ${{NAME}}); signed URLs belong in a table",
                )
        return value

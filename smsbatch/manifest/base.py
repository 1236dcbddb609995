"""The base class of all sections of a manifest: frozen, without unknown keys, without secrets."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

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


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, populate_by_name=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_secret(cls, value: Any) -> Any:
        """Refuse secrets: a manifest is stored with the run, readable for everybody."""
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, str) and SECRET.search(item):
                raise ValueError(
                    "holds a secret, which a manifest must not: credentials come from the environment "
                    "(AWS_PROFILE, ~/.aws, the machine's role); signed URLs belong in a table"
                )
        return value

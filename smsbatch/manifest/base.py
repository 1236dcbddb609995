"""The base class of all sections of a manifest: frozen, without unknown keys, without secrets."""

from __future__ import annotations

import re
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

FILLED = "filled in"  # context of a validation: the values of the environment, which are not recorded, are filled in

Beta = Annotated[float, Field(ge=0, lt=1)]

# Every repetition is bounded, or begins at a character that it cannot repeat: the time is linear in the length of the
# text, which may come from anywhere.
SECRET = re.compile(
    r"""
      # Any userinfo of http(s), but elsewhere only a password: `abfs://container@account` is no secret.
      (?:(?<=http://)|(?<=https://)) [^/\s?#@]{1,256}+ (?: @[^/\s?#@]{0,256}+ ){0,8} (?=@)
    | (?<=//) [^/\s:@]{0,256}+ : (?!\s | \d{1,5}(?:[/?\#\s]|$)) [^@\n]{1,256}+ (?: @[^/\s@]{0,256}+ ){0,8} (?=@)
    | (?P<shown>
        # A parameter of a URL, or a part of a connection string.
        [?&#;] (?=[^?#=&;\s]*=) (?:
            key | code | tok
          | (?: [^?#=&;\s]* [-_.] )? (?: cred | session )
          | (?: [^?#=&;\s]* [-_.] )? (?: sig | sign | auth | pwd | pw | pass | tkn | sas | hmac | authorization )
          | [^?#=&;\s]* (?:
                signature | token | secret | credential | passw | passphrase | jwt | bearer | oauth | session_?id
              | (?: api | access | account | private | shared ) [-_]? key | shared_?access
              | (?: auth | app | license | subscription | functions ) [-_]? key
            ) [^?#=&;\s]*
          ) =
        # A setting whose name has no other meaning; one whose name has others, if its value looks like a secret.
      | (?<![A-Z]) (?:
            (?: secret | private | account | shared | access | api ) [-_]? (?:access)? [-_]? key | client [-_]? secret
          | (?: access | auth | session | security | refresh | bearer | api | hf | hub | github | gitlab ) [-_]? token
          ) ["']? \s{0,3} [:=] \s{0,3} ["']? (?=[^\s&'"$]{6})
      | (?<![A-Z]) (?: password | passwd | passphrase | pwd | token | secret | credentials? )
          ["']? \s{0,3} [:=] \s{0,3} ["']? (?=[^\s&'"/$]{0,64}[0-9]) (?=[^\s&'"/$]{0,64}[A-Z]) (?=[^\s&'"$]{6})
        # A header.
      | (?<![A-Z]) authorization ["']? \s{0,3} [:=] \s{0,3} ["']? (?:[A-Z]{1,20}\s)? (?=[^\s'"$]{6})
      | (?<![A-Z]) bearer \s{1,3} (?=\S{0,64}[0-9]) (?=[^\s'"]{12})
      | (?<![A-Z]) sharedkey (?:lite)? \s [A-Z0-9]{1,24} : (?=\S{12})
      ) [^&\s'"]+
      # Keys and tokens that their issuers mark.
    | (?<![A-Z0-9]) (?:
        (?: AKIA | ASIA | ABIA | ACCA ) [0-9A-Z]{16} (?![0-9A-Z])
      | (?: hf_ | api_org_ | gh[pousr]_ | npm_ | r8_ | dckr_pat_ | shp(?:at|ca|pa|ss)_ | [sr]k_(?:live|test)_ | glsa_ )
          [A-Z0-9]{20,512}
      | (?: github_pat_ | gl(?:pat|dt|ft|oas|rt|soat|ptt|imt|agent|cbt)- | nvapi- | dop_v1_ | pypi- | GOCSPX- | ya29\. )
          [-\w.]{20,512}
      | sk- (?: (?: ant | proj | svcacct | admin | or )- [-\w]{20,512} | (?:[A-Z0-9]{1,12}-){0,3} [A-Z0-9_]{20,512} )
      | (?: gsk_ | hvs\. | dapi | ATATT3 | figd_ | whsec_ | xai- | pplx- | KGAT_ ) [-\w=]{20,512}
      | (?: xox[A-Z]- | xapp- ) [-0-9A-Z]{10,512}
      | AIza[-\w]{30,64}
      | SG\. [-\w]{16,64} \. [-\w]{16,128}
      | eyJ[-\w]{8,8192}+ \. [-\w]{8,8192}+ (?: \.[-\w]{0,8192}+ )?
      )
    | -----BEGIN\ [A-Z\ ]{0,40}PRIVATE\ KEY(?:\ BLOCK)?----- [A-Z0-9+/=\s\\:,-]{0,8192}
    """,
    re.IGNORECASE | re.VERBOSE,
)
"""Secrets anywhere in a text: userinfo of a URL, a parameter that holds one (the group `shown` is all but its value), a
setting or header with one, a key or token with the mark of its issuer. Manifests may not contain them, and messages do
not show them."""

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
            item = item.decode("latin-1") if isinstance(item, bytes) else item
            if isinstance(item, str) and not all(map(is_named, SECRET.finditer(item))):
                raise PydanticCustomError(
                    "secret",
                    "holds a secret, which a manifest must not: credentials come from the environment "
                    "(AWS_PROFILE, ~/.aws, the machine's role, or ${NAME}); signed URLs belong in a table",
                )
        return value

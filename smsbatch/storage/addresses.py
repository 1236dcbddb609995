"""The addresses that rows of a table may name, by where the table lies.

    table on the web           http:// and https://, and no private address unless `storage.private_addresses`
    table in an object store   object stores, http:// and https://
    table on the local disk    anything

A name without a scheme is relative to the table; `//host/path` is a web address. A `data:` URL, which holds its picture
itself, may stand in any table. `named` applies the rule of a row's own table when the table is read. `Rules` applies
that of all tables of a run again where bytes are read, whatever the plan says.
"""

from __future__ import annotations

import base64
import binascii
import errno
import ipaddress
import re
from collections.abc import Collection
from contextlib import suppress
from functools import lru_cache
from typing import Literal, NamedTuple
from urllib.parse import unquote_to_bytes, urljoin, urlsplit

OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "ocilake", "oss", "tos", "hf"}
WEB = {"http", "https"}
LONGEST_DATA_URL = 250_000  # characters; the index holds the URLs of thousands of rows in memory
REFUSED = "refused:"  # begins the address of a row that its table may not name, which no backend reads

_LOCAL = {"file", "local", "memory", "tiny"}
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):", re.IGNORECASE)
_URL = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_WEB_URL = re.compile(r"https?://", re.IGNORECASE)
_DATA_URL = re.compile(r"data:", re.IGNORECASE)
_AMPERSAND = re.compile(r"&(?:amp;)+", re.IGNORECASE)
# IPv6 addresses that stand for the IPv4 address in their last 32 bits, beside ::ffff:0:0/96 and 2002::/16
_EMBEDDING = [ipaddress.IPv6Network(net) for net in ("64:ff9b::/96", "64:ff9b:1::/48", "::ffff:0:0:0/96", "::/96")]


def is_web(address: str) -> bool:
    return _WEB_URL.match(address) is not None


def is_data(address: str) -> bool:
    """True for a `data:` URL, which holds its content itself."""
    return _DATA_URL.match(address) is not None


def named(table: str, name: str) -> str:
    """The address that a row of `table` names. If it may not, the address is marked and `resolve` refuses it."""
    if is_data(name) and len(name) > LONGEST_DATA_URL:
        size = f"{len(name):,} characters, more than {LONGEST_DATA_URL:,}"
        address, reason = name[:100], f"a data: URL of {size}; keep its picture in a file or in a Parquet column"
    else:
        try:
            address = _absolute(table, name)
            reason = _rules(table).refusal(address)
        except ValueError as error:  # of urljoin, such as an IPv6 host that is never closed
            address, reason = name, f"no URL ({error})"
    if is_web(address):
        address = _AMPERSAND.sub("&", address)  # as copied from HTML
    return f"{REFUSED}{reason} ({table})\n{address}" if reason else address


def split_refused(address: str) -> tuple[str, str]:
    """The address, and why its table may not name it ('' if it may)."""
    if not address.startswith(REFUSED):
        return address, ""
    reason, _, place = address.removeprefix(REFUSED).partition("\n")
    return place, reason


class Rules(NamedTuple):
    """What the rows of some tables may name; of several tables, the least strict one decides on schemes.

    Attributes:
        schemes: the schemes allowed, None for any.
        hosts: the (host, port) pairs that may have a private address, None if every host may. Any table on the web
            restricts them, to the hosts of the tables.
        own: the buckets of the run itself, as in `s3://bucket`. All else is foreign: its refusals are those of rows.
    """

    schemes: frozenset[str] | None
    hosts: frozenset[tuple[str, int]] | None
    own: frozenset[str]

    @classmethod
    def of(cls, tables: Collection[str], private_addresses: bool = False, output: str = "") -> Rules:
        places = {_place(table) for table in tables}
        allowed = WEB if places <= {"web"} else WEB | OBJECT_STORES | {_scheme(table) for table in tables}
        hosts = frozenset(found for table in tables if is_web(table) and (found := _host(table)))
        return cls(
            None if "local" in places else frozenset(allowed),
            hosts if "web" in places and not private_addresses else None,
            frozenset(_bucket(url) for url in (*tables, output) if _place(url) == "store"),
        )

    def refusal(self, address: str) -> str:
        """Why no row may name this address, '' if one may."""
        if self.schemes is None or is_data(address) or (_URL.match(address) and _scheme(address) in self.schemes):
            return ""
        stores = "" if self.schemes <= WEB else "object stores and "
        return f"a table {'in an object store' if stores else 'on the web'} may name {stores}http(s):// addresses only"

    def is_own(self, address: str) -> bool:
        return _bucket(address) in self.own


def is_public(host: str) -> bool:
    """True for an IP address of the public internet; False also for a text that is no IP address."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner is None and any(address in network for network in _EMBEDDING):
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            address = inner
    local = isinstance(address, ipaddress.IPv6Address) and address.is_site_local
    return address.is_global and not address.is_multicast and not local


def decode_data_url(url: str) -> bytes:
    """The content of a `data:` URL, in base64 or percent-encoded. OSError: it is not one."""
    head, comma, body = url.partition(",")
    if not comma:
        raise OSError(errno.EINVAL, "a data: URL without a comma")
    data = unquote_to_bytes(body)
    if not head.lower().rstrip().endswith(";base64"):
        return data
    packed = b"".join(data.split()).rstrip(b"=")
    try:
        return base64.b64decode(packed + b"=" * (-len(packed) % 4), validate=True)
    except binascii.Error as error:
        raise OSError(errno.EINVAL, f"a data: URL that is not base64 ({error})") from error


@lru_cache(maxsize=16)
def _rules(table: str) -> Rules:
    return Rules.of([table])


def _absolute(table: str, name: str) -> str:
    place, scheme = _place(table), _scheme(name)
    if is_data(name):
        return name
    if place == "web":
        path, mark, query = re.match(r"([^?#]*)([?#]?)(.*)", name, re.DOTALL).groups()  # type: ignore[union-attr]
        name = path.replace("\\", "/") + mark + query  # as browsers do
        return name if scheme else urljoin(table, name)
    if re.match(r"//[^/]", name):
        return f"https:{name}"
    if _URL.match(name) or scheme == "tiny" or name.startswith("/"):
        return name
    if place == "store" and scheme and (scheme in _LOCAL or name[len(scheme) :].startswith("::")):
        return name
    return f"{table.rpartition('/')[0]}/{name}"


def _place(table: str) -> Literal["web", "store", "local"]:
    scheme = _URL.match(table)
    if scheme is None or scheme[1].lower() in {"file", "local"}:
        return "local"
    return "web" if scheme[1].lower() in WEB else "store"


def _scheme(address: str) -> str:
    """In lower case, '' for a path."""
    match = _SCHEME.match(address)
    return match[1].lower() if match else ""


def _host(url: str) -> tuple[str, int] | None:
    with suppress(ValueError):
        parts = urlsplit(url)
        return (parts.hostname or "", parts.port or {"http": 80, "https": 443}[parts.scheme.lower()])
    return None


def _bucket(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{'s3' if scheme.lower() == 's3a' else scheme.lower()}://{rest.partition('/')[0]}"

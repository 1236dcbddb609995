"""The backend of Amazon S3 and of servers that speak its protocol; `create` is `If-None-Match: *`.

Credentials are found as by every AWS tool; endpoint, profile and region come from the manifest. Requests are made by
botocore, only uploads and copies, in parts if large, by s3fs.

Every upload carries its MD5, which all servers check. The checksum headers of newer clients are not sent, because R2,
Ceph, GCS and older MinIO refuse them.
"""

from __future__ import annotations

import errno
import re
import uuid
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
import botocore.exceptions as boto
from botocore.parsers import ResponseParserError
from botocore.utils import conditionally_calculate_md5

from smsbatch.manifest import Storage
from smsbatch.storage.backend import Backend, Fetched, ObjectInfo, TooLarge, byte_range, folder_prefix, strip_etag
from smsbatch.storage.retries import RemoteError, redact, seconds_to_wait

CONNECTIONS = 64  # per process and store
PART = 16 << 20  # bytes of an upload's part; four are in memory at once
MOST_PARTS = 10_000  # per upload
MARK = "smsbatch-upload"  # metadata of an object made by `create`: identifies its writer

_CREDENTIALS = "set AWS_PROFILE or other AWS_ variables, or storage.profile; for a public bucket storage.anonymous"
_LATER = "what is committed is kept, run again when it answers"
_BUSY = {  # temporary, whatever the status; NoSuchUpload also follows a completed upload whose answer was lost
    "BadDigest",  # the bytes were damaged on their way, and so with XAmzContentSHA256Mismatch
    "ConditionalRequestConflict",
    "NoSuchUpload",
    "OperationAborted",
    "RequestTimeout",
    "SlowDown",
    "Throttling",
    "XAmzContentSHA256Mismatch",
}
_REGION = "set storage.region to the region of the bucket"
_PERMISSIONS = "check the permissions; if its readers pay for the bucket, set storage.requester_pays"
_REQUEST = "check storage.endpoint, storage.region and the credentials"
_FULL = "free some space in the store, what is committed is kept"
_FATAL = {  # what to do about an error code with which every other object would be refused too
    "InvalidAccessKeyId": _CREDENTIALS,
    "InvalidToken": _CREDENTIALS,
    "NotSignedUp": _CREDENTIALS,
    "ExpiredToken": "the credentials have expired; renew them and run again, what is committed is kept",
    "TokenRefreshRequired": "the credentials have expired; renew them and run again, what is committed is kept",
    "SignatureDoesNotMatch": "check the secret key (AWS_SECRET_ACCESS_KEY), and that no proxy changes requests",
    "RequestTimeTooSkewed": "set this machine's clock (NTP)",
    "RequestExpired": "set this machine's clock (NTP)",
    "AuthorizationHeaderMalformed": _REGION,
    "IllegalLocationConstraintException": _REGION,
    "PermanentRedirect": _REGION,
    "QuotaExceeded": _FULL,
    "XMinioStorageFull": _FULL,
}
_ADVICE = {  # the same for one that concerns an object or a request
    "NoSuchBucket": "create it or check its name",
    "InvalidBucketName": "check the name of the bucket",
    "AccessDenied": _PERMISSIONS,
    "403": _PERMISSIONS,  # the answer to HEAD has no code
    "400": _REQUEST,
    "InvalidArgument": _REQUEST,
    "InvalidRequest": _REQUEST,
    "MethodNotAllowed": "check storage.endpoint, which may be the store's web page",
    "InvalidObjectState": "the object is archived; restore it first",
    "NotImplemented": "the store does not know this request; update it or choose another",
}
# What a refusal may name of a request, but for the headers of every signed one
_HEADER = re.compile(
    r"\bx-amz-(?!date|content-sha256|security-token|algorithm|credential|signature|expires)[\w-]+"
    r"|\bif-none-match\b|\bcontent-md5\b|\baws-chunked\b",
    re.IGNORECASE,
)
_OF_HEADER = {
    "if-none-match": "the store has no create-only put; run one driver at a time",
    "x-amz-request-payer": "set storage.requester_pays to false",
}
_NUMBERS = {
    400: errno.EINVAL,
    403: errno.EACCES,
    404: errno.ENOENT,
    412: errno.EEXIST,
    501: errno.ENOSYS,
}
_BROKEN = (
    aiohttp.ClientConnectionError,
    aiohttp.ClientPayloadError,
    boto.ConnectionError,
    boto.HTTPClientError,
    boto.IncompleteReadError,
    ResponseParserError,
)
_REFUSED = (
    boto.CredentialRetrievalError,
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.ProfileNotFound,
)


class S3(Backend):
    can_create = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.fs.retries = 1

    @staticmethod
    def options(storage: Storage) -> dict[str, Any]:
        named = {"endpoint_url": storage.endpoint, "profile": storage.profile}
        return {
            "anon": storage.anonymous,
            "client_kwargs": {"region_name": storage.region} if storage.region else {},
            "config_kwargs": {
                "connect_timeout": storage.timeout_s,
                "read_timeout": storage.timeout_s,
                "retries": {"total_max_attempts": 1},
                "max_pool_connections": CONNECTIONS,
                "request_checksum_calculation": "when_required",
                "response_checksum_validation": "when_required",
            },
            "max_concurrency": 4,
            "requester_pays": storage.requester_pays,
            **{name: value for name, value in named.items() if value},
        }

    def path_of(self, url: str) -> str:
        return url.partition("://")[2].strip("/")

    def url_of(self, path: str) -> str:
        return f"s3://{path}"

    def walk(self, folder: str) -> Iterator[ObjectInfo]:
        bucket, key = self._split(folder)
        for page in self._pages(Bucket=bucket, Prefix=folder_prefix(key)):
            for item in page.get("Contents", ()):
                if not item["Key"].endswith("/"):  # a folder made by a console
                    yield ObjectInfo(f"{bucket}/{item['Key']}", item["Size"], strip_etag(item.get("ETag")))

    def names(self, folder: str) -> list[str]:
        bucket, key = self._split(folder)
        prefix = folder_prefix(key)
        names: list[str] = []
        for page in self._pages(Bucket=bucket, Prefix=prefix, Delimiter="/"):
            names += [item["Key"] for item in page.get("Contents", ())]
            names += [item["Prefix"] for item in page.get("CommonPrefixes", ())]
        return [name.removeprefix(prefix).rstrip("/") for name in names if name != prefix]

    def delete(self, path: str) -> None:
        bucket, key = self._split(path)
        self._with_retries(self._call, "delete_object", Bucket=bucket, Key=key)

    def modified(self, path: str) -> datetime:
        when: datetime = self._with_retries(self._head, path)["LastModified"]
        return when

    def _pages(self, **request: str) -> Iterator[dict[str, Any]]:
        while True:  # each page has its own retries
            page = self._with_retries(self._call, "list_objects_v2", **request)
            yield page
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def _head(self, path: str) -> Any:
        bucket, key = self._split(path)
        if not key:
            raise FileNotFoundError(errno.ENOENT, "a bucket, not an object", path)
        return self._call("head_object", Bucket=bucket, Key=key)

    def _find(self, path: str) -> ObjectInfo:
        head = self._head(path)
        return ObjectInfo(path, head["ContentLength"], strip_etag(head.get("ETag")))

    def _get(self, path: str, start: int, stop: int | None, limit: int | None) -> Fetched:
        bucket, key = self._split(path)
        request = {"Bucket": bucket, "Key": key}
        if start or stop is not None:
            request["Range"] = byte_range(start, stop)
        if stop is None or stop > start:
            try:
                got: Fetched = self._call(self._download, request, limit)
                return got
            except boto.ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] != 416:
                    raise
        _, size, etag = self._find(path)  # an empty range, or the object ends before `start`
        return Fetched(b"", size, etag)

    async def _download(self, request: dict[str, str], limit: int | None) -> Fetched:
        answer = await self.fs.s3.get_object(**request, **self.fs.req_kw)
        async with answer["Body"] as body:
            length = answer["ContentLength"]
            if limit is not None and length > limit:
                raise TooLarge(length)
            data = await body.read()
        whole = answer.get("ContentRange", "").rpartition("/")[2]
        return Fetched(data, int(whole) if whole.isdigit() else length, strip_etag(answer.get("ETag")))

    def upload(self, path: str, source: bytes | Path, *, create: bool = False) -> None:
        if not create:
            self._with_retries(self._upload, path, source)
            return
        # If the answer to an upload is lost, we or the HTTP client send it again and find the object that it made.
        # Equal bytes would not prove that it is ours, the mark does.
        mark = uuid.uuid4().hex
        try:
            self._with_retries(self._upload, path, source, mode="create", Metadata={MARK: mark})
        except FileExistsError:
            try:
                is_ours = self._with_retries(self._head, path)["Metadata"].get(MARK) == mark
            except FileNotFoundError:  # deleted meanwhile by another publisher
                is_ours = False
            if not is_ours:
                raise

    def _upload(self, path: str, source: bytes | Path, create: bool = False, **options: Any) -> None:
        events = self.fs.s3.meta.events
        for name in ("PutObject", "UploadPart"):
            events.register(f"before-call.s3.{name}", conditionally_calculate_md5, unique_id=f"smsbatch-{name}")
        if isinstance(source, bytes):
            self.fs.pipe_file(path, source, chunksize=_part(len(source)), **options)
        else:
            self.fs.put_file(str(source), path, chunksize=_part(source.stat().st_size), **options)

    def _call(self, method: Any, *args: Any, **request: Any) -> Any:
        """Run a coroutine function, or the client's method of that name."""
        client = self.fs.s3  # connects at the first use
        if isinstance(method, str):
            method, request = getattr(client, method), request | self.fs.req_kw
        return self._wait(method, *args, **request)

    def _split(self, path: str) -> tuple[str, str]:
        bucket, key, _ = self.fs.split_path(path)
        return bucket, key

    def _translate(self, error: Exception) -> Exception:
        answer = error if isinstance(error, boto.ClientError) else error.__cause__
        if isinstance(answer, boto.ClientError):
            return _refusal(answer)
        if isinstance(error, _BROKEN):
            return RemoteError(str(error), f"check the network and the endpoint; {_LATER}", again=True)
        if isinstance(error, _REFUSED):
            return RemoteError(str(error), _CREDENTIALS, fatal=True)
        if isinstance(error, boto.ParamValidationError):
            return RemoteError(str(error), _ADVICE["InvalidBucketName"])
        if isinstance(error, boto.BotoCoreError | ValueError):
            return RemoteError(str(error), "check the manifest's storage section and the AWS settings", fatal=True)
        return super()._translate(error)


def _refusal(error: boto.ClientError) -> OSError:
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    told = error.response.get("Error", {})
    code = str(told.get("Code", status))
    text = f"{told.get('Message') or 'no reason given'} ({code})"
    number = _NUMBERS.get(status, errno.EIO)
    may_name = status in {400, 403, 411, 501} and code not in _BUSY and code != "AccessDenied"
    header = _HEADER.search(text) if may_name else None
    if header:
        name = header[0].lower()
        advice = _OF_HEADER.get(name, f"the store does not take {name}; update it or choose another")
        # `supports_create` looks for this number.
        return RemoteError(text, advice, fatal=True, number=errno.ENOSYS if name == "if-none-match" else errno.EIO)
    if status == 401:  # as R2 refuses wrong keys
        return RemoteError(text, _CREDENTIALS, fatal=True)
    if code in _FATAL or status in {301, 307}:
        return RemoteError(text, _FATAL.get(code, _REGION), fatal=True)
    if code in _BUSY or status in {409, 429} or (status >= 500 and status != 501):
        headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        return RemoteError(text, _LATER, again=True, after_s=seconds_to_wait(headers.get("retry-after")))
    if code == "NoSuchBucket":
        text = "there is no such bucket"
    if code in _ADVICE:
        return RemoteError(text, _ADVICE[code], number=number)
    return OSError(number, redact(text))


def _part(size: int) -> int:
    """Bytes of one part of an upload."""
    return max(PART, -(-size // MOST_PARTS))

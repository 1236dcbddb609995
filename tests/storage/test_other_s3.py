"""S3 beyond AWS: servers without newer checksum headers, buckets whose readers pay, what to do at a refusal."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from botocore.exceptions import ClientError
from support.making import make_files, source_of
from support.s3server import Faults, Server
from tenacity import wait_none

from smsbatch.data.sources import parts
from smsbatch.errors import SourceError, StorageError
from smsbatch.storage import retries, s3 as s3_door
from smsbatch.storage.s3 import _refusal
from smsbatch.storage.store import Store

PART = 5 << 20


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "WAIT", wait_none())


@pytest.fixture(params=[(501, "NotImplemented"), (400, "InvalidArgument"), (403, "SignatureDoesNotMatch")])
def strict(request: pytest.FixtureRequest, s3: Server) -> Iterator[Faults]:
    with Faults(s3.endpoint, strict=request.param) as proxy:
        yield proxy


def store_behind(proxy: Faults, s3: Server, **options: object) -> Store:
    update = {"endpoint": proxy.endpoint, "retries": 1, **options}
    return Store(f"s3://{s3.bucket()}/run", s3.storage.model_copy(update=update))


def use_all(store: Store, folder: Path) -> bytes:
    """Every request that a run makes, also uploads and copies in parts; returns the large object."""
    large = os.urandom(2 * PART + 9)
    make_files(folder, {"small": b"1", "large": large})
    store.check_writable()
    assert store.supports_create()
    store.put("a", b"1")
    assert store.create("b", folder / "small")
    assert store.create("bytes", large)
    store.put("file", folder / "large")
    store.copy("a", "c")
    assert store.read_all(["a", "b", "c"]) == dict.fromkeys("abc", b"1")
    assert store.list() == ["a", "b", "bytes", "c", "file"]
    assert (store.size("a"), store.entries()) == (1, ["a", "b", "bytes", "c", "file"])
    assert store.read("bytes") == store.read("file") == large
    store.delete("c")
    return large


def test_a_server_without_newer_checksums(
    strict: Faults, s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_door, "PART", PART)
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_supported")
    use_all(store_behind(strict, s3), tmp_path)
    uploads = [r for r in strict.requests if r.method == "PUT" and "x-amz-copy-source" not in r.headers]
    assert len(uploads) > 8
    assert all("content-md5" in request.headers for request in uploads), "an upload is verified by the server"
    assert not any("x-amz-checksum-mode" in request.headers for request in strict.requests)


def test_bytes_that_are_damaged_on_their_way_are_sent_again(
    strict: Faults, s3: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_behind(strict, s3)
    check, damaged = strict._refused, []

    def once_damaged(method: str, headers: dict[str, str], sent: bytes) -> object:
        if method == "PUT" and not damaged:
            damaged.append(sent)
            sent = sent[:-1] + b"?"
        return check(method, headers, sent)

    monkeypatch.setattr(strict, "_refused", once_damaged)
    store.put("a", b"whole")
    assert (damaged, [request.method for request in strict.requests]) == ([b"whole"], ["PUT", "PUT"])
    assert store.read("a") == b"whole"


@pytest.mark.parametrize("pays", [False, True])
def test_the_requester_pays(s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pays: bool) -> None:
    monkeypatch.setattr(s3_door, "PART", PART)
    with Faults(s3.endpoint) as proxy:
        use_all(store_behind(proxy, s3, requester_pays=pays), tmp_path)
        sent = {(request.method, request.headers.get("x-amz-request-payer")) for request in proxy.requests}
    methods = ("GET", "HEAD", "PUT", "POST", "DELETE")
    assert sent == {(method, "requester" if pays else None) for method in methods}


def refusal(status: int, code: str, message: str = "told", **headers: str) -> OSError:
    meta = {"HTTPStatusCode": status, "HTTPHeaders": headers}
    return _refusal(ClientError({"Error": {"Code": code, "Message": message}, "ResponseMetadata": meta}, "PutObject"))  # type: ignore[typeddict-item,arg-type]


CHECKSUM = "Header 'x-amz-checksum-crc32' with value 'AA==' not implemented"


@pytest.mark.parametrize(
    ("status", "code", "message", "advice"),
    [
        (501, "NotImplemented", CHECKSUM, "the store does not take x-amz-checksum-crc32;"),
        (400, "InvalidArgument", CHECKSUM, "the store does not take x-amz-checksum-crc32;"),
        (403, "SignatureDoesNotMatch", CHECKSUM, "the store does not take x-amz-checksum-crc32;"),
        (
            400,
            "InvalidRequest",
            "x-amz-sdk-checksum-algorithm",
            "the store does not take x-amz-sdk-checksum-algorithm;",
        ),
        (411, "MissingContentLength", "aws-chunked", "the store does not take aws-chunked;"),
        (501, "NotImplemented", "If-None-Match", "the store has no create-only put;"),
        (400, "InvalidArgument", "Header if-none-match: *", "the store has no create-only put;"),
        (400, "InvalidArgument", "x-amz-request-payer", "set storage.requester_pays to false"),
        (501, "NotImplemented", "told", "the store does not know this request;"),
        (400, "InvalidArgument", "told", "check storage.endpoint, storage.region and the credentials"),
        (400, "InvalidRequest", "told", "check storage.endpoint, storage.region and the credentials"),
        (400, "400", "Bad Request", "check storage.endpoint, storage.region and the credentials"),
        (403, "SignatureDoesNotMatch", "told", "check the secret key"),
        (403, "InvalidAccessKeyId", "told", "set AWS_PROFILE"),
        (400, "ExpiredToken", "x-amz-security-token", "the credentials have expired; renew them"),
        (403, "RequestTimeTooSkewed", "x-amz-date", "set this machine's clock"),
        (403, "AccessDenied", "told", "check the permissions; if its readers pay"),
        (403, "AccessDenied", "denied by s3:x-amz-server-side-encryption", "check the permissions"),
        (403, "InvalidObjectState", "told", "the object is archived; restore it first"),
        (401, "Unauthorized", "told", "set AWS_PROFILE"),
        (403, "403", "Forbidden", "check the permissions; if its readers pay"),
        (404, "NoSuchBucket", "told", "create it or check its name"),
        (400, "InvalidBucketName", "told", "check the name of the bucket"),
        (400, "AuthorizationHeaderMalformed", "told", "set storage.region"),
        (301, "PermanentRedirect", "told", "set storage.region"),
        (301, "301", "told", "set storage.region"),
        (405, "MethodNotAllowed", "told", "check storage.endpoint"),
        (507, "XMinioStorageFull", "told", "free some space in the store"),
        (503, "SlowDown", "told", "what is committed is kept, run again when it answers"),
    ],
)
def test_a_refusal_says_what_to_do_about_what_it_names(status: int, code: str, message: str, advice: str) -> None:
    error = refusal(status, code, message)
    assert isinstance(error, retries.RemoteError)
    assert error.advice.startswith(advice)
    assert ("AWS_PROFILE" in error.advice) == (code in ("InvalidAccessKeyId", "Unauthorized"))
    assert message in str(error) or code == "NoSuchBucket"


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (404, "NoSuchKey", FileNotFoundError),
        (404, "404", FileNotFoundError),
        (412, "PreconditionFailed", FileExistsError),
    ],
)
def test_answers_that_are_no_refusals(status: int, code: str, kind: type[OSError]) -> None:
    assert isinstance(refusal(status, code, "at least one of the conditions If-None-Match did not hold"), kind)


def test_only_a_refused_condition_is_a_store_without_create_only_put() -> None:
    assert refusal(400, "InvalidArgument", "If-None-Match").errno == errno.ENOSYS
    assert refusal(501, "NotImplemented", CHECKSUM).errno not in (errno.ENOSYS, errno.EINVAL)


def test_a_store_is_asked_again_when_it_wants() -> None:
    error = refusal(503, "SlowDown", **{"retry-after": "9"})
    assert isinstance(error, retries.RemoteError)
    assert (error.again, error.after_s) == (True, 9)


def test_a_source_that_is_refused_says_what_to_do(s3: Server) -> None:
    with Faults(s3.endpoint) as proxy:
        storage = s3.storage.model_copy(update={"endpoint": proxy.endpoint})
        proxy.inject("403")
        with pytest.raises(SourceError, match=r"^s3://bucket/x.tar: .*\(403\); check the permissions; if its readers"):
            parts(source_of("webdataset", "s3://bucket/x.tar"), storage)


@pytest.mark.parametrize("bucket", ["a b", "x" * 300])
def test_a_bucket_that_cannot_be(s3: Server, bucket: str) -> None:
    with pytest.raises(StorageError, match="check the name of the bucket") as caught:
        Store(f"s3://{bucket}/run", s3.storage).check_writable()
    assert "\n" not in str(caught.value)

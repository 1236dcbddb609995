"""Runs from S3 to S3, also through a proxy that injects faults: the bytes are those of the same run on disk.

Also the errors for missing credentials, and that no secret is written or printed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.faults import Bucket, Life, check_end, check_whole
from support.jobs import KEYS, commits, make_photos, rows, write_manifest
from support.s3server import SEEDED, Faults, Server

import smsbatch as sb

IN_PLACE = ("url",)  # the column with a sample's location
SECRET, TOKEN = "wJalrXUtnFEMI-K7MDENG-bPxRfiCYsecret", "FwoGZXIvYXdzEJr-a-session-token"


@pytest.fixture(autouse=True)
def _no_life_is_left() -> Iterator[None]:
    yield
    Life.end_all()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder `photos` and two tars of the same samples, one of them broken; each has JSON that is passed through."""
    folder = tmp_path_factory.mktemp("sources")
    photos = make_photos(folder / "photos")
    for key in KEYS:
        (photos / f"{key}.json").write_text(json.dumps({"id": key}))
    (photos / "photo-4.png").write_bytes(b"no picture")
    for number, keys in enumerate((KEYS[:3], KEYS[3:])):
        (folder / "tars").mkdir(exist_ok=True)
        with tarfile.open(folder / "tars" / f"{number:05}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for file in sorted(file for file in photos.iterdir() if file.stem in keys):
                tar.add(file, file.name)
    return folder


@pytest.fixture
def job(tmp_path: Path, model: Path, lora: Path, s3: Server) -> Callable[..., sb.Manifest]:
    """A factory of this file's manifest; the arguments are the paths of source and output, and overrides."""

    def make(source: str, output: str, *overrides: str) -> sb.Manifest:
        file = write_manifest(
            tmp_path,
            model,
            lora,
            Path(),
            source={"format": "folder" if source.endswith("photos") else "webdataset", "urls": source},
            output={"path": output},
            errors={"max_failed_fraction": 0.5},
            storage={"endpoint": s3.endpoint, "region": s3.storage.region},
        )
        return sb.load(file, overrides)

    return make


@pytest.fixture(scope="module")
def on_disk(sources: Path, model: Path, lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that returns the output of a run with source `photos` or `tars` and output on disk."""
    done: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in done:
            folder = tmp_path_factory.mktemp(f"on-disk-{kind}")
            format, urls = ("folder", "photos") if kind == "photos" else ("webdataset", "tars/{00000..00001}.tar")
            file = write_manifest(
                folder,
                model,
                lora,
                Path(),
                source={"format": format, "urls": f"{sources}/{urls}"},
                errors={"max_failed_fraction": 0.5},
            )
            sb.run(sb.load(file))
            done[kind] = folder / "out"
        return done[kind]

    return get


@pytest.fixture
def bucket(s3: Server, sources: Path) -> str:
    """The URL of a bucket with both sources."""
    url = f"s3://{s3.bucket()}"
    s3.upload(sources, url)
    return url


@pytest.mark.parametrize(("kind", "urls"), [("photos", "photos"), ("tars", "tars/{00000..00001}.tar")])
def test_the_same_manifest_but_for_two_paths_gives_the_same_bytes(
    kind: str,
    urls: str,
    job: Callable[..., sb.Manifest],
    bucket: str,
    s3: Server,
    sources: Path,
    on_disk: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    manifest = job(f"{bucket}/{urls}", f"{bucket}/runs/one")
    twin = job(f"{sources}/{urls}", str(tmp_path / "out"))
    differences = {key for key, value in manifest.dump().items() if value != twin.dump()[key]}
    assert differences == {"source", "output"}

    report = sb.run(manifest)
    assert (report.planned, report.succeeded, report.failed) == (6, 5, 1)
    out = s3.download(f"{bucket}/runs/one", tmp_path / "copy")
    check_end(out, on_disk(kind), without=IN_PLACE)
    assert rows(out)["photo-2"]["url"].startswith(f"{bucket}/{kind}/")
    assert {name for name in Bucket(s3, f"{bucket}/runs/one").names() if "/" not in name} == {
        file.name for file in on_disk(kind).iterdir() if file.is_file()
    }
    assert sb.status(manifest).finished


def test_ray(
    cluster: None,
    job: Callable[..., sb.Manifest],
    bucket: str,
    s3: Server,
    on_disk: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    sb.run(job(f"{bucket}/photos", f"{bucket}/runs/ray", "compute.pool=ray", "compute.workers=2"))
    check_end(s3.download(f"{bucket}/runs/ray", tmp_path / "copy"), on_disk("photos"), without=IN_PLACE)


def test_it_goes_on_where_the_commits_end(
    job: Callable[..., sb.Manifest], bucket: str, s3: Server, on_disk: Callable[[str], Path], tmp_path: Path
) -> None:
    url = f"{bucket}/runs/resumed"
    manifest = job(f"{bucket}/photos", url)
    sb.run(manifest)
    before = commits(s3.download(url, tmp_path / "before"))
    for name in ("_smsbatch/commits/000001.json", "_SUCCESS", "shards/000000.tar", "metrics/000001.parquet"):
        s3.client.delete_object(Bucket=bucket.removeprefix("s3://"), Key=f"runs/resumed/{name}")
    status = sb.status(manifest)
    assert (status.units_done, status.units, status.finished) == (2, 3, False)
    sb.run(manifest)
    out = s3.download(url, tmp_path / "after")
    after = commits(out)
    assert {name for name in before if before[name] != after[name]} == {"000001"}
    check_end(out, on_disk("photos"), without=IN_PLACE)


class TestFaults:
    """Runs through a proxy that injects errors of S3 and of networks."""

    def test_a_bad_day_changes_nothing(
        self,
        job: Callable[..., sb.Manifest],
        bucket: str,
        s3: Server,
        on_disk: Callable[[str], Path],
        tmp_path: Path,
    ) -> None:
        with Faults(s3.endpoint, rate=0.04, seed=4) as proxy:
            for kind in SEEDED:  # every kind at least once in a read, a write and a commit
                proxy.inject(kind, method="GET", part="photos/")
                proxy.inject(kind, method="PUT", part="/_smsbatch/attempts/")
                proxy.inject(kind, method="PUT", part="/_smsbatch/commits/")
            proxy.inject("409", method="PUT", part="/_smsbatch/commits/")
            manifest = job(
                f"{bucket}/photos", f"{bucket}/runs/bad", f"storage.endpoint={proxy.endpoint}", "storage.timeout_s=1"
            )
            report = sb.run(manifest)
            assert set(proxy.injected) >= {*SEEDED, "409"}
        assert report.errors == {"decode_error": 1}, "a fault of the store must not become a sample's"
        out = s3.download(f"{bucket}/runs/bad", tmp_path / "copy")
        check_end(out, on_disk("photos"), without=IN_PLACE)

    def test_a_lost_answer_is_not_a_lost_race(
        self, job: Callable[..., sb.Manifest], bucket: str, s3: Server, tmp_path: Path
    ) -> None:
        """The commit is stored but its answer is lost, so the retry finds a commit: its own."""
        with Faults(s3.endpoint) as proxy:
            proxy.inject("reset_after", times=3, method="PUT", part="/_smsbatch/commits/")
            sb.run(job(f"{bucket}/photos", f"{bucket}/runs/lost", f"storage.endpoint={proxy.endpoint}"))
            assert proxy.injected == {"reset_after": 3}
        out = s3.download(f"{bucket}/runs/lost", tmp_path / "copy")
        attempts = list((out / "_smsbatch" / "attempts").rglob("*.tar"))
        assert len(attempts) == len(commits(out)) == 3
        check_whole(out)

    @pytest.mark.parametrize("fault", ["503", "403"])
    def test_a_store_that_stays_away_ends_the_run_and_keeps_the_commits(
        self,
        fault: str,
        job: Callable[..., sb.Manifest],
        bucket: str,
        s3: Server,
        on_disk: Callable[[str], Path],
        tmp_path: Path,
    ) -> None:
        url = f"{bucket}/runs/away"
        with Faults(s3.endpoint) as proxy:
            proxy.inject(fault, times=1000, method="PUT", part="/_smsbatch/attempts/000002")
            manifest = job(f"{bucket}/photos", url, f"storage.endpoint={proxy.endpoint}", "storage.retries=1")
            with pytest.raises(sb.StorageError, match=rf"{url}/_smsbatch/attempts/000002") as caught:
                sb.run(manifest)
            assert "\n" not in str(caught.value)
            asked = Counter(request.path for request in proxy.requests if request.fault)
            assert set(asked.values()) == {1 if fault == "403" else 2}, "a refusal is final, a fault is not"
        assert commits(s3.download(url, tmp_path / "before")).keys() <= {"000000", "000001"}
        sb.run(job(f"{bucket}/photos", url))
        check_end(s3.download(url, tmp_path / "after"), on_disk("photos"), without=IN_PLACE)

    def test_a_store_without_conditional_writes(
        self,
        job: Callable[..., sb.Manifest],
        bucket: str,
        s3: Server,
        on_disk: Callable[[str], Path],
        tmp_path: Path,
    ) -> None:
        """Only the driver commits, and run.json records this."""
        url = f"{bucket}/runs/plain"
        with Faults(s3.endpoint) as proxy:
            proxy.inject("501", times=1000, conditional=True)
            sb.run(job(f"{bucket}/photos", url, f"storage.endpoint={proxy.endpoint}"))
            assert proxy.injected["501"]
        out = s3.download(url, tmp_path / "copy")
        check_end(out, on_disk("photos"), without=IN_PLACE)
        assert json.loads((out / "run.json").read_text())["commits"] == "driver"


def _cli(
    *arguments: str, env: dict[str, str] | None = None, without: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in without} | (env or {})
    return subprocess.run(
        [sys.executable, "-m", "smsbatch", *arguments], capture_output=True, text=True, env=environment, check=False
    )


@pytest.mark.parametrize("what", ["none", "profile", "wrong"])
def test_credentials_that_are_missing(
    what: str, job: Callable[..., sb.Manifest], bucket: str, s3: Server, tmp_path: Path
) -> None:
    job(f"{bucket}/photos", f"{bucket}/runs/never")
    options = ["--set", "storage.profile=nobody"] if what == "profile" else []
    if what == "wrong":
        with Faults(s3.endpoint) as proxy:
            proxy.inject("403", times=1000)
            ended = _cli("run", str(tmp_path / "manifest.yaml"), "--set", f"storage.endpoint={proxy.endpoint}")
    else:
        ended = _cli(
            "run",
            str(tmp_path / "manifest.yaml"),
            *options,
            env={"HOME": str(tmp_path)},
            without=("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
        )
    assert ended.returncode == 3, ended.stderr
    (line,) = ended.stderr.strip().splitlines()
    assert line.startswith("smsbatch: ")
    assert bucket in line
    assert {"none": "redential", "profile": "nobody", "wrong": "permissions"}[what] in line
    assert not Bucket(s3, f"{bucket}/runs/never").names()


@pytest.mark.slow
def test_no_secret_is_ever_written_or_said(
    job: Callable[..., sb.Manifest], bucket: str, s3: Server, tmp_path: Path
) -> None:
    url = f"{bucket}/runs/secret"
    job(f"{bucket}/photos", url)
    secrets = {"AWS_SECRET_ACCESS_KEY": SECRET, "AWS_SESSION_TOKEN": TOKEN}
    manifest = str(tmp_path / "manifest.yaml")
    life = Life(tmp_path / "manifest.yaml", env=secrets)
    assert life.wait() == 0, life.said
    ends = [
        (("status", manifest, "--json"), 0),
        (("run", manifest, "--set", "source.urls=s3://no-such-bucket/photos", "--set", f"output.path={url}-no"), 2),
        (("run", manifest, "--set", "storage.endpoint=http://127.0.0.1:9", "--set", "storage.retries=0"), 3),
    ]
    texts = [life.said]
    for arguments, code in ends:
        ended = _cli(*arguments, env=secrets)
        assert ended.returncode == code, ended.stderr
        texts.append(ended.stdout + ended.stderr)
    assert all(texts), "each of them says something"
    assert not [text for text in texts if SECRET in text or TOKEN in text]
    written = s3.objects(url)
    assert "run.json" in written
    readable = {**written, **{name: _texts(content, name, tmp_path) for name, content in written.items()}}
    assert not [name for name, content in readable.items() if SECRET.encode() in content or TOKEN.encode() in content]


def test_a_signed_url_of_a_table_stays_in_the_plan(
    job: Callable[..., sb.Manifest], bucket: str, s3: Server, tmp_path: Path
) -> None:
    """The plan needs the signature to fetch the picture; no other file of the run contains it."""
    name = bucket.removeprefix("s3://")
    links = {
        key: s3.client.generate_presigned_url("get_object", Params={"Bucket": name, "Key": f"photos/{key}.png"})
        for key in (*KEYS[:2], "missing")
    }
    signatures = [part for link in links.values() for part in link.split("&") if "ignature" in part]
    assert signatures
    table = "key,url\n" + "".join(f'{key},"{link}"\n' for key, link in links.items())
    s3.client.put_object(Bucket=name, Key="table.csv", Body=table.encode())
    url = f"{bucket}/runs/table"
    manifest = job(
        f"{bucket}/table.csv",
        url,
        "source.format=table",
        "source.columns.key=key",
    )
    report = sb.run(manifest)
    assert (report.planned, report.errors) == (3, {"read_error": 1})
    written = {name: content for name, content in s3.objects(url).items() if not name.startswith("plan/")}
    for secret in {part.partition("=")[2] for part in signatures}:
        leaks = [name for name, content in written.items() if secret.encode() in _texts(content, name, tmp_path)]
        assert not leaks, rows(s3.download(url, tmp_path / "copy"))["missing"]
    out = s3.download(url, tmp_path / "copy")
    assert f"{bucket.replace('s3://', '/')}/photos/{KEYS[0]}.png" in rows(out)[KEYS[0]]["url"]


def _texts(content: bytes, name: str, folder: Path) -> bytes:
    """The content of a file; for Parquet, which is compressed, its rows as JSON."""
    if not name.endswith(".parquet"):
        return content
    file = folder / "look.parquet"
    file.write_bytes(content)
    return json.dumps(pq.ParquetFile(file).read().to_pylist(), default=str).encode()


@pytest.fixture(scope="module")
def cluster(s3: Server) -> Iterator[None]:
    """A local Ray cluster whose actors get the server's credentials from the environment."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()

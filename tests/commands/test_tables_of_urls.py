"""A run on a table of signed URLs over real HTTP; no file outside its plan contains a signature."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from support.jobs import make_photos, pictures, rows, write_manifest

import smsbatch as sb


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The URL of an HTTP server of the pictures of `make_photos`."""
    folder = make_photos(tmp_path / "photos")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def test_is_stylized_and_its_signatures_go_nowhere(tmp_path: Path, model: Path, lora: Path, server: str) -> None:
    lines = ["id,link,text"]
    lines += [f"fox-{n},{server}/photo-{n}.png?X-Amz-Signature=hunter2&v=1,caption {n}" for n in range(3)]
    lines += [f"lost,{server}/nothing.png?X-Amz-Signature=hunter2,gone"]
    (tmp_path / "links.csv").write_text("\n".join(lines) + "\n")
    table = {
        "format": "table",
        "urls": str(tmp_path / "links.csv"),
        "columns": {"image": "link", "caption": "text", "key": "id"},
    }
    manifest = write_manifest(
        tmp_path, model, lora, tmp_path, source=table, errors={"max_failed_fraction": 0.5}, storage={"retries": 0}
    )
    report = sb.run(sb.load(manifest))
    out = tmp_path / "out"
    found = rows(out)
    assert (report.succeeded, report.errors) == (3, {"read_error": 1})
    assert set(pictures(out)) == {"fox-0", "fox-1", "fox-2"}
    assert found["fox-1"]["caption"] == "caption 1"
    assert found["fox-1"]["url"] == f"{server}/photo-1.png?X-Amz-Signature=***&v=1"
    assert "404" in found["lost"]["error_message"] or "Not Found" in found["lost"]["error_message"]
    assert "hunter2" not in str(found)
    written = [file for file in out.rglob("*") if file.is_file() and file.suffix != ".parquet"]
    assert len(written) > 5
    assert not [file for file in written if b"hunter2" in file.read_bytes()]

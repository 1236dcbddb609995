"""`report.html`: its content, the escaping of foreign text, and its behaviour in a real browser."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from support.made_up_run import HOSTILE, MIXED, failed, make_run, picture, stylized

from smsbatch.data import pixels
from smsbatch.report.model import SHOW_ALL, SHOW_END, SHOW_SAMPLE
from smsbatch.report.write import write_report
from smsbatch.runs.run import Run
from smsbatch.storage.store import Store
from smsbatch.text import duration, moment

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """The elements and the visible text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def attributes(self, tag: str, name: str) -> list[str]:
        return [attributes[name] or "" for found, attributes in self.elements if found == tag and name in attributes]


def page(store: Store) -> Page:
    write_report(Run.open(store))
    return Page(store.read("report.html").decode())


def image_of(data_uri: str) -> pixels.Pixels:
    assert data_uri.startswith("data:image/webp;base64,")
    return pixels.decode(base64.b64decode(data_uri.partition(",")[2]), min_side=1)


# ----------------------------------------------------------------------------------------------------------- gallery


def test_a_small_run_is_shown_whole_from_the_lowest_metric_to_the_highest(tmp_path: Path) -> None:
    shown = page(make_run(tmp_path, MIXED)).attributes("img", "alt")
    keys = [outcome.key for outcome in MIXED if outcome.succeeded]
    assert shown == [f"{key}: {what}" for key in keys for what in ("source", "result")]


def test_a_large_run_shows_a_lot_and_both_ends(tmp_path: Path) -> None:
    total = SHOW_ALL + 8
    found = page(make_run(tmp_path, [stylized(n) for n in range(total)]))
    alts = found.attributes("img", "alt")
    keys = [alt.removesuffix(": result") for alt in alts if alt.endswith(": result")]
    lot, lowest, highest = keys[:SHOW_SAMPLE], keys[SHOW_SAMPLE:-SHOW_END], keys[-SHOW_END:]
    assert len(set(lot)) == SHOW_SAMPLE
    assert lot != sorted(lot)
    assert lowest == ["p000", "p001", "p002"]
    assert highest == [f"p{n:03d}" for n in (total - 1, total - 2, total - 3)]


def test_another_seed_draws_another_lot(tmp_path: Path) -> None:
    lots = []
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        store = make_run(tmp_path / str(seed), [stylized(n) for n in range(SHOW_ALL + 8)], seed=seed)
        lots.append(page(store).attributes("img", "alt")[: 2 * SHOW_SAMPLE])
    assert lots[0] != lots[1]


def test_before_is_the_source_as_it_was_fitted_and_after_is_the_result(tmp_path: Path) -> None:
    store = make_run(tmp_path, [stylized(0)], image={"resolution": 32, "fit": "center_crop"})
    before, after = (image_of(uri) for uri in page(store).attributes("img", "src"))
    fitted = pixels.fit(pixels.decode((tmp_path / "in/p000.png").read_bytes()), 32, "center_crop")
    result = pixels.decode(picture(1000))
    assert (before.shape, after.shape) == (fitted.shape, result.shape)
    for found, expected in ((before, fitted), (after, result)):
        assert np.abs(found.astype(int) - expected).mean() < 12  # WebP at quality 80, blocks of flat colour


def test_a_source_that_is_gone_is_said_to_be_gone(tmp_path: Path) -> None:
    store = make_run(tmp_path, [stylized(0), stylized(1)])
    (tmp_path / "in/p000.png").unlink()
    found = page(store)
    assert found.attributes("img", "alt") == ["p000: result", "p001: source", "p001: result"]
    assert "The source can no longer be read." in found.text


def test_a_run_in_which_all_failed_has_a_report(tmp_path: Path) -> None:
    found = page(make_run(tmp_path, [failed(n, "decode_error", "broken") for n in range(5)]))
    assert "No image was stylized, so there is nothing to show." in found.text
    assert "img" not in dict(found.elements)
    assert "5 of 5 images (100 %); the limit was 1 % when the run was planned." in found.text


# -------------------------------------------------------------------------------------------------------------- page


def test_the_page_tells_numbers_failures_settings_and_time(tmp_path: Path) -> None:
    text = " ".join(page(make_run(tmp_path, MIXED)).text)
    for said in (
        "9 of 12 images stylized as “oil painting style”, 20 steps of SMS each",
        "3 of 12 images (25 %); the limit was 1 % when the run was planned.",
        "damaged JPEG data: broken",
        "perhaps cut",
        "identity_weight 0.0005",
        "samples_per_shard 8",
        "median 0.050",
        "3 units by 1 worker",
        "a" * 64,
    ):
        assert said in text


def test_foreign_text_stays_text(tmp_path: Path) -> None:
    found = page(make_run(tmp_path, MIXED))
    tags = [tag for tag, _ in found.elements]
    assert tags.count("script") == 1
    assert found.text.count(HOSTILE) == 2  # a caption and a failure's message
    assert not [name for _, attributes in found.elements for name in attributes if name.startswith("on")]


def test_the_page_fetches_nothing(tmp_path: Path) -> None:
    store = make_run(tmp_path, MIXED)
    found = page(store)
    assert all(source.startswith("data:image/") for source in found.attributes("img", "src"))
    assert not {"link", "iframe", "object", "base"} & {tag for tag, _ in found.elements}
    assert not [attributes for _, attributes in found.elements if "href" in attributes]
    assert b"url(" not in store.read("report.html")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.84, "0.8 s"), (42, "42 s"), (60, "1 min"), (200.4, "3 min 20 s"), (18120, "5 h 2 min"), (370800, "4 d 7 h")],
)
def test_a_duration_reads_in_at_most_two_units(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_moment_is_short() -> None:
    assert moment("2026-11-22T14:18:05+00:00") == "2026-11-22 14:18 UTC"


# ----------------------------------------------------------------------------------------------------------- browser


def in_browser(html: str, folder: Path) -> tuple[Page, str]:
    """The document after Chromium has run it in a narrow window, and the messages of its console."""
    assert CHROMIUM is not None
    file = folder / "page.html"
    file.write_text(html, encoding="utf-8")
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
            *(f"--user-data-dir={folder / 'profile'}", "--window-size=500,900", "--enable-logging=stderr"),
            *("--dump-dom", file.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return Page(done.stdout), "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_browser_runs_our_script_and_no_other(tmp_path: Path) -> None:
    store = make_run(tmp_path, MIXED)
    write_report(Run.open(store))
    html = store.read("report.html").decode()
    found, console = in_browser(html, tmp_path)
    assert found.attributes("html", "class") == ["js"]
    assert console == ""
    # If escaping failed, the content security policy would still block the script.
    broken = html.replace("</header>", f"</header>{HOSTILE}")
    found, console = in_browser(broken, tmp_path)
    assert "made-up: report" in found.text
    assert "owned" not in found.text
    assert "Content Security Policy" in console


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_in_a_browser_the_slider_moves_and_nothing_is_wider_than_a_phone(tmp_path: Path) -> None:
    long = stylized(0, caption="x" * 300, key="p000")
    store = make_run(tmp_path, [long, failed(1, "decode_error", "y" * 300), *MIXED[2:]], name="n" * 90)
    write_report(Run.open(store))
    probe = """<script>
        const slider = document.querySelector("input"), root = document.documentElement;
        slider.value = 80;
        slider.dispatchEvent(new Event("input", { bubbles: true }));
        const cut = getComputedStyle(slider.parentElement.querySelector(".before")).clipPath;
        document.title = `${cut} ${root.scrollWidth - root.clientWidth}`;
    </script></html>"""
    html = re.sub(r"<meta http-equiv=.*", "", store.read("report.html").decode()).replace("</html>", probe)
    found, _ = in_browser(html, tmp_path)
    assert "inset(0px 20% 0px 0px) 0" in found.text

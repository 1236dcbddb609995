"""`report.html`: one self-contained file that reads a `Report` and a gallery aloud.

Contract: a pure function of its arguments. Nothing is fetched: pictures are data URIs, styles and script are inline.
Every text from outside (captions, messages, settings) is escaped, and a content security policy lets run only the style
and script whose hashes it names. Without scripts the slider is two pictures side by side.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping
from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Any

from smsbatch.report.model import duration, moment, rate
from smsbatch.text import count

if TYPE_CHECKING:
    from smsbatch.report.gallery import Group, Picture
    from smsbatch.report.model import Distribution, Report


def render(report: Report, gallery: Iterable[Group]) -> str:
    groups = list(gallery)
    style = _asset("report.css") + _ratio_classes(groups)
    script = _asset("report.js")
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}"
    body = [
        _header(report),
        "<main>",
        _gallery(groups),
        _metrics(report),
        _failures(report),
        _settings(report),
        "</main>",
    ]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(report.name)}: report</title>",
            f"<style>{style}</style>",
            f"<script>{script}</script>",
            *body,
            _footer(report),
            "</html>",
            "",
        ]
    )


# ---------------------------------------------------------------------------------------------------------- sections


def _header(report: Report) -> str:
    work = report.description
    facts = [
        ("images stylized", f"{report.succeeded:,}"),
        ("failed", f"{report.failed:,}"),
        ("shard" if report.shards == 1 else "shards", f"{report.shards:,}"),
        ("from start to end", _with_units(duration(report.wall_seconds))),
        ("of computing", _with_units(duration(report.seconds))),
        ("images", _with_units(rate(report))),
        *((f"median {_title(name)}", f"{one.quantiles['p50']:.3f}") for name, one in report.metrics.items()),
    ]
    return (
        '<header><p class="over">smsbatch report</p>'
        f"<h1>{escape(report.name)}</h1>"
        f'<p class="lede">{report.succeeded:,} of {count(report.planned, "image")} stylized as '
        f"“{escape(work.style)}”, {escape(work.work)}, {moment(report.started)}.</p>"
        f'<dl class="facts">{"".join(f"<div><dt>{escape(k)}</dt><dd>{v}</dd></div>" for k, v in facts)}</dl></header>'
    )


def _gallery(groups: list[Group]) -> str:
    if not any(group.pictures for group in groups):
        return "<section><h2>Pictures</h2><p>No image was stylized, so there is nothing to show.</p></section>"
    hint = '<span class="hint">; drag the line</span>'
    parts = [f'<section><h2>Before and after</h2><p class="note">Left the source, right the result{hint}.</p>']
    for group in groups:
        pictures = "".join(_picture(picture) for picture in group.pictures)
        parts.append(f'<h3>{escape(group.title)}</h3><div class="gallery">{pictures}</div>')
    return "\n".join([*parts, "</section>"])


def _picture(picture: Picture) -> str:
    key = escape(picture.key)
    size = f'width="{picture.width}" height="{picture.height}"'
    if picture.before is None:
        before = '<div class="before lost">The source can no longer be read.</div>'
    else:
        before = f'<img class="before" {size} alt="{key}: source" src="{_data_uri(picture.before)}">'
    values = " ".join(f"{_title(name)} {value:.3f}" for name, value in picture.metrics.items())
    words = f'<div class="words">{escape(picture.caption)}</div>' if picture.caption else ""
    return (
        f'<figure class="{_ratio_class(picture)}"><div class="compare">{before}'
        f'<img class="after" {size} alt="{key}: result" src="{_data_uri(picture.after)}">'
        f'<input type="range" aria-label="{key}: from source to result"></div><figcaption>'
        f'<div class="line"><span class="key">{key}</span><span class="value">{escape(values)}</span></div>'
        f"{words}</figcaption></figure>"
    )


def _metrics(report: Report) -> str:
    parts = []
    for name, one in report.metrics.items():
        numbers = [("mean", one.mean), *one.quantiles.items(), ("lowest", one.low), ("highest", one.high)]
        pairs = _pairs((_QUANTILES.get(label, label), f"{value:.3f}") for label, value in numbers)
        explained = f'<p class="note">{escape(_EXPLAINED[name])}</p>' if name in _EXPLAINED else ""
        parts.append(
            f"<section><h2>{_title(name)}</h2>{explained}"
            f'<div class="metric">{_histogram(name, one)}{pairs}</div></section>'
        )
    return "\n".join(parts)


def _failures(report: Report) -> str:
    if not report.failures:
        return "<section><h2>Failures</h2><p>None: every planned image was stylized.</p></section>"
    allowed = report.settings["errors"]["max_failed_fraction"]
    rows = "".join(
        f'<tr><td class="code"><code>{escape(one.code)}</code></td><td class="number">{one.count:,}</td>'
        f"<td><code>{escape(one.key)}</code><br>{escape(one.message)}</td></tr>"
        for one in report.failures
    )
    return (
        f"<section><h2>Failures</h2><p>{report.failed:,} of {count(report.planned, 'image')} "
        f"({_percent(report.failed / report.planned)}); the limit was {_percent(allowed)} when the run was planned.</p>"
        "<p><code>smsbatch errors</code> lists them all.</p>"
        '<table><thead><tr><th>code</th><th class="number">images</th><th>for example</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></section>"
    )


def _settings(report: Report) -> str:
    loose = {key: value for key, value in report.settings.items() if not isinstance(value, Mapping)}
    sections: dict[str, Mapping[str, Any]] = {"run": loose}
    if report.generator is not None:
        sections["generator"] = report.generator
    sections |= {key: value for key, value in report.settings.items() if isinstance(value, Mapping)}
    sections |= {"versions": report.versions}
    groups = "".join(
        f'<div class="group"><h3>{escape(title)}</h3>{_pairs(_flat(values))}</div>'
        for title, values in sections.items()
    )
    notices = "".join(f"<p>{escape(notice)}</p>" for notice in report.notices)
    notices = f"<h3>Notices</h3>{notices}" if notices else ""
    weights = "".join(
        f"<tr><td>{escape(path)}</td><td><code>{escape(digest)}</code></td></tr>"
        for path, digest in report.weights.items()
    )
    weights = f"<table><thead><tr><th>weights</th><th>SHA-256</th></tr></thead><tbody>{weights}</tbody></table>"
    return f'<section><h2>Settings</h2>{notices}<div class="settings">{groups}</div>{weights}</section>'


def _footer(report: Report) -> str:
    return (
        f"<footer>{count(report.units, 'unit')} by {count(report.workers, 'worker')}, "
        f"{moment(report.started)} to {moment(report.finished)}. The same in rows: <code>metrics/*.parquet</code>, "
        f"one per image, failed ones too.</footer>"
    )


# ------------------------------------------------------------------------------------------------------------ pieces

_QUANTILES = {
    "p05": "5 % below",
    "p25": "a quarter below",
    "p50": "median",
    "p75": "three quarters below",
    "p95": "95 % below",
}
_EXPLAINED = {
    "lpips": "Perceived distance between source and result: 0 is the same picture; "
    "low means little was changed, high that the content may have been lost."
}
_ACRONYMS = {"lpips": "LPIPS"}


def _histogram(name: str, one: Distribution) -> str:
    """Bars, an axis and the median, 400 units wide; the tallest bar is 120 high."""
    width, height, base = 400.0, 120.0, 140.0
    low, high, tallest = one.edges[0], one.edges[-1], max(one.counts)

    def x(value: float) -> float:
        return width * (value - low) / (high - low)

    parts = [f'<svg viewBox="-12 0 424 162" role="img" aria-label="Histogram of {_title(name)}">']
    for left, right, bar in zip(one.edges, one.edges[1:], one.counts, strict=False):
        tall = height * bar / tallest
        parts.append(
            f'<rect class="bar" x="{x(left) + 0.75:.2f}" y="{base - tall:.2f}" width="{x(right) - x(left) - 1.5:.2f}" '
            f'height="{tall:.2f}"><title>{left:.4g} to {right:.4g}: {count(bar, "image")}</title></rect>'
        )
    parts.append(f'<path class="axis" d="M0 {base}H{width}"/>')
    every = max(1, round(len(one.edges) / 6))
    parts += [f'<text x="{x(edge):.2f}" y="{base + 16}">{edge:.4g}</text>' for edge in one.edges[::every]]
    middle = x(one.quantiles["p50"])
    anchor = min(max(middle, 40), width - 40)
    parts.append(
        f'<path class="median" d="M{middle:.2f} 16V{base}"/><text class="label" x="{anchor:.2f}" y="11">median '
        f"{one.quantiles['p50']:.3f}</text></svg>"
    )
    return "".join(parts)


def _pairs(pairs: Iterable[tuple[str, str]]) -> str:
    rows = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in pairs)
    return f'<dl class="pairs">{rows}</dl>'


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            yield f"{prefix}{key}", ", ".join(map(str, value)) or "none"
        else:
            yield f"{prefix}{key}", "none" if value is None else str(value)


def _ratio_class(picture: Picture) -> str:
    return f"r{round(100 * picture.width / picture.height)}"


def _ratio_classes(groups: list[Group]) -> str:
    """A class per aspect ratio instead of style attributes, which the policy would have to allow for every element."""
    names = sorted({_ratio_class(picture) for group in groups for picture in group.pictures})
    return "".join(f".{name} {{ --r: {int(name[1:]) / 100}; }}\n" for name in names)


def _asset(name: str) -> str:
    return resources.files("smsbatch.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _data_uri(image: bytes) -> str:
    kind = "jpeg" if image.startswith(b"\xff\xd8") else "png" if image.startswith(b"\x89PNG") else "webp"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def _title(name: str) -> str:
    return escape(_ACRONYMS.get(name, name))


def _with_units(text: str) -> str:
    """Numbers large, the units after them small."""
    parts = (escape(part) if part[0].isdigit() else f"<small>{escape(part)}</small>" for part in text.split())
    return " ".join(parts)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.3g} %"

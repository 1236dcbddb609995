"""`report.html`: one self-contained file that shows a `Report` and a gallery.

The page is a pure function of its arguments. It fetches nothing: pictures are data URIs, style and script are inline.
Every text from outside (captions, messages, settings) is escaped, and a content security policy allows only the style
and script with the hashes that it lists. Without scripts the slider becomes two pictures side by side.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any

from markupsafe import Markup, escape

from smsbatch.report.gallery import Group, Picture
from smsbatch.report.model import Distribution, Report
from smsbatch.text import count, flat, render_template


def render(report: Report, gallery: Iterable[Group]) -> str:
    groups = list(gallery)
    style, script = _asset("report.css") + _ratio_classes(groups), _asset("report.js")
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}"
    return render_template(
        "report/report.html.jinja",
        {
            "data_uri": _data_uri,
            "histogram": _histogram,
            "numbers": _numbers,
            "percent": lambda fraction: f"{100 * fraction:.3g} %",
            "ratio_class": _ratio_class,
            "small_units": _small_units,
            "title": _title,
        },
        report=report,
        work=report.description,
        groups=groups,
        explained=_EXPLAINED,
        settings=_settings(report),
        policy=Markup(policy),
        style=Markup(style),
        script=Markup(script),
    )


def _settings(report: Report) -> dict[str, Mapping[str, str]]:
    """The sections of the settings; nested keys are joined by dots."""
    loose = {key: value for key, value in report.settings.items() if not isinstance(value, Mapping)}
    sections: dict[str, Any] = {"run": loose}
    if report.generator is not None:
        sections["generator"] = report.generator
    sections |= {key: value for key, value in report.settings.items() if isinstance(value, Mapping)}
    sections |= {"versions": report.versions}
    return {title: {key: _shown(value) for key, value in flat(values).items()} for title, values in sections.items()}


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _numbers(one: Distribution) -> Iterable[tuple[str, str]]:
    numbers = [("mean", one.mean), *one.quantiles.items(), ("lowest", one.low), ("highest", one.high)]
    return [(_QUANTILES.get(label, label), f"{value:.3f}") for label, value in numbers]


_QUANTILES = {
    "p05": "5 % below",
    "p25": "a quarter below",
    "p50": "median",
    "p75": "three quarters below",
    "p95": "95 % below",
}
_EXPLAINED = {
    "lpips": "Perceptual distance between source and result. 0 is the same picture; a low value means that little has "
    "changed, a high one that the content may be lost."
}
_ACRONYMS = {"lpips": "LPIPS"}


def _histogram(one: Distribution, name: str) -> Markup:
    """An SVG of bars, an axis and the median, 400 units wide; the tallest bar is 120 units high.

    `report/model.py` counts the values of each bar.
    """
    width, height, base = 400.0, 120.0, 140.0
    low, high, tallest = one.edges[0], one.edges[-1], max(one.counts)

    def x(value: float) -> float:
        return width * (value - low) / (high - low)

    parts = [f'<svg viewBox="-12 0 424 162" role="img" aria-label="Histogram of {escape(_title(name))}">']
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
    return Markup("".join(parts))


def _ratio_class(picture: Picture) -> str:
    return f"r{round(100 * picture.width / picture.height)}"


def _ratio_classes(groups: list[Group]) -> str:
    """A class per aspect ratio, because the policy forbids style attributes."""
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
    return _ACRONYMS.get(name, name)


def _small_units(text: str) -> Markup:
    """Numbers in normal size, the units after them small."""
    parts = (escape(part) if part[0].isdigit() else Markup("<small>{}</small>").format(part) for part in text.split())
    return Markup(" ").join(parts)

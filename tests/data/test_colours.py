"""Colours: a picture in another colour space comes out as its sRGB original, in every container and mode.

The profiles are built here from published primaries (ICC.1:2010, section 7 and 8), the pictures by the formulas of the
colour spaces in float64; neither uses LittleCMS.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageCms

from smsbatch.data.pixels import decode
from smsbatch.errors import SampleError

Array = npt.NDArray[np.float64]

SRGB = [(0.64, 0.33), (0.30, 0.60), (0.15, 0.06)]
P3 = [(0.68, 0.32), (0.265, 0.69), (0.15, 0.06)]
SPACES: dict[str, tuple[list[tuple[float, float]], float]] = {
    "display-p3": (P3, 2.2),
    "adobe-rgb": ([(0.64, 0.33), (0.21, 0.71), (0.15, 0.06)], 2.19921875),
    "wide-gamut": ([(0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001)], 1.8),
    "linear": (SRGB, 1.0),
}
_CONES = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
_SCALE = np.diag((_CONES @ [0.9642, 1, 0.8249]) / (_CONES @ [0.95047, 1, 1.08883]))
ADAPT = np.linalg.inv(_CONES) @ _SCALE @ _CONES  # XYZ from white point D65 to D50 (Bradford)
# Skin, foliage, sky, brick.
SCENE = np.kron(
    np.array([[[224, 172, 140], [60, 140, 50]], [[90, 150, 220], [180, 60, 50]]], np.uint8),
    np.ones((24, 24, 1), np.uint8),
)


def light(levels: npt.NDArray[Any]) -> Array:
    """sRGB levels in [0, 255] as linear light."""
    part = levels / 255
    return np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)


def to_xyz(primaries: list[tuple[float, float]]) -> Array:
    """Linear RGB to XYZ, white point D65."""
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
    return columns * np.linalg.solve(columns, [0.95047, 1, 1.08883])


def stored(space: str, bits: int = 8) -> npt.NDArray[Any]:
    """The levels that `space` has for SCENE."""
    primaries, gamma = SPACES[space]
    linear = light(SCENE) @ (np.linalg.inv(to_xyz(primaries)) @ to_xyz(SRGB)).T
    levels = np.rint((2**bits - 1) * linear.clip(0, 1) ** (1 / gamma))
    return levels.astype(np.uint8 if bits == 8 else np.uint16)


def fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def icc(space: bytes, tags: Mapping[bytes, bytes], connection: bytes = b"XYZ ", kind: bytes = b"mntr") -> bytes:
    """An ICC profile of version 2.4."""
    text = b"test\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78),
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": b"XYZ \0\0\0\0" + b"".join(map(fixed, (0.9642, 1, 0.8249))),
        **tags,
    }
    table, body = b"", b""
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += struct.pack(">4sII", name, 132 + 12 * len(tags) + len(body), len(content))
        body += content
    head = struct.pack(">I4xI4s4s4s12x4s", 132 + len(table) + len(body), 0x02400000, kind, space, connection, b"acsp")
    head += bytes(28) + b"".join(map(fixed, (0.9642, 1, 0.8249)))
    return head + bytes(128 - len(head)) + struct.pack(">I", len(tags)) + table + body


def curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def rgb_profile(space: str) -> bytes:
    primaries, gamma = SPACES[space]
    tags = {}
    for name, column in zip((b"r", b"g", b"b"), (ADAPT @ to_xyz(primaries)).T, strict=True):
        tags[name + b"XYZ"] = b"XYZ \0\0\0\0" + b"".join(map(fixed, column))
        tags[name + b"TRC"] = curve(gamma)
    return icc(b"RGB ", tags)


def grey_profile(gamma: float) -> bytes:
    return icc(b"GRAY", {b"kTRC": curve(gamma)})


def cmyk_profile() -> bytes:
    """Ink of which cyan alone is L 50, a 0, b -40, magenta alone L 50, a 60, b 0, and so on: a table of two points."""
    paper, inks = np.array([255, 128, 128]), [(128, 128, 88), (128, 188, 128), (230, 128, 208), (30, 128, 128)]
    corners = []
    for corner in range(16):
        lab = paper.astype(float)
        for ink, change in enumerate(inks):
            if corner >> (3 - ink) & 1:
                lab = np.array([lab[0] * change[0] / 255, lab[1] + change[1] - 128, lab[2] + change[2] - 128])
        corners.append(np.rint(lab).clip(0, 255).astype(np.uint8).tobytes())
    ramp = bytes(range(256))
    head = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + b"".join(map(fixed, (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    return icc(b"CMYK", {b"A2B0": head + ramp * 4 + b"".join(corners) + ramp * 3}, b"Lab ", b"prtr")


def from_lab(lightness: float, a: float, b: float) -> Array:
    """sRGB levels of a colour in CIE 1976 L*a*b*, white point D50."""
    middle = (lightness + 16) / 116
    parts = np.array([middle + a / 500, middle, middle - b / 200])
    cubes = np.where(parts > 6 / 29, parts**3, 3 * (6 / 29) ** 2 * (parts - 4 / 29)) * [0.9642, 1, 0.8249]
    linear = (np.linalg.inv(ADAPT @ to_xyz(SRGB)) @ cubes).clip(0, 1)
    levels: Array = 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return levels


def saved(image: Image.Image, format: str, profile: bytes = b"", **options: Any) -> bytes:
    sink = io.BytesIO()
    lossless: dict[str, dict[str, Any]] = {
        "JPEG": {"quality": 100} | ({"subsampling": 0} if image.mode == "RGB" else {}),
        "WEBP": {"lossless": True},
        "AVIF": {"quality": 100, "subsampling": "4:4:4"},
    }
    image.save(sink, format, **lossless.get(format, {}), **({"icc_profile": profile} if profile else {}), **options)
    data = sink.getvalue()
    if profile and format == "GIF":  # Pillow does not write it
        table = 13 + 3 * 2 ** ((data[10] & 7) + 1)
        parts = [profile[at : at + 255] for at in range(0, len(profile), 255)]
        blocks = b"".join(bytes([len(part)]) + part for part in parts)
        data = data[:table] + b"!\xff\x0bICCRGBG1012" + blocks + b"\0" + data[table:]
    if profile and format == "JPEG2000":  # nor this: replace the box `colr`, and the length of the one around it
        at, around = data.index(b"colr") - 4, data.index(b"jp2h") - 4
        box = struct.pack(">I4sBBB", 11 + len(profile), b"colr", 2, 0, 0) + profile
        old = int.from_bytes(data[at : at + 4])
        whole = struct.pack(">I", int.from_bytes(data[around : around + 4]) + len(box) - old)
        data = data[:around] + whole + data[around + 4 : at] + box + data[at + old :]
    return data


def error(data: bytes, expected: npt.NDArray[Any]) -> tuple[float, float]:
    """Mean and largest difference in levels."""
    difference = np.abs(decode(data).astype(float) - expected)
    return float(difference.mean()), float(difference.max())


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "GIF", "JPEG2000"])
def test_a_profile_is_converted_in_every_container(format: str, space: str) -> None:
    picture = Image.fromarray(stored(space))
    if format == "GIF":
        picture = picture.quantize(4)
    mean, largest = error(saved(picture, format, rgb_profile(space)), SCENE)
    assert mean <= 2
    assert largest <= 9
    unread = np.abs(stored(space).astype(float) - SCENE).mean()
    assert unread > 6, "without conversion the picture is clearly off"


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "P transparent", "RGB transparent"])
def test_a_profile_is_converted_in_every_mode_of_rgb(mode: str) -> None:
    picture, options = Image.fromarray(stored("wide-gamut")), {}
    expected = SCENE.copy()
    if mode == "RGBA":
        picture.putalpha(Image.fromarray(np.repeat([[255] * 24 + [0] * 24], 48, 0).astype(np.uint8)))
        expected[:, 24:] = 255
    if mode.startswith("P"):
        picture = picture.quantize(4)
    if mode == "P transparent":
        options["transparency"] = picture.getpixel((0, 0))
        expected[:24, :24] = 255
    if mode == "RGB transparent":
        options["transparency"] = picture.getpixel((47, 47))
        expected[24:, 24:] = 255
    _, largest = error(saved(picture, "PNG", rgb_profile("wide-gamut"), **options), expected)
    assert largest <= 2


def test_half_transparent_colours_are_converted_before_they_lie_over_white() -> None:
    picture = Image.fromarray(stored("linear"))
    picture.putalpha(128)
    over_white = SCENE * (128 / 255) + 255 * (127 / 255)
    assert error(saved(picture, "PNG", rgb_profile("linear")), over_white)[1] <= 3


GREY = np.rint(np.linspace(0, 255, 48))[None].repeat(48, 0).astype(np.uint8)


@pytest.mark.parametrize(
    ("mode", "format"),
    [
        *(("L", format) for format in ("JPEG", "PNG", "TIFF")),
        *((mode, format) for mode in ("LA", "I;16") for format in ("PNG", "TIFF")),
        *((mode, "PNG") for mode in ("L transparent", "I;16 transparent")),
    ],
)
def test_a_grey_profile_is_converted_in_every_mode_of_grey(mode: str, format: str) -> None:
    linear = light(GREY)
    expected = GREY.astype(float)
    options: dict[str, Any] = {}
    wide = np.rint(65535 * linear).astype(np.uint16)
    image = Image.fromarray(wide if mode.startswith("I") else np.rint(255 * linear).astype(np.uint8))
    if mode == "LA":
        image.putalpha(Image.fromarray(np.where(GREY > 128, 255, 0).astype(np.uint8)))
        expected[GREY <= 128] = 255
    if mode.endswith("transparent"):
        options["transparency"] = image.getpixel((10, 0))
        expected[np.asarray(image) == options["transparency"]] = 255
    found = decode(saved(image, format, grey_profile(1.0), **options)).astype(float)
    if mode.startswith("I"):  # exact also in the dark, where 8 linear bits have one level for thirteen of sRGB
        assert np.abs(found - expected[..., None]).max() <= 1
    else:
        assert np.abs(found - expected[..., None])[:, 20:].max() <= 4
    assert np.abs(255 * linear - GREY).mean() > 30


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk_is_converted_by_its_profile(format: str) -> None:
    inks = Image.new("CMYK", (32, 32), (255, 0, 0, 0))
    assert decode(saved(inks, format))[0, 0].tolist() == [0, 255, 255], "the plain formula, without a profile"
    found = decode(saved(inks, format, cmyk_profile()))[0, 0]
    assert np.abs(found - from_lab(128 / 255 * 100, 0, -40)).max() <= 3


@pytest.mark.parametrize(
    ("picture", "profile"),
    [
        pytest.param(
            Image.fromarray(SCENE), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), id="sRGB"
        ),
        pytest.param(Image.fromarray(SCENE), b"", id="none"),
        pytest.param(Image.fromarray(SCENE), b"\0", id="a byte"),
        pytest.param(Image.fromarray(SCENE), b"no profile at all" * 20, id="text"),
        pytest.param(Image.fromarray(SCENE), rgb_profile("linear")[:200], id="cut"),
        pytest.param(Image.fromarray(SCENE), rgb_profile("linear")[:128] + bytes(400), id="without tags"),
        pytest.param(Image.fromarray(SCENE), icc(b"RGB ", {}), id="without curves"),
        pytest.param(Image.fromarray(SCENE), grey_profile(1.0), id="grey, of a colour picture"),
        pytest.param(Image.fromarray(SCENE), cmyk_profile(), id="CMYK, of a colour picture"),
        pytest.param(Image.new("CMYK", (32, 32), (9, 80, 7, 60)), rgb_profile("linear"), id="RGB, of CMYK"),
        pytest.param(Image.fromarray(GREY), cmyk_profile(), id="CMYK, of grey"),
    ],
)
def test_a_profile_that_says_nothing_leaves_the_pixels(picture: Image.Image, profile: bytes) -> None:
    format = "TIFF"
    assert np.array_equal(decode(saved(picture, format, profile)), decode(saved(picture, format)))


def test_a_grey_picture_with_a_colour_profile_is_converted() -> None:
    levels = np.rint(255 * light(GREY)).astype(np.uint8)
    found = decode(saved(Image.fromarray(levels), "PNG", rgb_profile("linear"))).astype(float)
    assert np.abs(found - GREY[..., None])[:, 20:].max() <= 4


def with_chunk(data: bytes, name: bytes, content: bytes) -> bytes:
    """A PNG with one more chunk before its pixels."""
    chunk = struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return data[:33] + chunk + data[33:]


def with_nclx(data: bytes, primaries: int, transfer: int) -> bytes:
    """An AVIF with other values in its box `nclx`."""
    at = data.index(b"colrnclx") + 8
    return data[:at] + struct.pack(">HH", primaries, transfer) + data[at + 4 :]


def in_p3() -> npt.NDArray[np.uint8]:
    """SCENE in Display P3, whose curve is that of sRGB."""
    linear = (light(SCENE) @ (np.linalg.inv(to_xyz(P3)) @ to_xyz(SRGB)).T).clip(0, 1)
    return np.rint(255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)).astype(
        np.uint8
    )


@pytest.mark.parametrize("format", ["PNG", "AVIF"])
def test_coded_primaries_are_converted(format: str) -> None:
    def coded(pixels: npt.NDArray[np.uint8], primaries: int, transfer: int) -> bytes:
        data = saved(Image.fromarray(pixels), format)
        if format == "AVIF":
            return with_nclx(data, primaries, transfer)
        return with_chunk(data, b"cICP", bytes([primaries, transfer, 0, 1]))

    assert error(coded(in_p3(), 12, 13), SCENE)[1] <= 6
    assert error(coded(SCENE, 1, 13), SCENE)[1] <= 6
    for hdr in ((9, 16), (9, 18), (1, 8), (11, 13)):
        with pytest.raises(SampleError, match=f"HDR or rare .cICP {hdr[0]}/{hdr[1]}., convert it to sRGB"):
            decode(coded(SCENE, *hdr))


@pytest.mark.parametrize(
    ("gamma", "also", "converted"),
    [
        (1.0, None, True),
        (1 / 1.8, None, True),
        (1 / 2.2, None, False),
        (0.45455, None, False),
        (1.0, b"sRGB", False),
        (0.0, None, False),
        (90.0, None, False),
    ],
)
def test_gamma_of_a_png(gamma: float, also: bytes | None, converted: bool) -> None:
    levels = np.rint(255 * light(SCENE) ** gamma).astype(np.uint8) if converted else SCENE
    data = with_chunk(saved(Image.fromarray(levels), "PNG"), b"gAMA", struct.pack(">I", round(gamma * 100_000)))
    data = with_chunk(data, also, b"\0") if also else data
    assert error(data, SCENE)[1] <= (4 if converted else 0)
    assert not converted or np.abs(levels.astype(float) - SCENE).mean() > 6


def test_a_profile_comes_before_gamma_and_coded_colours_before_a_profile() -> None:
    """The order of the PNG specification, third edition, section 4.3."""
    data = saved(Image.fromarray(stored("wide-gamut")), "PNG", rgb_profile("wide-gamut"))
    assert error(with_chunk(data, b"gAMA", struct.pack(">I", 100_000)), SCENE)[1] <= 2
    assert error(with_chunk(data, b"cICP", bytes([1, 13, 0, 1])), stored("wide-gamut"))[1] == 0


def png(mode: int, bits: int, rows: npt.NDArray[Any], *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of any kind, with chunks before its pixels; `rows` are the bytes of each row."""
    height, width = rows.shape[0], rows.shape[1] * 8 // (bits * {0: 1, 2: 3, 4: 2}[mode])

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    head = struct.pack(">IIBBBBB", width, height, bits, mode, 0, 0, 0)
    extra = b"".join(chunk(*one) for one in chunks)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def iccp(profile: bytes) -> tuple[bytes, bytes]:
    return b"iCCP", b"p\0\0" + zlib.compress(profile)


def test_grey_of_16_bits_with_alpha_is_converted() -> None:
    """Pillow opens it as RGBA."""
    level = round(65535 * float(light(np.array(133))))
    pixels = np.tile(np.array([level, 65535], ">u2").view(np.uint8), (32, 32))
    assert decode(png(4, 16, pixels, iccp(grey_profile(1.0))))[0, 0].tolist() == pytest.approx([133] * 3, abs=2)
    grey = Image.fromarray(np.full((32, 32), round(255 * float(light(np.array(133)))), np.uint8))
    webp = saved(grey.convert("RGB"), "WEBP", grey_profile(1.0))
    assert decode(webp)[0, 0].tolist() == pytest.approx([133] * 3, abs=4)


def test_gamma_does_not_replace_a_profile() -> None:
    gamma = b"gAMA", struct.pack(">I", 100_000)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels = np.tile(np.array([200, 60, 40], np.uint8), (32, 32))
    for profile in (srgb, rgb_profile("linear")[:200]):
        assert decode(png(2, 8, pixels, iccp(profile), gamma))[0, 0].tolist() == [200, 60, 40]
    assert decode(png(2, 8, pixels, gamma))[0, 0].tolist() != [200, 60, 40]


@pytest.mark.parametrize(
    ("mode", "bits", "row", "key"),
    [
        (0, 1, [0b10101010] * 4, 1),
        (0, 2, [0b01_00_01_00] * 8, 1),
        (0, 4, [0x10] * 16, 1),
        (0, 8, [7, 0] * 16, 7),
        (0, 16, [1, 200, 0, 0] * 16, 456),
        (2, 16, [1, 9, 2, 9, 3, 9, 0, 0, 0, 0, 0, 0] * 16, (265, 521, 777)),
    ],
)
def test_one_transparent_level_at_every_depth(mode: int, bits: int, row: list[int], key: Any) -> None:
    keys = key if isinstance(key, tuple) else (key,)
    pixels = np.tile(np.array(row, np.uint8), (32, 1))
    found = decode(png(mode, bits, pixels, (b"tRNS", struct.pack(f">{len(keys)}H", *keys))))
    assert found[0, :2].tolist() == [[255] * 3, [0] * 3]

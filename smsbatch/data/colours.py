"""Colours are converted to sRGB by what the file says of them, the first of these that it has:

    ICC profile     LittleCMS, relative colorimetric with black point compensation; grey at 16 bits if it has them
    cICP, nclx      primaries of sRGB, Display P3 and BT.2020 with a curve of standard range; others, which are HDR, are
                    a decode_error. In a PNG it comes before the profile, as its specification demands.
    gAMA            of a PNG without the chunk sRGB or a profile: the curve; cHRM is not read

A profile that is broken, empty, of another kind of pixels or within 2 levels of sRGB leaves the pixels as they are.
CMYK without a profile is converted by the plain formula. Transparency (alpha, tRNS of palettes, grey and RGB) is taken
before any conversion, and the result lies over white. EXIF and tags of TIFF are not asked for colours.
"""

from __future__ import annotations

import io
import re
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageCms

COLOURS = "to sRGB by ICC profile, cICP or gAMA; relative colorimetric, black point compensation"
"""What `decode` does with colours, for `run.json`: runs that differ in this are not mixed."""

_SRGB = ImageCms.createProfile("sRGB")
_LIKE_SRGB = 2  # levels
# Linear RGB of these primaries (ITU-T H.273) to linear sRGB, both with white point D65; None: those of sRGB.
_PRIMARIES: dict[int, npt.NDArray[np.float64] | None] = {
    **dict.fromkeys((1, 2, 5, 6, 7)),  # BT.709, unspecified, and BT.601, which is close
    9: np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]),  # BT.2020
    12: np.array([[1.2249, -0.2247, 0.0], [-0.0420, 1.0419, 0.0], [-0.0197, -0.0786, 1.0979]]),  # Display P3
}
_STANDARD_RANGE = (1, 2, 6, 13, 14, 15)  # transfer functions that are shown as that of sRGB


def opaque(image: Image.Image, data: bytes) -> Image.Image:
    """The picture in sRGB, over white where it is transparent; `data` is its file."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    coded, info = _coded(image, data), image.info
    profile = None if coded and image.format == "PNG" else _profile(image, data)
    image, alpha = _apart(image, data)
    rgb = _converted(image, profile) if profile else None
    if rgb is None:
        rgb = _eight_bits(image).convert("RGB")
        if coded and not profile:
            rgb = _from_primaries(rgb, *coded)
        elif not {"srgb", "icc_profile"} & info.keys() and isinstance(gamma := info.get("gamma"), float):
            rgb = _from_gamma(rgb, gamma)
    if alpha is None:
        return rgb
    rgb.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", rgb.size, "white"), rgb).convert("RGB")


def is_grey_in_colour(image: Image.Image, data: bytes) -> bool:
    """True if a profile for grey belongs to a picture that Pillow has opened in colour, such as grey of 16 bits with
    alpha: only the whole picture shows whether it is grey."""
    return image.mode in ("RGB", "RGBA") and _space(_profile(image, data)) == "GRAY"


def _apart(image: Image.Image, data: bytes) -> tuple[Image.Image, Image.Image | None]:
    """The colours without alpha, and the alpha channel; None for an opaque picture."""
    if not image.has_transparency_data:
        return image.convert("RGB") if image.mode == "P" else image, None
    level = image.info.get("transparency")
    if image.mode.startswith("I"):  # grey of 16 bits with one transparent level
        return image, Image.fromarray(np.where(np.asarray(image) == level, 0, 255).astype(np.uint8))
    bits = data[24] if image.format == "PNG" and len(data) > 24 else 8
    if image.mode == "L" and isinstance(level, int) and bits in (2, 4):  # Pillow scales the pixels, but not this
        image.info["transparency"] = level * 255 // (2**bits - 1)
    elif image.mode == "RGB" and isinstance(level, tuple) and bits == 16:
        image.info["transparency"] = tuple(part >> 8 for part in level)
    grey = image.mode in ("1", "L", "LA", "La")
    image = image.convert("LA" if grey else "RGBA")
    return image.convert("L" if grey else "RGB"), image.getchannel("A")


def _eight_bits(image: Image.Image) -> Image.Image:
    if not image.mode.startswith("I"):
        return image
    levels = np.asarray(image).astype(np.int64).clip(0, 65535)  # 16 bits, whatever the container; 65535 / 257 = 255
    return Image.fromarray(((levels + 128) // 257).astype(np.uint8))


def _converted(image: Image.Image, profile: bytes) -> Image.Image | None:
    """The picture by its ICC profile as RGB; None if the profile says nothing about its pixels."""
    space = _space(profile)
    if space == "GRAY" and image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray(levels.astype(np.uint16))
    elif space == "GRAY" and (image.mode in ("1", "L") or _is_grey(image)):
        image = image.convert("L") if image.mode == "1" else image.getchannel(0)
    elif space == "RGB " and image.mode != "CMYK":
        image = _eight_bits(image).convert("RGB")
    elif space != {"CMYK": "CMYK", "LAB": "Lab "}.get(image.mode):
        return None
    transform = _transform(profile, image.mode)
    return None if transform is None else ImageCms.applyTransform(image, transform)


def _is_grey(image: Image.Image) -> bool:
    if image.mode != "RGB":
        return False
    red, green, blue = image.split()
    return ImageChops.difference(red, green).getbbox() is None and ImageChops.difference(red, blue).getbbox() is None


def _space(profile: bytes) -> str:
    """The colour space of the pixels that an ICC profile is for, by its header; '' for no profile."""
    return profile[16:20].decode("latin-1") if profile[36:40] == b"acsp" else ""


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The conversion of pixels of this mode to sRGB; None if the profile is broken, or nearly sRGB."""
    # LittleCMS would interpolate grey of 16 bits in a coarse table, which is 10 levels off in the dark.
    exact = ImageCms.Flags.NOOPTIMIZE if mode == "I;16" else ImageCms.Flags.NONE
    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            _SRGB,
            mode,
            "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION | exact,
        )
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    if mode in ("RGB", "L"):
        levels = np.arange(0, 256, 15, dtype=np.uint8)
        cube = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 1, 3)
        probe = Image.fromarray(cube if mode == "RGB" else levels[None])
        changed = np.asarray(ImageCms.applyTransform(probe, transform)).astype(int)
        if np.abs(changed - np.asarray(probe.convert("RGB"))).max() <= _LIKE_SRGB:
            return None
    return transform


def _profile(image: Image.Image, data: bytes) -> bytes:
    """The ICC profile in a file, b'' if it has none. Pillow does not read those of GIF and JPEG 2000."""
    if image.format == "GIF" and (found := re.search(rb"!\xff\x0bICCRGBG1012", data)):
        blocks, at = b"", found.end()
        while at < len(data) and data[at]:
            blocks += data[at + 1 : at + 1 + data[at]]
            at += 1 + data[at]
        return blocks
    if image.format == "JPEG2000" and (found := re.search(rb"colr\x02..", data, re.DOTALL)):
        length = int.from_bytes(data[found.end() : found.end() + 4])
        return data[found.end() : found.end() + length]
    profile = image.info.get("icc_profile")
    return profile if isinstance(profile, bytes) else b""


def _coded(image: Image.Image, data: bytes) -> tuple[int, int] | None:
    """Primaries and transfer function (ITU-T H.273) of a PNG's cICP or an AVIF's nclx, if it has them."""
    if image.format == "PNG":
        found = re.search(rb"\0\0\0\x04cICP(.)(.)", data[: data.find(b"IDAT")], re.DOTALL)
        return (found[1][0], found[2][0]) if found else None
    found = re.search(rb"colrnclx(..)(..)", data, re.DOTALL) if image.format == "AVIF" else None
    return (int.from_bytes(found[1]), int.from_bytes(found[2])) if found else None


def _from_primaries(rgb: Image.Image, primaries: int, transfer: int) -> Image.Image:
    if primaries not in _PRIMARIES or transfer not in _STANDARD_RANGE:
        raise ValueError(f"its colours are HDR or rare (cICP {primaries}/{transfer}), convert it to sRGB")
    matrix = _PRIMARIES[primaries]
    if matrix is None:
        return rgb
    light = _light(np.arange(256) / 255)[np.asarray(rgb)] @ matrix.T
    return Image.fromarray(np.rint(255 * _curve(light.clip(0, 1))).astype(np.uint8))


def _from_gamma(rgb: Image.Image, gamma: float) -> Image.Image:
    """`gamma` is the exponent by which light became levels: 1 / 2.2 is that of sRGB, nearly."""
    if not 0.1 <= gamma <= 2 or abs(gamma - 1 / 2.2) < 0.01:
        return rgb
    levels = np.rint(255 * _curve((np.arange(256) / 255) ** (1 / gamma))).astype(int)
    return rgb.point([*levels] * 3)


def _light(levels: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Linear light of sRGB levels, both in [0, 1] (IEC 61966-2-1)."""
    return np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)


def _curve(light: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """sRGB levels of linear light, the inverse of `_light`."""
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)

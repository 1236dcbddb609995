"""The one door to PIL: bytes to arrays and back. A picture here is uint8 [H, W, 3], sRGB values, upright, opaque.

Whatever a file may hold becomes such an array or a SampleError: decode_error (not a picture, or damaged anywhere),
too_small, too_large (known from the header, before any memory is spent), encode_error.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from math import log

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from smsbatch.errors import SampleError

__all__ = [
    "FITS",
    "FORMATS",
    "MAX_PIXELS",
    "MIN_SIDE",
    "Pixels",
    "crop",
    "decode",
    "encode",
    "fit",
    "fitted",
    "size",
    "thumbnail",
]

Pixels = npt.NDArray[np.uint8]

MIN_SIDE = 16
MAX_PIXELS = 89_478_485  # PIL's own limit of a bomb: 256 MiB of pixels
FITS = ("short_side", "center_crop", "bucket", "none")
_OVER = 1.05  # of resolution x resolution: the area that a bucket may have
FORMATS = {"webp": "WEBP", "png": "PNG", "jpg": "JPEG"}

# Pictures only: PIL also opens documents, some by starting other programs (EPS runs ghostscript).
_READABLE = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")

Image.init()  # registers all of them; PIL does so by itself only after the common ones have failed

# What PIL's decoders raise on damaged files, by experience and by its source; all of it means the same to us.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
)

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LYING = (5, 6, 7, 8)  # those that swap width and height


def decode(data: bytes, *, min_side: int = MIN_SIDE, max_pixels: int = MAX_PIXELS) -> Pixels:
    """The picture in a file, turned as its EXIF says; alpha over white, 16 bits to 8, an animation's first frame."""
    with _opened(data, min_side, max_pixels) as image:
        image.load()  # all of it: a header proves nothing
        return np.array(_rgb(_upright(image)))


def size(data: bytes, *, min_side: int = MIN_SIDE, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) of what `decode` will make of it, by the header alone: a PNG whose EXIF stands behind its pixels
    may be turned after all."""
    with _opened(data, min_side, max_pixels) as image:
        width, height = image.size
        known = image.format != "PNG" or "exif" in image.info
        # PIL gives a TIFF's size as it will be.
        turned = known and image.format != "TIFF" and _orientation(image) in _LYING
        return (height, width) if turned else (width, height)


@contextmanager
def _opened(data: bytes, min_side: int, max_pixels: int) -> Iterator[Image.Image]:
    """The file with its header read, if it is a picture of that size; what goes wrong with it inside is damage."""
    if not data:
        raise SampleError("decode_error", "an empty file (0 bytes)")
    with warnings.catch_warnings():
        # PIL warns of odd metadata, which costs us nothing, and of sizes, which are judged here. The filters belong to
        # all threads: of two that decode at once one may leave them like this, and some warning goes unseen.
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data), formats=_READABLE) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise SampleError("too_large", f"{width} x {height} is over the limit of {max_pixels} pixels")
                if min(width, height) < min_side:
                    raise SampleError("too_small", f"{width} x {height} is under the limit of {min_side} pixels a side")
                yield image
        except Image.DecompressionBombError as error:
            raise SampleError("too_large", f"{error}; the limit here is {max_pixels} pixels") from error
        except UnidentifiedImageError as error:
            raise SampleError("decode_error", "not a picture in a known format") from error
        except _DAMAGE as error:
            raise SampleError("decode_error", f"damaged: {error}") from error


def fit(pixels: Pixels, resolution: int, mode: str = "short_side") -> Pixels:
    """Resize, antialiased and never distorted; what becomes of a picture depends on its own size alone.

    `short_side` to that length, aspect kept; `center_crop` then cuts a square; `bucket` covers the nearest of a few
    sizes and cuts the rest, alike on both sides; or `none`.
    """
    if mode not in FITS:
        raise ValueError(f"unknown fit {mode!r}, expected one of {', '.join(FITS)}")
    if mode == "none":
        return pixels
    height, width = pixels.shape[:2]
    if mode == "bucket":
        return _cover(pixels, _bucket(width, height, resolution))
    scaled = _short_side(width, height, resolution)
    if scaled != (width, height):
        kernel = _kernel(resolution / min(height, width))
        pixels = np.array(Image.fromarray(pixels).resize(scaled, kernel))
    if mode == "center_crop":
        left, top = (scaled[0] - resolution) // 2, (scaled[1] - resolution) // 2
        pixels = np.ascontiguousarray(pixels[top : top + resolution, left : left + resolution])
    return pixels


def fitted(width: int, height: int, resolution: int, mode: str = "short_side") -> tuple[int, int]:
    """(width, height) that `fit` gives a picture of this size; the same SampleError."""
    if mode == "none":
        return width, height
    if mode == "bucket":
        return _bucket(width, height, resolution)
    scaled = _short_side(width, height, resolution)
    return (resolution, resolution) if mode == "center_crop" else scaled


def _short_side(width: int, height: int, resolution: int) -> tuple[int, int]:
    scale = resolution / min(height, width)
    scaled = (resolution, round(height * scale)) if width <= height else (round(width * scale), resolution)
    if scaled[0] * scaled[1] > MAX_PIXELS:
        became = f"{scaled[0]} x {scaled[1]}"
        raise SampleError("too_large", f"{width} x {height} becomes {became}: too long for its short side")
    return scaled


def _cover(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """The central part of that shape, scaled to `size` (width, height)."""
    height, width = pixels.shape[:2]
    scale = max(size[0] / width, size[1] / height)
    left, top = (max(0.0, width - size[0] / scale) / 2, max(0.0, height - size[1] / scale) / 2)
    # Cut and scaled at once: a picture a hundred times as long as wide is never held at full length.
    return np.array(Image.fromarray(pixels).resize(size, _kernel(scale), (left, top, width - left, height - top)))


def crop(pixels: Pixels, resolution: int, zoom: float, x: float, y: float, flip: bool) -> Pixels:
    """A square [resolution, resolution, 3] of the picture, antialiased and never distorted.

    As if the short side were scaled to `resolution * zoom` pixels and the square cut out then: `x` and `y` in [0, 1]
    say where, from the left or top to as far as it goes. `flip` mirrors it left to right.
    """
    height, width = pixels.shape[:2]
    side = min(height, width) / zoom
    left, top = x * (width - side), y * (height - side)
    box = (left, top, min(left + side, width), min(top + side, height))  # rounding must not go over the edge
    square = Image.fromarray(pixels).resize((resolution, resolution), _kernel(resolution / side), box)
    return np.array(square.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else square)


def _kernel(scale: float) -> Image.Resampling:
    """Lanczos is sharpest when it averages, but rings at edges that it has to invent."""
    return Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC


def _bucket(width: int, height: int, resolution: int) -> tuple[int, int]:
    """The bucket (width, height) whose aspect ratio is nearest to the picture's."""
    return min(_buckets(resolution), key=lambda size: abs(log(size[0] / size[1]) - log(width / height)))


_SHORTEST = 32  # pixels; LPIPS sees nothing below


@cache
def _buckets(resolution: int) -> tuple[tuple[int, int], ...]:
    """Widths and heights from 1:2 to 2:1: for either side of whole units the longest other one within the area.

    The unit is an eighth of the resolution, in whole multiples of 8 pixels; of 512 that makes 384 x 704, 384 x 640,
    448 x 576, 512 x 512 and the same lying.
    """
    unit = max(8, round(resolution / 64) * 8)
    area = resolution**2 * _OVER
    sizes = {(side, int(area / side / unit) * unit) for side in range(unit, 2 * resolution, unit)}
    sizes |= {(width, height) for height, width in sizes}
    return tuple(sorted(size for size in sizes if max(size) <= 2 * min(size) and min(size) >= _SHORTEST))


def encode(pixels: Pixels, format: str, quality: int = 95) -> bytes:
    """The same array gives the same bytes. `quality` 1 to 100 is for webp and jpg; png is lossless."""
    if format not in FORMATS:
        raise ValueError(f"unknown image format {format!r}, expected one of {', '.join(FORMATS)}")
    # 4:4:4 at high quality: strokes of colour are what a style is made of.
    jpg = {"quality": quality, "subsampling": 0 if quality >= 90 else 2}
    options = {"png": {}, "webp": {"quality": quality}, "jpg": jpg}[format]
    sink = io.BytesIO()
    try:
        Image.fromarray(pixels).save(sink, FORMATS[format], **options)
    except _DAMAGE as error:
        height, width = pixels.shape[:2]
        raise SampleError("encode_error", f"{width} x {height} as {format}: {error}") from error
    return sink.getvalue()


def thumbnail(picture: Pixels | bytes, side: int, quality: int = 80) -> bytes:
    """A small WebP, at most `side` pixels a side and never enlarged, for pages that embed it."""
    pixels = decode(picture, min_side=1) if isinstance(picture, bytes) else picture
    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return encode(np.array(image), "webp", quality)


def _upright(image: Image.Image) -> Image.Image:
    method = _UPRIGHT.get(_orientation(image))
    return image if method is None else image.transpose(method)


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except _DAMAGE:  # damaged EXIF beside good pixels: the picture as it lies is better than none
        return 1
    return orientation if isinstance(orientation, int) else 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode.startswith("I"):  # 16 bits, whatever the container; 65535 / 257 = 255
        levels = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")

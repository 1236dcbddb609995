"""Decode, resize and encode pictures; only this module and colours.py import PIL.

A picture is uint8 [H, W, 3], sRGB, upright, opaque. Any input becomes such an array or a SampleError: decode_error (not
a picture, or damaged anywhere), too_small, too_large (from the header, before memory is allocated), encode_error.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from math import log

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from smsbatch import manifest
from smsbatch.data.colours import is_grey_in_colour, opaque
from smsbatch.errors import SampleError
from smsbatch.parallel import MemoryLimit

Pixels = npt.NDArray[np.uint8]

MIN_SIDE = 16
MAX_PIXELS = 89_478_485  # PIL's decompression bomb limit: 256 MiB of pixels
FITS = ("short_side", "center_crop", "bucket", "none")
_OVER = 1.05  # largest area of a bucket, relative to resolution x resolution
FORMATS = {"webp": "WEBP", "png": "PNG", "jpg": "JPEG"}

# Pictures only: PIL also opens documents, some by starting other programs (EPS runs ghostscript).
_READABLE = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")

Image.init()  # registers all formats; by itself PIL does so only after the common ones have failed

# Exceptions of PIL's decoders on damaged files, observed or found in its source; all are treated alike.
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

DECODING = MemoryLimit(1 << 30)
"""Memory of all pictures that are being decoded in this process at a time."""
_STRIP = 1 << 20  # pixels that are converted at once
# At the most; measured with pictures of 25 megapixels. All others: 8.
_BYTES_A_PIXEL = {"JPEG": 12, "MPO": 12, "WEBP": 16, "AVIF": 16, "JPEG2000": 25}

_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # of those in a JPEG that are followed by a length, or EOI
MOST_SCANS = 100  # of a progressive JPEG; encoders write about ten

_ORIENTATION_TAG = 0x0112
_TURNS: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels[:, ::-1].swapaxes(0, 1),
}
_LYING = (5, 6, 7, 8)  # those that swap width and height


def decode(data: bytes, *, min_side: int = MIN_SIDE, max_pixels: int = MAX_PIXELS) -> Pixels:
    """The picture in a file, turned by its EXIF tag; alpha over white, 16 bits to 8, an animation's first frame."""
    with decoded(data, min_side=min_side, max_pixels=max_pixels) as pixels:
        return pixels


@contextmanager
def decoded(data: bytes, *, min_side: int = MIN_SIDE, max_pixels: int = MAX_PIXELS) -> Iterator[Pixels]:
    """`decode`, and the memory for it until the context ends: all pictures that this process decodes at a time share
    `DECODING`, so that a few files of a hundred megapixels do not exhaust the machine.

    Pillow has four bytes a pixel, the result three, and what is converted is a strip; some decoders need more.
    """
    with _opened(data, min_side, max_pixels) as image:  # of which only the header is read
        need = _BYTES_A_PIXEL.get(image.format or "", 8) * image.size[0] * image.size[1]
    with DECODING.take(need):
        with _opened(data, min_side, max_pixels) as image:
            image.load()  # completely: an intact header proves nothing
            turn = _TURNS.get(_orientation(image), _TURNS[1])
            pixels = _sheet(image, data)
        del image  # its memory, before the picture is turned
        yield np.ascontiguousarray(turn(pixels))


def _sheet(image: Image.Image, data: bytes) -> Pixels:
    """The pixels of a loaded picture, converted in strips, because Pillow copies a picture for every conversion."""
    width, height = image.size
    rows = height if is_grey_in_colour(image, data) else max(1, _STRIP // width)
    if rows >= height:
        return np.array(opaque(image, data))
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        strip.format = image.format
        pixels[top : top + rows] = np.asarray(opaque(strip, data))
    return pixels


def size(data: bytes, *, min_side: int = MIN_SIDE, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) of `decode`'s result, from the header alone: `decode` may still turn a PNG whose EXIF follows its
    pixels."""
    with _opened(data, min_side, max_pixels) as image:
        width, height = image.size
        known = image.format != "PNG" or "exif" in image.info
        # PIL already swaps the sides of a turned TIFF.
        turned = known and image.format != "TIFF" and _orientation(image) in _LYING
        return (height, width) if turned else (width, height)


@contextmanager
def _opened(data: bytes, min_side: int, max_pixels: int) -> Iterator[Image.Image]:
    """A picture with its header read and its size checked; errors of PIL inside the context become SampleErrors."""
    if not data:
        raise SampleError("decode_error", "an empty file (0 bytes)")
    with warnings.catch_warnings():
        # PIL warns of odd metadata, which is harmless, and of sizes, which are checked here. Filters are shared by all
        # threads: two that decode at once may leave them like this, which hides later warnings.
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data), formats=_READABLE) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise SampleError("too_large", f"{width} x {height} is over the limit of {max_pixels} pixels")
                scans = _scans(data) if image.format in ("JPEG", "MPO") else 0  # each costs a pass over all pixels
                if scans > MOST_SCANS:
                    raise SampleError("decode_error", f"a JPEG of {scans:,} scans; the limit is {MOST_SCANS}")
                if min(width, height) < min_side:
                    raise SampleError("too_small", f"{width} x {height} is under the limit of {min_side} pixels a side")
                yield image
        except Image.DecompressionBombError as error:
            raise SampleError("too_large", f"{error}; the limit here is {max_pixels} pixels") from error
        except UnidentifiedImageError as error:
            raise SampleError("decode_error", "not a picture in a known format") from error
        except _DAMAGE as error:
            raise SampleError("decode_error", f"damaged: {error}") from error


def _scans(data: bytes) -> int:
    """The scans of the first picture in a JPEG file; those of thumbnails and of what follows it do not count."""
    at, scans = 2, 0
    while found := _MARKER.search(data, at):
        marker, at = found[0][1], found.end()
        if marker == 0xD9:  # the end of the picture
            break
        scans += marker == 0xDA
        at += int.from_bytes(data[at : at + 2])  # the length of the marker's own data
    return scans


def source_picture(data: bytes, image: manifest.Image) -> tuple[Pixels, tuple[int, int]]:
    """A source's picture as a run stylizes it, decoded and fitted, and the (width, height) that it had.

    SampleError as of both.
    """
    with decoded(data, min_side=image.min_side, max_pixels=image.max_pixels) as picture:
        height, width = picture.shape[:2]
        return fit(picture, image.resolution, image.fit), (width, height)


def fit(pixels: Pixels, resolution: int, mode: str = "short_side") -> Pixels:
    """Resize with antialiasing and without distortion; the result's size depends on the picture's own size alone.

    `short_side` scales the short side to `resolution`; `center_crop` then cuts out a square; `bucket` scales to cover
    the nearest of a few sizes and crops both sides equally; `none` changes nothing.
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
    """(width, height) that `fit` gives a picture of this size; raises the same SampleError."""
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
    """The largest central part with the shape of `size` (width, height), scaled to it."""
    height, width = pixels.shape[:2]
    scale = max(size[0] / width, size[1] / height)
    left, top = (max(0.0, width - size[0] / scale) / 2, max(0.0, height - size[1] / scale) / 2)
    # Crop and scale in one step: a picture a hundred times as long as wide is never held at full length.
    return np.array(Image.fromarray(pixels).resize(size, _kernel(scale), (left, top, width - left, height - top)))


def crop(pixels: Pixels, resolution: int, zoom: float, x: float, y: float, flip: bool) -> Pixels:
    """A square [resolution, resolution, 3] of the picture, antialiased and without distortion.

    Equals scaling the short side to `resolution * zoom` pixels and then cutting out the square. `x` and `y` in [0, 1]
    are its position from the left to the right edge and from top to bottom. `flip` mirrors it left to right.
    """
    height, width = pixels.shape[:2]
    side = min(height, width) / zoom
    left, top = x * (width - side), y * (height - side)
    box = (left, top, min(left + side, width), min(top + side, height))  # rounding must not go over the edge
    square = Image.fromarray(pixels).resize((resolution, resolution), _kernel(resolution / side), box)
    return np.array(square.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else square)


def _kernel(scale: float) -> Image.Resampling:
    """Lanczos is sharpest when it reduces, but rings at edges when it enlarges."""
    return Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC


def _bucket(width: int, height: int, resolution: int) -> tuple[int, int]:
    """The bucket (width, height) whose aspect ratio is nearest to the picture's."""
    return min(_buckets(resolution), key=lambda size: abs(log(size[0] / size[1]) - log(width / height)))


_SHORTEST = 32  # pixels; LPIPS needs at least as many


@cache
def _buckets(resolution: int) -> tuple[tuple[int, int], ...]:
    """(width, height) of all buckets, 1:2 to 2:1: for each side in whole units, the longest other one within the area.

    The unit is an eighth of the resolution, rounded to a multiple of 8 pixels. 512 gives 384 x 704, 384 x 640,
    448 x 576, 512 x 512 and their transposes.
    """
    unit = max(8, round(resolution / 64) * 8)
    area = resolution**2 * _OVER
    sizes = {(side, int(area / side / unit) * unit) for side in range(unit, 2 * resolution, unit)}
    sizes |= {(width, height) for height, width in sizes}
    return tuple(sorted(size for size in sizes if max(size) <= 2 * min(size) and min(size) >= _SHORTEST))


def encode(pixels: Pixels, format: str, quality: int = 95) -> bytes:
    """Encode a picture; equal arrays give equal bytes. `quality`, 1 to 100, is for webp and jpg; png is lossless."""
    if format not in FORMATS:
        raise ValueError(f"unknown image format {format!r}, expected one of {', '.join(FORMATS)}")
    # 4:4:4 at high quality, because a style consists of strokes of colour.
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
    """A WebP to embed in a page: at most `side` pixels a side, never enlarged."""
    pixels = decode(picture, min_side=1) if isinstance(picture, bytes) else picture
    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return encode(np.array(image), "webp", quality)


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except _DAMAGE:  # damaged EXIF beside good pixels: keep the picture, unturned
        return 1
    return orientation if isinstance(orientation, int) else 1

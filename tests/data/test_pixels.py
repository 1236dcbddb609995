"""Any image file becomes an upright opaque RGB array or one of four errors.

The file exceeds 400 lines because it has the tests of decoding and its limits, fitting, buckets and encoding.
"""

from __future__ import annotations

import io
import re
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings, strategies as st
from PIL import Image
from support.making import pattern

from smsbatch.data import pixels
from smsbatch.data.pixels import (
    FITS,
    FORMATS,
    MAX_PIXELS,
    Pixels,
    _bucket,
    crop,
    decode,
    encode,
    fit,
    fitted,
    size,
    thumbnail,
)
from smsbatch.errors import SampleError
from smsbatch.parallel import MemoryLimit


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, format, **options)
    return sink.getvalue()


def corners(pixels: Pixels) -> list[list[int]]:
    """The colours in the middle of each quarter, left to right, top to bottom; a channel is 1 if above 127, else 0."""
    height, width = pixels.shape[:2]
    points = [
        (height // 4, width // 4),
        (height // 4, -width // 4),
        (-height // 4, width // 4),
        (-height // 4, -width // 4),
    ]
    return [(pixels[point] > 127).astype(int).tolist() for point in points]


RED, GREEN, BLUE, WHITE, BLACK = [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1], [0, 0, 0]
UPRIGHT = [RED, GREEN, BLUE, WHITE]
RGB = Image.fromarray(pattern())


def failure(data: bytes, **options: Any) -> tuple[str, str]:
    with pytest.raises(SampleError) as caught:
        decode(data, **options)
    return caught.value.code, str(caught.value)


# --- supported input ---


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000"])
def test_formats(format: str) -> None:
    pixels = decode(saved(RGB, format))
    assert (pixels.shape, pixels.dtype, corners(pixels)) == ((40, 60, 3), np.uint8, UPRIGHT)
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable


@pytest.mark.parametrize(
    ("mode", "format", "expected"),
    [
        ("P", "PNG", UPRIGHT),
        ("P", "GIF", UPRIGHT),
        ("CMYK", "JPEG", UPRIGHT),
        ("CMYK", "TIFF", UPRIGHT),
        ("YCbCr", "JPEG", UPRIGHT),
        ("LAB", "TIFF", UPRIGHT),
        ("L", "PNG", [BLACK, WHITE, BLACK, WHITE]),
        ("1", "PNG", None),
        ("LA", "PNG", [BLACK, WHITE, BLACK, WHITE]),
        ("I;16", "PNG", [BLACK, WHITE, BLACK, WHITE]),
        ("I;16", "TIFF", [BLACK, WHITE, BLACK, WHITE]),
        ("I", "TIFF", [BLACK, WHITE, BLACK, WHITE]),
    ],
)
def test_modes(mode: str, format: str, expected: list[list[int]] | None) -> None:
    if mode.startswith("I"):
        grey = np.asarray(RGB.convert("L")).astype(np.uint16 if mode == "I;16" else np.int32) * 257
        image = Image.fromarray(grey)
    else:
        image = RGB.convert(mode)
    pixels = decode(saved(image, format))
    assert pixels.shape == (40, 60, 3)
    assert expected is None or corners(pixels) == expected


def test_sixteen_bits_become_the_nearest_eight() -> None:
    levels = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    expected = np.round(levels / 65535 * 255).astype(np.uint8)
    assert (decode(saved(Image.fromarray(levels), "PNG"))[..., 0] == expected).all()


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette"])
def test_alpha_lies_over_white(kind: str) -> None:
    black = Image.new("RGBA", (32, 32), (0, 0, 0, 128))
    black.paste((0, 0, 0, 0), (0, 0, 16, 32))
    if kind == "palette":
        image = Image.new("P", (32, 32), 0)
        image.putpalette([10, 20, 30, 0, 0, 0])
        image.paste(1, (16, 0, 32, 32))
        pixels = decode(saved(image, "PNG", transparency=0))
        assert pixels[0, 20].tolist() == [0, 0, 0]
    else:
        pixels = decode(saved(black.convert(kind), "PNG"))
        assert pixels[0, 20].tolist() == [127] * 3
    assert pixels[0, 5].tolist() == [255] * 3


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture_upright(format: str, orientation: int) -> None:
    # A camera stores the inverse of the operation that the tag asks of a viewer, who then sees the pattern.
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = RGB if orientation == 1 else RGB.transpose(Image.Transpose(inverse[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = decode(saved(stored, format, exif=exif))
    assert (pixels.shape, corners(pixels)) == ((40, 60, 3), UPRIGHT)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"])
def test_damaged_exif_costs_nothing(exif: bytes) -> None:
    assert corners(decode(saved(RGB, "JPEG", exif=exif))) == UPRIGHT


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_unknown_orientation_is_upright(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    assert corners(decode(saved(RGB, "JPEG", exif=exif))) == UPRIGHT


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_gives_its_first_frame(format: str) -> None:
    black = Image.new("RGB", RGB.size)
    assert corners(decode(saved(RGB, format, save_all=True, append_images=[black, black]))) == UPRIGHT


# --- refused input ---


def test_no_picture_at_all() -> None:
    assert failure(b"") == ("decode_error", "an empty file (0 bytes)")
    assert failure(b"<html>404 not found</html>") == ("decode_error", "not a picture in a known format")
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n%%EndComments\n"
    assert failure(postscript) == ("decode_error", "not a picture in a known format")
    assert failure(saved(Image.fromarray(np.zeros((32, 32), np.float32)), "TIFF"))[0] == "decode_error"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"])
@pytest.mark.parametrize("fraction", [0.02, 0.3, 0.6, 0.95])
def test_a_truncated_picture_fails(format: str, fraction: float) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    data = saved(noise, format)
    assert failure(data[: int(len(data) * fraction)])[0] == "decode_error"


FILES = [saved(RGB, format) for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(FILES), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=8))
@example(FILES[1], [(24, 200)])
def test_any_damage_is_a_picture_or_a_sample_error(data: bytes, changes: list[tuple[int, int]]) -> None:
    damaged = bytearray(data)
    for place, value in changes:
        damaged[place % len(damaged)] = value
    code, pixels = "", pattern()
    try:
        pixels = decode(bytes(damaged), max_pixels=1_000_000)
    except SampleError as error:
        code = error.code
    assert code in {"", "decode_error", "too_small", "too_large"}
    assert (pixels.dtype, pixels.shape[2:]) == (np.uint8, (3,))


def bomb(width: int, height: int) -> bytes:
    """A PNG of about a hundred bytes whose header claims this size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9_500, 12_000, 60_000])  # PIL warns at the first two and raises at the last
def test_a_bomb_is_too_large_before_it_is_decoded(side: int) -> None:
    code, message = failure(bomb(side, side))
    assert code == "too_large"
    assert f"{MAX_PIXELS} pixels" in message


def test_bounds_are_inclusive() -> None:
    data = saved(RGB, "PNG")
    assert decode(data, min_side=40, max_pixels=2400).shape == (40, 60, 3)
    assert failure(data, min_side=41) == ("too_small", "60 x 40 is under the limit of 41 pixels a side")
    assert failure(data, max_pixels=2399) == ("too_large", "60 x 40 is over the limit of 2399 pixels")


# --- fit ---


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (50, 50), (300, 200), (17, 1000)])
@pytest.mark.parametrize("resolution", [24, 128])
def test_fit_shapes(size: tuple[int, int], resolution: int) -> None:
    picture = pattern(*size)
    fitted = fit(picture, resolution)
    assert min(fitted.shape[:2]) == resolution
    aspect = max(size) / min(size)
    assert abs(max(fitted.shape[:2]) - resolution * aspect) <= 0.5
    assert (fitted.shape[0] > fitted.shape[1]) == (size[0] > size[1])
    square = fit(picture, resolution, "center_crop")
    assert square.shape == (resolution, resolution, 3)
    assert square.flags.c_contiguous
    assert fit(picture, resolution, "none") is picture


def test_fit_keeps_the_picture_and_its_centre() -> None:
    assert corners(fit(pattern(400, 600), 64)) == UPRIGHT
    assert corners(fit(pattern(40, 60), 256, "center_crop")) == UPRIGHT
    assert (fit(pattern(64, 64), 64) == pattern(64, 64)).all()


def test_fit_averages_when_it_shrinks() -> None:
    board = (np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8)
    fitted = fit(np.stack([board] * 3, -1), 64).astype(int)
    assert abs(fitted - 127).max() <= 8  # sampling without a filter would give 0 or 255


def test_a_hair_is_too_large_to_fit() -> None:
    with pytest.raises(SampleError, match="too long for its short side") as caught:
        fit(np.zeros((1, 50_000, 3), np.uint8), 512)
    assert caught.value.code == "too_large"


def ramps(width: int, height: int) -> Pixels:
    """A picture whose red increases from 0 to 255 along its width, and whose green increases along its height."""
    across = np.broadcast_to(np.arange(width) * 255 / max(width - 1, 1), (height, width))
    down = np.broadcast_to(np.arange(height)[:, None] * 255 / max(height - 1, 1), (height, width))
    return np.stack([across, down, np.zeros_like(across)], -1).round().astype(np.uint8)


SIDES = st.integers(32, 400)


@settings(max_examples=150, deadline=None)
@given(width=SIDES, height=SIDES, resolution=st.integers(32, 260))
@example(width=400, height=32, resolution=64)
@example(width=64, height=64, resolution=64)
def test_a_bucket_is_covered_from_the_centre_and_nothing_is_distorted(width: int, height: int, resolution: int) -> None:
    fitted = fit(ramps(width, height), resolution, "bucket")
    to_height, to_width = fitted.shape[:2]
    assert to_width % 8 == to_height % 8 == 0
    assert to_width * to_height <= 1.05 * resolution**2
    assert 0.5 <= to_width / to_height <= 2
    assert fitted.min(axis=(0, 1))[2] == fitted.max(axis=(0, 1))[2] == 0, "no border was invented"
    scale = max(to_width / width, to_height / height)
    for side, seen, channel, axis in ((width, to_width, 0, 0), (height, to_height, 1, 1)):
        line = fitted[..., channel].mean(axis).astype(float) * (side - 1) / 255  # where in the source each pixel was
        expected = (np.arange(seen) + 0.5) / scale - 0.5 + (side - seen / scale) / 2
        inner = slice(None) if scale >= 1 else slice(3, -3)  # at the edge the Lanczos kernel is cut off
        assert abs(line - expected.clip(0, side - 1))[inner].max() <= 1 + side / 255, (side, seen)


@settings(max_examples=150, deadline=None)
@given(width=st.integers(32, 4000), height=st.integers(32, 4000), eighths=st.integers(1, 16))
def test_a_bucket_cuts_little_of_a_picture_within_two_to_one(width: int, height: int, eighths: int) -> None:
    resolution = 64 * eighths
    assume(0.5 <= width / height <= 2)
    to_width, to_height = _bucket(width, height, resolution)
    scale = max(to_width / width, to_height / height)
    assert to_width * to_height / (width * height * scale**2) >= 7 / 8
    assert to_width % (resolution // 8) == to_height % (resolution // 8) == 0


@pytest.mark.parametrize("resolution", [64, 100, 500, 512, 1024])
def test_buckets_are_few_and_the_same_lying_and_standing(resolution: int) -> None:
    sizes = {_bucket(width, 1000, resolution) for width in range(100, 8000, 7)}
    assert 3 <= len(sizes) <= 7
    assert sizes == {(height, width) for width, height in sizes}
    square = _bucket(1000, 1000, resolution)
    assert square[0] == square[1]
    assert 0.8 <= square[0] / resolution <= 1.05**0.5
    assert _bucket(1, 1000, resolution) == min(sizes, key=lambda size: size[0] / size[1])
    for width, height in sizes:
        assert _bucket(width * 3, height * 3, resolution) == (width, height)


def test_the_buckets_of_512() -> None:
    shapes = {fit(pattern(*size), 512, "bucket").shape[:2] for size in [(90, 160), (100, 150), (90, 120), (99, 100)]}
    assert shapes == {(384, 704), (384, 640), (448, 576), (512, 512)}
    same = ramps(448, 576)
    assert (fit(same, 512, "bucket") == same).all()


def test_a_hair_is_cut_to_the_longest_bucket() -> None:
    assert fit(np.zeros((1, 50_000, 3), np.uint8), 512, "bucket").shape == (384, 704, 3)


def test_an_unknown_fit_or_format_is_our_own_mistake() -> None:
    with pytest.raises(ValueError, match="unknown fit"):
        fit(pattern(), 64, "stretch")
    with pytest.raises(ValueError, match="unknown image format"):
        encode(pattern(), "gif")


# --- crop ---

PLACES = st.floats(0, 1)


@settings(max_examples=150, deadline=None)
@given(SIDES, SIDES, st.integers(32, 260), st.floats(1, 8), PLACES, PLACES, st.booleans())
@example(400, 33, 64, 1.0, 1.0, 1.0, True)
@example(64, 64, 64, 1.0, 0.3, 0.7, False)
def test_a_square_is_cut_where_it_should_be_and_nothing_is_distorted(
    width: int, height: int, resolution: int, zoom: float, x: float, y: float, flip: bool
) -> None:
    square = crop(ramps(width, height), resolution, zoom, x, y, flip)
    assert (square.shape, square.dtype) == ((resolution, resolution, 3), np.uint8)
    if flip:
        square = square[:, ::-1]
    side = min(width, height) / zoom  # of the visible square, in source pixels
    for whole, place, channel, axis in ((width, x, 0, 0), (height, y, 1, 1)):
        line = square[..., channel].mean(axis).astype(float) * (whole - 1) / 255  # where in the source each pixel was
        expected = (np.arange(resolution) + 0.5) * side / resolution - 0.5 + place * (whole - side)
        # Near the picture's edge the filter's kernel is cut off.
        reach = 3 * max(1, side / resolution)
        inner = (expected > reach) & (expected < whole - 1 - reach)
        assert abs(line - expected)[inner].max(initial=0) <= 1 + whole / 255, (whole, side)
        assert abs(line - expected).max() <= 1 + whole / 255 + reach


def test_a_square_at_its_own_size_is_left_as_it_is() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    assert (crop(picture, 64, 1, 0.25, 0.5, flip=False) == picture[:, 8:72]).all()
    assert (crop(picture, 64, 1, 1, 0, flip=True) == picture[:, :31:-1]).all()
    assert (crop(picture, 32, 2, 0, 1, flip=False) == picture[32:, :32]).all()


def test_a_square_is_cut_as_if_the_whole_had_been_scaled_first() -> None:
    x, y = np.meshgrid(np.linspace(0, 12, 300), np.linspace(0, 9, 200))
    waves = ((np.stack([np.sin(x), np.cos(y), np.sin(x + y)], -1) + 1) * 127).round().astype(np.uint8)
    whole = fit(waves, 96)  # 144 x 96
    square = crop(waves, 64, 1.5, 0.5, 0.25, flip=False)
    assert abs(square.astype(int) - whole[8:72, 40:104]).max() <= 2


# --- encode ---


@pytest.mark.parametrize("format", FORMATS)
def test_encode_is_deterministic_and_comes_back(format: str) -> None:
    smooth = np.linspace(0, 255, 64 * 48 * 3).astype(np.uint8).reshape(64, 48, 3)
    data = encode(smooth, format, 95)
    assert data == encode(smooth.copy(), format, 95)
    difference = np.abs(decode(data).astype(int) - smooth)
    assert difference.max() == 0 if format == "png" else difference.mean() < 3


def test_quality_costs_bytes() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for format in ("webp", "jpg"):
        assert len(encode(noise, format, 30)) < len(encode(noise, format, 95))


def test_what_a_format_cannot_hold_is_an_encode_error() -> None:
    with pytest.raises(SampleError, match="20000 x 16 as webp") as caught:
        encode(np.zeros((16, 20_000, 3), np.uint8), "webp")
    assert caught.value.code == "encode_error"


def test_thumbnails_are_small_and_never_enlarged() -> None:
    assert decode(thumbnail(pattern(400, 600), 120)).shape == (80, 120, 3)
    assert decode(thumbnail(saved(RGB, "JPEG"), 120)).shape == (40, 60, 3)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"])
@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
def test_a_header_tells_the_size(format: str, orientation: int | None) -> None:
    exif = Image.Exif()
    options: dict[str, Any] = {}
    if orientation is not None and format not in ("GIF", "BMP"):
        exif[0x0112] = orientation
        options["exif"] = exif
    data = saved(Image.new("RGB", (60, 40), "red"), format, **options)
    picture = decode(data)
    height, width = picture.shape[:2]
    assert size(data) == (width, height)
    for mode in FITS:
        assert fitted(width, height, 36, mode) == fit(picture, 36, mode).shape[1::-1]


# --- limits of memory and time ---


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "LA", "I;16"])
def test_a_picture_converted_in_strips_is_the_same(
    mode: str, orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    grey = Image.fromarray(pattern(61, 40)).convert("L")
    image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 200) if mode == "I;16" else grey.convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(grey)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(image, "PNG", exif=exif)
    whole = decode(data)
    monkeypatch.setattr(pixels, "_STRIP", 7 * 40)
    assert np.array_equal(decode(data), whole)


def test_pictures_share_a_limit_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    class Watched(MemoryLimit):
        @contextmanager
        def take(self, size: int) -> Iterator[None]:
            with super().take(size):
                taken.append((size, self.taken))
                time.sleep(0.01)
                yield

    data = saved(Image.fromarray(pattern(100, 100)), "PNG")
    monkeypatch.setattr(pixels, "DECODING", Watched(3 * 8 * 100 * 100))
    with ThreadPoolExecutor(12) as threads:
        pictures = list(threads.map(decode, [data] * 24))
    assert all(np.array_equal(picture, pattern(100, 100)) for picture in pictures)
    assert {size for size, _ in taken} == {80_000}
    assert max(at_once for _, at_once in taken) == 240_000
    assert pixels.DECODING.taken == 0


def test_a_failed_picture_gives_its_memory_back() -> None:
    data = saved(Image.fromarray(pattern()), "JPEG")
    with pytest.raises(SampleError):
        decode(data[: len(data) // 2])
    with pytest.raises(RuntimeError), pixels.decoded(data):
        raise RuntimeError
    assert pixels.DECODING.taken == 0


def test_a_bomb_costs_a_few_bytes_a_pixel() -> None:
    """81 megapixels in ten kilobytes: a palette with transparency, which Pillow alone would expand four times."""
    program = """if True:
        import io, resource
        from PIL import Image
        from smsbatch.data.pixels import decode
        sink = io.BytesIO()
        Image.new("P", (9000, 9000)).save(sink, "PNG", transparency=0)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert decode(sink.getvalue()).shape == (9000, 9000, 3)
        print(len(sink.getvalue()), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    compressed, memory = map(int, done.stdout.split())
    assert compressed < 20_000
    assert memory < 8 * 9000 * 9000


def many_scans(times: int) -> bytes:
    """A progressive JPEG whose last scan is there many times."""
    data = saved(Image.fromarray(pattern(64, 64)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * times + data[-2:]


def test_a_jpeg_of_thousands_of_scans_is_refused_and_one_of_many_is_not() -> None:
    assert decode(many_scans(50)).shape == (64, 64, 3)
    code, message = failure(many_scans(5000))
    assert code == "decode_error"
    assert re.fullmatch(r"a JPEG of 5,0\d\d scans; the limit is 100", message)


def test_scans_are_counted_in_the_picture_alone() -> None:
    """Cameras write several pictures into one file (MPO), and put other data into segments and behind the picture."""
    frames = [Image.fromarray(pattern(64, 64))] * 2
    data = saved(frames[0], "MPO", save_all=True, append_images=frames[1:])
    first = data.index(b"\xff\xe2")
    many = many_scans(5000)
    segment = data[first : first + 2 + int.from_bytes(data[first + 2 : first + 4])]
    assert failure(many[:2] + segment + many[2:])[1].startswith("a JPEG of 5,0")
    good = saved(frames[0], "JPEG")
    marks = b"\xff\xda" * 9000
    segment = b"\xff\xeb" + (len(marks) + 2).to_bytes(2) + marks
    for data in (good + marks * 100, good[:2] + segment * 3 + good[2:]):
        assert decode(data).shape == (64, 64, 3)

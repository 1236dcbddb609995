"""`task: stylize`, one pass of a generator per image, with all guarantees of a run.

Over 400 lines: one set of tests on one job.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from support.faults import Disk, Life, check_end, check_whole, disturb
from support.jobs import KEYS, commits, make_generator, make_photos, pictures, rows, tars, write_stylize
from support.s3server import Server
from torch import Tensor

import smsbatch as sb
from smsbatch.data import pixels
from smsbatch.data.sample import Sample
from smsbatch.engines.feedforward import GeneratorEngine
from smsbatch.generator.network import Generator
from smsbatch.generator.tiles import Tiling, overview
from smsbatch.manifest import identity_of
from smsbatch.storage.store import Store
from smsbatch.workers import stylizer
from smsbatch.workers.stylizer import sample_seed

BROKEN = {"empty": "decode_error", "cut": "decode_error", "small": "too_small", "caption": "bad_caption"}


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_generator(tmp_path_factory.mktemp("generator"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of six pictures of one size, two of another, and four samples that cannot be stylized."""
    folder = make_photos(tmp_path_factory.mktemp("stylize") / "photos")
    make_photos(folder, ["tall-0", "tall-1"], size=(32, 40))
    (folder / "empty.png").write_bytes(b"")
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    whole = pixels.encode(noise, "png")
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    make_photos(folder, ["small"], size=(20, 20))
    make_photos(folder, ["caption"])
    (folder / "caption.txt").write_bytes(b"\xff\xff")
    return folder


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, generator: Path, photos: Path) -> Path:
    """A finished run with batches of one, so that kernels round the same when a sample is computed again."""
    folder = tmp_path_factory.mktemp("job")
    file = write_stylize(folder, generator, photos, compute={"batch_size": 1}, errors={"max_failed_fraction": 0.5})
    sb.run(sb.load(file))
    return file


@pytest.fixture
def manifest(tmp_path: Path, generator: Path, photos: Path) -> Callable[..., sb.Manifest]:
    """A factory of manifests for the same pictures; arguments are overrides and sections."""

    def make(*overrides: str, **sections: Any) -> sb.Manifest:
        where = sections.pop("generator", generator)
        file = write_stylize(tmp_path, where, photos, errors={"max_failed_fraction": 0.5}, **sections)
        return sb.load(file, overrides)

    return make


def picture(number: int, height: int = 40, width: int = 60) -> NDArray[np.uint8]:
    """A smooth, colourful picture, different for every number."""
    coarse = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def samples(number: int, height: int = 40, width: int = 60) -> list[Sample]:
    return [
        Sample(f"{width}x{height}-{i}", "u", pixels.encode(picture(i, height, width), "png"), "png", "", {})
        for i in range(number)
    ]


def tensor(picture: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 255


def apart(first: dict[str, NDArray[np.uint8]], second: dict[str, NDArray[np.uint8]]) -> int:
    """The largest difference between the pixels of two runs, of 255."""
    assert first.keys() == second.keys()
    return max(int(np.abs(first[key].astype(int) - second[key]).max()) for key in first)


class TestRows:
    def test_every_sample_is_one(self, job: Path, photos: Path, generator: Path) -> None:
        found = rows(job.parent / "out")
        assert {key: row["error_code"] for key, row in found.items() if row["status"] == "failed"} == BROKEN
        assert found.keys() == BROKEN.keys() | set(KEYS) | {"tall-0", "tall-1"}
        row = found["photo-2"]
        assert (row["prompt"], row["caption"], row["steps"], row["batch_size"]) == (
            "wavy style",
            "waves number 2",
            1,
            1,
        )
        assert (row["width"], row["height"], row["original_width"], row["original_height"]) == (48, 32, 48, 32)
        assert row["seed"] == sample_seed(0, "photo-2")
        assert row["source_sha256"] == hashlib.sha256((photos / "photo-2.png").read_bytes()).hexdigest()
        assert row["seconds"] > 0
        assert 0 < row["lpips"] < 1.5
        assert sb.status(str(job.parent / "out")).finished

    def test_the_picture_is_the_generators(self, job: Path, photos: Path, generator: Path) -> None:
        source = tensor(np.asarray(Image.open(photos / "tall-1.png")))
        with torch.no_grad():
            expected = Generator.load(generator)(source)[0].permute(1, 2, 0)
        found = pictures(job.parent / "out")["tall-1"]
        assert np.array_equal(found, (expected * 255).round().byte().numpy())

    def test_the_run_says_which_generator_it_was(self, job: Path, generator: Path) -> None:
        out = job.parent / "out"
        run = json.loads((out / "run.json").read_text())
        files = ("generator.json", "generator.safetensors")
        assert run["weights"] == {name: hashlib.sha256((generator / name).read_bytes()).hexdigest() for name in files}
        page, card = (out / "report.html").read_text(), (out / "README.md").read_text()
        assert "8 of 12 images stylized as “wavy style”, one pass of the generator waves each" in page
        assert "Images stylized in one pass of the generator `waves` by smsbatch." in card
        assert "`wavy style`, LoRA `waves.safetensors`" in card
        assert run["weights"]["generator.safetensors"] in card
        assert sb.run(sb.load(job)).generator["width"] == 8

    def test_it_verifies_replays_and_is_measured(self, job: Path, tmp_path: Path) -> None:
        out = str(job.parent / "out")
        assert sb.verify(out, full=True).ok
        again = sb.replay(out, "photo-3", tmp_path)
        assert (again.same, again.changed) == (True, ())
        assert sb.replay(out, "cut", tmp_path).row["error_code"] == "decode_error"
        measured = sb.measure(out, "tiny:styles/oil.reference.safetensors")
        assert len(measured.pictures) == 8
        assert measured.values["LPIPS"] == pytest.approx(
            np.mean([row["lpips"] for row in rows(job.parent / "out").values() if row["lpips"] is not None])
        )

    def test_what_is_lost_is_computed_again(self, job: Path, tmp_path: Path) -> None:
        out = shutil.copytree(job.parent / "out", tmp_path / "out")
        before = tars(out)
        shutil.rmtree(out / "_smsbatch" / "attempts" / "000001")
        (out / "shards" / "000000.tar").unlink()
        repaired = sb.repair(str(out))
        assert repaired.ok
        assert "compute unit 000001 again" in repaired.done
        assert tars(out) == before
        assert sb.gc(str(out), dry_run=True).objects > 0

    def test_one_picture_without_a_run(self, job: Path, photos: Path) -> None:
        found, row = sb.Stylizer(sb.load(job))(photos / "photo-4.png", key="photo-4")
        assert np.array_equal(found, pictures(job.parent / "out")["photo-4"])
        assert (row["prompt"], row["steps"]) == ("wavy style", 1)


class TestResults:
    @pytest.mark.parametrize(("batch", "unit"), [(8, 12), (3, 5), (2, 1)])
    def test_depend_on_no_batch_and_no_unit(
        self, batch: int, unit: int, job: Path, manifest: Callable[..., sb.Manifest], tmp_path: Path
    ) -> None:
        sb.run(manifest(f"compute.batch_size={batch}", f"output.samples_per_unit={unit}", "metrics=[]"))
        assert apart(pictures(tmp_path / "out"), pictures(job.parent / "out")) <= 1
        assert {key: row["error_code"] for key, row in rows(tmp_path / "out").items() if row["error_code"]} == BROKEN

    def test_depend_on_no_order(self, manifest: Callable[..., sb.Manifest]) -> None:
        work = [*samples(3), *samples(2, height=48, width=36), *samples(4, width=64)]
        one = sb.Stylizer(manifest("compute.batch_size=1", "metrics=[]"))
        alone = {outcome.key: outcome.image for outcome in one.stylize(work)}
        random.Random(1).shuffle(work)
        shuffled = one.stylize(work)
        assert [outcome.key for outcome in shuffled] == [sample.key for sample in work]
        assert {outcome.key: outcome.image for outcome in shuffled} == alone

    def test_are_the_same_bytes_where_batches_are_the_same(
        self, manifest: Callable[..., sb.Manifest], tmp_path: Path
    ) -> None:
        asked = manifest("metrics=[]")
        sb.run(asked)
        first = tars(tmp_path / "out")
        shutil.rmtree(tmp_path / "out")
        sb.run(asked)
        assert tars(tmp_path / "out") == first

    @pytest.mark.parametrize(("precision", "bound"), [("fp16", 2), ("bf16", 12)])
    def test_in_half_precision(self, precision: str, bound: int, manifest: Callable[..., sb.Manifest]) -> None:
        work = samples(2)
        whole, half = (
            [pixels.decode(outcome.image or b"").astype(int) for outcome in sb.Stylizer(asked).stylize(work)]
            for asked in (manifest("metrics=[]"), manifest("metrics=[]", f"compute.precision={precision}"))
        )
        differences = [int(np.abs(one - other).max()) for one, other in zip(whole, half, strict=True)]
        assert 0 < max(differences) <= bound

    def test_with_channels_last(self, manifest: Callable[..., sb.Manifest]) -> None:
        images = torch.cat([tensor(picture(number)) for number in range(2)])
        plain, other = (
            GeneratorEngine(manifest(f"compute.channels_last={on}"), "cpu").render(images, ["", ""], [0, 0], print)
            for on in ("false", "true")
        )
        assert other.images.is_contiguous(memory_format=torch.channels_last)
        assert (plain.images - other.images).abs().max() < 1e-5

    @pytest.mark.slow
    def test_compiled(self, manifest: Callable[..., sb.Manifest]) -> None:
        """Slow because of the compiler."""
        images = torch.cat([tensor(picture(number, 72, 104)) for number in range(2)])
        tiles = ("tiles.size=64", "tiles.overlap=32", "compute.batch_size=3")
        for options in ((), tiles):
            plain, compiled = (
                GeneratorEngine(manifest(f"compute.compile={on}", *options), "cpu").render(
                    images, ["", ""], [0, 0], print
                )
                for on in ("false", "true")
            )
            assert (plain.images - compiled.images).abs().max() < 1e-4

    def test_that_are_not_finite_are_failures_of_their_own(
        self, manifest: Callable[..., sb.Manifest], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one = sb.Stylizer(manifest("metrics=[]"))
        render = one.engine.render

        def first_diverges(*rest: Any) -> Any:
            rendered = render(*rest)
            return rendered._replace(finite=rendered.finite & (torch.arange(len(rendered.finite)) > 0))

        monkeypatch.setattr(one.engine, "render", first_diverges)
        bad, good = one.stylize(samples(2))
        assert (bad.error_code, good.error_code) == ("diverged", None)
        assert "set compute.precision to bf16 or fp32" in str(bad.error_message)


class TestPipeline:
    """Events prove that the stages run concurrently: a stage that runs after the others would time out."""

    PATIENCE_S = 60

    def test_encodes_while_the_device_goes_on(
        self, manifest: Callable[..., sb.Manifest], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one, encoded = sb.Stylizer(manifest("metrics=[]", "compute.batch_size=1")), threading.Event()
        encode, render, behind = pixels.encode, one.engine.render, []

        def encode_and_tell(*rest: Any) -> bytes:
            data = encode(*rest)
            encoded.set()
            return data

        def wait_for_the_first(*rest: Any) -> Any:
            if behind:
                assert encoded.wait(self.PATIENCE_S)
            behind.append(True)
            return render(*rest)

        work = samples(2)
        monkeypatch.setattr(pixels, "encode", encode_and_tell)
        monkeypatch.setattr(one.engine, "render", wait_for_the_first)
        assert all(outcome.succeeded for outcome in one.stylize(work))
        assert one.idle_fraction is not None
        assert 0 < one.idle_fraction < 1

    def test_the_next_call_decodes_before_its_turn(
        self, manifest: Callable[..., sb.Manifest], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one, rendering, decoded = sb.Stylizer(manifest("metrics=[]")), threading.Event(), threading.Event()
        decode, render = pixels.source_picture, one.engine.render
        first, second = samples(2), samples(2, width=64)

        def decode_and_tell(data: bytes, image: Any) -> Any:
            if data == second[1].image:
                decoded.set()
            return decode(data, image)

        def wait_for_the_second(*rest: Any) -> Any:
            rendering.set()
            assert decoded.wait(self.PATIENCE_S)
            return render(*rest)

        monkeypatch.setattr(pixels, "source_picture", decode_and_tell)
        monkeypatch.setattr(one.engine, "render", wait_for_the_second)
        found: list[Any] = []
        calls = [threading.Thread(target=lambda: found.extend(one.stylize(first)))]
        calls[0].start()
        assert rendering.wait(self.PATIENCE_S)
        found.extend(one.stylize(second))
        calls[0].join()
        assert sorted(outcome.key for outcome in found) == sorted(sample.key for sample in first + second)
        assert all(outcome.succeeded for outcome in found)

    @pytest.mark.parametrize(("bytes_ahead", "most"), [(1 << 29, 12), (1, 7)])
    def test_holds_a_few_decoded_pictures_only(
        self,
        bytes_ahead: int,
        most: int,
        manifest: Callable[..., sb.Manifest],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """At most `most` pictures are in memory: two batches decoded, one stacked, one on the device, one begun."""
        one = sb.Stylizer(manifest("metrics=[]"))
        decode, render = pixels.source_picture, one.engine.render
        lock, held, seen = threading.Lock(), 0, []

        def count(more: int) -> None:
            nonlocal held
            with lock:
                held += more
                seen.append(held)

        def decode_and_count(data: bytes, image: Any) -> Any:
            count(1)
            return decode(data, image)

        def render_and_count(images: Tensor, *rest: Any) -> Any:
            rendered = render(images, *rest)
            count(-len(images))
            return rendered

        work = samples(40)
        monkeypatch.setattr(stylizer, "_AHEAD_BYTES", bytes_ahead)
        monkeypatch.setattr(pixels, "source_picture", decode_and_count)
        monkeypatch.setattr(one.engine, "render", render_and_count)
        assert all(outcome.succeeded for outcome in one.stylize(work))
        assert max(seen) <= most
        assert seen[-1] == 0

    def test_a_call_that_is_stopped_leaves_the_device_to_others(self, manifest: Callable[..., sb.Manifest]) -> None:
        class Stopped(Exception):
            pass

        def stop(done: int, batch: int, step: int) -> None:
            if done == 4:
                raise Stopped

        one = sb.Stylizer(manifest("metrics=[]"))
        with pytest.raises(Stopped):
            one.stylize(samples(20), stop)
        told: list[tuple[int, int, int]] = []
        assert all(outcome.succeeded for outcome in one.stylize(samples(3), lambda *now: told.append(now)))
        assert told == [(0, 0, 0), (0, 2, 1), (2, 0, 0), (2, 1, 1), (3, 0, 0)]

    def test_a_header_that_does_not_say_how_the_picture_lies(self, manifest: Callable[..., sb.Manifest]) -> None:
        """EXIF data behind the pixels of a PNG may rotate it, so its decoded size counts and not that of its header."""
        exif = Image.Exif()
        exif[0x0112] = 6
        work = samples(3)
        lying = Image.fromarray(picture(7))
        sink = io.BytesIO()
        lying.save(sink, "PNG", exif=exif)
        data = sink.getvalue()
        start = data.index(b"eXIf") - 4
        length = int.from_bytes(data[start : start + 4], "big") + 12
        end = data.index(b"IEND") - 4
        late = data[:start] + data[start + length : end] + data[start : start + length] + data[end:]
        assert pixels.size(late) == (60, 40)
        assert pixels.decode(late).shape == (60, 40, 3)
        work.insert(1, Sample("turned", "u", late, "png", "", {}))
        outcomes = sb.Stylizer(manifest("metrics=[]", "image.resolution=40")).stylize(work)
        assert [(outcome.width, outcome.height) for outcome in outcomes] == [(60, 40), (40, 60), (60, 40), (60, 40)]


class TestTiles:
    def tiled(self, one: Generator, image: Tensor, size: int, overlap: int, under: Any, at_once: int = 3) -> Tensor:
        tiling = Tiling(image, size, overlap, one.reach)
        for start in range(0, len(tiling), at_once):
            chosen = slice(start, start + at_once)
            with torch.no_grad():
                tiling.paste(chosen, one(tiling.cut(chosen), under))
        return tiling.result()

    @pytest.mark.parametrize(("height", "width"), [(203, 331), (128, 130), (90, 400)])
    def test_that_share_twice_the_reach_make_the_whole_picture(self, generator: Path, height: int, width: int) -> None:
        one, image = Generator.load(generator), tensor(picture(3, height, width))
        moments = one.moments(overview(image, 160))
        with torch.no_grad():
            whole = one(image, moments)
        assert one.reach == 29
        assert (self.tiled(one, image, 128, 60, moments) - whole).abs().max() < 1e-5
        assert (self.tiled(one, image, 128, 60, moments, at_once=1) - whole).abs().max() < 1e-5
        if width > 300:
            assert (self.tiled(one, image, 128, 16, moments) - whole).abs().max() > 1e-2, "else the test says nothing"

    @pytest.mark.parametrize(
        ("length", "size", "overlap"), [(400, 64, 32), (130, 128, 0), (1000, 128, 60), (96, 64, 4)]
    )
    def test_count_one_everywhere(self, length: int, size: int, overlap: int) -> None:
        tiling = Tiling(torch.rand(1, 3, 72, length), size, overlap, reach=29)
        chosen = slice(0, len(tiling))
        tiling.paste(chosen, torch.ones_like(tiling.cut(chosen)))
        assert (tiling.result() - 1).abs().max() < 1e-6

    def test_show_no_seam(self, generator: Path) -> None:
        """At the edges of naive tiles the picture jumps; at the edges of ours it is as smooth as the whole picture."""
        one, size = Generator.load(generator), 64
        image = tensor(picture(5, 128, 256))  # a few smooth blobs
        with torch.no_grad():
            whole, own = (
                one(image),
                torch.cat(
                    [torch.cat([one(tile) for tile in row.split(size, -1)], -1) for row in image.split(size, -2)], -2
                ),
            )
        ours = self.tiled(one, image, size, 32, one.moments(overview(image, 96)))

        def seam(result: Tensor, edges: Sequence[int]) -> float:
            """The deviation of the columns at an edge from the continuation of their neighbours."""
            bends = [
                (result[..., x] - result[..., x - 1] - (result[..., x + 1] - result[..., x - 2]) / 3).abs().mean()
                for x in edges
            ]
            return float(torch.stack(bends).mean())

        naive_edges = range(size, 256, size)
        starts = [0, 32, 64, 96, 128, 160, 192]
        our_edges = sorted({x for start in starts for x in (start, start + size)} - {0, 256})
        assert seam(own, naive_edges) > 10 * seam(whole, naive_edges)
        assert seam(ours, our_edges) < 1.2 * seam(whole, our_edges)

    def test_in_a_run(self, tmp_path: Path, generator: Path) -> None:
        """A picture larger than a tile is one row, and the number of tiles per batch does not change it."""
        (tmp_path / "photos").mkdir()
        large = picture(1, 150, 210)
        Image.fromarray(large).save(tmp_path / "photos" / "large.png")
        Image.fromarray(picture(2)).save(tmp_path / "photos" / "small.png")
        file = write_stylize(
            tmp_path,
            generator,
            tmp_path / "photos",
            image={"fit": "none"},
            tiles={"size": 128, "overlap": 60, "thumbnail": 96},
        )
        sb.run(sb.load(file))
        found = pictures(tmp_path / "out")
        one, source = Generator.load(generator), tensor(large)
        with torch.no_grad():
            whole = one(source, one.moments(overview(source, 96)))
        expected = (whole * 255).round().byte()[0].permute(1, 2, 0).numpy()
        assert apart({"large": expected}, {"large": found["large"]}) <= 1
        assert {key: row["batch_size"] for key, row in rows(tmp_path / "out").items()} == {"large": 1, "small": 1}
        shutil.rmtree(tmp_path / "out")
        sb.run(sb.load(file, ["compute.batch_size=1"]))
        assert apart(pictures(tmp_path / "out"), found) <= 1

    def test_that_do_not_fit_are_halved(
        self, manifest: Callable[..., sb.Manifest], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = manifest(
            "metrics=[]", "image.resolution=130", "tiles.size=64", "tiles.overlap=32", "compute.batch_size=5"
        )
        one, fits, tried = sb.Stylizer(asked), 2, []
        assert isinstance(one.engine, GeneratorEngine)
        forward = one.engine.generator.forward

        def in_little_memory(images: Tensor, *moments: Any) -> Tensor:
            tried.append(len(images))
            if len(images) > fits:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(images, *moments)

        monkeypatch.setattr(one.engine.generator, "forward", in_little_memory)
        (outcome,) = one.stylize(samples(1, 130, 130))
        assert outcome.succeeded
        assert tried == [5, *[2] * 8]  # 16 tiles, four by four
        fits = 0
        (outcome,) = one.stylize(samples(1, 130, 130))
        assert outcome.error_code == "oom"
        assert "130x130 does not fit the device's memory; lower image.resolution or tiles.size" in str(
            outcome.error_message
        )


class TestGenerator:
    def test_there_is_none(self, manifest: Callable[..., sb.Manifest], tmp_path: Path) -> None:
        with pytest.raises(sb.WeightsError, match="generator: /nowhere does not exist, or is empty; if"):
            sb.run(manifest(generator="/nowhere"))
        assert not (tmp_path / "out").exists()
        (tmp_path / "pictures").mkdir()
        (tmp_path / "pictures" / "fox.jpg").touch()
        with pytest.raises(sb.WeightsError, match=r"pictures has no generator\.json, there or in generator/; name the"):
            sb.plan(manifest(generator=str(tmp_path / "pictures")))

    def test_below_a_distill_run(self, manifest: Callable[..., sb.Manifest], generator: Path, tmp_path: Path) -> None:
        run = tmp_path / "distilled"
        run.mkdir()
        (run / "run.json").write_text(json.dumps({"manifest": {"task": "distill"}}))
        asked = manifest(generator=str(run))
        with pytest.raises(sb.WeightsError, match="distilled is a distill run that is not finished; `smsbatch run`"):
            sb.plan(asked)
        shutil.copytree(generator, run / "generator")
        assert sb.plan(asked).samples == 12

    def test_of_another_run(self, manifest: Callable[..., sb.Manifest], job: Path) -> None:
        with pytest.raises(sb.WeightsError, match="is the output of a run of task stylize, which makes no generator"):
            sb.plan(manifest(generator=str(job.parent / "out")))

    @pytest.mark.parametrize(
        ("spoil", "words"),
        [
            (lambda folder: (folder / "generator.safetensors").unlink(), "generator.safetensors is missing; copy both"),
            (lambda folder: (folder / "generator.safetensors").write_bytes(b"cut"), "is not what generator.json says"),
            (lambda folder: (folder / "generator.json").write_text("{"), "is damaged, it is not JSON"),
            (lambda folder: (folder / "generator.json").write_text("{}"), "is not of a generator of smsbatch"),
            (
                lambda folder: (folder / "generator.json").write_text(
                    (folder / "generator.json").read_text().replace('"version": 1', '"version": 2')
                ),
                "is of version 2, this smsbatch reads 1",
            ),
        ],
    )
    def test_spoiled(
        self,
        spoil: Callable[[Path], Any],
        words: str,
        manifest: Callable[..., sb.Manifest],
        generator: Path,
        tmp_path: Path,
    ) -> None:
        copy = shutil.copytree(generator, tmp_path / "copy")
        spoil(copy)
        with pytest.raises(sb.WeightsError, match=f"^generator: .*{words}"):
            sb.plan(manifest(generator=str(copy)))

    def test_that_changed_since_is_refused(
        self, manifest: Callable[..., sb.Manifest], generator: Path, tmp_path: Path
    ) -> None:
        copy = shutil.copytree(generator, tmp_path / "copy")
        asked = manifest("metrics=[]", generator=str(copy))
        sb.run(asked)
        make_generator(copy, seed=1)
        with pytest.raises(sb.DriftError, match=r"changed: weights: the file generator\.json; weights: .*safetensors"):
            sb.run(asked)
        again = sb.replay(str(tmp_path / "out"), "photo-1", tmp_path)
        assert not again.same
        assert again.changed == ("the file generator.json has changed", "the file generator.safetensors has changed")

    def test_in_an_object_store(
        self, manifest: Callable[..., sb.Manifest], generator: Path, job: Path, tmp_path: Path, s3: Server
    ) -> None:
        url = f"s3://{s3.bucket()}/distilled"
        s3.upload(generator, f"{url}/generator")
        storage = {"endpoint": s3.endpoint, "region": s3.storage.region}
        sb.run(manifest("compute.batch_size=1", generator=url, storage=storage))
        assert tars(tmp_path / "out") == tars(job.parent / "out")


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again(tmp_path: Path, generator: Path) -> None:
    """A run that is resumed after every SIGKILL ends with the bytes of an undisturbed run."""
    photos = make_photos(tmp_path / "photos", [f"photo-{number:02}" for number in range(24)], size=(96, 64))
    (photos / "photo-05.png").write_bytes(b"no picture")
    options: dict[str, Any] = {"errors": {"max_failed_fraction": 0.5}, "image": {"resolution": 64}}
    (tmp_path / "undisturbed").mkdir()
    undisturbed = write_stylize(tmp_path / "undisturbed", generator, photos, output={"samples_per_unit": 1}, **options)
    sb.run(sb.load(undisturbed))
    job, out = write_stylize(tmp_path, generator, photos, output={"samples_per_unit": 1}, **options), tmp_path / "out"
    seen: dict[str, str] = {}

    def check() -> None:
        check_whole(out)
        now = {name: commit["attempt"] for name, commit in commits(out).items()}
        assert seen.items() <= now.items()
        seen.update(now)

    try:
        killed = disturb(lambda: Life(job), Disk(out), deaths=2, stride=30, seed=2, check=check)
    finally:
        Life.end_all()
    assert killed >= 2
    assert seen, "it was killed only before it had done anything"
    check_end(out, tmp_path / "undisturbed" / "out")


@pytest.fixture
def distilling(tmp_path: Path) -> str:
    """The output of a distill run, as far as these verbs read it."""
    manifest = {"task": "distill", "errors": {}}
    run = {
        "name": "d",
        "manifest": manifest,
        "manifest_sha256": identity_of(manifest),
        "weights": {},
        "planned": {"samples": 1, "units": 0, "shards": 0, "bytes": 1},
    }
    run |= {"notices": [], "versions": {}, "index_sha256": ""}
    Store(tmp_path / "distilled").put("run.json", json.dumps(run).encode())
    return str(tmp_path / "distilled")


@pytest.mark.parametrize(
    "verb",
    [
        sb.verify,
        sb.repair,
        sb.gc,
        lambda where: sb.replay(where, "photo-1"),
        lambda where: sb.measure(where, "tiny:styles/oil.reference.safetensors"),
        lambda where: list(sb.failures(where)),
    ],
)
def test_a_distill_run_has_no_dataset(verb: Callable[[str], Any], distilling: str) -> None:
    with pytest.raises(sb.RequestError, match="this run distills a generator and makes no dataset; `smsbatch status`"):
        verb(distilling)

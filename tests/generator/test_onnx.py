"""Tests of the export of a generator to ONNX: the file computes the same network for images of any size."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from smsbatch.commands import export as exporting
from smsbatch.commands.export import Exported, export
from smsbatch.errors import RequestError, RunError, WeightsError
from smsbatch.generator import onnx as onnx_file
from smsbatch.generator.network import CONFIG, WEIGHTS, Generator

ABOUT = {"name": "oil", "style": "oil painting style"}


@pytest.fixture(scope="module")
def generator() -> Generator:
    torch.manual_seed(3)
    return Generator(8, 1, restore=True, about=ABOUT).requires_grad_(False)


@pytest.fixture(scope="module")
def run(generator: Generator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a generator, as a distill run writes it."""
    folder = tmp_path_factory.mktemp("run")
    generator.save(folder / "generator")
    return folder


@pytest.fixture(scope="module")
def exported(run: Path) -> Exported:
    return export(run, run)


def test_it_computes_what_torch_computes(generator: Generator, exported: Exported) -> None:
    session = onnxruntime.InferenceSession(str(exported.path), providers=["CPUExecutionProvider"])
    assert [(put.name, put.shape) for put in (*session.get_inputs(), *session.get_outputs())] == [
        ("images", ["batch", 3, "height", "width"]),
        ("stylized", ["batch", 3, "height", "width"]),
    ]
    for batch, height, width in ((1, 16, 16), (1, 17, 200), (3, 35, 66), (2, 128, 64)):
        images = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(height))
        (found,) = session.run(None, {"images": images.numpy()})
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, generator(images).numpy(), atol=1e-4)
    for extreme in (np.zeros, np.ones):
        (found,) = session.run(None, {"images": extreme((1, 3, 20, 20), np.float32)})
        assert 0 <= found.min() <= found.max() <= 1


def test_what_is_told_of_it(generator: Generator, exported: Exported, run: Path) -> None:
    assert exported.path == run / "generator.onnx"
    assert exported.parameters == generator.parameter_count
    assert exported.bytes == exported.path.stat().st_size > 4 * exported.parameters
    assert exported.largest is not None
    assert 0 < exported.largest < 1e-4
    assert json.loads(json.dumps(exported.to_dict()))["path"] == str(exported.path)
    assert sorted(path.name for path in run.iterdir()) == ["generator", "generator.onnx"], (
        "and one file is all there is"
    )


def test_the_file_is_whole_and_says_what_it_is(exported: Exported) -> None:
    model = onnx.load(exported.path)
    onnx.checker.check_model(model, full_check=True)
    assert {entry.key: entry.value for entry in model.metadata_props}["about"] == json.dumps(ABOUT)
    assert not any(tensor.external_data for tensor in model.graph.initializer)


def test_a_generator_in_half_precision_is_exported_whole(generator: Generator, tmp_path: Path) -> None:
    """The exporter receives float32 parameters."""
    half = Generator.of_files(generator.files()).to(torch.bfloat16)
    with patch.object(torch.onnx, "export", side_effect=InterruptedError) as called, pytest.raises(InterruptedError):
        onnx_file.export_onnx(half, tmp_path / "x.onnx")
    assert {parameter.dtype for parameter in called.call_args.args[0].parameters()} == {torch.float32}


def test_a_file_that_computes_something_else_is_not_left(run: Path, exported: Exported, tmp_path: Path) -> None:
    """The exporter's stand-in always writes the file of the generator in `run`, which is wrong for another one."""
    torch.manual_seed(4)
    Generator(8, 1, restore=True).save(tmp_path / "other")
    (tmp_path / "x.onnx").write_text("kept")

    def write(_: Generator, file: Path) -> None:
        file.write_bytes(exported.path.read_bytes())

    with patch.object(exporting, "export_onnx", write):
        with pytest.raises(RunError, match="onnxruntime") as raised:
            export(tmp_path / "other", tmp_path / "x.onnx")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "x.onnx"]
        assert (tmp_path / "x.onnx").read_text() == "kept"
        again = export(run / "generator", tmp_path / "x.onnx")
    assert "\n" not in str(raised.value)
    assert (tmp_path / "x.onnx").read_bytes() == exported.path.read_bytes()
    assert again.largest == exported.largest


def test_without_a_runtime_nothing_is_compared(run: Path, exported: Exported, tmp_path: Path) -> None:
    with (
        patch.dict(sys.modules, onnxruntime=None),
        patch.object(exporting, "export_onnx", lambda _, file: file.write_bytes(b"x")),
    ):
        assert export(run, tmp_path).largest is None


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_without_the_extra_it_says_what_to_install(run: Path, tmp_path: Path, missing: str) -> None:
    with patch.dict(sys.modules, {missing: None}), pytest.raises(RequestError, match=r"pip install 'smsbatch\[onnx\]'"):
        export(run, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["x.pt", "nowhere/x.onnx", "s3://bucket/x.onnx"])
def test_a_target_that_is_not_possible(run: Path, tmp_path: Path, target: str) -> None:
    with pytest.raises(RequestError, match="folder"):
        export(run, target if "://" in target else tmp_path / target)


def test_no_generator_and_a_damaged_one(run: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="does not exist, or is empty"):
        export(tmp_path, tmp_path / "x.onnx")
    (tmp_path / "fox.jpg").touch()
    with pytest.raises(WeightsError, match=CONFIG):
        export(tmp_path, tmp_path / "x.onnx")
    Generator.load(run / "generator").save(tmp_path)
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:-1])
    with pytest.raises(WeightsError, match=WEIGHTS):
        export(tmp_path, tmp_path / "x.onnx")
    assert not (tmp_path / "x.onnx").exists()

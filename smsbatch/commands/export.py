"""`export`: write a generator as an ONNX file, which runs without this package.

The file is tested before it gets its name: one whose results differ from the generator's is deleted.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from smsbatch.errors import RequestError, RunError
from smsbatch.generator.files import read_generator
from smsbatch.generator.network import Generator
from smsbatch.generator.onnx import difference, export_onnx
from smsbatch.manifest import Storage
from smsbatch.storage.store import storage_errors

_TOLERANCE = 1e-3  # for values in [0, 1]; one step of a pixel is four times as large


@dataclass(frozen=True)
class Exported:
    """An exported file.

    Attributes:
        parameters: number of parameters of the generator.
        bytes: size of the file.
        largest: largest difference between torch and onnxruntime, for values in [0, 1]; None if the latter is missing.
    """

    path: Path
    parameters: int
    bytes: int
    largest: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"path": str(self.path)}


def export(generator: str | Path, target: str | Path, storage: Storage | None = None) -> Exported:
    """Write a generator as an ONNX file (see `generator/onnx.py`), and compare its results with the generator's.

    Args:
        generator: the output of a `distill` run, or a folder with a generator's two files; on disk or in an object
            store.
        target: a file that ends in `.onnx`, which is replaced if it exists, or an existing folder.
        storage: settings for an object store.

    Raises:
        RequestError: the extra `onnx` is not installed, or the target is invalid.
        WeightsError: there is no generator, or it is damaged.
        RunError: onnxruntime computes other results; no file is left.
        StorageError: the generator cannot be read, or the file cannot be written.
    """
    path = Path(target)
    if path.is_dir():
        path = path / "generator.onnx"
    if path.suffix != ".onnx" or "://" in str(target):
        raise RequestError(f"{target}: an export needs a local file name that ends in .onnx, or an existing folder")
    if not path.parent.is_dir():
        raise RequestError(f"{target}: there is no folder {path.parent}; make it first")
    whole = Generator.of_files(read_generator(str(generator), storage or Storage()), str(generator))
    with (
        storage_errors("write", path),
        tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as folder,
    ):
        written = Path(folder, path.name)
        export_onnx(whole, written)
        largest = difference(whole, written)
        if largest is not None and not largest <= _TOLERANCE:
            raise RunError(
                f"{path} is not written: onnxruntime computes values that are {largest:.2g} from torch's; try other "
                "versions of torch, onnxscript or onnxruntime"
            )
        written.replace(path)
    return Exported(path, whole.parameter_count, path.stat().st_size, largest)

"""A generator as an ONNX file: it then runs wherever an ONNX runtime does, without torch and without this package.

The graph has one input, `images` [batch, 3, height, width] float32 in [0, 1], and one output of the same shape and
range, `stylized`. Batch, height and width are dynamic, height and width at least 16; the graph pads to the stride and
crops. The generator's `about` is in the file's metadata.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from smsbatch.errors import RequestError
from smsbatch.generator.network import Generator

INPUT, OUTPUT = "images", "stylized"
_SMALLEST = 16
# Shapes of the check: sides that are multiples of the stride, sides that are not, and the smallest side.
_SHAPES = ((1, 64, 96), (2, 51, 70), (1, 16, 33))


def export_onnx(generator: Generator, file: Path) -> None:
    """Write a generator, exported in float32 on the CPU whatever its own precision and device.

    Raises:
        RequestError: the extra `onnx` is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise RequestError(f"exporting to ONNX needs an extra ({error}); pip install 'smsbatch[onnx]'") from error
    plain = Generator.of_files(generator.files())
    height, width = (torch.export.Dim(side, min=_SMALLEST) for side in ("height", "width"))
    # The example's sides differ and are not multiples of the stride: the export must not specialize on them.
    program = torch.onnx.export(
        plain,
        (torch.zeros(2, 3, 37, 46),),
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=({0: torch.export.Dim("batch"), 2: height, 3: width},),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    (given,), (made,) = program.model.graph.inputs, program.model.graph.outputs
    made.shape = given.shape  # instead of the formula of padding and cropping
    program.model.metadata_props["about"] = json.dumps(generator.about)
    program.save(str(file))


def difference(generator: Generator, file: Path) -> float | None:
    """The largest difference of any value between torch and onnxruntime on noise pictures; None without onnxruntime."""
    try:
        import onnxruntime
    except ImportError:
        return None
    onnxruntime.set_default_logger_severity(3)  # errors only: it would warn of missing accelerators
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    plain, draws = Generator.of_files(generator.files()), torch.Generator().manual_seed(0)
    largest = 0.0
    for batch, height, width in _SHAPES:
        images = torch.rand(batch, 3, height, width, generator=draws)
        (found,) = session.run([OUTPUT], {INPUT: images.numpy()})
        largest = max(largest, float((torch.from_numpy(found) - plain(images)).abs().max()))
    return largest

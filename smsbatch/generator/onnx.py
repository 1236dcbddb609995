"""A generator as an ONNX file: it then runs wherever an ONNX runtime does, without torch and without this package.

The graph has one input, `images` [batch, 3, height, width] float32 in [0, 1], and one output of the same shape and
range, `stylized`. All three sides are free, height and width at least 16; padding to the stride and cutting back are
inside. What the generator says of itself is in the file's metadata, under `about`.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from smsbatch.errors import RequestError
from smsbatch.generator.network import Generator

__all__ = ["difference", "export_onnx"]

INPUT, OUTPUT = "images", "stylized"
_SMALLEST = 16
# Of the pictures that the check is made on: a multiple of the stride, none, and the smallest side there is.
_SHAPES = ((1, 64, 96), (2, 51, 70), (1, 16, 33))


def export_onnx(generator: Generator, file: Path) -> None:
    """Write a generator, in float32 and on the CPU whatever it computes in.

    Raises:
        RequestError: what writes ONNX is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise RequestError(f"an ONNX file is written by an extra ({error}); pip install 'smsbatch[onnx]'") from error
    plain = Generator.of_files(generator.files())
    height, width = (torch.export.Dim(side, min=_SMALLEST) for side in ("height", "width"))
    # The example's sides are no multiples of the stride and differ: what they happened to be must not be kept.
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
    made.shape = given.shape  # instead of the formula of padding and cutting
    program.model.metadata_props["about"] = json.dumps(generator.about)
    program.save(str(file))


def difference(generator: Generator, file: Path) -> float | None:
    """The largest difference of any value between torch and onnxruntime on a few pictures of noise; None without it."""
    try:
        import onnxruntime
    except ImportError:
        return None
    onnxruntime.set_default_logger_severity(3)  # errors alone: of this machine's missing accelerators it would warn
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    plain, draws = Generator.of_files(generator.files()), torch.Generator().manual_seed(0)
    largest = 0.0
    for batch, height, width in _SHAPES:
        images = torch.rand(batch, 3, height, width, generator=draws)
        (found,) = session.run([OUTPUT], {INPUT: images.numpy()})
        largest = max(largest, float((torch.from_numpy(found) - plain(images)).abs().max()))
    return largest

"""The base class of engines, which stylize pictures as tensors on one device and know no files, rows or units.

The class itself tells a driver, without torch, on which weights its results depend, how many units a worker holds and
how a report describes its work. So a module of an engine imports torch only inside of methods.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

from smsbatch.manifest import Dataset

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ManifestT = TypeVar("ManifestT", bound=Dataset)


class Rendered(NamedTuple):
    """A batch of results: images [B, 3, H, W] in [0, 1], the steps of each [B], and whether each is finite [B]."""

    images: Tensor
    steps: Tensor
    finite: Tensor


class Weights(NamedTuple):
    """The model files of a manifest as a clause, and a line for each of their parts that is not used."""

    found: str
    notices: list[str]


@dataclass(frozen=True)
class Description:
    """The description of an engine's work in a report.

    Attributes:
        style: the style in words.
        work: how every image was processed, for the first line of the report.
        method: the same for the dataset card, after "Images stylized", in Markdown.
        facts: rows of the dataset card, name and value in Markdown.
    """

    style: str
    work: str
    method: str
    facts: Sequence[tuple[str, str]]


class Engine(ABC, Generic[ManifestT]):
    """Stylizes pictures by one method, in one style, on one device.

    Attributes:
        units_in_flight: units that a worker holds at once: one that it computes, others that it reads or commits.
        device: the device of the results.
        steps: steps of a batch, in the unit of the progress of `render`.
        diverged_hint, oom_hint: advice if a result is not finite, or if a picture does not fit into memory.
    """

    # With one unit a worker would wait for every read; with three, more work would be lost when it dies.
    units_in_flight: ClassVar[int] = 2
    diverged_hint: ClassVar[str]
    oom_hint: ClassVar[str]
    device: torch.device
    steps: int

    @abstractmethod
    def __init__(self, manifest: ManifestT, device: str) -> None:
        """Load the models.

        Raises:
            WeightsError: a model, LoRA or generator is missing or not supported, or two models are incompatible.
        """

    # ------------------------------------------------------------------------------------------------ without torch

    @staticmethod
    @abstractmethod
    def steps_per_image(manifest: ManifestT) -> int | None:
        """Iterations per image; None for an engine that needs one pass."""

    @staticmethod
    @abstractmethod
    def check_weights(manifest: ManifestT) -> Weights:
        """Check the model files.

        Raises:
            WeightsError: one is missing or not supported.
            StorageError: one cannot be read.
        """

    @staticmethod
    @abstractmethod
    def digests(manifest: ManifestT) -> dict[str, str]:
        """SHA-256 of every model file that determines the results, by a name that is the same on every machine.

        Raises: as `check_weights`.
        """

    @staticmethod
    def about(manifest: ManifestT) -> dict[str, Any] | None:
        """Facts about the generator, which `run.json` records for `describe`; None without a generator."""
        return None

    @staticmethod
    @abstractmethod
    def describe(settings: Mapping[str, Any], about: Mapping[str, Any] | None) -> Description:
        """Describe the work of a run from its manifest as plain data and the result of `about`."""

    # ------------------------------------------------------------------------------------------------ on the device

    @abstractmethod
    def prompt(self, caption: str) -> str:
        """The prompt for a picture with this caption, which its row records."""

    @abstractmethod
    def batch_size(self, height: int, width: int) -> int:
        """The number of pictures of this size to render at once."""

    @abstractmethod
    def render(
        self, images: Tensor, captions: Sequence[str], seeds: Sequence[int], progress: Callable[[int], None]
    ) -> Rendered:
        """Stylize images [B, 3, H, W] in [0, 1] independently of each other.

        `progress` is called with the number of finished steps, and may raise to stop. Out of memory raises torch's
        error.
        """


def finite(values: Tensor) -> Tensor:
    """True for each of the values [B, ...] whose entries are all finite, [B]."""
    return values.isfinite().flatten(1).all(1)

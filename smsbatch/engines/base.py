"""An engine: pictures in, pictures out, as tensors on one device. It knows no files, rows or units.

Its class answers what a driver has to know of it, without torch: which weights its results depend on, how many units a
worker holds, and how a report describes its work. So a module of an engine imports torch only inside of methods.
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

Task = TypeVar("Task", bound=Dataset)


class Rendered(NamedTuple):
    """A batch of results: images [B, 3, H, W] in [0, 1], the steps each took [B], and whether each is finite [B]."""

    images: Tensor
    steps: Tensor
    finite: Tensor


class Weights(NamedTuple):
    """The model files of a manifest: which they are, as a clause, and a line for each part that is left out."""

    found: str
    notices: list[str]


@dataclass(frozen=True)
class Description:
    """What a report says of an engine's work.

    Attributes:
        style: the style in words.
        work: what every image was put through, for the first line of the report.
        method: the same for the dataset card, after "Images stylized", in Markdown.
        facts: rows of the dataset card, name and value in Markdown.
    """

    style: str
    work: str
    method: str
    facts: Sequence[tuple[str, str]]


class Engine(ABC, Generic[Task]):
    """A style on one device.

    Attributes:
        units_in_flight: units that a worker holds at once: one that it computes, others that it reads or commits.
        device: of the results.
        steps: of a batch, as `render` tells its progress.
        diverged_hint, oom_hint: what to do where a result is not finite, or a picture does not fit the memory.
    """

    # With one unit a worker would wait for every read; with three a lost worker would lose more.
    units_in_flight: ClassVar[int] = 2
    diverged_hint: ClassVar[str]
    oom_hint: ClassVar[str]
    device: torch.device
    steps: int

    @abstractmethod
    def __init__(self, manifest: Task, device: str) -> None:
        """Load the models.

        Raises:
            WeightsError: a model, LoRA or generator is missing or not understood, or two models do not go together.
        """

    # ------------------------------------------------------------------------------------------------ without torch

    @staticmethod
    @abstractmethod
    def steps_per_image(manifest: Task) -> int | None:
        """Iterations of every image; None where one pass does it."""

    @staticmethod
    @abstractmethod
    def check_weights(manifest: Task) -> Weights:
        """Look whether the model files are there and understood.

        Raises:
            WeightsError: one is not.
            StorageError: one cannot be read.
        """

    @staticmethod
    @abstractmethod
    def digests(manifest: Task) -> dict[str, str]:
        """SHA-256 of every model file that results depend on, by a name that is the same on every machine.

        Raises: as `check_weights`.
        """

    @staticmethod
    def about(manifest: Task) -> dict[str, Any] | None:
        """What `run.json` records of the generator in use, for `describe`; None without one."""
        return None

    @staticmethod
    @abstractmethod
    def describe(settings: Mapping[str, Any], about: Mapping[str, Any] | None) -> Description:
        """The work of a run with this manifest, as plain data, and what `about` gave."""

    # ------------------------------------------------------------------------------------------------ on the device

    @abstractmethod
    def prompt(self, caption: str) -> str:
        """The prompt that a picture with this caption gets, for its row."""

    @abstractmethod
    def batch_size(self, height: int, width: int) -> int:
        """How many pictures of this size are best rendered at once."""

    @abstractmethod
    def render(
        self, images: Tensor, captions: Sequence[str], seeds: Sequence[int], progress: Callable[[int], None]
    ) -> Rendered:
        """Stylize images [B, 3, H, W] in [0, 1], none of which has any influence on another.

        `progress` is called with the number of finished steps, and may raise to stop. Out of memory is torch's error.
        """


def finite(values: Tensor) -> Tensor:
    """Which of [B, ...] have no entry that is infinite or not a number, [B]."""
    return values.isfinite().flatten(1).all(1)

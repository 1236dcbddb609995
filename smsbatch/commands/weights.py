"""The model files that a manifest's results depend on, whatever its task: looked at and digested. Without torch."""

from __future__ import annotations

import hashlib

from smsbatch.diffusion.lora_files import check_style
from smsbatch.diffusion.priors import files as weights
from smsbatch.generator.files import read_generator
from smsbatch.manifest import Manifest, Styled, Stylize


def check_weights(manifest: Manifest) -> list[str]:
    """Look whether the models, LoRAs or the generator are there and understood; a line for whatever is left out.

    Raises:
        WeightsError: one is not.
        StorageError: the generator cannot be read.
    """
    if isinstance(manifest, Styled):
        return check_style(manifest)
    if isinstance(manifest, Stylize):
        read_generator(manifest.generator, manifest.storage)
    return []


def weight_digests(manifest: Manifest) -> dict[str, str]:
    """SHA-256 of every model file that results depend on, whatever the task, by a name that is the same on every
    machine.

    Raises:
        WeightsError: one is missing or not understood.
        StorageError: the generator cannot be read.
    """
    if not isinstance(manifest, Stylize):
        return weights.model_digests(manifest)
    files = read_generator(manifest.generator, manifest.storage)
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}

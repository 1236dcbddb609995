"""Small trainings on a model of random weights, also by several processes, and functions that read their output."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from support.faults import PATIENCE_S, PRELOAD
from support.jobs import make_photos


def write_training(folder: Path, model: Path, lora: Path, **sections: dict[str, Any]) -> Path:
    """Write a manifest of a training of twelve steps, two of them warm-up; `sections` override its keys.

    Every step has four pictures of 32 pixels out of ten.
    """
    manifest: dict[str, Any] = {
        "task": "distill",
        "name": "test",
        "source": {"format": "folder", "urls": str(folder / "photos")},
        "model": {"path": str(model)},
        "style": {"lora": str(lora), "prompt": "wavy style"},
        "image": {"resolution": 32},
        "distill": {
            "width": 8,
            "blocks": 1,
            "warmup_steps": 2,
            "steps": 10,
            "images_per_step": 4,
            "repeats": 2,
            "checkpoint_every": 2,
            "keep": 100,
            "log_every": 1,
            "grid_every": 6,
        },
        "output": {"path": str(folder / "out")},
        "compute": {"pool": "local", "threads": 1},
    }
    for name, section in sections.items():
        manifest[name] = manifest.get(name, {}) | section
    if not (folder / "photos").exists():
        make_photos(folder / "photos", [f"photo-{number:02}" for number in range(10)])
    file = folder / "training.yaml"
    file.write_text(yaml.safe_dump(manifest))
    return file


def parameters(out: Path) -> dict[str, torch.Tensor]:
    """The parameters of a run's generator."""
    return load_file(out / "generator/generator.safetensors")


def log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]


def steps(out: Path) -> list[int]:
    """The steps of the log, in its order."""
    return [line["step"] for line in log(out)]


def checkpoints(out: Path) -> list[int]:
    return sorted(int(file.stem) for file in (out / "_smsbatch/checkpoints").glob("*.json"))


def train_together(job: Path, workers: int, folder: Path) -> None:
    """Run the job's planned training in `workers` processes that gloo connects.

    Worker 0 saves the averaged tensors in `folder`: one safetensors file for each call, named by its number.
    """
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    folder.mkdir()
    processes = [context.Process(target=_train, args=(job, rank, workers, folder)) for rank in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE_S)
    assert [process.exitcode for process in processes] == [0] * workers


def _train(job: Path, rank: int, workers: int, folder: Path) -> None:
    import smsbatch as sb
    from smsbatch.manifest import Distill
    from smsbatch.training.group import WorkerGroup
    from smsbatch.training.loop import train_loop

    class Watched(WorkerGroup):
        calls = 0

        def average(self, tensors: list[torch.Tensor]) -> None:
            super().average(tensors)
            if self.rank == 0:
                save_file({str(n): tensor.clone() for n, tensor in enumerate(tensors)}, folder / f"{self.calls}")
            self.calls += 1

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=workers)
    manifest = sb.load(job)
    assert isinstance(manifest, Distill)
    assert train_loop(manifest, Watched(rank, workers), stop=lambda: False)
    torch.distributed.destroy_process_group()

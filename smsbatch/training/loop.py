"""The training loop of a generator, the same in every pool: one worker alone, or several by torch.distributed.

All workers do every step together and leave together: before each step they share an error or a request to stop that
only one of them has met. Worker 0 writes, and always whole files: a resumed training begins at the newest checkpoint
and sees the pictures that would have come next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from time import monotonic
from typing import Any, Self

import torch
from torch import Tensor

from smsbatch.data.index import index_size
from smsbatch.diffusion.priors.load import load_models
from smsbatch.errors import RunError
from smsbatch.manifest import Distill
from smsbatch.runs.checkpoints import Checkpoint, Restored, prune, read, restore, write
from smsbatch.runs.layout import SUCCESS
from smsbatch.runs.run import Run
from smsbatch.training.distiller import Distiller, generator_learning_rate
from smsbatch.training.group import WorkerGroup
from smsbatch.training.loader import Batch, TrainingLoader
from smsbatch.training.log import TrainingLog, TrainingProgress
from smsbatch.training.result import describe_generator, model_card

_SHOWN = 8  # pictures in a grid


def train_here(
    manifest: Distill, run: Run, stop: Callable[[], bool], progress: Callable[[TrainingProgress], None]
) -> bool:
    """`train_loop` in this process, on a GPU if there is one."""
    group = WorkerGroup(device="cuda" if torch.cuda.is_available() else "cpu")
    return train_loop(manifest, group, stop, progress, run=run)


def train_loop(
    manifest: Distill,
    group: WorkerGroup,
    stop: Callable[[], bool],
    progress: Callable[[TrainingProgress], None] = lambda now: None,
    preempted: Callable[[], bool] = lambda: False,
    run: Run | None = None,
) -> bool:
    """Run the training planned at `output.path`, from its newest checkpoint to its generator.

    Args:
        stop: called before each step; True in one worker makes all of them leave, with a checkpoint.
        progress: called by worker 0 after each step.
        preempted: whether a worker's machine is about to be taken away. Every worker calls it at the same steps, those
            of the log, and gets the same answer; the first True writes a checkpoint.
        run: the planned run, if this process has opened it.

    Returns:
        True if the training is finished, False if it was stopped.

    Raises:
        SmsbatchError: in all workers; out of memory is raised only in the worker that met it.
    """
    run, training = run or Run.open(manifest), manifest.distill
    store = run.store
    if isinstance(manifest.compute.threads, int):
        torch.set_num_threads(manifest.compute.threads)
    found: Restored | None = None
    writer: TrainingWriter | None = None
    with group.collective():
        distiller = Distiller(*load_models(manifest, group.device), manifest, group.average)
        samples = index_size(run.index)
        found = restore(store) if group.rank == 0 else None
    checkpoint = group.broadcast(found.checkpoint if found else None)
    with group.collective():
        if checkpoint is not None:
            distiller.restore(found.data if found else read(store, checkpoint))

    saved, warned, failures = distiller.step, False, checkpoint.about["failed"] if checkpoint else 0
    with ExitStack() as stack:
        loader = TrainingLoader(manifest, run.index, samples, group.rank, group.size, distiller.step)
        stack.enter_context(loader)
        with group.collective():
            if group.rank == 0:
                writer = stack.enter_context(TrainingWriter(run, manifest, distiller, checkpoint))
        batches, recent, idle_s, began = iter(loader), list[dict[str, Tensor]](), 0.0, monotonic()
        while distiller.step < training.all_steps:
            batch, asked = None, monotonic()
            with group.defer_errors():
                batch = next(batches)
            idle_s += monotonic() - asked
            stopping, failed = group.agree(int(stop()), len(batch.failed) if batch else 0)
            if stopping:
                break
            assert batch is not None, "agree() raises the error that came instead"
            failures += failed
            taken = max(samples, (distiller.step + 1) * training.images_per_step)
            if failures > manifest.errors.max_failed_fraction * taken:
                group.fail(_too_many(failures, taken, batch, distiller.step, manifest))

            images = torch.from_numpy(batch.images).to(group.device).permute(0, 3, 1, 2).float() / 255
            recent.append(_step(distiller, images, batch, manifest))
            step = distiller.step
            last = step == training.all_steps
            logs = last or step % training.log_every == 0
            saves = last or step % training.checkpoint_every == 0
            losses: dict[str, float] = {}
            if logs or saves:
                wrong = _not_finite(distiller, recent)
                if wrong:
                    group.fail(RunError(f"{wrong}; {_advice(saved)}"))
                losses = _means(recent)
            if logs and preempted():
                saves, warned = saves or not warned, True
            with group.defer_errors():
                if writer is not None:
                    progress(writer.log.step(step, failed))
                    if logs:
                        others = {"learning_rate": generator_learning_rate(step - 1, training)}
                        others["idle_fraction"] = idle_s / (monotonic() - began)
                        writer.log.scalars(step, losses | others, losses.keys())
                    if last or step % training.grid_every == 0:
                        writer.grid(images)
                    if saves:
                        writer.save(failures, losses)
            if logs:
                recent, idle_s, began = [], 0.0, monotonic()
            if saves:
                saved = step
        with group.collective():
            if writer is not None:
                writer.finish(failures, stopped=distiller.step < training.all_steps)
    return distiller.step == training.all_steps


class TrainingWriter:
    """Worker 0's output: log, grids, checkpoints, and at the end the generator.

    A checkpoint is taken at once and stored by a thread while the training goes on; the next `save`, or `finish`,
    raises the thread's error.
    """

    def __init__(self, run: Run, manifest: Distill, distiller: Distiller, checkpoint: Checkpoint | None) -> None:
        self._run, self._store, self._training, self._distiller = run, run.store, manifest.distill, distiller
        self._about: Mapping[str, Any] = checkpoint.about if checkpoint else {"failed": 0, "seconds": 0.0, "losses": {}}
        self._saved, self._began = distiller.step, monotonic()
        self._seconds = self._about["seconds"]
        self.log = TrainingLog(run.store, manifest, distiller.step, self._about["failed"])
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="smsbatch-checkpoint")
        self._storing: Future[None] | None = None

    def __enter__(self) -> Self:
        self.log.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._thread.shutdown()
        self.log.__exit__(*error)

    def grid(self, images: Tensor) -> None:
        """Log a grid of sources [n, 3, H, W] in [0, 1] and of the averaged generator's results."""
        sources = images[:_SHOWN]
        with torch.no_grad():
            results = self._distiller.ema(sources)
        both = (torch.stack([sources, results.clamp(0, 1)]) * 255).round().to(torch.uint8)
        sources_shown, results_shown = both.permute(0, 1, 3, 4, 2).cpu().numpy()
        self.log.grid(self._distiller.step, sources_shown, results_shown)

    def save(self, failed: int, losses: Mapping[str, float]) -> None:
        """Take a checkpoint."""
        self._wait()
        self.log.flush()
        step = self._distiller.step
        self._saved = step
        self._about = {
            "failed": failed,
            "seconds": self._seconds + monotonic() - self._began,
            "losses": dict(losses),
        }
        self._storing = self._thread.submit(self._store_checkpoint, step, self._distiller.dump(), self._about)

    def finish(self, failed: int, stopped: bool) -> None:
        """Write the last checkpoint and, unless the training was stopped, the generator and `_SUCCESS`."""
        if self._saved < self._distiller.step:
            self.save(failed, self._about["losses"])
        self._wait()
        self.log.close(finished=not stopped)
        if stopped:
            return
        generator, run = self._distiller.ema, self._run.about
        generator.about = describe_generator(run, self._about)
        files = generator.files()
        for name, data in files.items():
            self._store.put(f"generator/{name}", data)
        self._store.put("generator/README.md", model_card(run, files).encode())
        self._store.create(SUCCESS, b"")

    def _wait(self) -> None:
        if self._storing is not None:
            self._storing.result()

    def _store_checkpoint(self, step: int, data: bytes, about: Mapping[str, Any]) -> None:
        write(self._store, step, data, about)
        prune(self._store, self._training.keep)


def _step(distiller: Distiller, images: Tensor, batch: Batch, manifest: Distill) -> dict[str, Tensor]:
    prompts = [manifest.objective.prompts(manifest.style.prompt, caption) for caption in batch.captions]
    try:
        return distiller.train_step(images, prompts, batch.seeds)
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"step {distiller.step + 1} does not fit the device's memory; lower compute.batch_size "
            f"({manifest.compute.batch_size} now), or set distill.checkpoint_vae"
        ) from error


def _means(recent: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """The mean of every loss over the steps that have it."""
    names = dict.fromkeys(name for losses in recent for name in losses)
    return {name: float(torch.stack([each[name] for each in recent if name in each]).mean()) for name in names}


def _not_finite(distiller: Distiller, recent: Sequence[Mapping[str, Tensor]]) -> str:
    """A message on the first value that is not finite, '' if there is none; the same in all workers."""
    for step, losses in enumerate(recent, distiller.step - len(recent) + 1):
        for name, loss in losses.items():
            if not math.isfinite(loss):
                return f"step {step}: the loss `{name}` is {float(loss)}"
    if not all(parameter.isfinite().all() for parameter in distiller.generator.parameters()):
        return f"step {distiller.step}: the generator's parameters are not finite"
    return ""


def _advice(saved: int) -> str:
    if not saved:
        return "lower distill.learning_rate or objective.fake.learning_rate, and start again in another output.path"
    return (
        f"lower distill.learning_rate and go on from step {saved} with --allow-drift distill.learning_rate, or start "
        "again in another output.path"
    )


def _too_many(failed: int, taken: int, batch: Batch, step: int, manifest: Distill) -> RunError:
    example = f" ({batch.failed[-1][0]}: {batch.failed[-1][1]}: {batch.failed[-1][2]})" if batch.failed else ""
    return RunError(
        f"{failed} of {taken} samples failed{example}, more than errors.max_failed_fraction "
        f"({manifest.errors.max_failed_fraction:g}) allows; stopped at step {step}; fix the source and run "
        "with --allow-drift inputs, or raise the limit"
    )

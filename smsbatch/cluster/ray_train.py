"""The training loop on a Ray cluster, by Ray Train: one process per worker; all-reduce by NCCL on GPUs, else by gloo.

When a worker dies, Ray Train ends the others, which cannot do a step without it, and starts a new group, which resumes
from our newest checkpoint. This happens at most `compute.retries` times; a preempted machine is always replaced. If the
cluster is notified of a preemption, as Ray's autoscaler and KubeRay are for spot machines, a checkpoint is written
within `distill.log_every` steps of the notice; otherwise the steps since the last checkpoint are lost. Ray Train's own
checkpoints are not used: ours are in the run's store, where a training without Ray finds them too.
"""

from __future__ import annotations

import os
import socket
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from typing import Any

from smsbatch.cluster.connect import Sizing, check_usable, connect, disconnect, size_up
from smsbatch.errors import RunError, SmsbatchError, StorageError
from smsbatch.manifest import Distill
from smsbatch.runs.run import store_of
from smsbatch.storage.scratch import scratch_folder
from smsbatch.storage.store import Store
from smsbatch.text import first_line
from smsbatch.training.log import TrainingProgress, read_progress
from smsbatch.workers.worker import require_version

_POLL_S = 1.0  # interval at which the driver reads the progress, and worker 0 looks for the stop file


def train_on_ray(
    manifest: Distill, store: Store, stop: Callable[[], bool], progress: Callable[[TrainingProgress], None]
) -> bool:
    """Run `train_loop` in as many processes as the manifest requests; False if it was stopped before its end.

    Raises:
        RequestError: Ray is not installed, there is no cluster, or no room in it.
        RunError: workers died more often than `compute.retries`.
        SmsbatchError: the error of a worker.
    """
    check_usable(manifest.compute)
    manifest = manifest.absolute()  # a worker has another working directory
    started = connect(manifest.compute)
    try:
        sizing = _divided(size_up(manifest.compute), manifest)
        stop_file = f"_smsbatch/training/stop-{uuid.uuid4().hex}"  # the workers stop when it exists
        with scratch_folder("train") as scratch:
            fit = _Fit(manifest, sizing, stop_file, scratch)
            stop_sent, shown, ended = False, read_progress(store), False
            try:
                while not ended:
                    ended = fit.wait(_POLL_S)
                    with suppress(StorageError):  # only a display; the workers use the same store and raise its errors
                        now = read_progress(store)
                        if now is not None and now != shown:
                            progress(now)
                            shown = now
                    if stop() and not stop_sent and not ended:
                        store.put(stop_file, b"")
                        stop_sent = True
            except BaseException:
                with suppress(StorageError):  # else the workers would go on without a driver, if the cluster remains
                    store.put(stop_file, b"")
                raise
            if stop_sent:
                with suppress(StorageError):
                    store.delete(stop_file)
            return _result(fit.outcome, manifest.compute.retries)
    finally:
        if started:
            disconnect()


def _divided(sizing: Sizing, manifest: Distill) -> Sizing:
    """Reduce `auto` workers to a divisor of `images_per_step`; the manifest has checked a given number."""
    if manifest.compute.workers != "auto":
        return sizing
    images = manifest.distill.images_per_step
    return sizing._replace(workers=next(n for n in range(sizing.workers, 0, -1) if images % n == 0))


class _Fit:
    """`TorchTrainer.fit` in a thread: in the main thread it would catch Ctrl-C."""

    def __init__(self, manifest: Distill, sizing: Sizing, stop_file: str, scratch: str) -> None:
        os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
        import ray.train
        from ray.train.torch import TorchConfig, TorchTrainer

        whole_gpus = sizing.gpus >= 1  # NCCL makes no group of workers that share a GPU
        self._trainer = TorchTrainer(
            _work,
            train_loop_config={
                "version": version("smsbatch"),
                "manifest": manifest,
                "threads": sizing.threads,
                "gpu": bool(sizing.gpus),
                "stop_file": stop_file,
            },
            # gloo is for CPU tensors: a few numbers before each step, for which no GPU has to wait.
            torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if whole_gpus else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=sizing.workers,
                use_gpu=bool(sizing.gpus),
                resources_per_worker={"CPU": sizing.cpus} | ({"GPU": sizing.gpus} if sizing.gpus else {}),
            ),
            run_config=ray.train.RunConfig(
                name=manifest.name,
                storage_path=scratch,
                failure_config=ray.train.FailureConfig(max_failures=manifest.compute.retries),
                logging_config=ray.train.LoggingConfig(log_level="ERROR"),
            ),
        )
        self.outcome: Any = None
        self._thread = threading.Thread(target=self._fit, name="smsbatch-fit", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Wait at most `seconds` for the end; True if it has ended."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _fit(self) -> None:
        try:
            self.outcome = self._trainer.fit()
        except BaseException as error:  # `_result` raises it in the caller's thread
            self.outcome = error


def _result(outcome: Any, retries: int) -> bool:
    """The result of the workers; raises their error unchanged, and RunError if they died too often."""
    import ray.train

    if isinstance(outcome, ray.train.WorkerGroupError):
        failures = outcome.worker_failures.values()
        for error in failures:
            if isinstance(error, SmsbatchError):
                raise error
        # The errors of the others, which were waiting for the dead worker, do not matter.
        for error in failures:
            death = getattr(error, "health_check_failure", error)
            if isinstance(death, ray.exceptions.RayError):
                reason = first_line(death)
                raise RunError(
                    f"workers died {retries + 1} times ({reason}); look at the memory of the nodes, then run again: it "
                    "goes on from the last checkpoint"
                )
    if isinstance(outcome, BaseException):
        raise outcome
    if isinstance(outcome.return_value, SmsbatchError):
        raise outcome.return_value
    return bool(outcome.return_value)


def _work(config: dict[str, Any]) -> bool | SmsbatchError:
    """The function of every worker; the driver gets the result of worker 0.

    An error that all workers share is returned, because raising it would start a new group with the same error. An
    error of a single worker is raised, because the others wait for it and must be ended.
    """
    import ray.train.torch

    from smsbatch.training.group import WorkerGroup
    from smsbatch.training.loop import train_loop

    context = ray.train.get_context()
    require_version(config["version"], f"training worker {context.get_world_rank()} on {socket.gethostname()}")
    manifest: Distill = config["manifest"]
    compute = manifest.compute.model_copy(update={"threads": config["threads"]})
    manifest = manifest.model_copy(update={"compute": compute})
    device = str(ray.train.torch.get_device()) if config["gpu"] else "cpu"  # this worker's GPU
    group = WorkerGroup(context.get_world_rank(), context.get_world_size(), device)
    asked = threading.Event()
    left = threading.Event()
    if group.rank == 0:
        threading.Thread(target=_listen, args=(manifest, config["stop_file"], asked, left), daemon=True).start()
    try:
        return train_loop(manifest, group, asked.is_set, preempted=_preempted)
    except SmsbatchError as error:
        if error is group.error:
            return error
        raise
    finally:
        left.set()


def _listen(manifest: Distill, stop_file: str, asked: threading.Event, left: threading.Event) -> None:
    """Set `asked` when the stop file exists."""
    store = store_of(manifest)
    while not left.wait(_POLL_S):
        with suppress(StorageError):  # tried again after _POLL_S
            if store.exists(stop_file):
                asked.set()
                return


def _preempted() -> bool:
    """True if the cluster has been notified that a machine of the workers will be preempted."""
    import ray.train

    return ray.train.get_preemption_info() is not None

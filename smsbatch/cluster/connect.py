"""Join the Ray cluster of a run, or start one here if none is named, and compute how many workers fit."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from smsbatch.errors import RequestError
from smsbatch.manifest import Compute
from smsbatch.text import first_line


class Sizing(NamedTuple):
    """The number of workers, and the GPUs and CPU threads of torch of each."""

    workers: int
    gpus: float
    threads: int

    @property
    def cpus(self) -> int:
        """CPUs that a worker reserves: one on a GPU, because there the CPUs are not the bottleneck."""
        return 1 if self.gpus else self.threads


def check_installed() -> None:
    """Raises RequestError if Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise RequestError(
            "compute.pool: Ray is not installed; pip install 'smsbatch[ray]', or --set compute.pool=local"
        )


def connect(compute: Compute) -> bool:
    """Connect this process to a cluster; True if it was not connected before, so that the caller must disconnect.

    Raises:
        RequestError: there is none at the address.
    """
    # Ray reads these at import; they only suppress messages that do not concern the user.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        return False
    _start(compute)
    return True


def _start(compute: Compute) -> None:
    import ray

    address = os.environ.get("RAY_ADDRESS") if compute.address == "auto" else compute.address
    options: dict[str, Any] = {"address": address}
    if address is None:
        wanted = 1 if compute.workers == "auto" else compute.workers
        threads = 1 if compute.threads == "auto" else compute.threads
        cores = max(os.cpu_count() or 1, wanted * threads)
        options = {"address": "local", "include_dashboard": False, "num_cpus": cores}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        with warnings.catch_warnings(), _quiet_stderr():
            warnings.simplefilter("ignore")
            ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        raise RequestError(
            f"compute.address: no Ray cluster at {address or 'this machine'} ({first_line(error)}); "
            "check `ray status`, RAY_AUTH_MODE=token if the cluster asks for one, or --set compute.pool=local"
        ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's handler would exit at once, without cleaning up


def size_up(compute: Compute) -> Sizing:
    """Compute the workers that fit, node by node, since a worker cannot span two nodes.

    Raises:
        RequestError: there is no room for the requested number of workers.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = [int(node.get("GPU", 0)) for node in nodes]
    each = float(any(gpus)) if compute.gpus_per_worker == "auto" else compute.gpus_per_worker
    fit = sum(int(count / each) for count in gpus) if each else len(nodes)
    workers = fit if compute.workers == "auto" else compute.workers
    if each and fit < (1 if compute.workers == "auto" else compute.workers):
        raise RequestError(
            f"compute: {max(workers, 1)} workers of {each:g} GPUs are wanted, there is room for {fit}; "
            "lower compute.workers, or set compute.gpus_per_worker to 0 to work on CPUs"
        )
    cores = min(int(node.get("CPU", 1)) for node in nodes)
    share = max(1, cores // -(-workers // len(nodes)))
    return Sizing(workers, each, share if compute.threads == "auto" else compute.threads)


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Discard this process's stderr: Ray's C++ code prints errors there that it also raises."""
    with Path(os.devnull).open("w") as nowhere:
        stderr = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)

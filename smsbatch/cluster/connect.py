"""The Ray cluster a run works on: joined where one is named, started here where none is; and what fits into it."""

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


class Sizing(NamedTuple):
    """How many workers of what size."""

    workers: int
    gpus: float
    """GPUs of one."""
    threads: int
    """CPU threads of torch in one."""

    @property
    def cpus(self) -> int:
        """What one reserves: on a GPU the processors are not what is scarce."""
        return 1 if self.gpus else self.threads


def check_installed() -> None:
    """Raises RequestError if Ray is not."""
    if importlib.util.find_spec("ray") is None:
        raise RequestError(
            "compute.pool: Ray is not installed; pip install 'smsbatch[ray]', or --set compute.pool=local"
        )


def connect(compute: Compute) -> bool:
    """Be in a cluster; whether it was joined or started now, so that the caller has to leave it.

    Raises:
        RequestError: there is none at the address.
    """
    # Ray reads these at import; they only spare the user messages that are not for him.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        return False
    _start(compute)
    return True


def _start(compute: Compute) -> None:
    """Join the cluster that is named, or start one here."""
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
            f"compute.address: no Ray cluster at {address or 'this machine'} ({str(error).splitlines()[0]}); "
            "check `ray status`, RAY_AUTH_MODE=token if the cluster asks for one, or --set compute.pool=local"
        ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray would exit at once, and not in order


def size_up(compute: Compute) -> Sizing:
    """How many workers of what size: node by node, since a worker cannot lie across two.

    Raises:
        RequestError: there is no room for as many as are wanted.
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
    """Nothing on the process's stderr: Ray's own code, in C++, writes there of what it then raises."""
    with Path(os.devnull).open("w") as nowhere:
        stderr = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)

"""Join the Ray cluster of a run, or start one here if none is named, and compute how many workers fit.

A cluster is joined as its owner has set it up. One that is started here is closed to others: it listens on the loopback
interface alone, without a dashboard, and refuses every call without a random token. Ray keeps the token in the memory
and in the environment of its processes, which other users of the machine cannot read, and passes it in no argument.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import secrets
import signal
import socket
import threading
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from smsbatch.errors import RequestError
from smsbatch.manifest import Compute
from smsbatch.storage.retries import redact
from smsbatch.text import first_line

_PORT, _CLIENT_PORT = 6379, 10001  # Ray's defaults: of a cluster, and of its server for ray://
_ADDRESS = re.compile(r"(ray://)?([^\s:/@\[\]]+|\[[0-9A-Fa-f:.]+\])(?::([0-9]{1,9}))?")
_DEADLINE_S = 5.0  # for a connection, and for its first bytes
_SETTINGS = b"\4"  # type of the frame with which gRPC servers greet, after its length in three bytes (RFC 9113)
_OWN = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")

_log = logging.getLogger(__name__)


class Sizing(NamedTuple):
    """The number of workers, and the GPUs and CPU threads of torch of each."""

    workers: int
    gpus: float
    threads: int

    @property
    def cpus(self) -> int:
        """CPUs that a worker reserves: one on a GPU, because there the CPUs are not the bottleneck."""
        return 1 if self.gpus else self.threads


def check_usable(compute: Compute) -> None:
    """Raises RequestError if Ray is not installed, or the address is none of a cluster; connects to nothing."""
    if importlib.util.find_spec("ray") is None:
        raise RequestError(
            "compute.pool: Ray is not installed; pip install 'smsbatch[ray]', or --set compute.pool=local"
        )
    cluster_address(compute)


def cluster_address(compute: Compute) -> str | None:
    """The address of the cluster to join, with its port; None if one is started here.

    Raises:
        RequestError: it is no address of a Ray cluster.
    """
    address = os.environ.get("RAY_ADDRESS") or "local" if compute.address == "auto" else compute.address
    if address == "local":
        return None
    if address == "auto":  # of RAY_ADDRESS: the cluster of this machine
        return address
    key = "compute.address" if compute.address != "auto" else "RAY_ADDRESS"
    refused = f"{key}: {redact(address)} is no address of a Ray cluster"
    right = f"take host:{_PORT}, or ray://host:{_CLIENT_PORT}"
    if address.lower().startswith(("http://", "https://")):
        raise RequestError(f"{refused} but of its dashboard and job server; {right}")
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise RequestError(f"{refused}; {right}")
    scheme, host, port = match.groups()
    number = int(port or (_CLIENT_PORT if scheme else _PORT))
    if not 0 < number < 2**16:
        raise RequestError(f"{refused}: it has no port {number}; {right}")
    return f"{scheme or ''}{host}:{number}"


def check_answers(address: str) -> None:
    """Check that a cluster answers at an address of `cluster_address`, within a few seconds.

    Ray itself would try for minutes without a word, and might then end this process.

    Raises:
        RequestError: nothing answers, or something else than a cluster, or it does not accept our token.
    """
    import ray
    from ray._private.services import canonicalize_bootstrap_address
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled

    advice = "start the cluster, or set RAY_ADDRESS or compute.address to where it is, or --set compute.pool=local"
    cause: Exception
    try:
        is_client = "://" in address
        # Where Ray will look: for `auto` what it finds on this machine, for a loopback address the machine's own.
        place = urlsplit(address).netloc if is_client else canonicalize_bootstrap_address(address)
        parts = urlsplit(f"//{place}")
        with closing(socket.create_connection((parts.hostname, parts.port), _DEADLINE_S)) as connection:
            if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
                greeting = connection.recv(4)
                if greeting[3:] != _SETTINGS:
                    raise ConnectionError("something else than Ray answers there")
        if not is_client and address != "auto":  # for `auto`, Ray looks for a token only later
            with _quiet_stderr():
                GcsClient(address=place)
        return
    except TimeoutError as error:
        reason, cause = f"no answer in {_DEADLINE_S:g} s", error
    except ray.exceptions.AuthenticationError as error:
        reason, cause = "it does not accept our token", error
        advice = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's"
    except (OSError, ValueError, ray.exceptions.RayError) as error:
        reason, cause = first_line(error), error
    raise RequestError(f"compute.address: no Ray cluster at {address} ({reason}); {advice}") from cause


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
    address = cluster_address(compute)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        if address is None:
            wanted = 1 if compute.workers == "auto" else compute.workers
            threads = 1 if compute.threads == "auto" else compute.threads
            with _closed_to_others():
                _start(address="local", include_dashboard=False, num_cpus=max(os.cpu_count() or 1, wanted * threads))
        else:
            _log.info("joining Ray at %s ...", address)
            _read_token_again()
            check_answers(address)
            _start(address=address)
    except BaseException:
        disconnect()
        raise
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's handler would exit at once, without cleaning up
    return True


def disconnect() -> None:
    """Leave the cluster that `connect` has joined, or stop the one that it has started."""
    import ray

    ray.shutdown()
    _read_token_again()


def _start(**options: Any) -> None:
    import ray

    try:
        with warnings.catch_warnings(), _quiet_stderr():
            warnings.simplefilter("ignore")
            ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise RequestError(
            f"compute.address: no Ray cluster at {options['address']} ({first_line(error)}); check `ray status`, "
            "or --set compute.pool=local"
        ) from error


@contextmanager
def _closed_to_others() -> Iterator[None]:
    """The Ray that is started inside refuses calls without its random token, and listens on loopback alone.

    Its processes inherit the token; this one keeps it until `disconnect`. It does not matter whether Ray was imported
    before, or which token the environment holds: that is for clusters to join.
    """
    from ray._private import ray_constants

    before = {name: os.environ.get(name) for name in _OWN}
    many_nodes = ray_constants.ENABLE_RAY_CLUSTER
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    ray_constants.ENABLE_RAY_CLUSTER = False  # the node's address is 127.0.0.1 then
    _read_token_again()
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = many_nodes
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _read_token_again() -> None:
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # compiled

    Config.initialize("")  # first, because a thread of Ray that needs a token and finds none ends the process
    AuthenticationTokenLoader.instance().reset_cache()


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

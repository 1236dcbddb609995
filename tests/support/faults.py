"""Processes of a run that end by SIGKILL, and checks of the run's output after each of them.

A `Life` is a real process that runs `smsbatch run` in a session of its own, so that it can be killed with all its
children. It is forked from a server that has already imported torch, so that a test can afford many of them; `fresh`
ones import everything themselves. The number of objects in the output and a seed decide when to kill.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Protocol

import pyarrow.parquet as pq
from support.jobs import commits, rows, tars
from support.s3server import Server

import smsbatch as sb

__all__ = ["Bucket", "Disk", "Life", "Output", "check_end", "check_whole", "descendants", "disturb", "facts", "until"]

PATIENCE_S = 300.0  # for events within seconds: only a hang exceeds it
PRELOAD = [
    "smsbatch.cli.app",
    "smsbatch.commands.run",
    "smsbatch.workers.stylizer",
    "smsbatch.training.loop",
    "smsbatch.metrics",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.schedulers.scheduling_ddim",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
    "s3fs",
]
OF_CHANCE = {"seconds", "batch_size", "attempt", "attempts", "worker"}  # columns that may differ if results are equal


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


class Life:
    """A process that runs `smsbatch run JOB OPTIONS...`; `said` is its output so far."""

    _lives: ClassVar[list[Life]] = []

    def __init__(self, job: Path, *options: str, env: Mapping[str, str] | None = None, fresh: bool = False) -> None:
        handle, said = tempfile.mkstemp(prefix="said-", dir=job.parent)
        os.close(handle)
        self._said = Path(said)
        context: Any = multiprocessing.get_context("spawn" if fresh else "forkserver")
        if not fresh:
            context.set_forkserver_preload(PRELOAD)
        scratch = job.parent / "scratch"
        scratch.mkdir(exist_ok=True)
        short = tempfile.gettempdir()  # for Ray's sockets, whose paths must be short
        environment = dict(os.environ) | {"TMPDIR": str(scratch), "RAY_TMPDIR": short} | dict(env or {})
        self._process = context.Process(target=_live, args=(["run", str(job), *options], said, environment))
        self._process.start()
        self.pid: int = self._process.pid
        self._lives.append(self)

    @property
    def ended(self) -> bool:
        return not self._process.is_alive()

    @property
    def said(self) -> str:
        return self._said.read_text()

    def wait(self) -> int:
        """Wait until it ends; returns its exit code, or minus the number of the signal that killed it."""
        self._process.join(PATIENCE_S)
        code: int | None = self._process.exitcode
        assert code is not None, f"it does not end: {self.said}"
        return code

    def kill(self, children: bool = True) -> bool:
        """Kill it with SIGKILL; False if it had already ended, which is allowed only with exit code 0."""
        with suppress(ProcessLookupError):  # it has ended already
            (os.killpg if children else os.kill)(self.pid, signal.SIGKILL)
        code = self.wait()
        assert code in (0, -signal.SIGKILL), self.said
        return code != 0

    @classmethod
    def end_all(cls) -> None:
        """Kill all lives that are still running, at the end of a test that may have failed."""
        while cls._lives:
            life = cls._lives.pop()
            if not life.ended:
                os.killpg(life.pid, signal.SIGKILL)
                life._process.join()


def _live(arguments: list[str], said: str, environment: dict[str, str]) -> None:
    os.setsid()
    file = os.open(said, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # to be read again from the environment

    from smsbatch.cli.app import app

    app(arguments)


class Output(Protocol):
    """The output of a run, on disk or in a bucket."""

    @property
    def url(self) -> str: ...

    def names(self) -> set[str]:
        """The names of all objects except temporary ones and heartbeats."""

    def local(self, folder: Path) -> Path:
        """The whole output as a local folder; of a bucket, a copy below `folder`."""


class Disk:
    def __init__(self, path: Path) -> None:
        self.path, self.url = path, str(path)

    def names(self) -> set[str]:
        found = set()
        for folder, _, files in os.walk(self.path):
            found |= {f"{folder}/{file}".removeprefix(f"{self.url}/") for file in files}
        return _lasting(found)

    def local(self, folder: Path) -> Path:
        return self.path


class Bucket:
    def __init__(self, s3: Server, url: str) -> None:
        self.url, self._s3 = url, s3

    def names(self) -> set[str]:
        return _lasting(self._s3.names(self.url))

    def local(self, folder: Path) -> Path:
        return self._s3.download(self.url, Path(tempfile.mkdtemp(dir=folder)))


def _lasting(names: set[str]) -> set[str]:
    return {name for name in names if not name.startswith("_smsbatch/tmp/") and "heartbeat" not in name}


def disturb(
    start: Callable[[], Life],
    output: Output,
    deaths: int,
    stride: int,
    seed: int,
    check: Callable[[], None],
    kill: Callable[[Life], bool] = Life.kill,
) -> int:
    """Start and kill a run `deaths` times, each after 1 to `stride` more objects, then start it and let it finish.

    `check` is called after every kill. Returns the number of kills: fewer if the run finishes before.
    """
    chance, killed = random.Random(seed), 0
    for _ in range(deaths):
        goal, delay_s = len(output.names()) + chance.randint(1, stride), chance.uniform(0, 0.2)
        life = start()
        until(lambda life=life, goal=goal: life.ended or len(output.names()) >= goal)
        time.sleep(delay_s)
        was_killed = kill(life)
        check()
        if not was_killed:
            break
        killed += 1
    last = start()
    assert last.wait() == 0, last.said
    return killed


def check_whole(out: Path) -> None:
    """Assert that all committed and published files exist and are whole; this holds at any time, after any kill."""
    for name, commit in commits(out).items():
        stem = out / "_smsbatch" / "attempts" / name.partition(".")[0] / commit["attempt"]
        for kind, proof in commit["files"].items():
            _prove(stem.with_name(f"{stem.name}.{kind}"), proof)
    for file in sorted((out / "_smsbatch" / "published").glob("*.json")):
        record = json.loads(file.read_text())
        _prove(out / "shards" / f"{record['shard']:06d}.tar", record["files"]["tar"])
        _prove(out / "metrics" / f"{record['shard']:06d}.parquet", record["files"]["parquet"])


def _prove(file: Path, proof: Mapping[str, Any]) -> None:
    content = file.read_bytes()
    assert (len(content), hashlib.sha256(content).hexdigest()) == (proof["bytes"], proof["sha256"]), file


def facts(out: Path, without: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """The rows by key, without the columns that may differ if results are equal."""
    left_out = OF_CHANCE | set(without)
    return {key: {name: value for name, value in row.items() if name not in left_out} for key, row in rows(out).items()}


def check_end(out: Path, undisturbed: Path, without: Sequence[str] = ()) -> None:
    """Assert that a run is finished and intact, with the rows and, byte for byte, the tars of an undisturbed run."""
    assert (out / "_SUCCESS").exists()
    assert tars(out) == tars(undisturbed)
    assert facts(out, without) == facts(undisturbed, without)
    check_whole(out)
    winners = {commit["unit"]: commit["attempt"] for commit in commits(out).values()}
    assert {row["unit"]: row["attempt"] for row in rows(out).values()} == winners
    planned = pq.read_table(out / "plan" / "samples.parquet").column("key").to_pylist()
    assert sorted(rows(out)) == sorted(planned)
    status = sb.status(str(out))
    assert status.finished
    assert status.units_done == status.units == len(winners)
    verified = sb.verify(str(out), full=True)
    assert verified.ok, verified


def descendants(pid: int) -> Iterator[tuple[int, str]]:
    """(pid, command) of all descendants of a process, from Linux' /proc."""
    parents, commands = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            commands[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue
    waiting = [pid]
    while waiting:
        parent = waiting.pop()
        children = [child for child, its in parents.items() if its == parent and child in commands]
        waiting += children
        yield from ((child, commands[child].strip()) for child in children)

"""`RayPool`: workers on a Ray cluster, replaced when they die."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from time import monotonic
from typing import Any

from smsbatch.cluster.connect import check_usable, connect, disconnect, size_up
from smsbatch.cluster.retries import UnitRetry
from smsbatch.data.sample import Entry
from smsbatch.errors import RunError, SmsbatchError
from smsbatch.manifest import Manifest
from smsbatch.parallel import Item, Result, started_ahead
from smsbatch.runs.plan import Estimate
from smsbatch.runs.records import Commit
from smsbatch.runs.run import Run
from smsbatch.runs.status import Progress
from smsbatch.text import first_line
from smsbatch.workers.pool import TICK_S, LocalPool, Pool
from smsbatch.workers.worker import Worker, WorkItem

_FEW = 64  # so few items are not worth starting a cluster for
_CHECK_S = 10.0  # interval of the check that the cluster still exists


@dataclass(eq=False)
class _Actor:
    """A Ray actor and the units that it is working on."""

    handle: Any
    name: str
    ready: bool = False
    retries: list[UnitRetry] = field(default_factory=list)


class RayPool(Pool):
    """Actors on a Ray cluster, each pinned to its GPUs, with the models loaded once.

    Joins the cluster at `compute.address` (or RAY_ADDRESS); if none is named, it starts one here and stops it at the
    end. A dead actor is replaced, and its units are tried again (`UnitRetry`).
    """

    _MAX_STARTUP_DEATHS = 3  # actors in a row that died while loading the models, which no sample can cause

    def __init__(self, manifest: Manifest) -> None:
        super().__init__(manifest.absolute())  # an actor has another working directory
        check_usable(manifest.compute)
        self._actors: list[_Actor] = []
        self._seen: dict[str, Progress] = {}
        self._spawned = self._startup_deaths = 0
        self._connected = self._started = False

    def __exit__(self, *_: object) -> None:
        if not self._connected:
            return
        import ray

        for actor in self._actors:
            ray.kill(actor.handle)
        if self._started:
            disconnect()

    def _connect(self) -> None:
        if self._connected:
            return
        self._started = connect(self.manifest.compute)
        self._connected = True
        self._sizing = size_up(self.manifest.compute)
        self._size = self._sizing.workers

    def progress(self) -> list[Progress]:
        return [self._seen.get(actor.name, Progress(actor.name, None)) for actor in self._actors]

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Generator[Result, None, None]:
        if len(items) <= _FEW:
            yield from super().map(function, items)
            return
        self._connect()
        import ray

        call = ray.remote(lambda item: function(item))  # Ray refuses callables that are not functions
        places = 2 * int(ray.cluster_resources().get("CPU", 1))
        yield from map(self._result, started_ahead((call.remote(item) for item in items), places))

    def estimate_cost(self, entries: Sequence[Entry]) -> Estimate:
        self._connect()
        actor = self._actors[0] if self._actors else self._spawn()
        self._result(actor.handle.setup.remote(version("smsbatch")))
        actor.ready = True
        measured: Estimate = self._result(actor.handle.estimate_cost.remote(list(entries)))
        return measured

    def _result(self, call: Any) -> Any:
        """The result of a call. Raises our own errors unchanged, and RunError for the death of its worker."""
        import ray

        try:
            return ray.get(call)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, SmsbatchError):
                raise error.cause from None
            raise
        except ray.exceptions.RayError as error:
            reason = first_line(error)
            raise RunError(
                f"a worker died before the work began ({reason}); look at the memory of the nodes"
            ) from error

    def work(self, run: Run, items: Iterable[WorkItem]) -> Iterator[Commit | None]:
        """Like `Pool.work`; each actor opens the run itself."""
        self._connect()
        import ray

        queue = deque(UnitRetry(item) for item in items)
        unrecoverable: list[str] = []
        next_check = monotonic() + _CHECK_S
        calls: dict[Any, tuple[_Actor, UnitRetry | None]] = {}  # a call without a unit is an actor's setup
        polls = {actor.handle.progress.remote(): actor for actor in self._actors}  # the actor of a probe, if any
        while True:
            outstanding = len(queue) + sum(len(actor.retries) for actor in self._actors)
            while len(self._actors) < min(self._size, outstanding):
                actor = self._spawn()
                calls[actor.handle.setup.remote(version("smsbatch"))] = actor, None
            for actor in self._actors:
                self._deal(actor, queue, calls)
            if not queue and not any(actor.retries for actor in self._actors):
                break  # without waiting for actors that are still loading or have no place yet

            finished, _ = ray.wait(list(calls), num_returns=1, timeout=TICK_S)
            for call in finished:
                actor, retry = calls.pop(call)
                try:
                    result = ray.get(call)
                except ray.exceptions.RayError as error:
                    cause = getattr(error, "cause", None)
                    if isinstance(cause, SmsbatchError):
                        raise cause from None
                    if isinstance(error, ray.exceptions.RayTaskError) and type(cause).__name__ != "AcceleratorError":
                        raise  # a bug: keep the actor's traceback
                    # The actor is dead, or its GPU has failed, which only a new process can use again.
                    calls = {key: value for key, value in calls.items() if value[0] is not actor}
                    unrecoverable += self._remove_dead(actor, queue, error)
                    continue
                if retry is None:
                    actor.ready, self._startup_deaths = True, 0
                    polls[actor.handle.progress.remote()] = actor
                    continue
                actor.retries.remove(retry)
                if retry.suspects:  # this was a probe, and the actor has survived it
                    retry.suspects.popleft()
                    queue.appendleft(retry)
                else:
                    yield result
            polls = self._poll(polls)
            if not finished and monotonic() >= next_check:
                if not any(node["Alive"] for node in ray.nodes()):  # then Ray never reports the deaths of its actors
                    raise RunError("the Ray cluster is gone: no node is alive; look at its logs, then run again")
                next_check = monotonic() + _CHECK_S
            yield None
        if unrecoverable:
            lost = sorted(unrecoverable)
            raise RunError(
                f"units {', '.join(lost)} kill their workers even without the samples that were found to do so; "
                "look at the memory and the drivers of the workers, then run again"
            )

    def _spawn(self) -> _Actor:
        import ray

        name = f"w{self._spawned}"
        self._spawned += 1
        sizing = self._sizing
        compute = self.manifest.compute.model_copy(update={"threads": sizing.threads})
        handle = (
            ray.remote(Worker)
            .options(
                num_gpus=sizing.gpus,
                num_cpus=sizing.cpus,
                max_concurrency=self.units_in_flight + 1,  # one more for `progress`
            )
            .remote(self.manifest.model_copy(update={"compute": compute}), name, "cuda" if sizing.gpus else "cpu")
        )
        actor = _Actor(handle, name)
        self._actors.append(actor)
        return actor

    def _deal(self, actor: _Actor, queue: deque[UnitRetry], calls: dict[Any, tuple[_Actor, UnitRetry | None]]) -> None:
        """Give an actor units up to its limit. A unit whose worker died runs alone, so a next death has one suspect."""
        while actor.ready and queue and len(actor.retries) < self.units_in_flight:
            idle = sum(not other.retries for other in self._actors)
            had_deaths = queue[0].deaths or any(retry.deaths for retry in actor.retries)
            if actor.retries and (had_deaths or len(queue) <= idle):
                return  # the last units go to idle actors, including those that are still loading
            retry = queue.popleft()
            actor.retries.append(retry)
            if retry.suspects:
                calls[actor.handle.probe.remote(retry.item, retry.suspects[0])] = actor, retry
            else:
                calls[actor.handle.process.remote(retry.item, tuple(retry.lost), retry.deaths)] = actor, retry

    def _remove_dead(self, actor: _Actor, queue: deque[UnitRetry], error: Exception) -> list[str]:
        """Remove a dead actor and requeue its units; returns the names of units with nothing left to try."""
        import ray

        ray.kill(actor.handle)
        self._actors.remove(actor)
        preempted = getattr(error, "preempted", False)  # such a death has nothing to do with samples or memory
        if not actor.ready and not preempted:
            self._startup_deaths += 1
            if self._startup_deaths >= self._MAX_STARTUP_DEATHS:
                if not any(other.ready for other in self._actors):
                    reason = first_line(error)
                    raise RunError(
                        f"{self._startup_deaths} workers in a row died while loading the models ({reason}); is their "
                        "memory too small? `--set compute.pool=local` shows what happens in this process"
                    )
                self._size, self._startup_deaths = self._size - 1, 0  # other actors work, so only this place is bad
        unrecoverable = []
        for retry in reversed(actor.retries):
            if preempted or retry.worker_died(self.manifest.compute.retries):
                queue.appendleft(retry)
            else:
                unrecoverable.append(retry.item.unit.name)
        return unrecoverable

    def _poll(self, polls: dict[Any, _Actor]) -> dict[Any, _Actor]:
        """Collect the actors' answers about their progress, and ask again."""
        import ray

        if not polls:
            return polls
        answered, waiting = ray.wait(list(polls), num_returns=len(polls), timeout=0)
        again = {call: polls[call] for call in waiting}
        for call in answered:
            actor = polls[call]
            with suppress(ray.exceptions.RayError):  # the actor died, which `work` learns from its call
                self._seen[actor.name] = ray.get(call)
                again[actor.handle.progress.remote()] = actor
        return again


def pool_of(manifest: Manifest) -> Pool:
    """The pool of `compute.pool`.

    Raises:
        RequestError: the pool is `ray`, but Ray is not installed.
    """
    if manifest.compute.pool == "local":
        return LocalPool(manifest)

    return RayPool(manifest)

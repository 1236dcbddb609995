"""Work in threads within a limit of memory."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from hypothesis import given, settings, strategies as st

from smsbatch.parallel import MemoryLimit


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(0, 150), min_size=1, max_size=40), threads=st.integers(1, 8))
def test_no_more_than_the_limit_is_taken(sizes: list[int], threads: int) -> None:
    limit, lock = MemoryLimit(100), threading.Lock()
    inside: list[int] = []
    worst = 0

    def work(size: int) -> None:
        nonlocal worst
        with limit.take(size):
            with lock:
                inside.append(size)
                worst = max(worst, sum(min(one, 100) for one in inside))
            with lock:
                inside.remove(size)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, sizes))
    assert worst <= 100
    assert limit.taken == 0


def test_a_large_one_waits_for_its_turn_and_is_not_overtaken_for_ever() -> None:
    limit, order = MemoryLimit(100), []
    begun = threading.Event()

    def work(name: str, size: int) -> None:
        with limit.take(size):
            order.append(name)

    with limit.take(60):
        large = threading.Thread(target=lambda: (begun.set(), work("large", 1000)))
        large.start()
        begun.wait()
        while not limit._waiting:
            pass
        small = threading.Thread(target=work, args=("small", 10))
        small.start()
        small.join(0.05)
        assert order == []
    large.join()
    small.join()
    assert order == ["large", "small"]

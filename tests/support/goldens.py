"""Golden files: expected texts in tests/golden; `pytest --regenerate-golden` writes them again.

Look at the difference before committing it: it shows how the change affects every user's results.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate-golden", action="store_true", help="write tests/golden anew instead of comparing")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], str]:
    """`golden(name, found)` returns the text stored under a name; with --regenerate-golden it first stores `found`."""

    def pinned(name: str, found: str) -> str:
        file = FOLDER / name
        if request.config.getoption("--regenerate-golden"):
            file.write_text(found)
        return file.read_text()

    return pinned

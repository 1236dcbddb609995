"""Tests of the public API: `__all__` is complete, every name resolves, and the errors form one tree."""

from __future__ import annotations

import pytest

import smsbatch as sb
from smsbatch import errors


def test_every_public_name_resolves() -> None:
    for name in sb.__all__:
        assert getattr(sb, name).__name__ == name
        assert getattr(sb, name).__doc__ or issubclass(getattr(sb, name), sb.SmsbatchError)
    assert dir(sb) == sb.__all__ == sorted(sb.__all__)


def test_there_is_nothing_else() -> None:
    with pytest.raises(AttributeError, match="attribute nothing"):
        sb.nothing  # noqa: B018
    import smsbatch.commands.run

    assert callable(sb.run), "no module may ever shadow a public name"
    assert smsbatch.commands.run.run is sb.run


def test_the_error_tree_is_what_its_docstring_shows() -> None:
    tree = {
        "RequestError": ("SmsbatchError", 2),
        "ManifestError": ("RequestError", 2),
        "SourceError": ("RequestError", 2),
        "WeightsError": ("RequestError", 2),
        "DriftError": ("RequestError", 2),
        "StorageError": ("SmsbatchError", 3),
        "RunError": ("SmsbatchError", 1),
        "SampleError": ("SmsbatchError", 1),
    }
    assert set(errors.__all__) == {*tree, "SmsbatchError", "ERROR_CODES"}
    for name, (parent, code) in tree.items():
        assert getattr(errors, name).__base__.__name__ == parent
        assert getattr(errors, name).exit_code == code
        assert name in (errors.__doc__ or "")


def test_a_sample_error_survives_a_process_boundary() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(sb.SampleError("read_error", "gone")))
    assert (error.code, str(error)) == ("read_error", "gone")

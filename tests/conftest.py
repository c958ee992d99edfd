"""Fixtures that several test files use."""

import pytest

from fusedmerge import backend


@pytest.fixture(params=["native", "torch"])
def engine(request, monkeypatch):
    """Both ways to run a switch on the CPU."""
    if request.param == "torch":
        monkeypatch.setattr(backend, "extension", lambda: None)
    else:
        assert backend.extension(), "the extension is not built: run `make test`"
    return request.param

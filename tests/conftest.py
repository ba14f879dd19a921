"""Real models for the tests: fetched once into the store of the machine, through Chandra's own `pull`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model_file() -> Callable[[str], Path]:
    """Path of a catalog model's file; the first use on a machine downloads it."""
    from chandra.config import Settings
    from chandra.store import Store

    home = os.environ.get("CHANDRA_TEST_HOME")
    store = Store(Path(home) if home else Settings.from_env().home)

    def path(name: str) -> Path:
        return store.pull(name, accept_license=True).path

    return path

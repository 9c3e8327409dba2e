"What every test shares: the root of the repository, and pictures drawn without a screen."
import os
from pathlib import Path

import pytest

os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.fixture(scope="session")
def root() -> Path:
    "The folder of settings.ini."
    return Path(__file__).resolve().parents[1]

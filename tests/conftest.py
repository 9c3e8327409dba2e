"What tests share: the root of the repository, drawn patients, and pictures drawn without a screen."
import os
import shutil
from pathlib import Path

import pytest

from ctdiffusion.data.phantom import Patient, make_dataset, phantom

os.environ.setdefault("MPLBACKEND", "Agg")

pytest_plugins = ["fault_table"]


@pytest.fixture(scope="session")
def root() -> Path:
    "The folder of settings.ini."
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def elsewhere(tmp_path_factory):
    "An empty folder to work in: a test must not meet what lies in `runs/` of the project, and leave nothing there."
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    yield
    os.chdir(before)


@pytest.fixture(scope="session")
def original(tmp_path_factory) -> Path:
    "Five patients and an MRI in the layout of AMOS22, not to be changed."
    return make_dataset(tmp_path_factory.mktemp("data") / "amos", train=3, val=2, size=48)


@pytest.fixture
def data(original, tmp_path) -> Path:
    "A copy of them, to be spoilt."
    return Path(shutil.copytree(original, tmp_path / "amos"))


@pytest.fixture(scope="session")
def patient() -> Patient: return phantom(seed=11, size=48)

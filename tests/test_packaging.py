"The wheel carries the right metadata and files, and works where no notebook tool is installed."
import configparser
import email
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ["nbdev", "fastcore", "execnb", "IPython", "papermill", "ipywidgets", "torchvision"]

BLOCK = f"""
import sys
class Block:
    def find_spec(self, fullname, path=None, target=None):
        if fullname.split('.')[0] in {TOOLS}: raise ImportError('asked for ' + fullname)
sys.meta_path.insert(0, Block())
"""


def pip(*arguments: str, cwd: Path) -> None:
    "Run pip without any index: what is tested here needs nothing from outside."
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments, "--no-index", "--no-deps"]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    "The wheel, built from a copy of the files that packaging needs."
    there = tmp_path_factory.mktemp("wheel")
    for file in ("settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"): shutil.copy(ROOT / file, there)
    shutil.copytree(ROOT / "ctdiffusion", there / "ctdiffusion", ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", "--no-build-isolation", "--wheel-dir", "out", ".", cwd=there)
    return next((there / "out").glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    "A folder with nothing but the installed wheel."
    there = tmp_path_factory.mktemp("installed")
    pip("install", "--target", str(there / "site"), str(wheel), cwd=there)
    return there


def python(installed: Path, code: str) -> str:
    "Run `code` on the installed wheel, with every notebook tool and torchvision out of reach."
    env = os.environ | {"PYTHONPATH": str(installed / "site"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", BLOCK + code], cwd=installed, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def settings() -> configparser.SectionProxy:
    "settings.ini as setup.py reads it."
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


@pytest.fixture(scope="module")
def metadata(wheel) -> email.message.Message:
    "The METADATA file of the wheel."
    with zipfile.ZipFile(wheel) as archive: return email.message_from_bytes(archive.read(next(n for n in archive.namelist() if n.endswith("METADATA"))))


def test_metadata_is_that_of_settings(metadata, settings):
    "Name, version, licence, Python, addresses and the README."
    expected = {"Name": "ctdiffusion", "Version": settings["version"], "Summary": settings["description"], "License-Expression": "Apache-2.0",
                "License-File": "LICENSE", "Requires-Python": f">={settings['min_python']}", "Description-Content-Type": "text/markdown"}
    assert {key: metadata[key] for key in expected} == expected
    assert settings["author"] in (metadata["Author"] or "") + (metadata["Author-email"] or "")
    assert {f"Source, {settings['git_url']}", f"Paper, {settings['paper_url']}"} <= set(metadata.get_all("Project-URL"))
    assert metadata.get_payload(decode=True).decode().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    assert not [c for c in metadata.get_all("Classifier") if c.startswith("License")], "a licence classifier beside an expression is refused by PyPI"


def test_requirements_and_extras_are_those_of_settings(metadata, settings):
    "Core requirements have no marker; each NAME_requirements of settings.ini is the extra [NAME]."
    extras = {key.removesuffix("_requirements"): settings[key].split() for key in settings if key.endswith("_requirements")}
    assert set(metadata.get_all("Provides-Extra")) == extras.keys() == {"notebooks", "judge", "fid", "formats", "dev"}
    asked = [Requirement(r) for r in metadata.get_all("Requires-Dist")]
    def plain(r): return f"{r.name}{r.specifier}"
    assert {plain(r) for r in asked if not r.marker} == {plain(Requirement(r)) for r in settings["requirements"].split()}
    for extra, wanted in extras.items():
        assert {plain(r) for r in asked if r.marker and r.marker.evaluate({"extra": extra})} == {plain(Requirement(r)) for r in wanted}


def test_wheel_holds_the_package_and_nothing_else(wheel):
    "Modules, embedded weights with their cards, and tables; no notebook, no test, no cache."
    kept = (".py", ".safetensors", ".json", ".md", ".csv")
    ours = {p.relative_to(ROOT).as_posix() for p in (ROOT / "ctdiffusion").rglob("*") if p.suffix in kept and "__pycache__" not in p.parts}
    with zipfile.ZipFile(wheel) as archive: names = {n for n in archive.namelist() if ".dist-info/" not in n}
    assert names == ours
    assert wheel.stat().st_size < 16 * 2**20


def test_every_module_imports_without_notebook_tools(installed):
    "All modules of the wheel import with nbdev, fastcore, IPython, papermill, ipywidgets and torchvision missing."
    code = """
import importlib, json, pkgutil, ctdiffusion
names = [m.name for m in pkgutil.walk_packages(ctdiffusion.__path__, 'ctdiffusion.')]
for name in names: importlib.import_module(name)
print(json.dumps([ctdiffusion.__file__, names]))
"""
    file, names = json.loads(python(installed, code))
    assert Path(file).is_relative_to(installed), f"imported {file} instead of the wheel"
    assert len(names) >= len([p for p in (ROOT / "nbs").glob("[0-9]*.ipynb")])


def test_front_door_is_instant_and_lazy(installed, settings):
    "`import ctdiffusion` loads no torch and no numpy; its names arrive on first use."
    code = """
import sys, ctdiffusion
assert not {'torch', 'numpy'} & set(sys.modules), 'the front door is heavy'
print(ctdiffusion.__version__, *sorted(ctdiffusion.__all__))
from ctdiffusion import load, synthesize, synthesize_slices, CTDiffusionError
assert issubclass(CTDiffusionError, Exception) and callable(load) and callable(synthesize) and callable(synthesize_slices)
"""
    assert python(installed, code).split() == [settings["version"], "CTDiffusionError", "load", "synthesize", "synthesize_slices"]

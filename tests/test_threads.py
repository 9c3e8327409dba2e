"Threads that wait must sleep. Spinning ones take a multiple of the time on a machine that others use, too."
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
JOBS = ("train", "prepare", "evaluate", "reproduce")

pytestmark = [
    pytest.mark.fault("F65"),
    pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP, which says what it does, is that of torch on Linux"),
]


def fresh(*command: str, **env: str) -> subprocess.CompletedProcess:
    "Run `command` where nothing was asked of OpenMP but to print, when it is loaded, what it will do."
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    env = inherited | {"OMP_DISPLAY_ENV": "VERBOSE", "PYTHONPATH": str(ROOT)} | env
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def spins(done: subprocess.CompletedProcess) -> set[int]:
    "How often a waiting thread looks before it sleeps, for each OpenMP library that was loaded."
    return {int(count) for count in re.findall(r"GOMP_SPINCOUNT\s*=\s*'(\d+)'", done.stderr)}


def first_imports(job: str) -> str:
    "The first code cell of a job that imports anything."
    page = nbformat.read(ROOT / "nbs" / f"{job}.ipynb", as_version=4)
    return next(c.source for c in page.cells if c.cell_type == "code" and "import" in c.source)


def test_a_script_that_imports_the_package_first():
    assert spins(fresh(sys.executable, "-c", "from ctdiffusion import load\nload")) == {0}


def test_a_user_who_wants_spinning_threads_gets_them():
    spinning = fresh(sys.executable, "-c", "from ctdiffusion import load\nload", OMP_WAIT_POLICY="ACTIVE")
    assert min(spins(spinning)) > 1_000_000


def test_the_jobs_import_the_package_before_torch():
    for imports in {first_imports(job) for job in JOBS}:  # one, unless a job begins in its own way
        assert spins(fresh(sys.executable, "-c", f"{imports}\nimport torch")) == {0}


def test_a_kernel_that_papermill_starts(tmp_path):
    cells = [nbformat.v4.new_code_cell(first_imports("train")), nbformat.v4.new_code_cell("import torch")]
    page = nbformat.v4.new_notebook(cells=cells)
    nbformat.write(page, tmp_path / "page.ipynb")
    papermill = [sys.executable, "-m", "papermill", "--kernel", "python3"]
    assert spins(fresh(*papermill, str(tmp_path / "page.ipynb"), str(tmp_path / "out.ipynb"))) == {0}


def test_the_processes_of_a_command_line_job():
    module = "ctdiffusion.synthesis.processes"
    assert spins(fresh(sys.executable, "-c", f"import {module}")) == {0}


def test_the_tests_themselves():
    "This process, as far as torch was not loaded before the package."
    assert os.environ["OMP_WAIT_POLICY"] in ("PASSIVE", "ACTIVE")


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_what_make_starts():
    "The pages, and JupyterLab: their kernels inherit it, whatever a page imports first."
    show = "show: ; @echo wait=$$OMP_WAIT_POLICY"
    done = fresh("make", "--no-print-directory", "-C", str(ROOT), "--eval", show, "show")
    assert "wait=PASSIVE" in done.stdout


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_the_kernel_of_the_environment():
    "A kernel that neither make nor the package was asked for: JupyterLab after activating .venv by hand."
    there = Path(sys.prefix) / "share/jupyter/kernels/python3/kernel.json"
    steps = fresh("make", "-n", "-B", "-C", str(ROOT), ".venv/.ready").stdout
    installs = re.findall(r"(\S+ -m ipykernel install .*?)(?:\s+#.*)?$", steps, re.M)
    assert there.exists() and len(installs) == 1 and "--env OMP_WAIT_POLICY PASSIVE" in installs[0]

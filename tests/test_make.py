"`make test` runs the tests also where a page failed, says how both ended, and fails if one did."
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="needs make")


def make_test(folder: Path, pages: int, tests: int) -> subprocess.CompletedProcess:
    "`make test` with programs in place of nbdev_test and python that end with these exit codes."
    for name, code in (("nbdev_test", pages), ("python", tests)):
        program = folder / name
        program.write_text(f"#!/bin/sh\necho {name} was called\nexit {code}\n")
        program.chmod(0o755)
    command = ["make", "--no-print-directory", "-C", str(ROOT), "test", "READY=", f"BIN={folder}"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("pages", [0, 1])
@pytest.mark.parametrize("tests", [0, 1])
def test_both_run_and_both_are_reported(pages, tests, tmp_path):
    done = make_test(tmp_path, pages, tests)
    assert "nbdev_test was called" in done.stdout and "python was called" in done.stdout
    summary = done.stdout.split("\n\n")[-1].splitlines()
    assert [line.split(":")[0] for line in summary] == ["pages", "tests"]
    assert ["FAILED" in line for line in summary] == [pages == 1, tests == 1]
    assert (done.returncode == 0) == (pages == tests == 0)

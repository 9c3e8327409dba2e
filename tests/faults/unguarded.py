"""Take each guard of the fault table away, run its test, and see red.

    python tests/faults/unguarded.py [F07 F12 ...] [--out nbs/results/faults.json]

A test that stays green without its guard tests nothing. Works on copies of the project, in forked children that share the imports of
everything that is not ours."""
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch counts the processors; children that are forked want no threads

import argparse
import importlib
import json
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))
from forks import ended, forked  # noqa: E402

SHARED = ("torch", "torch.distributed", "scipy.ndimage", "scipy.stats", "nibabel", "pandas", "matplotlib.pyplot", "PIL.Image", "skimage.metrics", "safetensors.torch", "papermill", "hypothesis", "jinja2")
LONGEST = 600  # seconds of one test


class Guards:
    "Plugin of pytest: the guards of all tests that were collected."
    def __init__(self): self.found = {}

    def pytest_collection_finish(self, session):
        for item in session.items:
            for mark in item.iter_markers("guard"): self.found[item.nodeid.split("[")[0], mark.args] = item.name.split("_")[1][:3]


def quietly(arguments: list[str], log: Path, plugins: list = []) -> int:
    "pytest's exit code; what it says goes to a file."
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2): os.dup2(out, stream)
    return int(pytest.main(arguments, plugins=plugins))


def collect(folder: Path) -> list[tuple]:
    "(row, test, file, old, new) of every guard; in a child, so that ours is not imported here."
    found, log, plugin = folder / "guards.json", folder / "collected.txt", Guards()
    def work() -> None:
        if quietly(["--collect-only", "-q", str(ROOT / "tests" / "faults")], log, [plugin]): sys.exit(1)
        found.write_text(json.dumps([(row, test, *guard) for (test, guard), row in plugin.found.items()]))
    if ended(forked(work)): sys.exit(f"the tests of the fault table cannot be collected\n{log.read_text()[-2000:]}")
    guards = list(map(tuple, json.loads(found.read_text())))
    wrong = [f"{test}: its guard stands {n} times in {file}, expected once: {old!r}" for _, test, file, old, _ in guards if (n := (ROOT / file).read_text(encoding="utf-8").count(old)) != 1]
    if wrong: sys.exit("\n".join(wrong))
    return guards


def without(copy: Path, guard: tuple, log: Path) -> int:
    "A child that runs a guard's test in `copy`, where the guard is not."
    _, test, file, old, new = guard
    path = copy / file
    path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    def work() -> None:
        signal.alarm(LONGEST)
        os.chdir(copy); sys.path.insert(0, str(copy)); os.environ["PYTHONPATH"] = str(copy)
        os._exit(quietly(["-x", "-q", "-p", "no:cacheprovider", str(copy / test)], log))
    return forked(work)


def seen(guards: list[tuple], folder: Path, workers: int):
    "(guard, red?, seconds), as they come."
    copies = [folder / f"copy{n}" for n in range(workers)]
    for copy in copies: shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv*", "runs", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info"))
    waiting, free, running = list(guards), list(copies), {}
    while waiting or running:
        while waiting and free:
            copy, guard = free.pop(), waiting.pop(0)
            running[without(copy, guard, copy / "log.txt")] = copy, guard, time.monotonic()
        pid, status = os.wait()
        if pid not in running: continue
        copy, guard, since = running.pop(pid)
        (copy / guard[2]).write_text((ROOT / guard[2]).read_text(encoding="utf-8"), encoding="utf-8")
        free.append(copy)
        code = os.waitstatus_to_exitcode(status)
        if code not in (0, 1): sys.exit(f"{guard[1]} without its guard in {guard[2]}, {guard[3]!r}: pytest ended with {code}\n{(copy / 'log.txt').read_text(errors='replace')[-3000:]}")
        yield guard, code == 1, time.monotonic() - since


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("rows", nargs="*", help="F07 ...; none: all")
    p.add_argument("--out", help="fault table to write the findings into")
    p.add_argument("--workers", type=int, default=min(4, len(os.sched_getaffinity(0))), help="tests at a time")
    args, found, start = p.parse_args(), {}, time.monotonic()
    with tempfile.TemporaryDirectory() as there:
        guards = [g for g in collect(Path(there)) if not args.rows or g[0] in args.rows]
        for module in SHARED: importlib.import_module(module)
        for guard, red, seconds in seen(guards, Path(there), args.workers):
            row, test, file, old, _ = guard
            found[guard] = red
            print(f"{row} {'red' if red else 'GREEN WITHOUT ITS GUARD':4} {seconds:5.1f} s  {test.split('::', 1)[1]}  {file}: {old.strip().splitlines()[0][:70]}", flush=True)
    green = [f"{g[1]}, {g[2]}: {g[3]!r}" for g in guards if not found[g]]
    print(f"{len(guards)} guards taken away, {len(guards) - len(green)} seen red, {time.monotonic() - start:.0f} s")
    if args.out:
        table = json.loads(Path(args.out).read_text(encoding="utf-8"))
        names = {(g[1].split("::", 1)[1], g[2], g[3]): red for g, red in found.items()}
        for r in table["rows"]:
            for name, t in r["tests"].items():
                if not args.rows or r["row"] in args.rows: t["guards"] = [dict(file=g[2], red=names[g[1].split("::", 1)[1], g[2], g[3]]) for g in guards if g[1].split("::", 1)[1] == name]
        Path(args.out).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    if green: sys.exit("stay green without their guard:\n" + "\n".join(green))


if __name__ == "__main__": main()

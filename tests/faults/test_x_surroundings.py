"Beyond the table: names of folders that are no text, a locale without UTF-8, and few open files."
import os
import resource
import subprocess
import sys
from pathlib import Path

from rows import refused

from ctdiffusion.data.phantom import make_dataset
from ctdiffusion.data.preparation import PrepareConfig
from ctdiffusion.data.store import prepare
from ctdiffusion.training.folder import RunLock
from ctdiffusion.training.parameters import TrainJob

CHAIN = '''
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from ctdiffusion.data.preparation import PrepareConfig
from ctdiffusion.data.store import prepare
from ctdiffusion.models.variants import preset
from ctdiffusion.synthesis.synthesis import load, synthesize
from ctdiffusion.training.trainer import train
from dataclasses import replace
there = Path(sys.argv[1])
store, p = prepare(there / "data", there / "store", PrepareConfig(size=64)), preset("pix2pix")
for steps in (2, 4): result = train(p.model, replace(p.train, max_steps=steps), store, there / "run", say=lambda line: None)
label = next((there / "data" / "labelsVa").glob("*.nii.gz"))
synthesize(load(there / "run"), label, there / "out.nii.gz", image=there / "data" / "imagesVa" / label.name)
assert result.done and (there / "out.nii.gz").exists()
'''
ASCII = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")


def chain(there: Path, **options) -> None:
    "Prepare, train, go on, synthesise, in a Python of its own."
    make_dataset(there / "data", 2, 1, size=64)
    done = subprocess.run([sys.executable, "-c", CHAIN, there], capture_output=True, **options)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]


def test_X5_a_locale_without_the_folders_letters(tmp_path):
    (there := tmp_path / "Bauch \N{CJK UNIFIED IDEOGRAPH-8179}").mkdir()
    chain(there, env=os.environ | ASCII)
    assert there.name in (there / "store" / "problems.csv").read_text(encoding="utf-8") and [p.name for p in there.rglob(".*")] == [".store.lock"]


def test_X5_a_folder_whose_name_is_no_text(tmp_path):
    "Data may lie there; a run may not, and is refused before its first step."
    there = Path(os.fsdecode(os.fsencode(tmp_path) + b"/M\xfcller"))
    make_dataset(there / "data", 2, 1, size=64)
    prepare(there / "data", there / "store", PrepareConfig(size=64))
    assert b"M\xfcller" in (there / "store" / "problems.csv").read_bytes()
    with refused("M", "no UTF-8 text", "Rename"), RunLock(there / "run"): pass
    with refused("parameters", "run_dir", "not text"): TrainJob.take(set(), dict(run_dir=str(there / "run")))
    assert not (there / "run").exists()


def test_X6_64_open_files(tmp_path):
    chain(tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)))

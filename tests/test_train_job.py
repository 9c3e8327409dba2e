"""nbs/train.ipynb as people run it: through papermill, with a small number of steps."""
import json, os
from pathlib import Path

import nibabel as nib
import numpy as np
import papermill as pm
import pytest

from ctdiffusion.training.parameters import TrainJob, parameters_cell

REAL = Path(os.environ.get("CTDIFFUSION_REAL_CT") or Path(__file__).resolve().parents[2] / "shared" / "data" / "real-ct")
SMALL = dict(max_steps=10, patients=2, sampler="ddim5", threads=1)


def train(root, folder, **parameters):
    folder.mkdir(exist_ok=True)
    pm.execute_notebook(str(root / "nbs" / "train.ipynb"), str(folder / "out.ipynb"), parameters=SMALL | dict(run_dir=str(folder / "run")) | parameters, progress_bar=False)
    return folder / "run"


def test_the_parameters_cell_declares_the_job(root):
    declared = parameters_cell(root / "nbs" / "train.ipynb")
    job = TrainJob()
    assert declared == {name: (type(value).__name__, value) for name, value in vars(job).items()}


@pytest.mark.parametrize("variant, steps, processes", [("conditional", 10, 0), ("edge", 3, 2)])  # 3: fewer than between two lines of metrics.csv
def test_train_and_synthesise(root, tmp_path, variant, steps, processes):
    run = train(root, tmp_path, variant=variant, max_steps=steps, processes=processes)
    assert json.loads((run / "run.json").read_text())["world"] == max(1, processes)
    assert "done at step" in (tmp_path / "out.ipynb").read_text()  # the words of the children reach the page
    assert (run / "DONE").exists() and (run / "checkpoints" / f"step_{steps:08d}.safetensors").exists()
    results = json.loads((run / "results.json").read_text())
    assert results["variant"] == variant and results["start"] == "embedded" and len(results["rows"]) == 32
    assert {p.stem for p in (run / "figures").glob("*.png")} >= {"loss", "film", "grid", "all", "medians", "swap", "volume_real", "volume_synthetic"}
    ct, image = nib.load(next(run.glob("*_synthetic.nii.gz"))), nib.load(run / "data" / "imagesVa" / "amos_0401.nii.gz")
    assert ct.shape == image.shape and np.array_equal(ct.affine, image.affine)


@pytest.mark.skipif(not (REAL / "imagesTr").is_dir(), reason=f"no real CT in {REAL}: set CTDIFFUSION_REAL_CT")
def test_real_ct(root, tmp_path):
    run = train(root, tmp_path, data_root=str(REAL))
    ct, image = nib.load(run / "real_0001_synthetic.nii.gz"), nib.load(REAL / "imagesTr" / "real_0001.nii.gz")
    assert ct.shape == image.shape == (122, 101, 112) and np.allclose(ct.affine, image.affine)
    hu = np.asanyarray(ct.dataobj)
    assert hu.dtype == np.int16 and hu.min() == -1000 and hu.max() <= 240

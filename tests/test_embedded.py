"""What the package promises of the models inside of it, on phantom patients they were never trained on."""
import json

import numpy as np
import pytest

from ctdiffusion import load, synthesize_slices
from ctdiffusion.data.labels import AMOS
from ctdiffusion.data.phantom import make_dataset
from ctdiffusion.data.preparation import PrepareConfig
from ctdiffusion.data.slices import unwindow
from ctdiffusion.data.store import prepare
from ctdiffusion.models.variants import preset
from ctdiffusion.synthesis.gallery import air_noise, organ_medians
from ctdiffusion.synthesis.synthesis import embedded, weights_folder

ORGANS = ("background", "body", "liver", "spleen", "kidney_right", "kidney_left", "stomach", "aorta")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    "32 slices of eight patients, their real HU and their label maps."
    folder = tmp_path_factory.mktemp("phantoms")
    store = prepare(make_dataset(folder / "data", train=1, val=8), folder / "store", PrepareConfig(size=64))
    rows = store.rows("val")[np.linspace(0, len(store.rows("val")) - 1, 32).astype(int)]
    return unwindow(store.images[rows] / np.float32(255)), np.array(store.labels[rows])


def far(real, synthetic):
    "Organs whose median is more than 20 HU away."
    return {organ: (real[organ], synthetic[organ]) for organ in ORGANS if abs(real[organ] - synthetic[organ]) > 20}


def test_there_is_one_for_each_design():
    assert set(embedded()) >= {"conditional-demo", "mask-demo", "edge-demo"}


@pytest.mark.parametrize("name", embedded())
def test_size_origin_and_configuration(name):
    folder, variant = weights_folder() / name, name.removesuffix("-demo")
    run = json.loads((folder / "run.json").read_text())
    assert (folder / "weights.safetensors").stat().st_size <= 2_000_000
    assert load(name, "cpu").config == preset(variant, "demo").model
    assert "papermill nbs/train.ipynb" in run["command"] and run["step"] > 0 and run["seed"] == 0


@pytest.mark.parametrize("name", embedded())
def test_slices_follow_their_mask_without_noise(name, held_out):
    real, masks = held_out
    synthetic = unwindow(synthesize_slices(load(name, "cpu"), masks, case="held-out"))
    assert not far(organ_medians(real, masks), organ_medians(synthetic, masks))
    ratio = air_noise(synthetic, masks) / air_noise(real, masks)
    assert ratio.max() <= 1.5, f"residual noise in slices {np.flatnonzero(ratio > 1.5).tolist()}: {ratio.max():.2f}"


@pytest.mark.parametrize("name", embedded())
def test_another_mask_gives_another_patient(name, held_out):
    "The noise of one patient's slices under the mask of another: organs move to where the new mask has them."
    real, masks = held_out
    other = np.roll(masks, 16, axis=0)
    model = load(name, "cpu")
    before, after = (unwindow(synthesize_slices(model, m, case="held-out")) for m in (masks, other))
    assert not far(organ_medians(np.roll(real, 16, axis=0), other), organ_medians(after, other))
    moved = (masks == AMOS.background) & (other != AMOS.background)
    assert moved.sum() > 1000 and np.median(before[moved]) < -150 and np.median(after[moved]) > -140

"""The front door: geometry, noise of a slice, damaged weights (fault F31); interrupted and damaged volumes are in faults/test_d_results.py."""
import nibabel as nib
import numpy as np
import pytest
import torch

from ctdiffusion import CTDiffusionError, load, synthesize, synthesize_slices
from ctdiffusion.data.labels import AMOS
from ctdiffusion.data.phantom import phantom, save_patient
from ctdiffusion.data.volumes import write_volume
from ctdiffusion.models.variants import ModelConfig, build
from ctdiffusion.synthesis.synthesis import Model, complete_labels, embedded, weights_folder

TINY = ModelConfig(variant="mask", size=16, channels=8, mult=(1, 2), blocks=1, attention=(8,), groups=4, T=20)


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build(TINY)
        for p in net.parameters(): torch.nn.init.normal_(p, std=0.05)
    return Model(net.eval().requires_grad_(False), TINY, AMOS, 40.0, 400.0, "ddim5", "tiny", "0" * 64)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, patient = tmp_path_factory.mktemp("patient"), phantom(seed=5, size=48)
    save_patient(patient, folder / "image.nii.gz", folder / "organs.nii.gz", "LPS")
    full = complete_labels(folder / "organs.nii.gz", folder / "image.nii.gz")
    return folder, write_volume(folder / "labels.nii.gz", full.data, full.source, np.uint8, "label map")


def test_geometry_is_that_of_the_labels(model, files, tmp_path):
    ct, label = nib.load(synthesize(model, files[1], tmp_path / "ct.nii.gz")), nib.load(files[1])
    assert ct.shape == label.shape and np.array_equal(ct.affine, label.affine) and nib.aff2axcodes(ct.affine) == ("L", "P", "S")
    assert ct.get_data_dtype() == np.int16 and (ct.dataobj.slope, ct.dataobj.inter) == (1, 0)
    assert ct.header["qform_code"] == ct.header["sform_code"] == 1 and ct.header.get_xyzt_units()[0] == "mm"
    hu, ids = np.asanyarray(ct.dataobj), np.asanyarray(label.dataobj)
    assert (hu[ids == 0] == -1000).all() and hu[ids > 0].min() >= -160 and hu.max() <= 240
    assert {"organs.ctbl", "organs.label.txt", "ct.json"} <= {p.name for p in tmp_path.iterdir()}


def test_the_image_draws_the_body(model, files, tmp_path):
    a = synthesize(model, files[0] / "organs.nii.gz", tmp_path / "a.nii.gz", image=files[0] / "image.nii.gz", case="p")
    b = synthesize(model, files[1], tmp_path / "b.nii.gz", case="p")
    assert a.read_bytes() == b.read_bytes()
    with pytest.raises(CTDiffusionError, match="no body.*image="): synthesize(model, files[0] / "organs.nii.gz", tmp_path / "c.nii.gz")
    assert not (tmp_path / "c.nii.gz").exists()


def test_seed_and_case_decide_the_noise(model, files, tmp_path):
    made = {key: synthesize(model, files[1], tmp_path / f"{i}.nii.gz", seed=key[0], case=key[1]).read_bytes() for i, key in enumerate([(0, "a"), (1, "a"), (0, "b")])}
    assert len(set(made.values())) == 3


def test_a_slice_does_not_see_its_batch(model):
    masks = np.random.default_rng(0).integers(0, 17, (5, 16, 16)).astype(np.uint8)
    together, alone = synthesize_slices(model, masks), synthesize_slices(model, masks, batch=1)
    assert np.abs(together - alone).max() <= 1.01 / 255
    assert np.allclose(together * 255, np.round(together * 255), atol=1e-4)


def test_other_labels_are_refused(model, files, tmp_path):
    label = nib.load(files[1])
    strange = np.asanyarray(label.dataobj).copy()
    strange[0, 0, 0] = 255
    nib.save(nib.Nifti1Image(strange, label.affine), tmp_path / "strange.nii.gz")
    with pytest.raises(CTDiffusionError, match="255"): synthesize(model, tmp_path / "strange.nii.gz", tmp_path / "ct.nii.gz")
    with pytest.raises(CTDiffusionError, match="resize_labels"): synthesize_slices(model, np.zeros((1, 8, 8), np.uint8))
    with pytest.raises(CTDiffusionError, match="class table"): synthesize_slices(model, np.full((1, 16, 16), 17, np.uint8))


@pytest.mark.parametrize("name", embedded())
def test_no_flipped_bit_is_loaded(name, tmp_path):
    source, folder = weights_folder() / name, tmp_path / name
    folder.mkdir()
    data = bytearray((source / "weights.safetensors").read_bytes())
    (folder / "run.json").write_bytes((source / "run.json").read_bytes())
    for at in np.random.default_rng(0).integers(0, 8 * len(data), 20):
        data[at // 8] ^= 1 << at % 8
        (folder / "weights.safetensors").write_bytes(data)
        with pytest.raises(CTDiffusionError, match="sha256"): load(folder)
        data[at // 8] ^= 1 << at % 8
    (folder / "weights.safetensors").write_bytes(data)
    assert load(folder, "cpu").config == load(name, "cpu").config


def test_unknown_model_names_what_there_is(tmp_path):
    with pytest.raises(CTDiffusionError, match="mask-demo"): load("mask-dmeo")
    with pytest.raises(CTDiffusionError, match="run.json"): load(tmp_path)

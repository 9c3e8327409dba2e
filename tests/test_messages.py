"""One clear error for what is typed wrong (fault F59): nothing raw, nothing left behind, and only advice that can be followed."""
import inspect
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from ctdiffusion import CTDiffusionError, load, synthesize
from ctdiffusion.data.labels import AMOS
from ctdiffusion.synthesis.synthesis import synthesize_slices

pytestmark = pytest.mark.fault("F59")


@pytest.fixture(scope="module")
def model():
    return load("mask-demo", "cpu")


@pytest.fixture(scope="module")
def quick():
    return load("pix2pix-demo", "cpu")


@pytest.fixture
def labels(tmp_path) -> Path:
    ids = np.full((16, 16, 1), AMOS.body, np.uint8)
    nib.save(nib.Nifti1Image(ids, np.diag([-5.0, -5.0, 5.0, 1.0])), tmp_path / "l.nii.gz")
    return tmp_path / "l.nii.gz"


@pytest.mark.parametrize("arguments, said", [
    (dict(source=3), "model: found 3; expected the name of a model (conditional-demo"),
    (dict(source=None), "model: found None"),
    (dict(source="mask-dmo"), "Did you mean 'mask-demo'?"),
    (dict(source="pix2pix"), "Did you mean 'pix2pix-demo'?"),
    (dict(source="xyz"), "or a folder with run.json"),
    (dict(source="mask-demo", device="gpu"), "device: found 'gpu'; expected 'auto', 'cpu', 'cuda', 'cuda:0', ... or 'mps'. Pass device='cuda'"),
    (dict(source="mask-demo", device="cuda:99"), "graphics cards"),
    (dict(source="mask-demo", device="cuda:x"), "device: found 'cuda:x'"),
    (dict(source="mask-demo", device=0), "device: found 0"),
    (dict(source="mask-demo", step="last"), "step: found 'last'"),
    (dict(source="mask-demo", mode="fast"), "Did you mean"),
])
def test_load(arguments, said):
    with pytest.raises(CTDiffusionError, match=re.escape(said)):
        load(**dict(device="cpu") | arguments)


@pytest.mark.parametrize("arguments, said", [
    (dict(model="mask-demo"), "Pass load('mask-demo')."),
    (dict(model=None), "Pass what `load` returns."),
    (dict(batch=0), "batch: found 0; expected a whole number, at least 1"),
    (dict(batch=-3), "batch: found -3"),
    (dict(batch=2.5), "batch: found 2.5"),
    (dict(seed="7"), "seed: found '7'; expected a whole number"),
    (dict(seed=1.0), "seed: found 1.0"),
    (dict(seed=None), "seed: found None"),
    (dict(air=-40000), "air: found -40000; expected a whole number, at least -32,768 and at most 32,767"),
    (dict(max_voxels=0), "max_voxels: found 0"),
    (dict(sampler="dimd50"), "no such sampler"),
    (dict(sampler=50), "sampler: found 50; expected a name"),
    (dict(sampler="ddim9999"), "The nearest are ddim500 and ddim1000"),
    (dict(labels="."), "expected one label file"),
    (dict(labels=None), "labels: found None; expected the path of a file"),
    (dict(labels="nothing.nii.gz"), "no such file"),
    (dict(image=7), "image: found 7"),
    (dict(out=7), "out: found 7"),
    (dict(out=""), "out: found ''"),
    (dict(out="."), "found a folder; expected the name of a file that ends in .nii.gz or .nii. Pass for example 'ct.nii.gz'"),
    (dict(out="folder.nii.gz"), "found a folder"),
    (dict(out="l.nii.gz/ct.nii.gz"), "which is no folder"),
    (dict(out="ct.png"), ".nii.gz (compressed NIfTI) or .nii"),
    (dict(out="x" * 300 + ".nii.gz"), "no place for a file (File name too long)"),
])
def test_synthesize(model, labels, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.nii.gz").mkdir()
    before = sorted(tmp_path.rglob("*"))
    given = dict(model=model, labels=labels, out="ct.nii.gz") | arguments
    with pytest.raises(CTDiffusionError, match=re.escape(said)) as error:
        synthesize(**given)
    assert "ake room" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before, "nothing was created, not even a hidden folder"


def test_numpy_numbers_are_numbers(quick, labels, tmp_path):
    a = synthesize(quick, labels, tmp_path / "a.nii.gz", seed=np.int64(3), batch=np.int32(2), case="p")
    b = synthesize(quick, labels, tmp_path / "b.nii.gz", seed=3, batch=2, case="p")
    assert a.read_bytes() == b.read_bytes()


def test_what_the_messages_advise_can_be_passed(quick, labels, tmp_path):
    "A header without an orientation: the error says assume='RAS', and that helps. Likewise max_voxels."
    bare = nib.load(labels)
    bare.set_qform(None, 0)
    bare.set_sform(None, 0)
    nib.save(bare, tmp_path / "bare.nii.gz")
    with pytest.raises(CTDiffusionError, match="pass assume='RAS'"):
        synthesize(quick, tmp_path / "bare.nii.gz", tmp_path / "ct.nii.gz")
    made = synthesize(quick, tmp_path / "bare.nii.gz", tmp_path / "ct.nii.gz", assume="RAS")
    assert nib.aff2axcodes(nib.load(made).affine) == ("R", "A", "S")
    with pytest.raises(CTDiffusionError, match="Raise max_voxels"):
        synthesize(quick, labels, tmp_path / "small.nii.gz", max_voxels=100)
    assert synthesize(quick, labels, tmp_path / "small.nii.gz", max_voxels=300).exists()


def test_the_clipping_is_said_where_a_user_of_the_volume_looks(quick, labels, tmp_path):
    import json
    out = synthesize(quick, labels, tmp_path / "ct.nii.gz")
    record = json.loads((tmp_path / "ct.json").read_text())
    assert record["hu_range"] == [-160, 240] and "lungs" in record["hu"] and "240" in record["hu"]
    words = " ".join(inspect.getdoc(synthesize).split())
    assert "clipped to the window" in words and "-160 to 240 HU" in words
    hu = np.asanyarray(nib.load(out).dataobj)
    assert hu.min() >= -160 and hu.max() <= 240


def test_what_the_readers_noted_is_said_and_kept(quick, tmp_path):
    "Labels stored as floats that are nearly whole, on pixels that are not square; the image with padding."
    import json
    ids = np.zeros((16, 16, 2), np.float32)
    ids[4:12, 4:12] = 6.0001
    affine = np.diag([-5.0, -4.0, 5.0, 1.0])
    hu = np.where(ids > 0, 60, -1000).astype(np.int16)
    hu[2:14, 2:14][hu[2:14, 2:14] < 0] = 30
    hu[0] = -2000
    nib.save(nib.Nifti1Image(ids, affine), tmp_path / "l.nii.gz")
    nib.save(nib.Nifti1Image(hu, affine), tmp_path / "i.nii.gz")
    told = []
    synthesize(quick, tmp_path / "l.nii.gz", tmp_path / "ct.nii.gz", image=tmp_path / "i.nii.gz", say=told.append)
    notes = json.loads((tmp_path / "ct.json").read_text())["notes"]
    for words in ("labels rounded", "not square", "set to -1024"):
        assert any(words in note for note in notes) and any(words in line for line in told), words


@pytest.mark.parametrize("given", [dict(batch=0), dict(seed="x"), dict(sampler="zzz"), dict(rows=[1])], ids=str)
def test_slices_with_a_wrong_parameter(model, given):
    masks = np.zeros((2, model.config.size, model.config.size), np.uint8)
    with pytest.raises(CTDiffusionError):
        synthesize_slices(model, masks, **given)


@pytest.mark.parametrize("masks", [[[1]], np.zeros((0, 64, 64), int), np.full((1, 64, 64), 0.5)], ids=["list", "empty", "real numbers"])
def test_slices_of_what_is_no_mask(model, masks):
    with pytest.raises(CTDiffusionError, match="masks"):
        synthesize_slices(model, masks)


@pytest.mark.parametrize("given", [dict(label_scheme=2), dict(assume=5), dict(overwrite="no"), dict(say=3), dict(seed=10**30), dict(batch=10**30)], ids=str)
def test_a_volume_with_a_parameter_of_another_type(model, given, tmp_path):
    with pytest.raises(CTDiffusionError, match=next(iter(given))):
        synthesize(model, tmp_path / "labels.nii.gz", tmp_path / "ct.nii.gz", **given)
    assert list(tmp_path.iterdir()) == []

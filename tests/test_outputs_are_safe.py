"""Nothing of the user's is destroyed (fault F43), and a volume has the format that its name says (F45)."""
import gzip
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from ctdiffusion import CTDiffusionError, load, synthesize
from ctdiffusion.data.labels import AMOS
from ctdiffusion.data.volumes import Source, read_image, write_volume
from ctdiffusion.synthesis.synthesis import export

AFFINE = np.diag([-5.0, -5.0, 5.0, 1.0])


@pytest.fixture(scope="module")
def model():
    return load("pix2pix-demo", "cpu")


def label_map() -> np.ndarray:
    "Two slices: a liver in a body in air."
    ids = np.zeros((24, 24, 2), np.uint8)
    ids[4:20, 4:20] = AMOS.body
    ids[8:14, 8:14] = AMOS.id("liver")
    return ids


@pytest.fixture
def labels(tmp_path) -> Path:
    path = tmp_path / "l.nii.gz"
    nib.save(nib.Nifti1Image(label_map(), AFFINE), path)
    return path


@pytest.fixture
def image(tmp_path) -> Path:
    path = tmp_path / "i.nii.gz"
    hu = np.where(label_map() > 0, 40, -1000).astype(np.int16)
    nib.save(nib.Nifti1Image(hu, AFFINE), path)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def itself(path: Path) -> Path:
    return path


def round_about(path: Path) -> Path:
    (path.parent / "there").mkdir()
    return path.parent / "there" / ".." / path.name


def relative(path: Path) -> Path:
    return Path(os.path.relpath(path))


def symbolic_link(path: Path) -> Path:
    link = path.with_name("link.nii.gz")
    link.symlink_to(path)
    return link


def hard_link(path: Path) -> Path:
    link = path.with_name("link.nii.gz")
    os.link(path, link)
    return link


def linked_folder(path: Path) -> Path:
    (path.parent.parent / f"{path.parent.name}-link").symlink_to(path.parent)
    return path.parent.parent / f"{path.parent.name}-link" / path.name


@pytest.mark.fault("F43")
@pytest.mark.parametrize("spelled", [itself, round_about, relative, symbolic_link, hard_link, linked_folder])
@pytest.mark.parametrize("which", ["labels", "image"])
def test_an_input_is_never_the_output(model, labels, image, which, spelled):
    out = spelled(dict(labels=labels, image=image)[which])
    before = contents(labels.parent)
    for overwrite in (False, True):
        with pytest.raises(CTDiffusionError, match="the place of an input"):
            synthesize(model, labels, out, image=image, overwrite=overwrite)
    assert contents(labels.parent) == before


@pytest.mark.fault("F43")
@pytest.mark.parametrize("name", ["ct.json", "organs.ctbl", "organs.label.txt"])
def test_an_input_is_not_replaced_by_what_goes_with_a_volume(model, labels, name):
    given = labels.rename(labels.with_name(name))
    before = contents(given.parent)
    with pytest.raises(CTDiffusionError, match="the place of an input"):
        synthesize(model, given, given.with_name("ct.nii.gz"), overwrite=True)
    assert contents(given.parent) == before


@pytest.mark.fault("F43")
def test_other_capitals_on_a_disk_that_ignores_them(model, labels, monkeypatch):
    "Such a disk finds the input under the other spelling, too."
    other = labels.with_name("L.NII.GZ")
    asked = os.stat

    def stat(path, *args, **options):
        if isinstance(path, (str, Path)) and Path(path) == other: path = labels
        return asked(path, *args, **options)

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(CTDiffusionError, match="the place of an input"):
        synthesize(model, labels, other)


@pytest.mark.fault("F43")
@pytest.mark.parametrize("name", ["ct.nii.gz", "ct.json", "organs.ctbl", "organs.label.txt"])
def test_a_file_of_somebody_else_is_replaced_only_on_request(model, labels, name):
    foreign = labels.with_name(name)
    foreign.write_text('{"Modality": "CT"}')
    before = contents(labels.parent)
    with pytest.raises(CTDiffusionError, match="overwrite=True") as error:
        synthesize(model, labels, labels.with_name("ct.nii.gz"))
    assert error.value.path == str(foreign) and contents(labels.parent) == before
    synthesize(model, labels, labels.with_name("ct.nii.gz"), overwrite=True)
    assert foreign.read_bytes() != before[name]


@pytest.mark.fault("F43")
def test_a_volume_that_was_edited_is_kept(model, labels):
    "Our volume, smoothed by its user and saved under its name, by nibabel: the record is still there."
    out = synthesize(model, labels, labels.with_name("ct.nii.gz"))
    volume = nib.load(out)
    edited = np.asanyarray(volume.dataobj) // 2
    nib.save(nib.Nifti1Image(edited, volume.affine, volume.header), out)
    kept = out.read_bytes()
    for seed in (0, 1):
        with pytest.raises(CTDiffusionError, match="changed since it was made.*overwrite=True"):
            synthesize(model, labels, out, seed=seed)
    assert out.read_bytes() == kept
    assert synthesize(model, labels, out, overwrite=True).read_bytes() != kept


@pytest.mark.fault("F43")
def test_our_own_volume_of_another_seed_is_replaced(model, labels):
    out = labels.with_name("ct.nii.gz")
    first = synthesize(model, labels, out, air=-1000).read_bytes()
    assert synthesize(model, labels, out, air=-900).read_bytes() != first


@pytest.mark.fault("F43")
def test_two_volumes_do_not_share_a_record(model, labels):
    "ct.nii and ct.nii.gz would both have ct.json."
    first = synthesize(model, labels, labels.with_name("ct.nii"))
    with pytest.raises(CTDiffusionError, match="ct.json.*not the record of this result"):
        synthesize(model, labels, labels.with_name("ct.nii.gz"))
    assert first.exists() and not labels.with_name("ct.nii.gz").exists()


@pytest.mark.fault("F43")
def test_weights_are_not_exported_into_their_run(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(CTDiffusionError, match="the place of an input"):
        export(tmp_path, tmp_path / "." )
    assert (tmp_path / "run.json").read_text() == "{}"


@pytest.mark.fault("F45")
@pytest.mark.parametrize("name, compressed", [("ct.nii", False), ("ct.nii.gz", True), ("CT.NII", False), ("CT.NII.GZ", True), ("my ct.Nii.Gz", True)])
def test_the_suffix_decides_the_format_in_any_case(model, labels, tmp_path, name, compressed):
    out = synthesize(model, labels, tmp_path / "out" / name)
    assert out.name == name and name in os.listdir(out.parent)
    raw = out.read_bytes()
    assert (raw[:2] == b"\x1f\x8b") == compressed
    plain = gzip.decompress(raw) if compressed else raw
    assert plain[344:348] == b"n+1\0" and read_image(out).data.shape == (24, 24, 2)
    assert (out.parent / f"{name.split('.')[0]}.json").exists()


@pytest.mark.fault("F45")
@pytest.mark.parametrize("name", ["ct.nrrd", "ct.mha", "ct.png", "ct", "ct.gz", "ct.nii.gz.bak", ".nii.gz", "ct.img", "ct.mgz"])
def test_other_formats_are_refused_before_the_work(model, labels, tmp_path, name):
    before = contents(tmp_path)
    with pytest.raises(CTDiffusionError, match=r"\.nii\.gz \(compressed NIfTI\) or \.nii"):
        synthesize(model, labels, tmp_path / "out" / name)
    assert contents(tmp_path) == before and not (tmp_path / "out").exists()


@pytest.mark.fault("F45")
def test_no_volume_is_written_under_the_name_of_another_format(tmp_path):
    source = Source("drawn", (2, 2, 2), np.eye(4), "0" * 64)
    with pytest.raises(CTDiffusionError, match=r"\.nii"):
        write_volume(tmp_path / "x.mha", np.zeros((2, 2, 2)), source)
    assert not list(tmp_path.iterdir())


@pytest.mark.fault("F43")
def test_a_killed_volume_goes_on_although_its_record_is_missing(model, labels, tmp_path):
    "The moment between the volume and its record: the volume lies in place, the record still in the hidden folder."
    out = synthesize(model, labels, tmp_path / "ct.nii.gz")
    whole = out.read_bytes()
    hidden = tmp_path / ".ct.nii.gz.0123456789ab"
    hidden.mkdir()
    shutil.move(tmp_path / "ct.json", hidden / "ct.json")
    assert synthesize(model, labels, out).read_bytes() == whole and (tmp_path / "ct.json").exists()

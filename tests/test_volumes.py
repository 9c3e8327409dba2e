"Files as software writes them: storage, byte order, padding, tilt, and what we write ourselves. Bad ones are in faults/test_a_data.py."
import gzip, struct
import nibabel as nib
import numpy as np
import pytest
from ctdiffusion.data.labels import CTDiffusionError
from ctdiffusion.data.volumes import nifti_bytes, read_image, read_labels, write_volume
from nifti import AFFINE, CODES, DTYPE, HU, OFFSET, SCALE, UNITS, patched


@pytest.mark.parametrize("dtype, slope, inter", [(np.uint16, 1, -1024), (np.int32, 1, 0), (np.float32, 1, 0), (np.float64, 1, 0), (np.int16, 2, -1000)])
def test_hu_do_not_depend_on_storage(tmp_path, dtype, slope, inter):
    hu = HU // 2 * 2
    v = read_image(patched(tmp_path / "a.nii", (SCALE, "<2f", slope, inter), data=((hu - inter) // slope).astype(dtype)))
    assert v.data.dtype == np.int16 and (v.data == hu[::-1]).all()


def test_big_endian_and_nifti2(tmp_path):
    big = nib.Nifti1Image(HU, AFFINE, nib.Nifti1Header(endianness=">"))
    two = nib.Nifti2Image(HU, AFFINE)
    for image in (big, two):
        nib.save(image, tmp_path / "a.nii.gz")
        v = read_image(tmp_path / "a.nii.gz")
        assert (v.data == HU[::-1]).all() and np.allclose(v.source.affine, AFFINE, atol=1e-6)


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.int8, np.float32])
def test_voxels_may_begin_at_an_odd_byte(tmp_path, gz, dtype):
    data = (HU % 100).astype(dtype)
    raw = bytearray(nifti_bytes(data, AFFINE, gz=False))
    struct.pack_into("<f", raw, OFFSET, 353)
    raw.insert(352, 0)
    (tmp_path / "a.nii").write_bytes(gzip.compress(bytes(raw)) if gz else raw)
    v = read_image(tmp_path / "a.nii")
    assert v.data.dtype == np.int16 and v.data.flags.aligned and (v.data == data[::-1]).all()
    assert (read_labels(patched(tmp_path / "b.nii", data=(data % 16).astype(np.int16))).data == (data % 16)[::-1]).all()


def test_padding_is_clipped_and_noted(tmp_path):
    v = read_image(patched(tmp_path / "a.nii", data=np.where(HU > 0, HU, -3024).astype(np.int16)))
    assert v.data.min() == -1024 and "-3024" in v.notes[-1]


def test_what_is_written(tmp_path):
    v = read_image(patched(tmp_path / "a.nii"))
    path = write_volume(tmp_path / "b.nii.gz", v.data.astype(np.float32) + .4, v.source)
    raw = gzip.decompress(path.read_bytes())
    assert struct.unpack_from("<2f", raw, SCALE) == (1, 0) and struct.unpack_from("<2h", raw, CODES) == (1, 1)
    assert struct.unpack_from("<h", raw, DTYPE) == (4,) and raw[UNITS] & 7 == 2 and b"synthetic" in raw[148:228]
    assert (read_image(path).data == v.data).all() and not [f for f in tmp_path.iterdir() if f.name.startswith(".")]
    assert path.read_bytes() == write_volume(tmp_path / "c.nii.gz", v.data, v.source).read_bytes()
    with pytest.raises(CTDiffusionError, match="Resample"): write_volume(tmp_path / "d.nii", v.data[1:], v.source)


def test_tilted_slices_are_noted(tmp_path):
    sheared = AFFINE.copy()
    sheared[1, 2] = 5 * np.tan(np.radians(12))
    image = nib.Nifti1Image(HU, None)
    image.set_sform(sheared, 1)
    nib.save(image, tmp_path / "a.nii")
    v = read_image(tmp_path / "a.nii")
    assert "12 degrees" in v.notes[0] and (v.data == HU[::-1]).all()

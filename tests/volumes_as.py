"A drawn volume in the files that other software writes: what several tests save and read back."
import locale
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from ctdiffusion.data.volumes import nifti_bytes

sitk = pytest.importorskip("SimpleITK", reason="pip install 'ctdiffusion[formats]'")
UID = "1.2.826.0.1.3680043.2.1125.1"


def oblique(affine: np.ndarray) -> np.ndarray:
    "The same voxels, turned by 12 degrees about a slanted axis, with another step along every axis and moved away."
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_rotvec(np.radians(12) * np.array([0.6, 0.48, 0.64])).as_matrix()
    out = turn @ affine @ np.diag([1, 1.25, 0.7, 1])
    out[:3, 3] += (31.7, -12.3, 250.1)
    return out


def stored_as(codes: str, data: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    "Data and affine of a RAS array in another order of axes."
    order = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes))
    turned = nib.orientations.apply_orientation(data, order)
    return turned, affine @ nib.orientations.inv_ornt_aff(order, data.shape)


def itk_image(data: np.ndarray, affine: np.ndarray):
    "The volume for SimpleITK: axes z, y, x in memory; LPS in place of RAS. A fourth axis holds layers."
    lps = np.diag([-1, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    axes = (2, 1, 0, 3)[: data.ndim]
    image = sitk.GetImageFromArray(np.ascontiguousarray(data.transpose(axes)), isVector=data.ndim == 4)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    return image


def save_itk(path: Path, data: np.ndarray, affine: np.ndarray, tags: dict | None = None) -> Path:
    "NRRD or MetaImage, by the suffix; compressed where that is usual."
    image = itk_image(data, affine)
    for key, value in (tags or {}).items():
        image.SetMetaData(key, value)
    sitk.WriteImage(image, str(path), useCompression=path.suffix in (".nrrd", ".mha"))
    return path


def save_series(folder: Path, data: np.ndarray, affine: np.ndarray, **tags: str) -> Path:
    "One DICOM file a slice, named in another order than they lie; the affine may be sheared."
    folder.mkdir(parents=True)
    lps = np.diag([-1, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    along = (lps[:3, :2] / spacing[:2]).T.ravel()
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    before = locale.setlocale(locale.LC_ALL)  # GDCM's writer sets it to "C" for the whole process
    for k in range(data.shape[2]):
        one = sitk.GetImageFromArray(np.ascontiguousarray(data[:, :, k].T)[None])
        one.SetSpacing(spacing.tolist())
        position = lps[:3, 3] + k * lps[:3, 2]
        here = {"0008|0060": "CT", "0008|0018": f"{UID}.1.{k + 1}", "0020|000d": f"{UID}.9", "0020|000e": UID, "0020|0013": str(k + 1)}
        here |= {"0020|0037": "\\".join(f"{x:.10f}" for x in along), "0020|0032": "\\".join(f"{x:.6f}" for x in position)}
        for key, value in (here | {name.replace("_", "|"): value for name, value in tags.items()}).items():
            one.SetMetaData(key.removeprefix("t"), value)
        writer.SetFileName(str(folder / f"{(k * 7) % data.shape[2]:03d}-{k:03d}.dcm"))
        writer.Execute(one)
    locale.setlocale(locale.LC_ALL, before)
    return folder


def save_mgh(path: Path, data: np.ndarray, affine: np.ndarray) -> Path:
    nib.save(nib.freesurfer.MGHImage(data, affine), path)
    return path


def save_pair(path: Path, data: np.ndarray, affine: np.ndarray) -> Path:
    "NIfTI in two files, .hdr and .img."
    image = nib.Nifti1Pair(data, affine)
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    nib.save(image, path)
    return path


def save_nifti(path: Path, data: np.ndarray, affine: np.ndarray) -> Path:
    path.write_bytes(nifti_bytes(data, affine, gz=path.name.lower().endswith(".gz")))
    return path


def save(path: Path, data: np.ndarray, affine: np.ndarray) -> Path:
    "In the format of the suffix; without a suffix, a DICOM series."
    suffix = path.suffix.lower()
    if suffix in (".nii", ".gz"):
        return save_nifti(path, data, affine)
    if suffix in (".hdr", ".img"):
        return save_pair(path, data, affine)
    if suffix in (".mgz", ".mgh"):
        return save_mgh(path, data, affine)
    return save_itk(path, data, affine) if suffix else save_series(path, data, affine)


def segmentation_tags(names: dict[str, int], layers: dict[str, int] | None = None) -> dict[str, str]:
    "What 3D Slicer writes into the header: names, values and layers of its segments."
    tags = {"Segmentation_MasterRepresentation": "Binary labelmap", "Segmentation_ReferenceImageExtentOffset": "0 0 0"}
    for n, (name, value) in enumerate(names.items()):
        layer = (layers or {}).get(name, 0)
        own = dict(ID=f"Segment_{n + 1}", Name=name, LabelValue=str(value), Layer=str(layer), Color="0.5 0.2 0.1")
        tags |= {f"Segment{n}_{key}": text for key, text in own.items()}
    return tags

"Files that might be NIfTI, drawn by hypothesis: headers with one to four wild fields, files with flipped, cut or added bytes, and rubbish."
import gzip
import logging
import struct
import warnings

import nibabel as nib
import numpy as np
from hypothesis import strategies as st
from nibabel.orientations import apply_orientation, io_orientation

from nifti import AFFINE, HU, LABELS

logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)
KINDS = (np.int16, np.uint8, np.int8, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.float32, np.float64)


def whole(data: np.ndarray, order: str, two: bool) -> bytes:
    "A sound file: any kind of number, byte order and version."
    image = (nib.Nifti2Image if two else nib.Nifti1Image)(data, AFFINE, (nib.Nifti2Header if two else nib.Nifti1Header)(endianness=order))
    image.set_qform(AFFINE, 1)
    return image.to_bytes()


def seeds() -> list[bytes]:
    "Images and labels in every kind, order and version."
    values = [(d % 100 if k in (np.uint8, np.int8) else d + 1000 if np.dtype(k).kind == "u" else d).astype(k) for k in KINDS for d in (HU, LABELS)]
    return [whole(v, order, two) for v in values for order in "<>" for two in (False, True)]


SEEDS = seeds()
FIELDS = [[(n, t.base.newbyteorder("="), t.shape, o) for n, (t, o) in h.template_dtype.fields.items()] for h in (nib.Nifti1Header, nib.Nifti2Header)]  # name, kind, shape, offset
LOUD = ("dim", "datatype", "vox_offset", "scl_slope", "scl_inter", "pixdim", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "srow_x", "srow_y", "srow_z", "magic", "sizeof_hdr", "bitpix")
WHOLE = st.sampled_from([0, 1, -1, 2, 3, 4, 5, 6, 7, 8, 16, 64, 77, 128, 256, 348, 352, 353, 512, 540, 544, 768, 1000, 1024, 1280, 1536, 2304, 32767, -32768, 2**31 - 1, -2**31, 2**62, -2**63]) | st.integers(-2**63, 2**63 - 1)
REAL = st.sampled_from([0., -0., 1., -1., .5, .7, 2., 5., 12.1, .0007, 348., 352., 352.5, 353., 400., 2.**24, 1e-40, 1e-300, 1e9, 3e38, -3e38, 1e300, 1.7e308, float("inf"), float("-inf"), float("nan")]) | st.floats(width=64)


@st.composite
def wild_header(draw):
    "A sound file with one to four numbers of its header replaced."
    raw = bytearray(draw(st.sampled_from(SEEDS)))
    order = "<" if raw[0] else ">"
    fields = FIELDS[int.from_bytes(raw[:4], "little" if order == "<" else "big") == 540]
    for _ in range(draw(st.integers(1, 4))):
        name, kind, shape, offset = draw(st.sampled_from([f for f in fields if f[0] in LOUD]))
        at = offset + kind.itemsize * draw(st.integers(0, max(0, int(np.prod(shape)) - 1)))
        if kind.kind in "fiu":
            value = draw(WHOLE if kind.kind in "iu" else REAL)
            with np.errstate(all="ignore"): raw[at:at + kind.itemsize] = (np.array(value).astype(kind) if kind.kind == "f" else np.array(value % 2**64, np.uint64).astype(kind)).astype(kind.newbyteorder(order)).tobytes()
        else: raw[at:at + kind.itemsize] = draw(st.sampled_from([b"ni1\0", b"n+1\0", b"n+2\0\r\n\032\n", b"ni2\0\r\n\032\n", b"\0" * 8]))[:kind.itemsize].ljust(kind.itemsize, b"\0")
    return bytes(raw)


@st.composite
def damaged(draw):
    "A sound file, packed or not, with bytes changed, and perhaps cut or longer."
    raw = draw(st.sampled_from(SEEDS))
    raw = bytearray(draw(st.sampled_from([bytes, packed]))(raw))
    for _ in range(draw(st.integers(0, 5))): raw[draw(st.integers(0, min(len(raw), draw(st.sampled_from([20, 400, 10**6]))) - 1))] = draw(st.integers(0, 255))
    if draw(st.booleans()): del raw[draw(st.integers(0, len(raw))):]
    return bytes(raw) + draw(st.sampled_from([b"", b"", b"\0" * 9, b"\x1f\x8b", b"rubbish"]))


RUBBISH = st.binary(max_size=700) | st.binary(max_size=60).map(lambda b: b"\x1f\x8b\x08" + b) | st.binary(max_size=560).map(lambda b: struct.pack("<i", 348) + b)


@st.composite
def files(draw):
    "Bytes of one file."
    raw = draw(st.one_of(wild_header(), wild_header(), damaged(), RUBBISH))
    return packed(raw) if draw(st.integers(0, 3)) == 0 else raw


def packed(raw: bytes) -> bytes: return gzip.compress(raw, 1, mtime=0)


def unpacked(content: bytes) -> bytes:
    "What is inside, by Python's own gzip."
    return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content


def plain_reading(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    "Values in RAS order and the matrix of the file, by nibabel alone."
    raw = unpacked(content)
    size = 348 if 348 in (int.from_bytes(raw[:4], order) for order in ("little", "big")) else 540
    header = (nib.Nifti1Header if size == 348 else nib.Nifti2Header)(raw[:size], check=False)
    shape, kind = tuple(int(n) for n in header["dim"][1:4]), header.get_data_dtype()
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        values = np.frombuffer(raw, kind, int(np.prod(shape)), int(header["vox_offset"])).reshape(shape, order="F").astype(np.float64)
        slope, inter = (float(header[k]) for k in ("scl_slope", "scl_inter"))
        if np.isfinite(slope) and slope != 0: values = values * slope + (inter if np.isfinite(inter) else 0)
        affine = header.get_best_affine()
        return apply_orientation(values, io_orientation(affine)), affine

"A small volume, and NIfTI files of it with bytes of the header overwritten."
import gzip
import struct

import numpy as np

from ctdiffusion.data.volumes import nifti_bytes

AFFINE = np.array([[-.8, 0, 0, 50], [0, .9, 0, -40], [0, 0, 5, 10], [0, 0, 0, 1.]])
HU = np.random.default_rng(0).integers(-1000, 400, (4, 5, 6)).astype(np.int16)
LABELS = np.random.default_rng(1).integers(0, 16, (4, 5, 6)).astype(np.float32)
DIM, DTYPE, PIXDIM, OFFSET, SCALE, UNITS, CODES, SROW = 40, 70, 76, 108, 112, 123, 252, 280


def patched(path, *patches, data=HU, gz=False):
    "A small NIfTI file with header bytes overwritten: patches are (offset, format, values...)."
    raw = bytearray(nifti_bytes(data, AFFINE, gz=False))
    for offset, form, *values in patches: struct.pack_into(form, raw, offset, *values)
    path.write_bytes(gzip.compress(bytes(raw), mtime=0) if gz else bytes(raw))
    return path

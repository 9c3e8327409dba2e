"""Bad NIfTI files (faults F1-F6, F9, F11-F13, F16): each is refused with its path, or read rightly with a note; never a wrong array."""
import gzip, hashlib, itertools, random, resource, struct, time, zlib
import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform
from ctdiffusion.data.labels import CTDiffusionError
from ctdiffusion.data.volumes import MAX_VOXELS, nifti_bytes, read_image, read_labels, write_volume

AFFINE = np.array([[-.8, 0, 0, 50], [0, .9, 0, -40], [0, 0, 5, 10], [0, 0, 0, 1.]])
HU = np.random.default_rng(0).integers(-1000, 400, (4, 5, 6)).astype(np.int16)
DIM, DTYPE, PIXDIM, OFFSET, SCALE, UNITS, CODES, SROW = 40, 70, 76, 108, 112, 123, 252, 280


def patched(path, *patches, data=HU, gz=False):
    "A small NIfTI file with header bytes overwritten: patches are (offset, format, values...)."
    raw = bytearray(nifti_bytes(data, AFFINE, gz=False))
    for offset, form, *values in patches: struct.pack_into(form, raw, offset, *values)
    path.write_bytes(gzip.compress(bytes(raw), mtime=0) if gz else bytes(raw))
    return path


def refused(path, *words, read=read_image, **kw):
    with pytest.raises(CTDiffusionError) as e: read(path, **kw)
    assert e.value.path == str(path) and e.value.do
    for w in words: assert w in str(e.value), str(e.value)


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("side", [(32767,) * 3, (1000,) * 3, (800,) * 3])
def test_header_that_claims_too_much(tmp_path, gz, side):
    path = patched(tmp_path / ("a.nii.gz" if gz else "a.nii"), (DIM + 2, "<3h", *side), gz=gz)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    refused(path)
    assert time.perf_counter() - start < 0.5 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_honest_bomb_is_stopped_by_the_voxel_limit(tmp_path):
    path = tmp_path / "bomb.nii.gz"
    path.write_bytes(nifti_bytes(np.zeros((256, 256, 256), np.int16), AFFINE))
    assert path.stat().st_size < 2**18
    refused(path, "16,777,216 voxels", "max_voxels", max_voxels=2**20)
    assert read_image(path, max_voxels=MAX_VOXELS).data.shape == (256, 256, 256)


def test_more_data_than_the_header_says(tmp_path):
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(nifti_bytes(HU, AFFINE, gz=False) + bytes(2**25)))
    refused(tmp_path / "a.nii.gz", "more than")


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("share", [0, .01, .3, .5, .9, .99])
def test_truncated(tmp_path, gz, share):
    whole = nifti_bytes(np.random.default_rng(0).integers(-1000, 400, (20, 20, 20)).astype(np.int16), AFFINE, gz=gz)
    path = tmp_path / ("a.nii.gz" if gz else "a.nii")
    path.write_bytes(whole[:int(len(whole) * share)])
    refused(path, *(["interrupted download"] if share > .01 else []))


def test_truncated_message_counts_bytes(tmp_path):
    whole = nifti_bytes(HU, AFFINE, gz=False)
    (tmp_path / "a.nii").write_bytes(whole[:-10])
    refused(tmp_path / "a.nii", f"holds {len(whole) - 10} of {len(whole)} bytes")
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(whole)[:-4])
    refused(tmp_path / "b.nii.gz", "interrupted download")


def test_truncated_gzip_counts_what_was_there(tmp_path):
    raw = nifti_bytes(np.random.default_rng(0).integers(-1000, 400, (60, 50, 40)).astype(np.int16), AFFINE, gz=False)
    whole = gzip.compress(raw, 6)
    for share in (.02, .3, .7, .99):
        part = whole[:int(len(whole) * share)]
        (tmp_path / "a.nii.gz").write_bytes(part)
        with pytest.raises(CTDiffusionError, match="interrupted download") as e: read_image(tmp_path / "a.nii.gz")
        there, promised = (int(n.replace(",", "")) for n in e.value.found.split()[1:4:2])
        assert promised == len(raw) and 0 <= len(zlib.decompressobj(31).decompress(part)) - there <= 258  # a decoder may wait with its last word


def test_gzip_in_parts_with_padding_and_with_rubbish(tmp_path):
    "What `cat`, bgzip or a tape leave behind is one file; the checksum is that of all its bytes, and nothing else may follow."
    raw, path, kinds = nifti_bytes(HU, AFFINE, gz=False), tmp_path / "a.nii.gz", {}
    cut = lambda *at: b"".join(gzip.compress(raw[a:b]) for a, b in zip((0, *at), (*at, len(raw))))
    for name, content in dict(one=cut(), two=cut(100), many=cut(*range(7, 500, 7)), padded=cut() + bytes(700), between=gzip.compress(raw[:300]) + bytes(2**17) + gzip.compress(raw[300:]),
                              stored=gzip.compress(raw, 0), named=cut()[:3] + b"\x08" + cut()[4:10] + b"name.nii\0" + cut()[10:], plain=raw).items():
        path.write_bytes(content)
        v = read_image(path)
        assert (v.data == HU[::-1]).all() and v.source.sha256 == hashlib.sha256(content).hexdigest(), name
    for rubbish in (b"x", b"xyz", b"\x1f", b"\x1f\x8b", bytes(9) + b"\x1f\x8c" + bytes(20), cut(100)[:-1]):
        path.write_bytes(cut() + rubbish)
        refused(path, *(["damaged compression"] if not b"\x1f\x8b".startswith(rubbish.lstrip(b"\0")[:2]) else ["interrupted"]))


def test_a_part_with_another_length_is_refused(tmp_path):
    whole = bytearray(nifti_bytes(HU, AFFINE))
    whole[-4:] = (int.from_bytes(whole[-4:], "little") + 1).to_bytes(4, "little")
    (tmp_path / "a.nii.gz").write_bytes(whole)
    refused(tmp_path / "a.nii.gz", "damaged compression")


def test_no_flipped_bit_in_gzip_is_silent(tmp_path):
    whole, rng, path = nifti_bytes(HU, AFFINE), random.Random(0), tmp_path / "a.nii.gz"
    for bit in [rng.randrange(10 * 8, len(whole) * 8) for _ in range(60)]:
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(CTDiffusionError, match="a.nii.gz"): read_image(path)


@pytest.mark.parametrize("content, word", [(b"<!DOCTYPE html><html>log in</html>", "web page"), (b"\n <html>", "web page"), (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
                                           (b"", "empty file"), (b"\x89PNG\r\n\x1a\n" + bytes(50), "PNG"), (bytes(128) + b"DICM" + bytes(500), "dcm2niix"), (b"hello" * 200, "NIfTI")])
def test_not_a_volume(tmp_path, content, word):
    for name in ("a.nii.gz", "a.nii"):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, word)
    (tmp_path / "z.nii.gz").write_bytes(gzip.compress(content))
    refused(tmp_path / "z.nii.gz", word)
    refused(tmp_path / "missing.nii.gz", "no such file")


NAN, INF = float("nan"), float("inf")
BROKEN = {
    "zero size": [(DIM + 2, "<h", 0)], "negative size": [(DIM + 4, "<h", -5)], "2-D": [(DIM, "<h", 2)], "no dimension": [(DIM, "<h", 0)], "9 dimensions": [(DIM, "<h", 9)],
    "4-D": [(DIM, "<5h", 4, 4, 5, 3, 2)], "unknown dtype": [(DTYPE, "<h", 77)], "RGB": [(DTYPE, "<2h", 128, 24)], "complex": [(DTYPE, "<2h", 32, 64)],
    "offset 0": [(OFFSET, "<f", 0)], "offset NaN": [(OFFSET, "<f", NAN)], "offset 1e9": [(OFFSET, "<f", 1e9)], "offset 352.5": [(OFFSET, "<f", 352.5)],
    "slope inf": [(SCALE, "<f", INF)], "slope 0 with intercept": [(SCALE, "<2f", 0, -1024)], "intercept NaN": [(SCALE, "<2f", 2, NAN)], "intercept inf": [(SCALE, "<2f", 1, INF)],
    "affine NaN": [(SROW, "<f", NAN)], "spacing 0": [(SROW, "<f", 0), (SROW + 16, "<f", 0), (SROW + 32, "<f", 0)], "flat affine": [(SROW, "<12f", 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0)],
    "metres": [(SROW, "<f", .0008)], "50 mm": [(SROW + 40, "<f", 50)], "no orientation": [(CODES, "<2h", 0, 0)], "bad qform": [(CODES, "<2h", 1, 0), (256, "<3f", 3, 3, 3)], "pixdim 0": [(CODES, "<2h", 1, 0), (PIXDIM + 4, "<f", 0)],
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_headers_are_refused(tmp_path, name):
    refused(patched(tmp_path / "a.nii", *BROKEN[name]))


@pytest.mark.parametrize("patches", [[(SCALE, "<2f", NAN, NAN)], [(SCALE, "<2f", 0, 0)], [(DIM, "<5h", 4, 4, 5, 6, 1)], [(CODES, "<2h", 1, 0)], [(CODES, "<2h", 0, 2)], [(PIXDIM + 4, "<f", 0)]])
def test_harmless_oddities_are_read_rightly(tmp_path, patches):
    v = read_image(patched(tmp_path / "a.nii", *patches))
    assert (v.data == HU[::-1]).all() and np.allclose(v.spacing, (.8, .9, 5))


def test_no_voxel_may_be_nan(tmp_path):
    data = HU.astype(np.float32)
    data[0, 0, 0] = NAN
    refused(patched(tmp_path / "a.nii", data=data), "1 voxels that are NaN")


def test_orientation_can_be_assumed(tmp_path):
    path = patched(tmp_path / "a.nii", (CODES, "<2h", 0, 0))
    refused(path, "no orientation", "assume='RAS'")
    assert (read_image(path, assume="RAS").data == HU).all() and (read_image(path, assume="LPS").data == HU[::-1, ::-1]).all()
    v = read_image(path, assume="PSR")
    assert v.source.axcodes == "PSR" and v.data.shape == (6, 4, 5) and np.allclose(v.spacing, (5, .8, .9))


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
    assert v.data.min() == -1024 and "-3024" in v.notes[0]


def test_all_48_orders_and_the_way_back(tmp_path):
    for axes in itertools.permutations(["RL", "AP", "SI"]):
        for codes in map("".join, itertools.product(*axes)):
            turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes))
            data, affine = apply_orientation(HU, turn), np.abs(AFFINE) @ inv_ornt_aff(turn, HU.shape)
            (tmp_path / "a.nii").write_bytes(nifti_bytes(data, affine, gz=False))
            v = read_image(tmp_path / "a.nii")
            assert v.source.axcodes == codes and (v.data == HU).all() and np.allclose(v.affine, np.abs(AFFINE), atol=1e-5)
            back = nib.load(write_volume(tmp_path / "b.nii", v.data, v.source))
            assert (np.asanyarray(back.dataobj) == data).all() and np.allclose(back.affine, affine, atol=1e-5)


def test_what_is_written(tmp_path):
    v = read_image(patched(tmp_path / "a.nii"))
    path = write_volume(tmp_path / "b.nii.gz", v.data.astype(np.float32) + .4, v.source)
    raw = gzip.decompress(path.read_bytes())
    assert struct.unpack_from("<2f", raw, SCALE) == (1, 0) and struct.unpack_from("<2h", raw, CODES) == (1, 1)
    assert struct.unpack_from("<h", raw, DTYPE) == (4,) and raw[UNITS] & 7 == 2 and b"synthetic" in raw[148:228]
    assert (read_image(path).data == v.data).all() and not [f for f in tmp_path.iterdir() if f.name.startswith(".")]
    assert path.read_bytes() == write_volume(tmp_path / "c.nii.gz", v.data, v.source).read_bytes()
    with pytest.raises(CTDiffusionError, match="Resample"): write_volume(tmp_path / "d.nii", v.data[1:], v.source)


LABELS = np.random.default_rng(1).integers(0, 16, (4, 5, 6)).astype(np.float32)


@pytest.mark.parametrize("value, words", [(1.5, ["1.5 (", "nearest neighbour"]), (16, ["label 16", "organs only"]), (255, ["255 (", "16"]), (-1, ["-1 ("]), (3.01, ["3.01"])])
def test_wrong_labels_are_refused(tmp_path, value, words):
    refused(patched(tmp_path / "a.nii", data=np.where(LABELS == 3, np.float32(value), LABELS)), *words, read=read_labels, allow_body=False)


def test_labels_are_rounded_never_cut(tmp_path):
    for value in (2.9999999, 2.9995, 3.0009):
        v = read_labels(patched(tmp_path / "a.nii", data=np.where(LABELS == 3, value, LABELS.astype(np.float64))))
        assert v.data.dtype == np.uint8 and (v.data == LABELS[::-1]).all()
    assert "rounded" in v.notes[0]
    scaled = read_labels(patched(tmp_path / "b.nii", (SCALE, "<2f", .5, 0), data=(LABELS * 2).astype(np.uint8)))
    assert (scaled.data == LABELS[::-1]).all()
    assert "no organ labelled" in read_labels(patched(tmp_path / "c.nii", data=LABELS * 0)).notes
    assert read_labels(patched(tmp_path / "d.nii", data=LABELS * 0 + 16)).data.max() == 16


def test_tilted_slices_are_noted(tmp_path):
    sheared = AFFINE.copy()
    sheared[1, 2] = 5 * np.tan(np.radians(12))
    image = nib.Nifti1Image(HU, None)
    image.set_sform(sheared, 1)
    nib.save(image, tmp_path / "a.nii")
    v = read_image(tmp_path / "a.nii")
    assert "12 degrees" in v.notes[0] and (v.data == HU[::-1]).all()

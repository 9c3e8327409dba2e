"Part A of the fault table: data that come in."
import csv
import gzip
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import struct
import time
import warnings
import zlib
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from forks import ended, forked, killed_at_random
from hypothesis import HealthCheck, Phase, given, settings
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform

from bounds import MB, within
from fuzz import files, plain_reading
from nifti import AFFINE, CODES, DIM, DTYPE, HU, LABELS, OFFSET, PIXDIM, SCALE, SROW, patched
from rows import refused

from ctdiffusion.data import store as store_module
from ctdiffusion.data.cases import Case, check_case_id, find_cases, inside, problems_table, read_case, write_problems
from ctdiffusion.data.labels import AMOS, CTDiffusionError
from ctdiffusion.data.phantom import phantom, save_patient
from ctdiffusion.data.preparation import PrepareConfig, SplitRow, count_slices, prepare_case, read_split, slices_of, write_split
from ctdiffusion.data.store import Store, content_hash, open_store, prepare
from ctdiffusion.data.volumes import AIR, nifti_bytes, read_image, read_labels, sha256_file, write_volume

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
CONFIG = PrepareConfig(size=32)
READERS = (read_image, read_labels)


def case_of(folder, hu, labels, affine, label_affine=None):
    (folder / "i.nii.gz").write_bytes(nifti_bytes(hu, affine))
    (folder / "l.nii.gz").write_bytes(nifti_bytes(labels, affine if label_affine is None else label_affine))
    return Case("c", folder / "i.nii.gz", folder / "l.nii.gz", "train")


def errors(problems): return [p for p in problems if p.severity == "error"]


def the_error(problems, path, *words):
    "The one error among them: it names the path, says what to do, and contains the words."
    (p,) = errors(problems)
    assert p.path == str(path) and p.expected and p.do, p
    for w in words: assert w in f"{p.found}; {p.expected}. {p.do}", p
    return p


def noisy(n=(20, 20, 20)): return np.random.default_rng(0).integers(-1000, 400, n).astype(np.int16)


# ---------------------------------------------------------------------------------------- F01-F06: one file

@needs_fork
def test_F01_claims_of_a_header_cost_nothing(tmp_path):
    paths = {}
    for side, word in ((32767, "35,181,150,961,663 voxels"), (1000, "1,000,000,000 voxels"), (800, "claim to hold 1,024,000,352")):
        for gz in (False, True): paths[patched(tmp_path / f"{side}.nii{'.gz' * gz}", (DIM + 2, "<3h", side, side, side), gz=gz)] = word
    big = nib.Nifti2Image(HU, AFFINE)
    big.header["vox_offset"], big.header["dim"][1:4] = 544, 2**31  # their product is more than 64 bits hold
    (tmp_path / "two.nii").write_bytes(bytes(big.header.binaryblock) + bytes(60))
    paths[tmp_path / "two.nii"] = "voxels"

    def read_all():
        for path, word in paths.items():
            assert path.stat().st_size < 700
            for read in READERS:
                with refused(path, word): read(path)
    assert within(50 * MB, read_all)


@needs_fork
def test_F02_bombs_are_not_inflated(tmp_path):
    "Two gigabytes of zeros in two megabytes, once under a header that admits them and once under one that does not: a few MB are looked at."
    zeros, honest, small = gzip.compress(bytes(2**26), 9), tmp_path / "honest.nii.gz", tmp_path / "small.nii.gz"
    header = bytearray(nifti_bytes(HU, AFFINE, gz=False)[:352])
    small.write_bytes(gzip.compress(bytes(header)) + zeros * 32)
    struct.pack_into("<3h", header, DIM + 2, 1024, 1024, 1024)
    honest.write_bytes(gzip.compress(bytes(header)) + zeros * 32)
    assert all(2**20 < p.stat().st_size < 2.2e6 for p in (honest, small))

    def read_both():
        for read in READERS:
            start = time.process_time()
            with refused(honest, "1,073,741,824 voxels", "max_voxels"): read(honest)
            with refused(small, "more than", "592 by its header"): read(small)
            assert time.process_time() - start < 1
    assert within(48 * MB, read_both)


def test_F02_the_limit_can_be_raised(tmp_path):
    path = tmp_path / "large.nii.gz"
    path.write_bytes(nifti_bytes(np.zeros((256, 256, 128), np.int16), AFFINE))
    assert path.stat().st_size < 2**17
    with refused(path, "8,388,608 voxels", "Raise max_voxels"): read_image(path, max_voxels=2**20)
    assert read_image(path, max_voxels=2**23).data.shape == (256, 256, 128)
    with pytest.raises(CTDiffusionError, match="PrepareConfig.max_voxels"): PrepareConfig(max_voxels=0)


def test_F03_half_a_file_says_how_much_is_there(tmp_path):
    raw = nifti_bytes(noisy((60, 50, 40)), AFFINE, gz=False)
    for name, whole in (("a.nii", raw), ("a.nii.gz", gzip.compress(raw, 6))):
        path = tmp_path / name
        for cut in (0, 20, *(int(len(whole) * share) for share in (.0005, .01, .02, .3, .5, .9, .99)), 348, 352, len(whole) - 10, len(whole) - 4, len(whole) - 1):
            path.write_bytes(part := whole[:cut])
            try: assert count_slices(path) == 40
            except CTDiffusionError as e: assert e.path == str(path) and "again" in e.do
            with refused(path, *(["holds", " of ", "robably an interrupted download"] if cut else ["an empty file", "again"])) as e: read_image(path)
            if not cut: continue
            there, promised = (int(w.replace(",", "")) for w in e.value.found.split() if w[0].isdigit())
            inside = len(part) if whole is raw else len(zlib.decompressobj(31).decompress(part))
            assert promised == (len(raw) if there >= 348 else 348) and 0 <= inside - there <= 258  # a decoder may wait with its last word


def test_F03_the_other_cases_go_on(data, tmp_path):
    halves = data / "imagesTr/amos_0001.nii.gz", data / "labelsVa/amos_0402.nii.gz"
    for f in halves: f.write_bytes(f.read_bytes()[:f.stat().st_size // 2])
    with refused(data, "in 2 cases", *map(str, halves)) as e: prepare(data, tmp_path / "s", CONFIG)
    assert {(p.case, p.path) for p in errors(e.value.problems)} == {("amos_0001", str(halves[0])), ("amos_0402", str(halves[1]))}
    assert all("interrupted download" in p.do for p in errors(e.value.problems)) and not (tmp_path / "s").exists()
    with (tmp_path / "problems.csv").open() as f: assert [r["case"] for r in csv.DictReader(f) if r["severity"] == "error"] == ["amos_0001", "amos_0402"]
    assert prepare(data, tmp_path / "s", replace(CONFIG, exclude=("amos_0001", "amos_0402"))).splits == {"train": ["amos_0002", "amos_0003"], "val": ["amos_0401"]}


def test_F04_no_flipped_bit_in_gzip_is_silent(tmp_path):
    "Every bit of gzip's own header and of its checksum, 50 anywhere in one file and 200 over ten. Only what no reader looks at, such as the date of packing, may flip."
    rng, path, quiet = random.Random(0), tmp_path / "a.nii.gz", {24, 29, 30, 31, *range(32, 80)}  # FTEXT, three bits without meaning, MTIME, XFL and OS

    def flip(whole, bit):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with nullcontext() if bit in quiet else refused(path, "ownload") as e:
            v = read_image(path)
        if bit in quiet: assert (v.data == read_image(sound).data).all() and v.source.sha256 != sha256_file(sound)
        else: assert "work out file type" not in str(e.value)
        return e

    sound = tmp_path / "sound.nii.gz"
    sound.write_bytes(whole := nifti_bytes(HU, AFFINE))
    for bit in {*range(80), *range(8 * len(whole) - 64, 8 * len(whole)), *(rng.randrange(8 * len(whole)) for _ in range(50))}: flip(whole, bit)
    assert all("damaged compression" in str(flip(whole, 8 * (len(whole) - 8) + k).value) for k in range(64)), "checksum and length"
    for n in range(10):
        sound.write_bytes(whole := nifti_bytes(noisy((9 + n, 10, 11)), AFFINE))
        for _ in range(20): flip(whole, rng.randrange(8 * len(whole)))


def test_F04_gzip_in_parts_with_padding_and_with_rubbish(tmp_path):
    "What `cat`, bgzip or a tape leave behind is one file; the checksum is that of all its bytes, and nothing else may follow."
    raw, path = nifti_bytes(HU, AFFINE, gz=False), tmp_path / "a.nii.gz"
    cut = lambda *at: b"".join(gzip.compress(raw[a:b]) for a, b in zip((0, *at), (*at, len(raw))))
    for name, content in dict(one=cut(), two=cut(100), many=cut(*range(7, 500, 7)), padded=cut() + bytes(700), between=gzip.compress(raw[:300]) + bytes(2**17) + gzip.compress(raw[300:]),
                              stored=gzip.compress(raw, 0), named=cut()[:3] + b"\x08" + cut()[4:10] + b"name.nii\0" + cut()[10:], plain=raw).items():
        path.write_bytes(content)
        v = read_image(path)
        assert (v.data == HU[::-1]).all() and v.source.sha256 == hashlib.sha256(content).hexdigest(), name
    for rubbish in (b"x", b"xyz", b"\x1f", b"\x1f\x8b", bytes(9) + b"\x1f\x8c" + bytes(20), cut(100)[:-1]):
        path.write_bytes(cut() + rubbish)
        with refused(path, *(["damaged compression"] if not b"\x1f\x8b".startswith(rubbish.lstrip(b"\0")[:2]) else ["interrupted"])): read_image(path)


def test_F04_a_plain_file_is_caught_by_the_split_file(data, tmp_path):
    "Without gzip there is no checksum in a file: a flipped bit reads as another number, and only the split file's sha256 knows."
    for f in data.glob("*/*.nii.gz"):
        f.with_suffix("").write_bytes(gzip.decompress(f.read_bytes()))
        f.unlink()
    (data / "dataset.json").unlink()
    store = prepare(data, tmp_path / "s", CONFIG)
    rng, spoiled = random.Random(1), {"image": data / "imagesTr/amos_0002.nii", "label": data / "labelsVa/amos_0401.nii"}
    for f in spoiled.values():
        content = bytearray(f.read_bytes())
        content[rng.randrange(352, len(content) // 352 * 352) & ~1] ^= 1  # the lowest bit of a voxel
        f.write_bytes(content)
    with refused(store.path, "has changed", "rebuild=True"): prepare(data, store.path, CONFIG)
    with refused(data, "in 2 cases", "download them again") as e: prepare(data, tmp_path / "new", CONFIG, split_file=store.path / "split.csv")
    assert {(p.case, p.found.split()[0]) for p in errors(e.value.problems)} == {("amos_0002", "image"), ("amos_0401", "label")} and not (tmp_path / "new").exists()
    assert all(p.path.startswith(f"{store.path / 'split.csv'}, line ") for p in errors(e.value.problems))


FOREIGN = {"login page": (b"<!DOCTYPE html><html>log in</html>", "a web page", "download it again"), "page": (b"\n <HTML>", "a web page", "download it again"),
           "LFS": (b"version https://git-lfs.github.com/spec/v1\noid", "a git-LFS pointer", "git lfs pull"), "empty": (b"", "an empty file", "again"),
           "DICOM": (bytes(128) + b"DICM" + bytes(500), "a DICOM file", "dcm2niix"), "PNG": (b"\x89PNG\r\n\x1a\n" + bytes(50), "a PNG picture", "again"), "JPEG": (b"\xff\xd8\xff\xe0" + bytes(50), "a JPEG picture", "again"),
           "zip": (b"PK\x03\x04" + bytes(50), "a zip archive", "again"), "JSON": (b'{"error": 403}', "a JSON text", "again"), "text": (b"hello" * 200, "starts with b'hellohel'", "again"), "zeros": (bytes(1000), "starts with", "again")}


def test_F05_not_a_volume(tmp_path):
    for what, (content, found, do) in FOREIGN.items():
        for name, packed in (("a.nii.gz", False), ("a.nii", False), ("z.nii.gz", True)):
            (path := tmp_path / name).write_bytes(gzip.compress(content) if packed else content)
            for read in READERS:
                with refused(path, found, do): read(path)
    with refused(tmp_path / "missing.nii.gz", "no such file"): read_image(tmp_path / "missing.nii.gz")
    with refused(tmp_path, "a folder without DICOM files"): read_image(tmp_path)


NAN, INF = float("nan"), float("inf")
BROKEN = {
    "zero size": [(DIM + 2, "<h", 0)], "negative size": [(DIM + 4, "<h", -5)], "2-D": [(DIM, "<h", 2)], "no dimension": [(DIM, "<h", 0)], "9 dimensions": [(DIM, "<h", 9)], "negative dimensions": [(DIM, "<h", -3)],
    "4-D": [(DIM, "<5h", 4, 4, 5, 3, 2)], "4-D of no frame": [(DIM, "<5h", 4, 4, 5, 6, 0)], "unknown dtype": [(DTYPE, "<h", 77)], "no dtype": [(DTYPE, "<h", 0)], "bits": [(DTYPE, "<h", 1)], "RGB": [(DTYPE, "<2h", 128, 24)], "complex": [(DTYPE, "<2h", 32, 64)],
    "float of 128 bits": [(DTYPE, "<2h", 1536, 128)], "offset 0": [(OFFSET, "<f", 0)], "offset in the header": [(OFFSET, "<f", 340)], "offset NaN": [(OFFSET, "<f", NAN)], "offset 1e9": [(OFFSET, "<f", 1e9)], "offset infinite": [(OFFSET, "<f", INF)],
    "offset negative": [(OFFSET, "<f", -352)], "offset 352.5": [(OFFSET, "<f", 352.5)], "offset a little far": [(OFFSET, "<f", 354)],
    "slope inf": [(SCALE, "<f", INF)], "slope 0 with intercept": [(SCALE, "<2f", 0, -1024)], "slope NaN with intercept": [(SCALE, "<2f", NAN, -1024)], "intercept NaN": [(SCALE, "<2f", 2, NAN)], "intercept inf": [(SCALE, "<2f", 1, INF)], "slope without end": [(SCALE, "<2f", 3e38, 0)],
    "affine NaN": [(SROW, "<f", NAN)], "affine infinite": [(SROW + 12, "<f", INF)], "spacing 0": [(SROW, "<f", 0), (SROW + 16, "<f", 0), (SROW + 32, "<f", 0)], "flat affine": [(SROW, "<12f", 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0)],
    "bad qform": [(CODES, "<2h", 1, 0), (256, "<3f", 3, 3, 3)], "quaternion NaN": [(CODES, "<2h", 1, 0), (256, "<3f", NAN, 0, 0)], "pixdim 0": [(CODES, "<2h", 1, 0), (PIXDIM + 4, "<f", 0)], "pixdim negative": [(CODES, "<2h", 1, 0), (PIXDIM + 8, "<f", -1)],
    "header of 349 bytes": [(0, "<i", 349)], "two files": [(344, "4s", b"ni1\0")],
}
READ = {  # patches, what is noted
    "slope and intercept NaN": [(SCALE, "<2f", NAN, NAN)], "slope NaN": [(SCALE, "<2f", NAN, 0)], "slope 0": [(SCALE, "<2f", 0, 0)], "one frame": [(DIM, "<5h", 4, 4, 5, 6, 1)], "seven dimensions of one": [(DIM, "<8h", 7, 4, 5, 6, 1, 1, 1, 1)],
    "qform alone": [(CODES, "<2h", 1, 0)], "sform of a template": [(CODES, "<2h", 0, 4)], "pixdim 0 beside an sform": [(PIXDIM + 4, "<f", 0)], "pixdim NaN beside an sform": [(PIXDIM + 4, "<3f", NAN, NAN, NAN)], "bits per voxel wrong": [(DTYPE + 2, "<h", 7)],
}


@pytest.mark.filterwarnings("error")
def test_F06_impossible_headers_are_refused(tmp_path):
    for name, patches in BROKEN.items():
        for gz in (False, True):
            path = patched(tmp_path / f"a{name}.nii{'.gz' * gz}", *patches, data=HU.astype(np.int32) if "without end" in name else HU, gz=gz)
            for read in READERS:
                with refused(path): read(path)


@pytest.mark.filterwarnings("error")
def test_F06_harmless_oddities_are_read_rightly(tmp_path):
    for name, patches in READ.items():
        v = read_image(patched(tmp_path / "a.nii", *patches))
        assert (v.data == HU[::-1]).all() and v.data.shape == (4, 5, 6) and np.allclose(v.spacing, (.8, .9, 5)) and np.allclose(v.source.affine, AFFINE, atol=1e-5), name


@pytest.mark.filterwarnings("error")
def test_F06_no_voxel_may_be_nan(tmp_path):
    for value, kind in ((NAN, np.float32), (INF, np.float32), (-INF, np.float64), (1e39, np.float64)):
        data = HU.astype(kind)
        data[0, 0, 0] = data[1, 2, 3] = value
        path = patched(tmp_path / "a.nii", data=data)
        for read in READERS:
            with refused(path, "2 voxels that are NaN or infinite", "xport"): read(path)


@needs_fork
def test_F06_fuzzed_headers_are_refused_or_read_rightly(tmp_path):
    "5,000 files, no more than 64 MB and not one warning: each is refused by our error or read as nibabel's parts read it."
    path, seen = tmp_path / "a.nii", dict(files=0, refused=0, read=0)

    def agrees(content, v, read):
        want, affine = plain_reading(content)
        near = np.allclose(v.data, np.maximum(want, AIR), rtol=1e-6, atol=1e-6) if read is read_image else np.abs(v.data - want).max() <= 1.001e-3
        return near and np.allclose(v.source.affine, affine)

    @settings(max_examples=5000, derandomize=True, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(files())
    def judge(content):
        path.write_bytes(content)
        seen["files"] += 1
        for read in READERS:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    v = read(path)
            except CTDiffusionError as e: assert e.path == str(path) and e.found and e.expected and e.do; seen["refused"] += 1
            else: assert agrees(content, v, read); seen["read"] += 1

    def all_of_them():
        judge()
        assert seen["files"] >= 5000 and min(seen["refused"], seen["read"]) > 1000, seen
    assert within(64 * MB, all_of_them)


# ------------------------------------------------------------------------------- F07-F16: one patient, image and label

def test_F07_shapes_differ(data, tmp_path, patient):
    for labels in (patient.labels[1:], patient.labels[:, :-2], patient.labels[..., :-1], np.concatenate([patient.labels] * 2, 2)):
        case = case_of(tmp_path, patient.hu, labels, patient.affine)
        the_error(read_case(case)[2], case.label, str(case.image), f"label of {labels.shape}", f"of {patient.hu.shape}", "Resample the label to the grid of the image with nearest neighbour")
    label = data / "labelsTr/amos_0002.nii.gz"
    v = nib.load(label)
    label.write_bytes(nifti_bytes(np.asanyarray(v.dataobj)[:-1], v.affine))
    with refused(data, str(label), str(data / "imagesTr/amos_0002.nii.gz"), "nearest neighbour"): prepare(data, tmp_path / "s", CONFIG)
    assert not (tmp_path / "s").exists(), "nobody is left out in silence"


def test_F08_affines_differ(tmp_path, patient):
    def moved(x): return patient.affine + np.outer([1, 0, 0, 0], [0, 0, 0, x])
    tolerance = 1e-3 * patient.spacing.min()
    for other in (moved(1e-6), moved(.9 * tolerance), patient.affine + 1e-6 * np.random.default_rng(0).standard_normal((4, 4)) * np.array([[1], [1], [1], [0]])):
        image, label, found = read_case(case_of(tmp_path, patient.hu, patient.labels, patient.affine, other))
        assert not found and (label.data == patient.labels).all()
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(.1), -np.sin(.1)], [np.sin(.1), np.cos(.1)]]
    for other in (moved(.1), moved(.3), moved(7), patient.affine @ np.diag([1, 1, 1.1, 1]), patient.affine @ np.diag([1.01, 1, 1, 1]), turn @ patient.affine):
        case = case_of(tmp_path, patient.hu, patient.labels, patient.affine, other)
        p = the_error(read_case(case)[2], case.label, str(case.image), "the same grid", "nearest neighbour")
        for matrix in (other, patient.affine): assert str(np.float32(matrix)[:3].astype(float).round(4).tolist()) in p.found
    hu, labels = (np.repeat(v, 60, 2) for v in body_and_disc((2, 2)))
    for grown, fine in ((1.0003, True), (1.0012, False)):  # 0.1 and 0.36 mm after 300 slices of 1 mm
        case = case_of(tmp_path, hu, labels, np.diag([2, 2, 1, 1]), np.diag([2, 2, grown, 1]))
        if fine: assert not read_case(case)[2]
        else: the_error(read_case(case)[2], case.label, "0.359 mm apart")
    for i, l in (("LPS", "SAR"), ("RAS", "LAS"), ("PIL", "RAS")):
        save_patient(patient, tmp_path / "i.nii.gz", tmp_path / "x.nii.gz", orientation=i)
        save_patient(patient, tmp_path / "y.nii.gz", tmp_path / "l.nii.gz", orientation=l)
        image, label, found = read_case(Case("c", tmp_path / "i.nii.gz", tmp_path / "l.nii.gz", "train"))
        assert (image.data == patient.hu).all() and (label.data == patient.labels).all()
        assert [(p.severity, p.found) for p in found] == [("note", f"stored as {l}")] and i in found[0].expected


ORDERS = ["".join(codes) for axes in itertools.permutations(["RL", "AP", "SI"]) for codes in itertools.product(*axes)]


def test_F09_all_48_orders_make_one_store(tmp_path, patient):
    stores, small = set(), phantom(seed=4, size=40)
    for codes in ORDERS:
        turn, folder = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes)), tmp_path / codes
        save_patient(small, folder / "images/p.nii.gz", folder / "labels/p.nii.gz", codes)
        s = prepare(folder, folder / "s", CONFIG)
        (c,) = s.cases
        stores.add((s.hash, content_hash(s.manifest), c["voxels"], c["sha256"], (s.path / "images.npy").read_bytes(), (s.path / "labels.npy").read_bytes()))
        assert c["axcodes"] == codes and len(s) == small.hu.shape[2] and s.labels.max() == AMOS.body
        for name, kind, read, values in (("images", np.int16, read_image, small.hu), ("labels", np.uint8, read_labels, small.labels)):
            stored, v = nib.load(folder / name / "p.nii.gz"), read(folder / name / "p.nii.gz")
            assert v.source.axcodes == codes and (v.data == values).all() and np.allclose(v.affine, small.affine, atol=1e-4)
            back = nib.load(write_volume(folder / f"{name}.nii", v.data, v.source, kind))
            assert (np.asanyarray(back.dataobj) == np.asanyarray(stored.dataobj)).all() and (back.affine == stored.affine).all() and back.shape == stored.shape
            assert (np.asanyarray(back.dataobj) == apply_orientation(values, turn)).all() and np.allclose(back.affine, small.affine @ inv_ornt_aff(turn, values.shape), atol=1e-3)
    assert len(ORDERS) == len(set(ORDERS)) == 48 and len(stores) == 1


def test_F10_mirrored_voxels(data, tmp_path, patient):
    two, three = (patient.labels == AMOS.id(f"kidney_{side}") for side in ("right", "left"))
    no_liver = np.where(np.isin(patient.labels, (AMOS.id("liver"), AMOS.id("spleen"))), 0, patient.labels)
    for hu, labels, word in ((patient.hu[::-1], patient.labels[::-1], "liver left of spleen"),
                             (patient.hu, np.where(two, 3, np.where(three, 2, patient.labels)).astype(np.uint8), "kidney_right left of kidney_left"), (patient.hu[::-1], no_liver[::-1], "kidney_right left of kidney_left")):
        case = case_of(tmp_path, hu, labels, patient.affine)
        the_error(read_case(case)[2], case.label, word, "patient's right", "situs inversus", "confirm with allow_mirrored")
        assert not errors(read_case(case, allow_mirrored=["c"])[2]) and errors(read_case(case, allow_mirrored=["another"])[2])
    half = np.where(np.isin(patient.labels, (AMOS.id("spleen"), AMOS.id("kidney_left"))), 0, patient.labels)
    for nothing_to_compare in (half, patient.labels * 0): assert not errors(read_case(case_of(tmp_path, patient.hu, nothing_to_compare, patient.affine))[2])
    case = case_of(tmp_path, patient.hu[::-1], half[::-1], patient.affine)
    the_error(read_case(case)[2], case.label, "liver left of adrenal_gland_left", "situs inversus", "confirm with allow_mirrored")
    case = case_of(tmp_path, patient.hu, patient.labels[::-1], patient.affine)
    the_error(read_case(case)[2], case.label, "labels beside their organs", "Flip the voxels of the label map left to right")
    for f in (data / "imagesTr/amos_0001.nii.gz", data / "labelsTr/amos_0001.nii.gz"):
        v = nib.load(f)
        f.write_bytes(nifti_bytes(np.flip(np.asanyarray(v.dataobj), nib.aff2axcodes(v.affine).index("R")), v.affine))
    with refused(data, "in 1 case", "liver left of spleen", "allow_mirrored"): prepare(data, tmp_path / "s", CONFIG)
    assert "amos_0001" in prepare(data, tmp_path / "s", replace(CONFIG, allow_mirrored=["amos_0001"])).splits["train"]


def test_F11_no_orientation(data, tmp_path):
    path = patched(tmp_path / "a.nii", (CODES, "<2h", 0, 0))
    assert nib.aff2axcodes(nib.load(path).affine) == tuple("LAS"), "what nibabel invents"
    for read, kind in ((read_image, HU), (read_labels, LABELS.astype(np.int16))):
        path = patched(tmp_path / "a.nii.gz", (CODES, "<2h", 0, 0), data=kind, gz=True)
        for wrong in (None, "", "R", "RA", "RAR", "XYZ", "ras", "RASP", "SSS"):
            with refused(path, "no orientation", "assume='RAS'"): read(path, assume=wrong)
        assert (read(path, assume="RAS").data == kind).all() and (read(path, assume="LPS").data == kind[::-1, ::-1]).all()
        v = read(path, assume="PSR")
        assert v.source.axcodes == "PSR" and v.data.shape == (6, 4, 5) and np.allclose(v.spacing, (5, .8, .9))
        assert (read(patched(tmp_path / "b.nii", data=kind), assume="RAS").data == kind[::-1]).all(), "a file that has an orientation keeps it"
    whole = prepare(data, tmp_path / "whole", CONFIG)
    assert whole.cases[0]["axcodes"] == "RAS"
    for f in (data / "imagesTr/amos_0001.nii.gz", data / "labelsTr/amos_0001.nii.gz"):
        raw = bytearray(gzip.decompress(f.read_bytes()))
        struct.pack_into("<2h", raw, CODES, 0, 0)
        f.write_bytes(gzip.compress(bytes(raw)))
    with refused(data, "in 1 case", "no orientation"): prepare(data, tmp_path / "s", CONFIG)
    s = prepare(data, tmp_path / "s", replace(CONFIG, assume="RAS"))
    assert [c["sha256"] for c in s.cases] == [c["sha256"] for c in whole.cases]


def test_F12_labels_are_rounded_never_cut(tmp_path):
    for kind in (np.float32, np.float64):
        for value in (2.9999999, 2.9995, 3.0009, 3.0000001):
            data = np.where(LABELS == 3, value, LABELS.astype(kind)).astype(kind)
            v = read_labels(patched(tmp_path / "a.nii", data=data))
            assert v.data.dtype == np.uint8 and (v.data == LABELS[::-1]).all()
            assert ("labels rounded to whole numbers" in v.notes) == (data != LABELS).any()
    n = int((LABELS == 3).sum())
    for value in (1.5, 2.5, 3.01, 2.99, -.2):
        path = patched(tmp_path / "a.nii", data=np.where(LABELS == 3, np.float32(value), LABELS))
        with refused(path, f"{np.float32(value):g} ({n} voxels)", "whole numbers", "nearest neighbour"): read_labels(path)
    path = patched(tmp_path / "a.nii", data=np.where(LABELS < 8, LABELS + np.float32(.25), LABELS))
    with refused(path) as e: read_labels(path)
    assert [w for w in e.value.found.replace("labels ", "").split(", ")] == [f"{k + .25:g} ({(LABELS == k).sum()} voxels)" for k in range(5)], "five values, each with its count"


def test_F12_scaled_labels(tmp_path):
    for slope, kind in ((.5, np.uint8), (1 / 256, np.uint16), (.0039, np.float32), (.001, np.int32)):
        stored = LABELS / np.float32(slope) if kind is np.float32 else np.rint(LABELS / slope)
        v = read_labels(patched(tmp_path / "a.nii", (SCALE, "<2f", slope, 0), data=stored.astype(kind)))
        assert (v.data == LABELS[::-1]).all(), slope
    path = patched(tmp_path / "b.nii", (SCALE, "<2f", .0039, 0), data=np.rint(LABELS / .0039).astype(np.uint16))  # 256 x 0.0039 = 0.9984
    with refused(path, f"0.9984 ({(LABELS == 1).sum()} voxels)"): read_labels(path)


def test_F13_strange_ids_and_nothing_labelled(data, tmp_path, patient):
    n = int((patient.labels == 3).sum())
    for value, found, expected in ((255, f"255 ({n} voxels)", "0 to 16 of the table 'amos'"), (-1, f"-1 ({n} voxels)", "0 to 16"), (17, f"17 ({n} voxels)", "0 to 16"), (16, f"label 16 ({n} voxels)", "organs only"), (300, f"300 ({n} voxels)", "0 to 16")):
        for kind in (np.int16, np.float32):
            case = case_of(tmp_path, patient.hu, np.where(patient.labels == 3, value, patient.labels.astype(int)).astype(kind), patient.affine)
            the_error(read_case(case)[2], case.label, found, expected)
    case = case_of(tmp_path, patient.hu, np.where(patient.labels == 3, 16, patient.labels).astype(np.uint8), patient.affine)
    assert (read_labels(case.label).data == 16).sum() == n, "a map for synthesis may hold the body"
    one, gaps = np.where(patient.labels == AMOS.id("liver"), patient.labels, 0), patient.labels.copy()
    gaps[..., 10:20] = gaps[..., 30:] = 0
    for labels, notes in ((one, []), (gaps, []), (patient.labels * 0, ["no organ labelled"])):
        image, label, found = read_case(case_of(tmp_path, patient.hu, labels, patient.affine))
        assert [(p.severity, p.found) for p in found] == [("note", w) for w in notes] and (label.data == labels).all()
        x, y = slices_of(image, label, CONFIG)
        assert len(x) == labels.shape[2] and set(np.unique(y)) <= {0, 16, *np.unique(labels)}
    v = nib.load(f := data / "labelsTr/amos_0003.nii.gz")
    f.write_bytes(nifti_bytes(np.zeros(v.shape, np.uint8), v.affine))
    assert ("amos_0003", "no organ labelled", "note") in {(p.case, p.found, p.severity) for p in prepare(data, tmp_path / "s", CONFIG).problems}


def test_F14_mri_among_ct(data, tmp_path, patient):
    for name in ("amos_0500", "amos_0600"):
        for f in ("images", "labels"): shutil.copy(data / f"{f}Tr/amos_0507.nii.gz", data / f"{f}Va/{name}.nii.gz")
    mri = ["amos_0500", "amos_0507", "amos_0600"]
    cases, problems = find_cases(data)
    assert len(cases) == 5 and not errors(problems) and sorted(p.case for p in problems) == mri and all("MRI" in p.found and p.path.endswith(f"{p.case}.nii.gz") for p in problems)
    s = prepare(data, tmp_path / "s", CONFIG)
    assert not {c["id"] for c in s.cases} & set(mri) and {p.case for p in s.problems if "MRI" in p.found} == set(mri)
    assert [r.id for r in read_split(s.path / "split.csv") if r.split == "out" and "MRI" in r.why] == mri
    assert {c.id for c in find_cases(data, labelled=False)[0]} == {c["id"] for c in s.cases}
    for hu in (np.abs(patient.hu + 1000.) * .3, np.random.default_rng(0).integers(0, 600, patient.hu.shape)):
        case = case_of(tmp_path, hu.astype(np.int16), patient.labels, patient.affine)
        the_error(read_case(case)[2], case.image, "no air, like MRI", "air near -1000 HU", "Leave the case out if it is MRI")
    image = data / "imagesTr/amos_0002.nii.gz"
    v = nib.load(image)
    image.write_bytes(nifti_bytes((np.abs(np.asanyarray(v.dataobj) + 1000.) * .3).astype(np.int16), v.affine))
    with refused(data, "in 1 case", str(image), "like MRI"): prepare(data, tmp_path / "t", CONFIG)


SPOILT = {  # what was done to the values: the word for it, and what is advised
    "intercept missing": (lambda x: x + 1024, "most tissue near", "HU after adding -1024"), "unsigned from -1000": (lambda x: (x + 1000).clip(0), "most tissue near", "intercept was lost"),
    "0 to 1": (lambda x: np.clip(x / 2000 + .5, 0, 1), "normalised", "original CT"), "-1 to 1": (lambda x: np.clip((x + 160) / 400, 0, 1) * 2 - 1, "normalised", "original CT"),
    "0 to 255": (lambda x: np.rint(255 * np.clip(x / 2000 + .5, 0, 1)), "grey levels", "original CT"), "a window in 0 to 255": (lambda x: np.rint(255 * np.clip((x + 160) / 400, 0, 1)), "grey levels", "original CT"),
    "windowed": (lambda x: np.clip(x, -160, 240), "windowed", "original CT"), "a wide window": (lambda x: np.clip(x, -500, 1300), "windowed", "original CT"),
    "intercept twice": (lambda x: x - 1024., "what is no air lies near", "intercept are wrong"), "slope 10": (lambda x: x * 10., "what is no air lies near", "Slope"),
}


def test_F15_hounsfield_units_lost(tmp_path, patient):
    for name, (spoil, found, do) in SPOILT.items():
        case = case_of(tmp_path, spoil(patient.hu.astype(np.float32)).astype(np.float32), patient.labels, patient.affine)
        the_error(read_case(case)[2], case.image, "values from", found, do, "air near -1000 HU, soft tissue near 40")
        assert prepare_case(case, CONFIG, AMOS, tmp_path)[0] is None and not list(tmp_path.glob("*.npy")), name


def test_F15_an_intercept_is_applied(data, tmp_path):
    "The same HU as unsigned numbers with an intercept make the same store; four more phantoms are accepted as they are."
    whole = prepare(data, tmp_path / "whole", CONFIG)
    for f in data.glob("images*/*"):
        v = nib.load(f)
        raw = bytearray(nifti_bytes((np.asanyarray(v.dataobj) + 1024).astype(np.uint16), v.affine, gz=False))
        struct.pack_into("<2f", raw, SCALE, 1, -1024)
        f.write_bytes(gzip.compress(bytes(raw), 1))
    s = prepare(data, tmp_path / "s", CONFIG)
    assert s.hash == whole.hash and not errors(s.problems)
    for seed in range(4):
        p = phantom(seed=seed, size=48)
        assert not errors(read_case(case_of(tmp_path, p.hu, p.labels, p.affine))[2]), p.info


def body_and_disc(spacing, radius=60.):
    "HU and label of a cylinder of soft tissue with a smaller one in it, around the middle of 180 x 160 mm: label 6 is a disc of `radius` mm."
    x, y = (np.arange(round(mm / s)) * s - mm / 2 for mm, s in zip((180, 160), spacing))
    r = np.hypot(*np.meshgrid(x, y, indexing="ij"))[..., None].repeat(5, 2)
    return np.where(r < 75, 40, -1000).astype(np.int16), np.where(r < radius, 6, 0).astype(np.uint8)


def test_F16_strange_spacing(tmp_path):
    for spacing in ((.7, .7, 5), (.7, 1.4, 5), (1.4, .7, .5), (2, 2.3, 12)):
        hu, labels = body_and_disc(spacing)
        case = case_of(tmp_path, hu, labels, np.diag([-spacing[0], spacing[1], spacing[2], 1]))
        image, label, found = read_case(case)
        assert [p.found for p in found] == [f"pixels of {spacing[0]} x {spacing[1]} mm, not square"] * (2 * (spacing[0] != spacing[1])) and not errors(found)
        assert np.allclose(image.spacing, spacing) and image.data.shape == hu.shape
        for size in (64, 200):
            e, _ = prepare_case(case, PrepareConfig(size=size), AMOS, tmp_path)
            pictures = np.load(tmp_path / "c.x.npy"), np.load(tmp_path / "c.y.npy")
            areas = [np.prod(e["pixel"]) * n for n in ((pictures[0] / pictures[0].max()).sum((1, 2)), (pictures[1] > 0).sum((1, 2)), (pictures[1] == 6).sum((1, 2)))]
            for area, radius in zip(areas, (75, 75, 60)): assert np.allclose(area, np.pi * radius**2, rtol=.025), (spacing, size)
        back = nib.load(write_volume(tmp_path / "back.nii.gz", image.data, image.source))
        assert np.allclose(back.header.get_zooms(), spacing) and (back.affine == nib.load(case.image).affine).all() and back.header.get_xyzt_units()[0] == "mm"
    hu, labels = body_and_disc((2, 2))
    for scale in ((.0007, .0007, .005), (700, 700, 5000), (.8, .8, 50), (.1, .8, 5), (.8, 12.5, 5), (.8, .8, .19)):
        case = case_of(tmp_path, hu, labels, np.diag([*scale, 1]))
        for read, path in ((read_image, case.image), (read_labels, case.label)):
            with refused(path, "spacing [", "0.2 to 12 mm along every axis", "Repair the header"): read(path)
        assert prepare_case(case, CONFIG, AMOS, tmp_path)[0] is None


# ----------------------------------------------------------------------------------------------- F17-F20: one folder

def test_F17_one_table_for_a_folder(data, tmp_path):
    "Five patients: 1 in the test as well, under another id and packed otherwise; 2 without label; 3 twice; 401 twice in one folder; a label of nobody. 402 and 3 are one scan in another axis order."
    def copy(a, b, change=lambda content: content):
        for f in ("images", "labels"): (data / f"{f}{b}").write_bytes(change((data / f"{f}{a}").read_bytes()))
    copy("Tr/amos_0001.nii.gz", "Va/amos_0411.nii", gzip.decompress)
    (data / "labelsTr/amos_0002.nii.gz").unlink()
    copy("Tr/amos_0003.nii.gz", "Va/amos_0003.nii.gz")
    copy("Va/amos_0401.nii.gz", "Va/amos_0401.nii", gzip.decompress)
    (data / "labelsTr/amos_0099.nii.gz").write_bytes(b"x")
    for f, read in (("images", read_image), ("labels", read_labels)):
        v = read(data / f"{f}Tr/amos_0001.nii.gz")
        (data / f"{f}Tr/amos_0005.nii.gz").write_bytes(nifti_bytes(np.flip(v.data, 1), v.affine @ np.array([[1, 0, 0, 0], [0, -1, 0, v.data.shape[1] - 1], [0, 0, 1, 0], [0, 0, 0, 1]])))
    with refused(data, "every patient once", "Mend the cases below") as e: prepare(data, tmp_path / "s", CONFIG)
    found = {(p.case, p.found) for p in errors(e.value.problems)}
    assert found == {("amos_0002", "an image without label"), ("amos_0002", "listed in dataset.json but missing"), ("amos_0099", "a label without image"), ("amos_0003", "one id in two folders"), ("amos_0003", "the same voxels as amos_0003 (train and val)"),
                     ("amos_0401", "the same case as amos_0401.nii"), ("amos_0411", "the same voxels as amos_0001 (train and val)")}
    assert ("amos_0005", "the same voxels as amos_0001 (train and train)", "note") in {(p.case, p.found, p.severity) for p in e.value.problems}
    assert all(p.path and p.expected and p.do for p in errors(e.value.problems)) and not (tmp_path / "s").exists()
    with (tmp_path / "problems.csv").open() as f: assert {(r["case"], r["found"]) for r in csv.DictReader(f) if r["severity"] == "error"} == found


def test_F17_a_scan_on_both_sides_of_a_split_file(data, tmp_path):
    for f in ("images", "labels"): shutil.copy(data / f"{f}Tr/amos_0001.nii.gz", data / f"{f}Tr/amos_0004.nii.gz")
    assert prepare(data, tmp_path / "s", CONFIG).splits["train"] == [f"amos_000{k}" for k in range(1, 5)], "twice in one split: a note"
    (tmp_path / "mine.csv").write_text("id,split\namos_0001,train\namos_0004,test\n")
    with refused(data, "amos_0004", "the same voxels as amos_0001 (train and val)", "nobody may be trained on and tested with"): prepare(data, tmp_path / "t", CONFIG, split_file=tmp_path / "mine.csv")


NAMES = ("../../x", "/etc/x", "a\nb", "con<img src=x onerror=alert(1)>", "l" * 300, "$(touch P)", "`touch P`", "; touch P", "-rf", "..", "a/../../x", "=cmd|' /c touch P'!A0", "a b", "a\0b", "ünï", "")


@pytest.fixture
def nothing_outside(tmp_path, monkeypatch):
    "The test may write below tmp_path/in; whatever else appears there or in the working folder fails it."
    inner, outer = tmp_path / "in", tmp_path / "work"
    for d in (inner, outer): d.mkdir()
    monkeypatch.chdir(outer)
    yield inner
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "work"] and not list(outer.iterdir()) and not list(tmp_path.rglob("P"))
    assert not Path("/etc/x").exists() and not (tmp_path.parent / "x").exists() and not (tmp_path.parent.parent / "x").exists()


def test_F18_hostile_case_names(original, nothing_outside):
    root, rule = nothing_outside, "1 to 64 letters, digits, '.', '_' or '-', not '..'"
    shutil.copytree(original, root / "data")
    good = prepare(original, root / "good", CONFIG)
    before, manifest = sorted(root.rglob("*")), (good.path / "manifest.json").read_text()
    for name in NAMES:
        with refused("file.csv", rule): check_case_id(name, "file.csv")
        with refused("i.nii", rule): prepare_case(Case(name, Path("i.nii"), None, "train"), CONFIG, AMOS, root)
        for wrong in (dict(exclude=(name,)), dict(allow_mirrored=(name,)), dict(split=((name, "train"),))):
            with refused("PrepareConfig", rule): PrepareConfig(**wrong)
        with refused(root / "split.csv", rule): write_split(root / "split.csv", [SplitRow("amos_0001", "train"), SplitRow(name, "out")])
        assert sorted(root.rglob("*")) == before
        with (root / "split.csv").open("w", newline="", encoding="utf-8") as f: csv.writer(f).writerows([["id", "split"], ["amos_0001", "train"], [name, "out"]])
        with refused(root / "split.csv", "line 3", rule): read_split(root / "split.csv")
        (root / "split.csv").unlink()
        m = good.manifest | dict(cases=[good.cases[0] | dict(id=name), *good.cases[1:]])
        (good.path / "manifest.json").write_text(json.dumps(m | dict(hash=content_hash(m))))
        with refused(good.path / "manifest.json", rule): open_store(good.path)
        (good.path / "manifest.json").write_text(manifest)
    for name in ("../x", "/etc/x", "a/../../x", "..", "a/b/../../../x"):
        with refused(root.parent, "leaves", "a path inside that folder") if name != "/etc/x" else refused("/etc/x", "leaves"): inside(root, name)
    assert sorted(root.rglob("*")) == before


def hostile_files(folder, content=b""):
    "Files of those names, as far as a file system takes them."
    folder.mkdir(parents=True)
    made = [n for n in NAMES if n and not set(n) & set("/\0") and len(n) < 240 and n != ".."]
    for n in made: (folder / f"{n}.nii.gz").write_bytes(content)
    (folder / f"{'l' * 200}.nii.gz").write_bytes(content)
    return [*made, "l" * 200]


def test_F18_a_folder_of_hostile_names(original, nothing_outside):
    root = nothing_outside
    names = [hostile_files(root / "data" / f) for f in ("imagesTr", "labelsTr")][0]
    for f in ("imagesVa", "labelsVa"): shutil.copytree(original / f, root / "data" / f)
    cases, problems = find_cases(root / "data")
    assert {c.id for c in cases} == {"amos_0401", "amos_0402"} and len(errors(problems)) == 2 * len(names) and all("1 to 64 letters" in p.expected for p in errors(problems))
    with refused(root / "data", f"in {len(names)} cases", "1 to 64 letters", "Rename the file"): prepare(root / "data", root / "s", CONFIG)
    assert "<img" not in problems_table(problems) and problems_table(problems).count("\n") == len(problems) + 1
    with (root / "problems.csv").open(newline="", encoding="utf-8") as f: rows = list(csv.reader(f))
    assert len(rows) == len(problems) + 1 and not [cell for row in rows for cell in row if cell[:1] in ("=", "+", "-", "@")]
    (root / "p.csv").write_bytes(b"")
    written = write_problems(root / "p.csv", [replace(problems[0], case=n, found=n, do=n) for n in NAMES])
    with written.open(newline="", encoding="utf-8") as f: assert not [cell for row in csv.reader(f) for cell in row if cell[:1] in ("=", "+", "-", "@")]
    assert sorted(p.name for p in root.iterdir()) == ["data", "p.csv", "problems.csv"] or sorted(p.name for p in root.iterdir()) == [".s.lock", "data", "p.csv", "problems.csv"]


def test_F18_synthesis_under_hostile_names(nothing_outside):
    "A folder of label maps is refused by rule. A case's name alone is the seed of its noise and no path: whatever it is, one volume is written where it was asked for."
    from ctdiffusion.models.variants import ModelConfig, build
    from ctdiffusion.synthesis.processes import SynthesisError, SynthesizeJob, synthesize_job
    from ctdiffusion.synthesis.synthesis import Model, synthesize
    root, config = nothing_outside, ModelConfig(variant="mask", size=16, channels=8, mult=(1,), blocks=1, attention=(), groups=4, T=20)
    model = Model(build(config).eval().requires_grad_(False), config, AMOS, 40.0, 400.0, "ddim5", "tiny", "0" * 64)
    for name in hostile_files(root / "labels"):
        one = root / "one"
        one.mkdir()
        (root / "labels" / f"{name}.nii.gz").rename(one / f"{name}.nii.gz")
        with pytest.raises(SynthesisError) as error: synthesize_job(SynthesizeJob(str(one), str(root / "ct"), model="mask-demo", device="cpu"), lambda line: None)
        problem, = error.value.problems
        only_a_name = name in ("a b", "ünï")  # there the empty file is what is wrong
        assert ("Rename the file" in problem.do) != only_a_name, name
        shutil.rmtree(one)
    label = root / "map.nii.gz"
    label.write_bytes(nifti_bytes(np.full((16, 16, 2), AMOS.body, np.uint8), AFFINE))
    (root / "ct").mkdir()
    made = {synthesize(model, label, root / "ct/out.nii.gz", case=name).read_bytes() for name in NAMES}
    assert len(made) == len(NAMES) and sorted(p.name for p in (root / "ct").iterdir()) == ["organs.ctbl", "organs.label.txt", "out.json", "out.nii.gz"]


def content(store): return {f.name: f.read_bytes() for f in sorted(store.iterdir())}


def beside(store): return sorted(f.name.replace(store.name, "X", 1) for f in store.parent.iterdir() if store.name in f.name)


@needs_fork
def test_F20_a_killed_preparation_is_never_picked_up(original, tmp_path):
    (tmp_path / "a").mkdir()
    clean, since = prepare(original, tmp_path / "a/clean", CONFIG), time.perf_counter()
    prepare(original, tmp_path / "a/timed", CONFIG)
    full, target, hits, seed, torn = time.perf_counter() - since, tmp_path / "k", 0, 0, 0

    def look():
        nonlocal torn
        if target.exists(): assert content(target) == content(clean.path)
        torn += any(f.name.startswith(".k.tmp") for f in tmp_path.iterdir())

    while hits < 10:
        hits += killed_at_random(lambda: prepare(original, target, CONFIG), 10 - hits, full, seed := seed + 1, look)
        assert content(target) == content(clean.path) and beside(target) == beside(clean.path)
        shutil.rmtree(target)
    assert torn > 2, "some were killed at work"


def killing(after):
    "os.replace that kills its process when it has put something where `after` says."
    real = os.replace

    def replace(a, b):
        real(a, b)
        if after(Path(b)): os.kill(os.getpid(), signal.SIGKILL)
    return replace


@needs_fork
def test_F20_a_killed_rebuild_leaves_the_old_store_or_the_new_one(original, tmp_path, monkeypatch):
    "At 10 random moments, then between the two renames and after them; and what a killed run has left goes with the next call, whatever it is."
    (tmp_path / "a").mkdir()
    other, target = replace(CONFIG, level=50), tmp_path / "s"
    clean = {c: content(prepare(original, tmp_path / f"a/{c.level}", c).path) for c in (CONFIG, other)}
    prepare(original, target, other)

    def rebuild(): prepare(original, target, CONFIG, rebuild=True)
    def whole(): return not target.exists() or content(target) in clean.values()
    since = time.perf_counter()
    rebuild()
    full, hits, seed = time.perf_counter() - since, 0, 0
    while hits < 10:
        hits += killed_at_random(rebuild, 10 - hits, full, seed := seed + 1, lambda: whole() or pytest.fail("half a store"))
        assert content(target) == clean[CONFIG] and beside(target) == beside(tmp_path / "a/40")
    for where, left in ((".s.old", other), ("s", CONFIG)):
        file = (prepare(original, target, other, rebuild=True).path / "images.npy").stat().st_mtime_ns
        with monkeypatch.context() as m:
            m.setattr(os, "replace", killing(lambda b: b == tmp_path / where))
            assert ended(forked(rebuild)) == -signal.SIGKILL
        assert (tmp_path / ".s.old").exists() and target.exists() == (left is CONFIG)
        assert prepare(original, target, left).config == left and ((target / "images.npy").stat().st_mtime_ns == file) == (left is other), "found, not made again"
        assert content(target) == clean[left] and beside(target) == beside(tmp_path / "a/40")


def below(pid):
    "Processes that `pid` has started."
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pids): return [p for p in pids if Path(f"/proc/{p}/stat").exists() and Path(f"/proc/{p}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"]


@pytest.mark.skipif(not Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").exists(), reason="needs Linux's list of children")
def test_F20_workers_leave_with_a_killed_parent(original, tmp_path):
    "They would wait for ever, and write what they still hold into the next preparation's folder."
    clean = prepare(original, tmp_path / "clean", CONFIG)
    parent = forked(lambda: prepare(original, tmp_path / "s", CONFIG, processes=2))
    until, workers = time.monotonic() + 60, []
    while len(workers) < 3 and time.monotonic() < until: workers = below(parent); time.sleep(.02)  # two, and Python's keeper of resources
    while not list(tmp_path.glob(".s.tmp*/*.npy")) and time.monotonic() < until: time.sleep(.005)
    os.kill(parent, signal.SIGKILL)
    assert ended(parent) == -signal.SIGKILL and len(workers) == 3
    try:
        until = time.monotonic() + 20
        while alive(workers) and time.monotonic() < until: time.sleep(.05)
        assert not alive(workers)
    finally:
        for p in alive(workers): os.kill(p, signal.SIGKILL)
    s = prepare(original, tmp_path / "s", CONFIG)
    assert content(s.path) == content(clean.path) and beside(s.path) == beside(clean.path)


@needs_fork
def test_F20_two_runs_never_share_a_folder(original, tmp_path, monkeypatch):
    "So what a worker of a killed run still writes comes into nobody's store."
    def noting(folder, target):
        (tmp_path / f"folder-{os.getpid()}").write_text(folder.name)
        commit(folder, target)
    commit = store_module._commit
    monkeypatch.setattr(store_module, "_commit", noting)
    for _ in range(2): assert ended(forked(lambda: prepare(original, tmp_path / "s", CONFIG, rebuild=True))) == 0
    assert len({f.read_text() for f in tmp_path.glob("folder-*")}) == 2


def test_F20_a_stale_store_is_refused_and_rebuilt(data, tmp_path, monkeypatch):
    s = prepare(data, tmp_path / "s", CONFIG)
    for changes in (dict(level=50.), dict(width=300.), dict(size=48), dict(body_radius=3.), dict(body_threshold=-400.), dict(every=4), dict(held_out=1), dict(exclude=("amos_0001",)), dict(max_voxels=10**7)):
        (name, value), = changes.items()
        with refused(s.path, f"{name}={getattr(CONFIG, name)!r} (now {value!r})", "Prepare again with rebuild=True"): prepare(data, s.path, replace(CONFIG, **changes))
        assert content(s.path) == content(open_store(s.path, CONFIG).path)
    for f in data.rglob("*.nii.gz"): os.utime(f)
    assert prepare(data, s.path, CONFIG).hash == s.hash, "new dates alone change nothing"
    with monkeypatch.context() as m:
        m.setattr("ctdiffusion.data.store.VERSION", 2)
        with refused(s.path, "version 1", "rebuild=True"): prepare(data, s.path, CONFIG)
    p = phantom(seed=99, size=48)
    save_patient(p, data / "imagesTr/amos_0002.nii.gz", data / "labelsTr/amos_0002.nii.gz")
    with refused(s.path, "amos_0002", "has changed", "rebuild=True"): prepare(data, s.path, CONFIG)
    assert prepare(data, s.path, CONFIG, rebuild=True).hash != s.hash
    for f in ("images", "labels"): (data / f"{f}Va/amos_0402.nii.gz").unlink()
    (data / "dataset.json").unlink()
    with refused(s.path, "other cases: amos_0402", "rebuild=True"): prepare(data, s.path, CONFIG)
    assert prepare(data, s.path, replace(CONFIG, size=48), rebuild=True).images.shape[1:] == (48, 48)


def test_F20_damaged_stores_are_refused(original, tmp_path):
    s = prepare(original, tmp_path / "s", CONFIG)
    manifest = (s.path / "manifest.json").read_text()
    for text in ("", "{}", "[]", "null", "7", manifest[:-50], manifest.replace('"split": "val"', '"split": "train"', 1), manifest.replace('"version": 1', '"version": 0')):
        (s.path / "manifest.json").write_text(text)
        with refused(s.path, "rebuild=True"): open_store(s.path)
    (s.path / "manifest.json").write_text(manifest)
    for name in ("images", "labels"):
        whole = (path := s.path / f"{name}.npy").read_bytes()
        for cut in (0, 100, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:cut])
            for verify in (True, False):
                with refused(s.path, f"{name}.npy of {cut:,} bytes", f"{len(whole):,}", "rebuild=True"): open_store(s.path, verify=verify)
        path.unlink()
        with refused(s.path, f"{name}.npy of 0 bytes"): open_store(s.path)
        path.write_bytes(whole)
    assert open_store(s.path).hash == s.hash
    with refused(tmp_path / "none", "no manifest.json", "Run prepare first"): open_store(tmp_path / "none")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("precious")
    with refused(tmp_path / "mine", "no store", "another folder"): prepare(original, tmp_path / "mine", CONFIG, rebuild=True)
    assert (tmp_path / "mine/thesis.txt").read_text() == "precious"


def test_F20_one_flipped_bit_in_a_store_is_found(original, tmp_path):
    "200 random bits of the slices, each of them found and its patient named; every bit of the two headers, found or without effect. A training and an evaluation open their store so."
    s, rng = prepare(original, tmp_path / "s", CONFIG), random.Random(0)
    for name in ("images", "labels"):
        path = s.path / f"{name}.npy"
        whole, values = path.read_bytes(), np.load(path)
        for bit in (*range(0, 8 * 128, 3), *(rng.randrange(8 * 128, 8 * len(whole)) for _ in range(100))):
            with path.open("r+b") as f: f.seek(bit // 8); f.write(bytes([whole[bit // 8] ^ 1 << bit % 8]))
            if bit < 8 * 128 and not Store(s.path).damaged(): assert (np.load(path) == values).all() and np.load(path).dtype == np.uint8
            else:
                with refused(s.path, "damaged slices of amos_", "rebuild=True") as e: open_store(s.path)
                if bit >= 8 * 128: assert e.value.found == f"damaged slices of {s.case_of((bit // 8 - 128) // 32**2)['id']}"
            with path.open("r+b") as f: f.seek(bit // 8); f.write(whole[bit // 8:bit // 8 + 1])
    assert not s.damaged()
    with (s.path / "labels.npy").open("r+b") as f: f.seek(5000); f.write(b"\xff")
    with refused(s.path, "damaged slices of amos_0001"): prepare(original, s.path, CONFIG)
    assert content(prepare(original, s.path, CONFIG, rebuild=True).path) == content(prepare(original, tmp_path / "t", CONFIG).path)


def test_F20_trainings_and_evaluations_verify_their_store(original, tmp_path, monkeypatch):
    "Each of the ways in looks at the checksums once; helpers of a process that has looked do not."
    from ctdiffusion.evaluation import evaluation
    from ctdiffusion.synthesis import processes
    s = prepare(original, tmp_path / "run/store", replace(CONFIG, size=64))
    with (s.path / "images.npy").open("r+b") as f: f.seek(5000); f.write(b"\xff")
    with refused(s.path, "damaged slices"): open_store(s.path)
    job = processes.TrainJob(run_dir=str(tmp_path / "run"))
    for given in (job, replace(job, data_root=str(original))):
        with refused(s.path, "damaged slices"): processes.prepared(given, processes.beginning(job)[1], None)
    with refused(s.path, "damaged slices"): processes.main(["train", "-p", "run_dir", str(tmp_path / "run")])
    monkeypatch.setattr(processes, "train_job", lambda job, store: store.hash)
    monkeypatch.setattr(processes, "leave_with_parent", lambda run: None)
    monkeypatch.setenv("CTDIFFUSION_CHILD", "1")
    processes.main(["train", "-p", "run_dir", str(tmp_path / "run")])
    monkeypatch.setattr(evaluation, "kept_steps", lambda run_dir, milestones: [1])
    (tmp_path / "run/run.json").touch()
    with refused(s.path, "damaged slices"): evaluation.open_job(evaluation.EvaluateJob(run_dir=str(tmp_path / "run")))

"Part A of the fault table: data that come in."
import csv
import gzip
import hashlib
import itertools
import os
import random
import shutil
import signal
import struct
import threading
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
from hypothesis import HealthCheck, given, settings
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform

from bounds import MB, within
from fuzz import files, plain_reading
from nifti import AFFINE, CODES, DIM, DTYPE, HU, LABELS, OFFSET, PIXDIM, SCALE, SROW, patched
from rows import refused

from ctdiffusion.data.cases import Case, check_case_id, find_cases, inside, problems_table, read_case, write_problems
from ctdiffusion.data.labels import AMOS, CTDiffusionError
from ctdiffusion.data.phantom import make_dataset, phantom, save_patient
from ctdiffusion.data.preparation import PrepareConfig, SplitRow, prepare_case, read_split, slices_of, split_rows, write_split
from ctdiffusion.data.store import PrepareError, Store, content_hash, open_store, prepare
from ctdiffusion.data.volumes import AIR, nifti_bytes, read_image, read_labels, sha256_file, write_volume

VOLUMES, CASES, PREPARATION, STORE = (f"ctdiffusion/data/{m}.py" for m in ("volumes", "cases", "preparation", "store"))
guard = pytest.mark.guard
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
CONFIG = PrepareConfig(size=32)
READERS = (read_image, read_labels)


@pytest.fixture(scope="module")
def original(tmp_path_factory): return make_dataset(tmp_path_factory.mktemp("data") / "amos", train=3, val=2, size=48)


@pytest.fixture
def data(original, tmp_path): return Path(shutil.copytree(original, tmp_path / "amos"))


@pytest.fixture(scope="module")
def patient(): return phantom(seed=11, size=48)


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
@guard(VOLUMES, "if on_disk * DEFLATE_RATIO >= header.size: return header", "return header")
@guard(VOLUMES, "if (n := shape[0] * shape[1] * shape[2]) > max_voxels:", "if (n := 0):")
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
                start = time.process_time()
                with refused(path, word): read(path)
                assert time.process_time() - start < .05
    assert within(50 * MB, read_all)


@needs_fork
@guard(VOLUMES, "if (n := shape[0] * shape[1] * shape[2]) > max_voxels:", "if (n := 0):")
@guard(VOLUMES, "if header and len(data) > header.size + 2**24:", "if False:")
def test_F02_bombs_are_not_inflated(tmp_path):
    "Two gigabytes of zeros in two megabytes, once under a header that admits them and once under one that does not: some 16 MB are looked at."
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
    assert within(64 * MB, read_both)


def test_F02_the_limit_can_be_raised(tmp_path):
    path = tmp_path / "large.nii.gz"
    path.write_bytes(nifti_bytes(np.zeros((256, 256, 128), np.int16), AFFINE))
    assert path.stat().st_size < 2**17
    with refused(path, "8,388,608 voxels", "Raise max_voxels"): read_image(path, max_voxels=2**20)
    assert read_image(path, max_voxels=2**23).data.shape == (256, 256, 128)
    with pytest.raises(CTDiffusionError, match="PrepareConfig.max_voxels"): PrepareConfig(max_voxels=0)


@guard(VOLUMES, "if not cut and len(data) >= header.size: return", "if len(data) >= header.size: return")
@guard(VOLUMES, "    if cut and len(data) < 348: raise", "    if False: raise")
def test_F03_half_a_file_says_how_much_is_there(tmp_path):
    raw = nifti_bytes(noisy((60, 50, 40)), AFFINE, gz=False)
    for name, whole in (("a.nii", raw), ("a.nii.gz", gzip.compress(raw, 6))):
        path = tmp_path / name
        for cut in (0, *(int(len(whole) * share) for share in (.0005, .01, .02, .3, .5, .9, .99)), 348, 352, len(whole) - 10, len(whole) - 4, len(whole) - 1):
            path.write_bytes(part := whole[:cut])
            with refused(path, *(["holds", " of ", "robably an interrupted download"] if cut else ["an empty file", "again"])) as e: read_image(path)
            if not cut: continue
            there, promised = (int(w.replace(",", "")) for w in e.value.found.split() if w[0].isdigit())
            inside = len(part) if whole is raw else len(zlib.decompressobj(31).decompress(part))
            assert promised == (len(raw) if inside >= 540 else 348) and 0 <= inside - there <= 258  # a decoder may wait with its last word


@guard(CASES, "except CTDiffusionError as e: return problems.append(as_problem(case.id, e))", "except CTDiffusionError: raise")
def test_F03_the_other_cases_go_on(data, tmp_path):
    halves = data / "imagesTr/amos_0001.nii.gz", data / "labelsVa/amos_0402.nii.gz"
    for f in halves: f.write_bytes(f.read_bytes()[:f.stat().st_size // 2])
    with refused(data, "in 2 cases", *map(str, halves)) as e: prepare(data, tmp_path / "s", CONFIG)
    assert {(p.case, p.path) for p in errors(e.value.problems)} == {("amos_0001", str(halves[0])), ("amos_0402", str(halves[1]))}
    assert all("interrupted download" in p.do for p in errors(e.value.problems)) and not (tmp_path / "s").exists()
    with (tmp_path / "s_problems.csv").open() as f: assert [r["case"] for r in csv.DictReader(f) if r["severity"] == "error"] == ["amos_0001", "amos_0402"]
    assert prepare(data, tmp_path / "s", replace(CONFIG, exclude=("amos_0001", "amos_0402"))).splits == {"train": ["amos_0002", "amos_0003"], "val": ["amos_0401"]}


@guard(VOLUMES, "    except IsalError as e: raise damaged(e) from e", "    except IsalError: return")
def test_F04_no_flipped_bit_in_gzip_is_silent(tmp_path):
    "Every bit of gzip's own header and of its checksum, 50 anywhere in one file and 200 over ten. What no reader looks at, the date of packing, is all that may flip."
    rng, path, quiet = random.Random(0), tmp_path / "a.nii.gz", {8 * 3, *range(8 * 4, 8 * 10)}  # FTEXT, MTIME, XFL and OS

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


@guard(PREPARATION, "if want and want != found:", "if False:")
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


@guard(VOLUMES, 'if not head: return "an empty file"', 'if not head: return "nothing"')
@guard(VOLUMES, 'if head[128:132] == b"DICM"', "if False")
@guard(VOLUMES, "text = bytes(head).lstrip().lower()", "text = b''")
def test_F05_not_a_volume(tmp_path):
    for what, (content, found, do) in FOREIGN.items():
        for name, packed in (("a.nii.gz", False), ("a.nii", False), ("z.nii.gz", True)):
            (path := tmp_path / name).write_bytes(gzip.compress(content) if packed else content)
            for read in READERS:
                with refused(path, found, do): read(path)
    for missing in (tmp_path / "missing.nii.gz", tmp_path):
        with refused(missing, "no such file"): read_image(missing)


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


@guard(VOLUMES, 'lambda h: (h["dim"][1:4] > 0).all()', 'lambda h: True')
@guard(VOLUMES, 'lambda h: h["datatype"] in _DTYPES', 'lambda h: True')
@guard(VOLUMES, 'lambda h: h.sizeof_hdr <= h["vox_offset"] < 2**24 and h["vox_offset"] % 1 == 0', 'lambda h: True')
@guard(VOLUMES, 'if not np.isfinite(affine).all():', "if False:")
@guard(VOLUMES, "if abs(np.linalg.det(affine[:3, :3] / spacing)) < 0.1:", "if False:")
@pytest.mark.filterwarnings("error")
def test_F06_impossible_headers_are_refused(tmp_path):
    for name, patches in BROKEN.items():
        for gz in (False, True):
            path = patched(tmp_path / f"a{name}.nii{'.gz' * gz}", *patches, data=HU.astype(np.int32) if "without end" in name else HU, gz=gz)
            for read in READERS:
                with refused(path): read(path)


@guard(VOLUMES, '(h["dim"][4:h["dim"][0] + 1] == 1).all()', 'h["dim"][0] == 3')
@guard(VOLUMES, "all(x == 0 or np.isnan(x) for x in (", "all(x == 0 for x in (")
@pytest.mark.filterwarnings("error")
def test_F06_harmless_oddities_are_read_rightly(tmp_path):
    for name, patches in READ.items():
        v = read_image(patched(tmp_path / "a.nii", *patches))
        assert (v.data == HU[::-1]).all() and v.data.shape == (4, 5, 6) and np.allclose(v.spacing, (.8, .9, 5)) and np.allclose(v.source.affine, AFFINE, atol=1e-5), name


@guard(VOLUMES, "if not (top := np.abs(x).max()) <= (most := np.finfo(np.float32).max):", "top, most = np.abs(x).max(), np.inf\n    if False:")
@pytest.mark.filterwarnings("error")
def test_F06_no_voxel_may_be_nan(tmp_path):
    for value, kind in ((NAN, np.float32), (INF, np.float32), (-INF, np.float64), (1e39, np.float64)):
        data = HU.astype(kind)
        data[0, 0, 0] = data[1, 2, 3] = value
        path = patched(tmp_path / "a.nii", data=data)
        for read in READERS:
            with refused(path, "2 voxels that are NaN or infinite", "xport"): read(path)


@needs_fork
@guard(VOLUMES, '    with np.errstate(over="ignore"): spacing =', "    spacing =")
@guard(VOLUMES, "if not (top := np.abs(x).max()) <= (most := np.finfo(np.float32).max):", "top, most = np.abs(x).max(), np.inf\n    if False:")
@guard(VOLUMES, "    if not cut and len(data) >= header.size: return", "    if not cut: return")
def test_F06_fuzzed_headers_are_refused_or_read_rightly(tmp_path):
    "5,000 files, no more than 64 MB and not one warning: each is refused by our error or read as nibabel's parts read it."
    path, seen = tmp_path / "a.nii", dict(files=0, refused=0, read=0)

    def agrees(content, v, read):
        want, affine = plain_reading(content)
        near = np.allclose(v.data, np.maximum(want, AIR), rtol=1e-6, atol=1e-6) if read is read_image else np.abs(v.data - want).max() <= 1.001e-3
        return near and np.allclose(v.source.affine, affine)

    @settings(max_examples=5000, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
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

"""Split files, and what the number of slices says about the paper's 50 patients."""
import csv, json, shutil
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import combinations
from math import comb
from pathlib import Path
import numpy as np
import papermill as pm
import pytest
from ctdiffusion.data.labels import CTDiffusionError
from ctdiffusion.data.phantom import make_dataset, phantom, save_patient
from ctdiffusion.data.preparation import PrepareConfig, broken, choose, left_out, read_split, split_pairs, write_split
from ctdiffusion.data.splits import SEEDS, candidates, chance, figures, figures_table, how_many, one_of_them, organs_of, properties, rows_for, verdict, ways_by_sum
from ctdiffusion.data.store import PrepareError, Store, open_store, prepare

CONFIG = PrepareConfig(size=32)


@pytest.fixture(scope="module")
def data(tmp_path_factory): return make_dataset(tmp_path_factory.mktemp("data") / "amos", train=3, val=2, size=48)


@pytest.fixture(scope="module")
def store(data, tmp_path_factory): return prepare(data, tmp_path_factory.mktemp("stores") / "s", CONFIG)


def write(path, text):
    path.write_text(text)
    return path


# split files

def test_every_store_says_who_is_in_it(data, store):
    rows = {r.id: r for r in read_split(store.path / "split.csv", data)}
    assert [(r.id, r.split) for r in rows.values() if r.split != "out"] == [(c["id"], c["split"]) for c in store.cases]
    for c in store.cases: assert (rows[c["id"]].slices, rows[c["id"]].image, rows[c["id"]].label) == (str(c["slices"]), c["image"]["sha256"], c["label"]["sha256"])
    assert rows["amos_0507"].split == "out" and "MRI" in rows["amos_0507"].why


def test_reasons_for_everybody_who_is_left_out(data, tmp_path):
    s = prepare(data, tmp_path / "s", replace(CONFIG, held_out=1, exclude=("amos_0002",)))
    why = {r.id: r.why for r in read_split(s.path / "split.csv") if r.split == "out"}
    assert why == {"amos_0507": "an MRI scan (AMOS id 500 or more)", "amos_0002": "excluded by parameter", "amos_0402": "not one of the first 1 held out"}


def test_the_same_patients_make_the_same_store(data, store, tmp_path):
    twin = prepare(data, tmp_path / "twin", CONFIG, split_file=store.path / "split.csv")
    assert twin.hash == store.hash and twin.splits == store.splits
    for name in ("images.npy", "labels.npy", "split.csv"): assert (twin.path / name).read_bytes() == (store.path / name).read_bytes()
    assert prepare(data, store.path, CONFIG, split_file=twin.path / "split.csv").hash == store.hash
    assert prepare(data, twin.path, CONFIG).hash == twin.hash, "a training that names no split takes the store as it is"


def test_other_patients_make_another_store(data, store, tmp_path):
    mine = write(tmp_path / "mine.csv", "id,split,why\namos_0401,train,\namos_0002,train,\namos_0001,test,younger than 20\namos_0003,out,moved\n")
    s = prepare(data, tmp_path / "s", CONFIG, split_file=mine)
    assert s.splits == {"train": ["amos_0002", "amos_0401"], "val": ["amos_0001"]} and s.hash != store.hash
    why = {r.id: r.why for r in read_split(s.path / "split.csv")}
    assert why == {"amos_0401": "", "amos_0002": "", "amos_0001": "younger than 20", "amos_0003": "moved", "amos_0402": "not named by the split", "amos_0507": "an MRI scan (AMOS id 500 or more)"}
    assert open_store(s.path).hash == s.hash and prepare(data, s.path, CONFIG, split_file=mine).hash == s.hash
    with pytest.raises(CTDiffusionError, match="another split .4 patients.*rebuild=True"): prepare(data, s.path, CONFIG, split_file=store.path / "split.csv")
    assert prepare(data, s.path, CONFIG, split_file=store.path / "split.csv", rebuild=True).hash == store.hash


def test_order_of_lines_and_of_pairs_means_nothing(data, tmp_path):
    rows = read_split(write(tmp_path / "a.csv", "id,split\namos_0401,val\namos_0001,train\n"), data)
    a, b = (PrepareConfig(split=split_pairs(r)) for r in (rows, rows[::-1]))
    assert a == b and [c.id for c in choose(data, a)[0]] == ["amos_0001", "amos_0401"]


def test_exclude_goes_before_the_split(data, tmp_path):
    pairs = (("amos_0001", "train"), ("amos_0002", "train"), ("amos_0401", "val"))
    s = prepare(data, tmp_path / "s", replace(CONFIG, split=pairs, exclude=("amos_0002",)))
    assert s.splits == {"train": ["amos_0001"], "val": ["amos_0401"]} and left_out(data, s.config)["amos_0002"] == "excluded by parameter"
    assert prepare(data, s.path, replace(CONFIG, split=pairs, exclude=("amos_0002",))).hash == s.hash


def test_checksums_tell_other_files(data, store, tmp_path):
    rows = read_split(store.path / "split.csv")
    other = write_split(tmp_path / "other.csv", [replace(r, image="0" * 64) if r.id == "amos_0402" else replace(r, slices="7") if r.id == "amos_0001" else r for r in rows])
    for target in (tmp_path / "new", store.path):
        with pytest.raises(PrepareError, match="in 2 cases") as e: prepare(data, target, CONFIG, split_file=other)
        found = {p.case: p for p in e.value.problems if p.severity == "error"}
        assert found["amos_0402"].expected == "0" * 16 and found["amos_0402"].found.startswith("image ") and found["amos_0402"].path == f"{other}, line 6"
        assert found["amos_0001"].expected == "7" and "empty the cell" in found["amos_0001"].do
    assert not (tmp_path / "new").exists() and not broken(rows, store.cases, "x")


HEX = "a" * 64
BAD = {  # text, line, found, expected
    "id,split\namos_0001,train\namos_0009,val\n": (3, "amos_0009", "the id of a labelled CT"),
    "id,split\namos_0001,train\n\namos_0001,train\n": (4, "amos_0001 in train, and in train in line 2", "every patient once"),
    "id,split\namos_0001,train\namos_0002,train\namos_0001,val\n": (4, "amos_0001 in val, and in train in line 2", "every patient once"),
    "id,split\namos_0001,train\namos_0001,out\n": (3, "amos_0001 in out, and in train", "every patient once"),
    "id,split\namos_0001,train\namos_0507,val\n": (3, "amos_0507, an MRI scan", "CT"),
    "id\namos_0001\n": (1, "columns ['id']", "split, once"),
    "amos_0001,train\n": (1, "columns ['amos_0001', 'train']", "id and split, once"),
    "id;split\namos_0001;train\n": (1, "columns ['id;split']", "id and split, once"),
    "id,split,split\namos_0001,train,val\n": (1, "columns", "split, once"),
    "": (1, "columns []", "id and split, once"),
    "id,split\namos_0001,train,extra\n": (2, "3 cells", "2, as in line 1"),
    "id,split\namos_0001,training\n": (2, "split 'training'", "train, val or out"),
    "id,split\namos_0001,\n": (2, "split ''", "train, val or out"),
    "id,split\n../x,train\n": (2, "case name '../x'", "1 to 64 letters"),
    "id,split\n=cmd|x,train\n": (2, "case name '=cmd|x'", "1 to 64 letters"),
    "id,split,slices\namos_0001,train,4.5\n": (2, "slices '4.5'", "a whole number or nothing"),
    "id,split,image\namos_0001,train,abc\n": (2, "image 'abc'", "a sha256 or nothing"),
    f"id,split,label\namos_0001,train,{HEX.upper()}\n": (2, "label 'AAAA", "a sha256 or nothing"),
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_line_is_named(data, tmp_path, text):
    line, found, expected = BAD[text]
    with pytest.raises(CTDiffusionError) as e: read_split(write(tmp_path / "bad.csv", text), data)
    assert e.value.path == f"{tmp_path / 'bad.csv'}, line {line}" and e.value.found.startswith(found) and expected in e.value.expected and e.value.do
    with pytest.raises(CTDiffusionError): prepare(data, tmp_path / "s", CONFIG, split_file=tmp_path / "bad.csv")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("text, word", [(b"id,split\namos_0001,out\n", "nobody in train or val"), (b"\xff\xfe\x00", "UnicodeDecodeError"), (b'id,split\n"amos_0001,train\n', "Error"), (b"id,split\na," + b"x" * 200_000, "Error")])
def test_what_is_no_split_file(data, tmp_path, text, word):
    (tmp_path / "bad.csv").write_bytes(text)
    with pytest.raises(CTDiffusionError) as e: read_split(tmp_path / "bad.csv", data)
    assert word in e.value.found and str(tmp_path / "bad.csv") in e.value.path
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(CTDiffusionError, match="not readable"): read_split(path)


def test_what_a_spreadsheet_does_is_understood(data, tmp_path):
    (tmp_path / "s.csv").write_bytes(b"\xef\xbb\xbfcomment,id , split\r\n\"a, b\", amos_0001 ,train\r\n,amos_0507,out\r\n,,\r\n")
    assert [(r.id, r.split, r.line) for r in read_split(tmp_path / "s.csv", data)] == [("amos_0001", "train", 2), ("amos_0507", "out", 3)]


@pytest.mark.parametrize("wrong", [dict(split=(("a", "out"),)), dict(split=(("a", "train"), ("a", "val"))), dict(split=(("a", "train"),), labels="none")])
def test_a_split_that_cannot_be(wrong):
    with pytest.raises(CTDiffusionError, match="PrepareConfig.split"): PrepareConfig(**wrong)


def test_unknown_patients_are_refused_without_a_file(data):
    with pytest.raises(CTDiffusionError, match="PrepareConfig.split.*amos_0009"): choose(data, PrepareConfig(split=(("amos_0009", "train"),)))


# stores made before there were split files

OLD_FIELDS = {"size", "level", "width", "body_threshold", "body_radius", "labels", "every", "held_out", "exclude", "allow_mirrored", "assume", "max_voxels"}


def test_a_manifest_without_the_field_stays_valid(data, store, tmp_path):
    manifest = json.loads((store.path / "manifest.json").read_text())
    assert set(manifest["config"]) == OLD_FIELDS, "a store made without a split file is written as ever"
    shutil.copytree(store.path, tmp_path / "old")
    (tmp_path / "old/split.csv").unlink()
    old = open_store(tmp_path / "old", CONFIG)
    assert old.hash == store.hash and old.config.split == () and prepare(data, old.path, CONFIG).hash == store.hash


def test_the_hash_is_the_one_of_before(store):
    """The formula of the first stores, written out: version, config, table, and what is kept of every case."""
    import hashlib
    m, h = store.manifest, hashlib.sha256()
    for part in (m["version"], m["config"], m["table"], [[c[k] for k in ("id", "split", "start", "stop", "sha256")] for c in m["cases"]]): h.update(json.dumps(part, sort_keys=True).encode())
    assert h.hexdigest() == store.hash


# counting

def brute(counts, n): return Counter(sum(counts[i] for i in ids) for ids in combinations(sorted(counts), n))


@pytest.mark.parametrize("seed", range(6))
def test_counts_agree_with_trying_all(seed):
    rng = np.random.default_rng(seed)
    counts = {f"p{i}": int(c) for i, c in enumerate(rng.integers(1, 25, rng.integers(1, 12)))}
    for n in range(len(counts) + 1):
        tried = brute(counts, n)
        assert ways_by_sum(counts, n) == [tried[s] for s in range(max(tried) + 1)]
        for s in range(-2, sum(counts.values()) + 3): assert how_many(counts, n, s) == tried[s]
        s = max(tried)
        assert chance(counts, n, s) == float(Fraction(tried[s], comb(len(counts), n)))


def test_numbers_beyond_any_word():
    assert how_many({f"{i:03}": 7 for i in range(200)}, 100, 700) == comb(200, 100)
    assert how_many({f"{i:03}": np.int64(2**i) for i in range(12)}, 6, 63) == 1


@pytest.mark.parametrize("counts, n", [({"a": 0}, 1), ({"a": -3}, 1), ({"a": 2.5}, 1), ({"a": "7"}, 1), ({"a": True}, 1), ({"a": 5}, 2), ({"a": 5}, -1)])
def test_what_is_no_count_is_refused(counts, n):
    for f in (how_many, one_of_them, candidates):
        with pytest.raises(CTDiffusionError): f(counts, n, 5, *((0,) if f is one_of_them else ()))


def test_every_choice_is_equally_likely():
    counts, draws = {f"p{i}": c for i, c in enumerate([1, 2, 3, 4, 5, 5, 6, 8])}, 4000
    fit = [ids for ids in combinations(sorted(counts), 4) if sum(counts[i] for i in ids) == 17]
    seen = Counter(one_of_them(counts, 4, 17, seed) for seed in range(draws))
    assert set(seen) == set(fit) and len(fit) == how_many(counts, 4, 17) > 5
    chi2 = sum((seen[ids] - draws / len(fit))**2 / (draws / len(fit)) for ids in fit)
    assert chi2 < len(fit) - 1 + 4 * (2 * (len(fit) - 1))**.5


def test_a_draw_can_be_repeated_for_ever():
    counts = {f"p{i:02}": 3 + i % 7 for i in range(30)}
    assert one_of_them(counts, 10, 60, 5) == one_of_them(dict(reversed(counts.items())), 10, 60, 5)
    drawn = ["".join(one_of_them({"a": 1, "b": 1, "c": 2, "d": 2}, 2, 3, seed)) for seed in range(6)]
    assert drawn == ["ac", "bd", "ad", "ad", "bd", "bc"], "the draws of these seeds, once and for all"
    assert len({one_of_them(counts, 10, 60, s) for s in range(20)}) > 15


def test_a_total_that_cannot_be():
    with pytest.raises(CTDiffusionError) as e: one_of_them({"a": 10, "b": 20, "c": 40}, 2, 51, 0)
    assert "51 slices, which no 2 of 3" in e.value.found and e.value.expected.startswith("50")


# rules

def test_rules_by_hand():
    counts = {f"amos_{i:04}": 100 + i for i in range(1, 9)}
    by = {c.name: c for c in candidates(counts, 4, 410)}
    assert by["the first 4 by id"].ids == tuple(sorted(counts))[:4] and (by["the first 4 by id"].slices, by["the first 4 by id"].off) == (410, 0)
    assert by["the last 4 by id"].slices == 105 + 106 + 107 + 108
    assert by["the middle 4 by id"].slices == 103 + 104 + 105 + 106
    assert by["one in 2 by id, from number 1"].slices == 101 + 103 + 105 + 107 and by["one in 2 by id, from number 2"].off == 10
    assert by.keys().isdisjoint({"all with odd numbers", "the 4 with the fewest slices"}), "the same patients are listed once"
    assert all(c.off == c.slices - 410 and len(c.ids) == 4 == len(set(c.ids)) for c in by.values())


def test_random_rules_are_the_generators_own():
    import random
    counts = {f"p{i:02}": 1 + i for i in range(20)}
    ids, by = sorted(counts), {c.name: set(c.ids) for c in candidates(counts, 10, 100)}
    for seed in SEEDS:
        random.seed(seed)
        assert by[f"random.sample, seed {seed}"] == set(random.sample(ids, 10))
        np.random.seed(seed)
        assert by[f"RandomState.permutation, seed {seed}, first 10"] == {ids[k] for k in np.random.permutation(20)[:10]}


def test_groups_and_verdicts():
    counts = {f"p{i:02}": 10 + i * i for i in range(1, 21)}
    some = [f"p{i:02}" for i in (2, 3, 5, 7, 11, 13, 17, 19)]
    def search(n, total): return candidates(counts, n, total, {"thin slices": some, "one only": {"p01"}, "everybody": set(counts)})
    by = {c.name: c for c in search(6, 500)}
    assert by["the first 6 of those with thin slices"].ids == tuple(some[:6]) and by["the last 6 of those with thin slices"].ids == tuple(some[2:])
    assert not any("one only" in n or "everybody" in n for n in by)
    total = by["the first 6 by id"].slices
    assert verdict(search(6, total), counts, 6, total).endswith("Hit by: the first 6 by id.") and "rules chance alone would let" in verdict(search(6, total), counts, 6, total)
    near = by["the middle 6 by id"].slices
    missed = next(t for t in range(near - 1, 0, -1) if how_many(counts, 6, t) and all(c.off for c in search(6, t)))
    assert "None hits. Nearest: " in verdict(search(6, missed), counts, 6, missed)
    assert "No choice of 6 among 20 patients has 9,999 slices" in verdict(search(6, 9999), counts, 6, 9999)
    everybody = sum(counts.values())
    assert verdict(search(20, everybody - 11), counts, 20, everybody - 11) == f"There is one choice: all 20, with {everybody:,} slices, 11 too many."
    assert verdict(search(20, everybody), counts, 20, everybody).endswith("as asked for.")


def test_a_choice_becomes_a_store(data, tmp_path):
    train, held = dict(amos_0001=45, amos_0002=64, amos_0003=54), {c.id: 1 for c in choose(data, CONFIG)[0] if c.split == "val"}
    rows = read_split(write_split(tmp_path / "r.csv", [replace(r, slices="") for r in rows_for(train, held, ["amos_0402"], "ours, not the paper's")]), data)
    s = prepare(data, tmp_path / "s", CONFIG, split_file=tmp_path / "r.csv")
    assert s.splits == {"train": sorted(train), "val": ["amos_0402"]}
    why = {r.id: r.why for r in read_split(s.path / "split.csv")}
    assert why["amos_0402"] == "ours, not the paper's" and why["amos_0401"] == "not chosen: ours, not the paper's" and len(rows) == 5
    with pytest.raises(CTDiffusionError, match="amos_0001"): rows_for(train, held, ["amos_0001"], "x")


# figures

def test_figures_and_properties(store):
    organs = organs_of(store)
    for c in store.cases: assert organs[c["id"]] == set(np.unique(store.labels[c["start"]:c["stop"]]).tolist())
    rows = {r[:2]: r[2:] for r in figures(store, organs)}
    assert rows["slices", "train"] == (f"{len(store.rows('train')):,}", "26,069", "§3") and rows["patients", "val"][:2] == ("2", "50")
    assert rows["patients with liver", "train"][0] == "3" and rows["side of a slice", "all"][:2] == ("32", "256")
    low, mid, high = map(float, rows["HU inside the body: 5, 50, 95 %", "train"][0].split(", "))
    x = store.images[store.rows("train")][store.labels[store.rows("train")] > 0]
    assert -160 <= low <= mid <= high <= 240 and abs(mid - (np.median(x) / 255 * 400 - 160)) < 1
    assert {r[3] for r in figures(store, organs, applies=False)} == {""}
    assert "26,069" in figures_table(figures(store, organs)) and "not stated" in figures_table(figures(store, organs))
    sets = properties(store, organs)
    assert sum(len(v) for k, v in sets.items() if k.endswith("mm apart")) == len(store.cases) == len(sets["48x48 pixels"])


def test_images_without_labels_have_figures(data, tmp_path):
    s = prepare(data, tmp_path / "s", replace(CONFIG, labels="none"))
    assert {r[1] for r in figures(s, organs_of(s), False)} == {"unlabelled", "all"}
    assert (tmp_path / "s/split.csv").read_text().count("unlabelled") == len(s.cases)


# the job

JOB = Path(__file__).parents[1] / "nbs" / "prepare.ipynb"


def run(tmp_path, monkeypatch, **parameters):
    monkeypatch.delenv("MPLBACKEND", raising=False)
    pm.execute_notebook(str(JOB), str(tmp_path / "out.ipynb"), parameters=dict(run_dir=str(tmp_path / "run"), size=16) | parameters, progress_bar=False, cwd=str(tmp_path))
    return (tmp_path / "out.ipynb").read_text()


def test_the_job_searches_where_there_is_a_choice(tmp_path, monkeypatch):
    root, p = tmp_path / "amos", phantom(seed=3, size=48)
    for k in range(1, 54):
        split = "Tr" if k < 2 else "Va"
        for f in ("images", "labels"): (root / f"{f}{split}").mkdir(parents=True, exist_ok=True)
        q = replace(p, hu=p.hu[:, :, 20:30 + k % 5].copy(), labels=p.labels[:, :, 20:30 + k % 5])
        q.hu[0, :, 0] = -900 - k
        save_patient(q, root / f"images{split}/amos_{k:04}.nii.gz", root / f"labels{split}/amos_{k:04}.nii.gz")
    page = run(tmp_path, monkeypatch, data_root=str(root), held_out=0, allow_mirrored=",".join(f"amos_{k:04}" for k in range(1, 54)))
    assert "the paper has 200 with 26,069" in page and "has 6,559 slices: other patients, or other slices. Nearest rule" in page and "the first 50 by id" in page
    rows = read_split(tmp_path / "run/split-first50.csv", root)
    assert Counter(r.split for r in rows) == dict(train=1, val=50, out=2) and {r.why for r in rows if r.split == "val"} == {"the first 50 by id; ours, the paper names nobody"}


def test_the_job_with_a_split_file(data, tmp_path, monkeypatch):
    mine = write(tmp_path / "mine.csv", "id,split\namos_0001,train\namos_0402,val\n")
    page = run(tmp_path, monkeypatch, data_root=str(data), split_file=str(mine))
    s = Store(tmp_path / "run/store")
    assert s.splits == {"train": ["amos_0001"], "val": ["amos_0402"]} and "split.csv" in page and "No search: a split file has chosen" in page
    with open(tmp_path / "run/figures.csv") as f: assert ["patients", "train", "1", "200", "§3"] in list(csv.reader(f))
    with pytest.raises(pm.PapermillExecutionError, match="made with a split file"): run(tmp_path, monkeypatch, data_root=str(data))


def test_the_drawn_patients_are_not_compared(tmp_path, monkeypatch):
    page = run(tmp_path, monkeypatch)
    assert "the paper's figures do not apply to them" in page and "does not apply" in page and "No search" in page
    assert (tmp_path / "run/store/split.csv").exists() and not list((tmp_path / "run").glob("split-*.csv"))

"Part A of the fault table, F19: dataset.json and zip archives that somebody else wrote."
import json
import os
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from forks import ended, forked
from rows import refused

from ctdiffusion.data.cases import find_cases
from ctdiffusion.data.foreign import unpack

# the spelling of the release: "licence", "arota"; and a name outside of ASCII
AMOS22 = dict(name="AMOS", licence="CC-BY-SA 4.0", author="Médecins", labels={"0": "background", "8": "arota", "9": "postcava"}, numTraining=1,
              training=[dict(image="./imagesTr/amos_0001.nii.gz", label="./labelsTr/amos_0001.nii.gz")], test=["./imagesTs/amos_0002.nii.gz"])
HOSTILE = {  # what is in the file -> what its problem says
    '{"training": [{"image": "/etc/passwd", "label": "/etc/shadow"}]}': "'/etc/passwd' leaves",
    '{"training": [{"image": "../../x", "label": "imagesTr/../../y"}]}': "'../../x' leaves",
    '{"training": [{"image": 3, "label": null}]}': "training: [{'image': 3",
    '{"training": 7}': "training: 7",
    '{"validation": ["x"]}': "validation: ['x']",
    '{"training": [{"image": "a\\u0000b", "label": "c"}]}': "a path that is none",
    '{"training": [], "numTraining": NaN}': "NaN",
    '{"training": [], "numTraining": 1e999}': "1e999",
    '{"training": [], "numTraining": ' + "9" * 5000 + "}": "5,000 digits",
    '{"training": [], "training": [{"image": "x", "label": "y"}]}': "a key twice",
    "[" * 100_000: "nested too deeply",
    "[1]": "a list",
    "{": "no JSON",
}


@pytest.fixture
def data(tmp_path) -> Path:
    "A data folder of one patient, with nothing around it; find_cases looks at names only."
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / "data" / folder).mkdir(parents=True)
        (tmp_path / "data" / folder / "amos_0001.nii.gz").touch()
    return tmp_path / "data"


def around(folder: Path) -> set: return {p for p in folder.parent.rglob("*") if not p.is_relative_to(folder)}


def megabytes(work) -> int:
    "What a piece of work adds to the memory of a child; it ends the child if it raises."
    def child():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        work()
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024
    return ended(forked(child))


@pytest.mark.parametrize("text", HOSTILE, ids=[f"{i:02}" for i in range(len(HOSTILE))])
def test_F19_dataset_json(data, text):
    "One problem, an error, that names the file, the reason and what to do; the cases are found all the same."
    (data / "dataset.json").write_text(text)
    cases, (problem,) = find_cases(data)
    assert [c.id for c in cases] == ["amos_0001"] and problem.severity == "error"
    assert problem.path == str(data / "dataset.json") and HOSTILE[text] in problem.found and problem.expected and "Download dataset.json again" in problem.do


def test_F19_dataset_json_of_200_megabytes(data):
    with open(data / "dataset.json", "wb") as f: f.truncate(200 * 2**20)
    def work():
        (problem,) = find_cases(data)[1]
        assert problem.found == "209,715,200 bytes" and "8,388,608" in problem.expected
    assert megabytes(work) == 0


def test_F19_the_real_dataset_json_is_accepted(data):
    "Misspelt keys of the release do no harm, nor does the language of the computer: ASCII, where Python is asked for it."
    (data / "dataset.json").write_text(json.dumps(AMOS22, ensure_ascii=False), encoding="utf-8")
    assert find_cases(data)[1] == []
    ascii = os.environ | dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONPATH=str(Path(__file__).parents[2]))
    code = f"import locale; assert 'UTF' not in locale.getpreferredencoding().upper(); from ctdiffusion.data.cases import find_cases; print(find_cases({str(data)!r})[1])"
    done = subprocess.run([sys.executable, "-c", code], env=ascii, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
    (data / "imagesTr/amos_0001.nii.gz").unlink()
    (data / "labelsTr/amos_0001.nii.gz").unlink()
    assert {p.found for p in find_cases(data)[1]} == {"listed in dataset.json but missing"}


# ------------------------------------------------------------------------------------------------------- zip archives

def member(name: str, mode: int = 0, **attributes) -> zipfile.ZipInfo:
    m = zipfile.ZipInfo("placeholder")
    m.filename = name  # past the constructor, which tidies
    m.external_attr = mode << 16
    for key, value in attributes.items(): setattr(m, key, value)
    return m


def zipped(path: Path, members, compression=zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as z:
        for name, content in members: z.writestr(name, content, compression)
    return path


def secret(path: Path) -> None:
    "Set the flag of encryption in the directory of an archive."
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\1\2") + 8] |= 1
    path.write_bytes(data)


EVIL = {
    "climbs": ([("../OWNED", "x")], "climbs"), "climbs later": ([("good", "x"), ("a/../../OWNED", "x")], "climbs"), "backslash": ([("..\\OWNED", "x")], "climbs"),
    "absolute": ([("/tmp/OWNED", "x")], "absolute"), "drive": ([("C:/OWNED", "x")], "absolute"), "control": ([("a\nb", "x")], "control characters"),
    "link": ([(member("out", 0o120777), ".."), ("out/OWNED", "x")], "a link or device"), "device": ([(member("zero", 0o020666), "")], "a link or device"),
    "bomb": ([("zeros", bytes(30 * 2**20))], "bytes out of"), "bombs": ([(f"{n}", bytes(2**20)) for n in range(30)], "bytes out of"),
    "twice": ([("a/b", "1"), ("a/b", "2")], "twice"), "capitals": ([("a/b", "1"), ("A/B", "2")], "twice"), "below a file": ([("a", "1"), ("a/b", "2")], "twice"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("what", EVIL)
def test_F19_evil_archive(tmp_path, what):
    "Members are checked before the first is written: nothing outside of the folder, nothing in it, no memory taken."
    members, reason = EVIL[what]
    archive, folder = zipped(tmp_path / "evil.zip", members), tmp_path / "deep" / "er" / "data"
    folder.mkdir(parents=True)
    before = around(folder)
    def work():
        with refused(archive, reason): unpack(archive, folder)
    assert megabytes(work) == 0
    assert around(folder) == before and not list(folder.iterdir()) and not Path("/tmp/OWNED").exists()


def test_F19_archive_into_a_folder_that_is_not_empty(tmp_path, monkeypatch):
    "A link that is there already, a full disk, a password, somebody's own file, a damaged member; and no archive at all."
    archive, folder = zipped(tmp_path / "a.zip", [("sub/x", "new")]), tmp_path / "data"
    folder.mkdir()
    (folder / "sub").symlink_to(tmp_path)
    with refused(folder / "sub/x", "a link that leads out"): unpack(archive, folder)
    assert not (tmp_path / "x").exists()
    (folder / "sub").unlink()
    with monkeypatch.context() as m:
        m.setattr("shutil.disk_usage", lambda path: type("Usage", (), dict(free=2)))
        with refused(archive, "2 free"): unpack(archive, folder)
    with refused(secret(zipped(tmp_path / "s.zip", [("x", "y")])) or tmp_path / "s.zip", "encrypted"): unpack(tmp_path / "s.zip", folder)
    assert not list(folder.iterdir())
    (folder / "sub").mkdir()
    (folder / "sub/x").write_text("mine")
    with refused(folder / "sub/x", "another file of that name"): unpack(archive, folder)
    assert (folder / "sub/x").read_text() == "mine"
    flipped = zipped(tmp_path / "f.zip", [("first", "a" * 99), ("second", "b" * 99)], zipfile.ZIP_STORED)
    data = bytearray(flipped.read_bytes())
    data[data.index(b"bbb")] ^= 1
    flipped.write_bytes(data)
    with refused(flipped, "'second' damaged"): unpack(flipped, tmp_path / "half")
    assert [p.name for p in (tmp_path / "half").iterdir()] == ["first"]
    for content in (b"", b"<html>", archive.read_bytes()[:-9]):
        (tmp_path / "no.zip").write_bytes(content)
        with refused(tmp_path / "no.zip", "no whole zip archive"): unpack(tmp_path / "no.zip", folder)
    with refused(tmp_path / "missing.zip", "no file"): unpack(tmp_path / "missing.zip", folder)


def test_F19_unpacking_can_be_repeated(tmp_path):
    "What is whole is kept, what is missing is written; permissions are those of the umask."
    archive = zipped(tmp_path / "a.zip", [(member("amos22/", 0o040755), ""), (member("amos22/run.sh", 0o104777), "#!/bin/sh"), ("amos22/imagesTr/amos_0001.nii.gz", os.urandom(999))])
    files = unpack(archive, tmp_path / "data")
    assert [f.relative_to(tmp_path / "data").as_posix() for f in files] == ["amos22/run.sh", "amos22/imagesTr/amos_0001.nii.gz"]
    assert not files[0].stat().st_mode & 0o7111
    at = files[0].stat().st_mtime_ns
    files[1].unlink()
    assert unpack(archive, tmp_path / "data") == files and files[0].stat().st_mtime_ns == at and files[1].stat().st_size == 999

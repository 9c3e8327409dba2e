"Part C of the fault table, F32 to F34: checkpoints and weights of somebody else's."
import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import struct
import tarfile
import zipfile
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import ended, forked
from rows import refused
from safetensors import safe_open
from safetensors.torch import save, save_file

from ctdiffusion.data.foreign import import_pt, read_tensors
from ctdiffusion.data.labels import AMOS, CTDiffusionError
from ctdiffusion.data.volumes import sha256_file
from ctdiffusion.evaluation.segmenter import SegmenterConfig, load_segmenter, network
from ctdiffusion.models.spade import load_vgg
from ctdiffusion.models.variants import ModelConfig, TrainConfig, build
from ctdiffusion.synthesis.synthesis import export, exported, load, synthesize_slices
from ctdiffusion.training.folder import claim_run, config_hash
from ctdiffusion.training.runs import FORMAT, read_checkpoint, write_checkpoint
from ctdiffusion.training.step import first_weights
from ctdiffusion.training.trainer import train

TINY = ModelConfig("mask", size=16, channels=4, mult=(1, 2), blocks=1, attention=(8,), groups=4, encoder_blocks=1, T=20)
STORY = json.loads(json.dumps(dict(variant="mask", seed=0, init="scratch", model=TINY.to_dict(), train=TrainConfig(sampler="ddim5", milestones=()).to_dict(),
                                   data=dict(hash="0" * 64, table=AMOS.to_json(), level=40.0, width=400.0), notes={})))


def edited(story: dict, *keys: str, to: object) -> dict:
    "A copy of nested dicts and lists with one leaf exchanged."
    story = deepcopy(story)
    at = story
    for k in keys[:-1]: at = at[k]
    at[keys[-1]] = to
    return story


def change(path: Path, *keys: str, to: object, careful: bool = False) -> None:
    "Edit a run.json; a careful forger gives it the right checksum, too."
    run = edited(json.loads(path.read_text()), *keys, to=to)
    if careful: run["config"] = config_hash({k: run[k] for k in STORY})
    path.write_text(json.dumps(run))


def seal(path: Path) -> None:
    "Give a checkpoint that was exchanged the papers of an honest one."
    side = path.with_suffix(".json")
    side.write_text(json.dumps(json.loads(side.read_text()) | dict(bytes=path.stat().st_size, sha256=sha256_file(path))))


@pytest.fixture
def run(tmp_path) -> Path:
    "A run folder with one checkpoint, as a training leaves it."
    net = build(TINY)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for p in net.parameters(): torch.nn.init.normal_(p, std=0.05)
    (tmp_path / "run").mkdir()
    about = claim_run(tmp_path / "run", STORY, {})
    write_checkpoint(tmp_path / "run", 10, dict(model=net.state_dict(), ema={k: v.clone() for k, v in net.state_dict().items()}), dict(config=about["config"], **STORY))
    return tmp_path / "run"


@pytest.fixture
def checkpoint(run) -> Path: return run / "checkpoints/step_00000010.safetensors"


# ---------------------------------------------------------------------------------------- F32: of something else

EDITS = {  # key that the message must name: what is edited, and to what
    "model.variant='edge'": (("model", "variant"), "edge"), "model.classes=5": (("model", "classes"), 5), "model.size=32": (("model", "size"), 32),
    "data.table.name='mine'": (("data", "table", "name"), "mine"), "data.table.classes=": (("data", "table", "classes", 6, "name"), "heart"), "data.level=50.0": (("data", "level"), 50.0),
}


@pytest.mark.parametrize("careful", [False, True], ids=["edited", "forged"])
@pytest.mark.parametrize("key", EDITS)
def test_F32_another_run_json(run, tmp_path, key, careful):
    "Beside a checkpoint and beside exported weights: refused, with the keys that differ, also where its own checksum was forged."
    keys, value = EDITS[key]
    folder = export(run, tmp_path / "exported")
    for where, enter in ((run, load), (folder, load), (folder, exported), (run, lambda r: export(r, tmp_path / "again"))):
        whole = (where / "run.json").read_text()
        change(where / "run.json", *keys, to=value, careful=careful)
        with refused(where / "run.json", key): enter(where)
        (where / "run.json").write_text(whole)
        enter(where)


def test_F32_newer_format_and_unknown_sampler(run, tmp_path):
    folder = export(run, tmp_path / "exported")
    for where in (run, folder):
        whole = (where / "run.json").read_text()
        for keys, value, *words in ((("format",), FORMAT + 1, f"format {FORMAT + 1}", "Update ctdiffusion"), (("train", "sampler"), "guess", "guess"), (("train", "sampler"), 7, "run.json"),
                                    (("train", "guidance"), "much", "guidance"), (("data", "width"), None, "width"), (("model", "chanels"), 8, "model.chanels=8"), (("model", "T"), "20", "model.T='20'")):
            change(where / "run.json", *keys, to=value, careful=True)
            with pytest.raises(CTDiffusionError) as e: load(where)
            assert str(where / "run.json") in str(e.value) and all(w in str(e.value) for w in words), str(e.value)
            (where / "run.json").write_text(whole)
        (where / "run.json").write_text("{")
        with refused(where / "run.json", "no JSON"): load(where)
        (where / "run.json").write_text(whole)
        load(where)


def test_F32_another_checkpoint(run, checkpoint):
    "The papers of a checkpoint are forged as well: its story is held against run.json, its format against ours."
    with safe_open(checkpoint, "pt") as f: meta, tensors = json.loads(f.metadata()["ctdiffusion"]), {k: f.get_tensor(k) for k in f.keys()}
    def forge(meta):
        save_file(tensors, checkpoint, {} if meta is None else dict(ctdiffusion=json.dumps(meta)))
        seal(checkpoint)
    for keys, value, word in ((("model", "variant"), "edge", "model.variant='mask' (but 'edge')"), (("model", "classes"), 5, "model.classes=17 (but 5)"), (("model", "size"), 32, "model.size=16 (but 32)"),
                              (("data", "table", "name"), "mine", "data.table.name='amos' (but 'mine')"), (("config",), "f" * 16, "config=")):
        forge(edited(meta, *keys, to=value))
        with refused(run / "run.json", word): load(run)
    forge(edited(meta, "format", to=FORMAT + 1))
    for enter in (lambda: load(run), lambda: read_checkpoint(checkpoint), lambda: first_weights(TINY, 0, run)):
        with refused(checkpoint, f"format {FORMAT + 1}", "Update ctdiffusion"): enter()
    for nonsense in (None, edited(meta, "format", to="1"), {k: v for k, v in meta.items() if k != "step"}):
        forge(nonsense)
        with refused(checkpoint, "format" if nonsense is None or "step" in nonsense else "step"): load(run)
    forge(meta)
    assert load(run, "cpu").config == TINY


def test_F32_another_network(run, tmp_path):
    "Weights of another variant or size as a start, or beside a run.json that tells their story in full: the tensors are named."
    for other in (replace(TINY, variant="edge"), replace(TINY, channels=8), replace(TINY, classes=5)):
        with pytest.raises(CTDiffusionError, match="tensors of another network: .*weight"): first_weights(other, 0, run)
    folder = export(run, tmp_path / "exported")
    weights = read_tensors(folder / "weights.safetensors")[0]
    save_file(weights, folder / "weights.safetensors")  # as exported by older versions: without their story
    change(folder / "run.json", "sha256", to=sha256_file(folder / "weights.safetensors"))
    load(folder)
    change(folder / "run.json", "model", "size", to=32)
    with refused(folder / "run.json", "checksum"): load(folder)
    change(folder / "run.json", "model", "channels", to=8, careful=True)
    with refused(folder, "tensors of another network", "weight"): load(folder)


@pytest.mark.parametrize("key", ["variant", "seed", "model.size", "model.mult", "train.lr", "data.hash"])
def test_F32_a_run_goes_on_as_it_began(run, key):
    "Training, too: whoever comes with another configuration is told the keys, and run.json stays."
    keys = key.split(".")
    whole = (run / "run.json").read_bytes()
    now = edited(STORY, *keys, to={"variant": "edge", "seed": 1, "size": 32, "mult": [1, 4], "lr": 1e-5, "hash": "f"}[keys[-1]])
    with refused(run / "run.json", f"{key}=", "(now "): claim_run(run, now, {})
    assert config_hash(now) != config_hash(STORY) and (run / "run.json").read_bytes() == whole


def test_F32_training_refuses_another_run(tmp_path):
    "The command itself, and a checkpoint that was put into the folder of another run."
    from test_trainer import CONFIG, MODEL, STORE
    short = replace(CONFIG, max_steps=2, grid_every=10, milestones=())
    go = lambda where, model=MODEL, config=short, **options: train(model, config, STORE, where, say=None, val_every=0, device="cpu", **options)
    there = go(tmp_path / "there").run_dir
    for key, change in {"model.variant='mask' (now 'edge')": dict(model=replace(MODEL, variant="edge")), "train.lr=0.001 (now 0.0001)": dict(config=replace(short, lr=1e-4)), "seed=0 (now 1)": dict(seed=1)}.items():
        with refused(there / "run.json", key): go(there, **change)
    assert (there / "DONE").exists()
    other = go(tmp_path / "other", config=replace(short, lr=1e-4)).run_dir
    for f in (there / "checkpoints").iterdir(): shutil.copy(f, other / "checkpoints")
    with refused(other / "checkpoints/step_00000002.safetensors", "another configuration: train.lr=0.001 (now 0.0001)"): go(other, config=replace(short, lr=1e-4, max_steps=4))


def test_F32_sampling_is_configured_by_the_checkpoint(run):
    "Network, schedule, window and classes are those of the training; only how it is walked may be said anew, by names that exist."
    model = load(run, "cpu")
    assert (model.config, model.table, model.level, model.width, model.sampler) == (TINY, AMOS, 40.0, 400.0, "ddim5")
    masks = np.full((1, 16, 16), 16, np.uint8)
    assert np.array_equal(synthesize_slices(model, masks), synthesize_slices(model, masks, sampler="ddim5"))
    with pytest.raises(CTDiffusionError): synthesize_slices(model, masks, sampler="ddim7000")


# ------------------------------------------------------------------------------------------------- F33: code inside

class Bomb:
    def __init__(self, owned): self.owned = owned
    def __reduce__(self): return os.system, (f"touch {self.owned}",)


def bombs(owned: Path) -> dict[str, bytes]:
    "name -> a file that creates `owned` when its pickle is run."
    def saved(new: bool) -> bytes:
        torch.save({"w": torch.zeros(3), "x": Bomb(owned)}, b := io.BytesIO(), _use_new_zipfile_serialization=new)
        return b.getvalue()
    bare, tar = pickle.dumps({"w": Bomb(owned)}), io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as t:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            info = tarfile.TarInfo(name); info.size = len(bare)
            t.addfile(info, io.BytesIO(bare))
    return {"zip": saved(True), "before zip": saved(False), "tar": tar.getvalue(), "bare pickle": bare}


def entrances(tmp_path: Path, run: Path, checkpoint: Path, content: bytes) -> dict:
    "Every door for weights, with the bomb behind it under a name and papers that are in order."
    checkpoint.write_bytes(content); seal(checkpoint)
    named = lambda name: (tmp_path / name).write_bytes(content) and tmp_path / name
    sha = hashlib.sha256(content).hexdigest()
    folder, judge = tmp_path / "folder", tmp_path / "judge"
    for f in (folder, judge):
        f.mkdir(); (f / "weights.safetensors").write_bytes(content)
    (folder / "run.json").write_text(json.dumps(json.loads((run / "run.json").read_text()) | dict(sha256=sha)))
    (judge / "segmenter.json").write_text(json.dumps(dict(sha256=sha, job=dict(config=SegmenterConfig(channels=(8,) * 6, neighbours=1).to_dict(), store="0" * 16), table=AMOS.to_json(), size=32, level=40, width=400, patients=1)))
    vgg, pt, renamed = named(f"vgg19-{sha[:8]}.pth"), named("weights.pt"), named("renamed.safetensors")
    start = named("start.pt")
    start.with_suffix(".json").write_text(json.dumps(dict(bytes=len(content), sha256=sha)))
    return {checkpoint: lambda: load(run), folder / "weights.safetensors": lambda: load(folder), judge / "weights.safetensors": lambda: load_segmenter(judge, "cpu"),
            vgg: lambda: load_vgg(vgg), start: lambda: first_weights(TINY, 0, start), pt: lambda: import_pt(pt), renamed: lambda: read_tensors(renamed)} | {
            str(folder): lambda: exported(folder), str(checkpoint.parent): lambda: first_weights(TINY, 0, run), run / "checkpoints": lambda: export(run, tmp_path / "again")}


@pytest.mark.parametrize("form", ["zip", "before zip", "tar", "bare pickle"])
def test_F33_code_inside(tmp_path, run, checkpoint, form):
    "At every door: refused, the file named, what to do, and the code has not run."
    owned = tmp_path / "OWNED"
    content = bombs(owned)[form]
    for path, enter in entrances(tmp_path, run, checkpoint, content).items():
        with refused(path, "in a sandbox, or ask for a safetensors file"): enter()
        assert not owned.exists()


def test_F33_the_bomb_is_live(tmp_path):
    "What the test above is worth: read in the ordinary way, three of the four create their file (the oldest form needs an older torch)."
    for form, content in bombs(tmp_path / "OWNED").items():
        if form == "bare pickle": pickle.loads(content)
        elif form != "tar": torch.load(io.BytesIO(content), weights_only=False)
        assert (tmp_path / "OWNED").exists() or form == "tar"
        (tmp_path / "OWNED").unlink(missing_ok=True)


# ------------------------------------------------------------------------------------- F34: larger than they look

LIMIT = 100 * 1024  # KiB


def lean(work) -> None:
    "Do it in a child that may take 100 MB more, and could not take more than 3 GB."
    def child():
        resource.setrlimit(resource.RLIMIT_AS, (int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 3 * 2**30,) * 2)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        work()
        extra = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert extra < LIMIT, f"{extra:,} KiB"
    assert ended(forked(child)) == 0


def repacked(recipe: bytes | None = None, numbers: bytes | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    "What torch.save writes for a few numbers, with another recipe, other numbers, or compressed."
    torch.save({"w": torch.arange(100, dtype=torch.uint8)}, source := io.BytesIO())
    with zipfile.ZipFile(source) as z, zipfile.ZipFile(out := io.BytesIO(), "w", compression) as new:
        for m in z.infolist():
            content = z.read(m)
            if recipe and m.filename.endswith("data.pkl"): content = recipe
            if numbers and m.filename.endswith("data/0"): content = numbers
            new.writestr(m.filename, content, compression)
    return out.getvalue()


def recipe_of() -> bytes:
    with zipfile.ZipFile(io.BytesIO(repacked())) as z: return z.read(next(n for n in z.namelist() if n.endswith("data.pkl")))


def twice_listed() -> bytes:
    "An archive whose directory names one member 300 times: more bytes than it has."
    data = repacked(numbers=bytes(2**20))
    end = data.rindex(b"PK\5\6")
    size, start = struct.unpack("<II", data[end + 12:end + 20])
    entries = data[start:start + size] * 300
    n = struct.unpack("<H", data[end + 10:end + 12])[0] * 300
    return data[:start] + entries + data[end:end + 8] + struct.pack("<HHII", n, n, len(entries), start) + data[end + 20:]


def view(*strides: int) -> bytes:
    torch.save({"w": torch.zeros(4).as_strided((10**6, 10**6), strides)}, b := io.BytesIO())
    return b.getvalue()


def header(text: str, numbers: bytes = b"") -> bytes: return struct.pack("<Q", len(text)) + text.encode() + numbers


def tensor(shape: list, a: int, b: int) -> str: return f'{{"dtype":"F32","shape":{shape},"data_offsets":[{a},{b}]}}'


BOMBS = {
    "deflated.pt": (lambda: repacked(numbers=bytes(128 * 2**20), compression=zipfile.ZIP_DEFLATED), "compressed members"),
    "bytearray.pt": (lambda: repacked(b"\x80\x02cbuiltins\nbytearray\nJ" + struct.pack("<i", 2**29) + b"\x85R."), "asks for builtins bytearray"),
    "numbers.pt": (lambda: repacked(recipe_of().replace(b"Kd", b"J" + struct.pack("<i", 2**30))), "record size"),
    "listed.pt": (twice_listed, "bytes together"),
    "stride0.pt": (lambda: view(0, 0), "w is a view of shape (1000000, 1000000)"),
    "empty.pt": (lambda: b"", "no zip archive"),
    "half.pt": (lambda: repacked()[:700], "zip"),
    "header.safetensors": (lambda: struct.pack("<Q", 2**60) + b"{}", "claims a header of 1,152,921,504,606,846,976"),
    "long.safetensors": (lambda: header('{"a":' + " " * 2**23 + "}"), "claims a header of 8,388,614"),
    "shape.safetensors": (lambda: header(f'{{"w":{tensor([2**20, 2**20], 0, 4)}}}', bytes(4)), "does not agree with its file"),
    "overflow.safetensors": (lambda: header(f'{{"w":{tensor([2**40, 2**40], 0, 4)}}}', bytes(4)), "does not agree with its file"),
    "minus.safetensors": (lambda: header(f'{{"w":{tensor([-1], 0, 4)}}}', bytes(4)), "does not agree with its file"),
    "overlap.safetensors": (lambda: header(f'{{"a":{tensor([2], 0, 8)},"b":{tensor([2], 4, 12)}}}', bytes(12)), "does not agree with its file"),
    "twice.safetensors": (lambda: header(f'{{"w":{tensor([1], 0, 4)},"w":{tensor([1], 4, 8)}}}', bytes(8)), "a key twice in w"),
    "hole.safetensors": (lambda: save({"w": torch.zeros(4)}) + b"more", "does not agree with its file"),
    "half.safetensors": (lambda: save({"w": torch.zeros(4)})[:-1], "does not agree with its file"),
    "empty.safetensors": (lambda: b"", "a file of 0 bytes"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_F34_larger_than_they_look(tmp_path, name):
    content, word = BOMBS[name]
    (tmp_path / name).write_bytes(content())
    def work():
        with refused(tmp_path / name, word): (import_pt if name.endswith(".pt") else read_tensors)(tmp_path / name)
    lean(work)


ABSURD = {  # of run.json's "model", with the papers of the file in order
    "channels": dict(channels=10**6), "size": dict(size=10**7), "T": dict(T=10**9), "blocks": dict(blocks=10**9), "mult": dict(mult=[1] * 10**5), "a factor": dict(mult=[1, 10**6]),
    "heads": dict(heads=-1), "misspelt": dict(chanels=8), "text": dict(T="20"), "no steps": dict(T=0), "no channels": dict(channels=0), "wide, within the limits": dict(channels=1024), "deep, within the limits": dict(blocks=16, mult=[1] * 5),
    "pix2pix": dict(variant="pix2pix", widest=8192), "oasis": dict(variant="oasis", doublings=12, channels=8192),
}


@pytest.fixture(scope="module")
def meta() -> None:
    "What torch imports to build anything at all on the meta device is not counted."
    with torch.device("meta"): build(ModelConfig("spade", size=16, channels=4, doublings=2, hidden=4))


@pytest.mark.usefixtures("meta")
@pytest.mark.parametrize("what", ABSURD)
def test_F34_absurd_run_json(run, checkpoint, what):
    "Self-consistent, in run.json and in the checkpoint: refused before the network takes memory."
    story = STORY | dict(model=STORY["model"] | ABSURD[what])
    tensors = read_checkpoint(checkpoint)
    (run / "run.json").unlink()
    about = claim_run(run, story, {})
    write_checkpoint(run, 10, dict(model=tensors["model"], ema=tensors["ema"]), dict(config=about["config"], **story))
    def work():
        with refused(run): load(run, "cpu")
    lean(work)


def test_F34_absurd_judge(tmp_path, meta):
    config = SegmenterConfig(channels=(8,) * 6, neighbours=1)
    save_file(network(config, AMOS.n).state_dict(), tmp_path / "weights.safetensors")
    about = dict(sha256=sha256_file(tmp_path / "weights.safetensors"), job=dict(config=config.to_dict(), store="0" * 16), table=AMOS.to_json(), size=32, level=40, width=400, patients=1)
    for change in (dict(), dict(channels=[512] * 6), dict(channels=[10**6] * 6), dict(channels=[8]), dict(neighbours=10**7), dict(neighbours=-5)):
        (tmp_path / "segmenter.json").write_text(json.dumps(edited(about, "job", "config", to=config.to_dict() | change)))
        if not change: load_segmenter(tmp_path, "cpu"); continue
        def work():
            with refused(tmp_path): load_segmenter(tmp_path, "cpu")
        lean(work)

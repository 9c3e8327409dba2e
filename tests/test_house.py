"The house stays in order: every rule lists all of its violations, each with its page and number."
import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from readme import render

ROOT = Path(__file__).resolve().parents[1]
NBS, PACKAGE = ROOT / "nbs", ROOT / "ctdiffusion"
FLOORS = {"0": "data", "1": "diffusion", "2": "models", "3": "training", "4": "synthesis", "5": "evaluation", "6": "apps"}
NOTEBOOKS = sorted(p for p in NBS.glob("*.ipynb") if p.name[0] not in "._")
PAGES = [p for p in NOTEBOOKS if p.name[0].isdigit()]
JOBS = [p for p in NOTEBOOKS if p not in PAGES and p.stem != "index"]
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "_modidx.py")


# ---------------------------------------------------------------------------------------------- reading pages

@cache
def notebook(path: Path) -> dict: return json.loads(path.read_text(encoding="utf-8"))
def source(cell: dict) -> str: return "".join(cell["source"])
def cells(path: Path, kind: str) -> list: return [c for c in notebook(path)["cells"] if c["cell_type"] == kind]
def code(path: Path) -> list: return [c for c in cells(path, "code") if source(c).strip()]
def exported(path: Path) -> list: return [c for c in code(path) if re.search(r"^#\|\s*export", source(c), re.M)]
def shown(path: Path) -> list: return [c for c in code(path) if c not in exported(path)]
def tags(cell: dict) -> list: return cell["metadata"].get("tags", [])
def outputs(path: Path) -> list: return [o for c in code(path) for o in c["outputs"]]
def name(path: Path) -> str: return path.relative_to(ROOT).as_posix()


def tree(text: str) -> ast.Module:
    "The syntax tree of a cell or file; magics and shell lines are left out."
    return ast.parse(re.sub(r"^\s*[%!].*$", "", text, flags=re.M))


def imports(parsed: ast.AST) -> list:
    "Every absolute module name imported anywhere in `parsed`, and the line it stands on."
    found = []
    for node in ast.walk(parsed):
        if isinstance(node, ast.Import): found += [(a.name, node.lineno) for a in node.names]
        if isinstance(node, ast.ImportFrom) and not node.level: found += [(f"{node.module}.{a.name}", node.lineno) for a in node.names]
    return found


def text_of(output: dict) -> str:
    "What a reader can read in an output: printed text, plain and rich text, but no picture."
    rich = [v for k, v in output.get("data", {}).items() if not k.startswith("image/") or k == "image/svg+xml"]
    return "\n".join("".join(v) if isinstance(v, list) else str(v) for v in [output.get("text", ""), *rich])


def none(violations: list) -> None:
    "Fail with all violations, one a line."
    if violations: pytest.fail(f"{len(violations)} violation(s)\n  " + "\n  ".join(violations), pytrace=False)


def run(*command: str, cwd: Path) -> None:
    "Run a tool of nbdev on a copy, outside of its own test mode and of a developer's settings."
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {"XDG_CONFIG_HOME": str(cwd)}
    done = subprocess.run([Path(sys.executable).with_name(command[0]), *command[1:]], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    "settings.ini and the notebooks alone, exported and cleaned by nbdev."
    there = tmp_path_factory.mktemp("house")
    shutil.copy(ROOT / "settings.ini", there)
    shutil.copytree(NBS, there / "nbs", ignore=shutil.ignore_patterns(".*"))
    run("nbdev_export", cwd=there)
    run("nbdev_clean", cwd=there)
    return there


# ---------------------------------------------------------------------------------- the notebook is the source

def test_export_in_sync(copy):
    "ctdiffusion/ is byte by byte what nbdev_export makes of the notebooks, and holds no other Python file."
    def files(base): return {p.relative_to(base).as_posix(): p.read_bytes() for p in base.rglob("*.py")}
    ours, fresh = files(PACKAGE), files(copy / "ctdiffusion")
    differ = [k for k in ours.keys() & fresh if ours[k] != fresh[k]]
    none([f"ctdiffusion/{k}: differs from its notebook; run `make export`" for k in sorted(differ)]
         + [f"ctdiffusion/{k}: no notebook makes it" for k in sorted(ours.keys() - fresh)]
         + [f"ctdiffusion/{k}: missing; run `make export`" for k in sorted(fresh.keys() - ours)])


def test_notebooks_clean(copy):
    "nbdev_clean has nothing left to do."
    none([f"{name(p)}: not clean; run `make clean`" for p in NOTEBOOKS if p.read_bytes() != (copy / "nbs" / p.name).read_bytes()])


def test_job_notebooks_keep_their_parameters(copy):
    "After a clean each job has exactly one cell tagged `parameters`; without it papermill ignores -p and exits 0."
    cleaned = {p.name: json.loads((copy / "nbs" / p.name).read_text()) for p in JOBS}
    counts = {n: sum("parameters" in tags(c) for c in nb["cells"]) for n, nb in cleaned.items()}
    none([f"nbs/{n}: {count} cells tagged `parameters`, expected 1" for n, count in counts.items() if count != 1])


def test_settings_keep_the_tags_and_leave_pyproject_alone():
    "The two settings whose loss nobody would notice until a run had used the wrong parameters."
    assert settings()["allowed_cell_metadata_keys"] == "tags"
    assert settings()["update_pyproject"] == "False"


def test_one_page_one_module_one_floor():
    "nbs/10_schedule.ipynb exports ctdiffusion/diffusion/schedule.py, and so on."
    wrong = []
    for page in PAGES:
        number, stem = page.stem.split("_", 1)
        target = re.findall(r"^#\|\s*default_exp\s+(\S+)", "\n".join(map(source, code(page))), re.M)
        if target != [f"{FLOORS[number[0]]}.{stem}"]: wrong.append(f"{name(page)}: exports to {target}, expected {FLOORS[number[0]]}.{stem}")
    none(wrong)


def test_floors_respected():
    "A module imports modules of lower-numbered pages only; the bare package says no more than where and which version it is."
    number = {f"ctdiffusion.{FLOORS[p.name[0]]}.{p.stem.split('_', 1)[1]}": int(p.name[:2]) for p in PAGES}
    wrong = []
    for module, mine in number.items():
        path = PACKAGE.parent / (module.replace(".", "/") + ".py")
        for node in ast.walk(tree(path.read_text(encoding="utf-8"))) if path.exists() else ():
            for used in imported(node, module):
                known = [m for m in (used, used.rpartition(".")[0]) if m in number]
                bare = used in ("ctdiffusion", "ctdiffusion.__version__")
                if used.startswith("ctdiffusion") and not bare and not (known and number[known[0]] < mine):
                    wrong.append(f"{name(path)}:{node.lineno} (page {mine:02}) imports {used} (page {number.get(known[0]) if known else 'unknown'})")
    none(wrong)


def imported(node: ast.AST, module: str) -> list:
    "The full dotted names that an import statement inside `module` brings in."
    if isinstance(node, ast.Import): return [a.name for a in node.names]
    if not isinstance(node, ast.ImportFrom): return []
    base = ".".join(module.split(".")[:-node.level]) if node.level else ""
    return [".".join(filter(None, [base, node.module, a.name])) for a in node.names]


# ------------------------------------------------------------------------------------------------ a page teaches

def test_page_begins_with_title_and_subtitle():
    "The first cell is `# Title` and `> subtitle`."
    first = {page: notebook(page)["cells"][0] for page in PAGES}
    none([f"{name(p)}: first cell is not `# Title` and `> subtitle`" for p, c in first.items() if c["cell_type"] != "markdown" or not re.match(r"# \S.*\n+> \S", source(c))])


def test_every_public_name_is_shown_on_its_own_page():
    "A name that `__all__` offers appears in a code cell that is not exported, or as `name` in the prose of its page."
    wrong = []
    for page in PAGES:
        path = PACKAGE / FLOORS[page.name[0]] / (page.stem.split("_", 1)[1] + ".py")
        public = re.search(r"^__all__ = (\[.*?\])", path.read_text(encoding="utf-8"), re.M | re.S) if path.exists() else None
        spans = re.findall(r"`[^`]+`", "\n".join(map(source, cells(page, "markdown"))))
        used = set(re.findall(r"\w+", "\n".join([*map(source, shown(page)), *spans])))
        wrong += [f"{name(page)}: `{n}` is exported but never shown" for n in ast.literal_eval(public[1]) if n not in used] if public else [f"{name(page)}: exports no public name"]
    none(wrong)


def test_imports_stand_alone_and_without_stars():
    "Import cells hold imports only (or the docs build breaks); no star hides where a name comes from."
    wrong = []
    for page in NOTEBOOKS:
        for number, cell in enumerate(notebook(page)["cells"]):
            body = tree(source(cell)).body if cell["cell_type"] == "code" else []
            is_import = [isinstance(n, (ast.Import, ast.ImportFrom)) for n in body]
            if any(is_import) and not all(is_import): wrong.append(f"{name(page)} cell {number}: imports mixed with other code")
    files = {name(p): p.read_text(encoding="utf-8") for p in [*MODULES, *(ROOT / "tests").rglob("*.py")]} | {name(p): "\n".join(map(source, code(p))) for p in NOTEBOOKS}
    wrong += [f"{f}: star import of {m}" for f, text in files.items() for m, _ in imports(tree(text)) if m.endswith(".*")]
    none(wrong)


def test_outputs_are_for_readers():
    "Pages are executed and show results only: no errors, no stderr, no warnings, no progress bars, no scripts, no widgets."
    wrong = [f"{name(p)}: no output; execute it" for p in PAGES if not outputs(p)]
    wrong += [f"{name(p)}: widget state" for p in NOTEBOOKS if "widgets" in notebook(p)["metadata"]]
    for page in NOTEBOOKS:
        for number, cell in enumerate(notebook(page)["cells"]):
            for output in cell.get("outputs", []):
                kinds, text = set(output.get("data", {})), text_of(output)
                wrong += [f"{name(page)} cell {number}: {what}" for what, bad in {
                    "an error": output["output_type"] == "error",
                    "stderr": output.get("name") == "stderr",
                    "a warning": bool(re.search(r"\w*Warning: ", text)),
                    "a progress bar": "\r" in text or bool(re.search(r"it/s[\],]|\|[█▏▎▍▌▋▊▉ ]{5,}\|", text)),
                    "a script": bool(re.search(r"<script|javascript:|\bon\w+=['\"]", text, re.I)) or "application/javascript" in kinds,
                    "a widget": any("widget" in k for k in kinds),
                    "an object's address": bool(re.search(r" at 0x[0-9a-f]{6,}", text)),
                }.items() if bad]
    none(wrong)


# ---------------------------------------------------------------------------------------- what the package may do

FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "urllib.request", "http.client", "requests", "httpx", "aiohttp", "ftplib", "tarfile"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.startfile", "shutil.unpack_archive", "pd.read_pickle", "pandas.read_pickle", "urlopen", "urlretrieve"}
NEVER_AT_RUN_TIME = {"nbdev", "fastcore", "execnb", "torchvision", "pytest"}
ONLY_APPS = {"IPython", "ipywidgets", "papermill", "nbformat", "nbclient"}


def dangerous(call: ast.Call) -> bool:
    "Does a call run text, a shell or a pickle, unpack without looking, or fetch what is not pinned?"
    called, options = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
    last = called.rpartition(".")[2]
    pinned = len(call.args) > 1 and ast.unparse(call.args[1]).startswith(("f'sha256:", "'sha256:"))
    return (called in FORBIDDEN_CALLS or last in ("extractall", "urlopen", "urlretrieve", "load_state_dict_from_url") or options.get("shell", "False") != "False"
            or called.startswith("torch.hub.") and last != "get_dir"  # where downloads are kept
            or called.startswith("subprocess.") and isinstance(call.args[0] if call.args else None, (ast.Constant, ast.JoinedStr, ast.BinOp))
            or last in ("load", "loadtxt", "genfromtxt") and "allow_pickle" in options
            or called == "pooch.retrieve" and not pinned or called.startswith("pooch.") and last not in ("retrieve", "file_hash"))


def test_package_uses_nothing_dangerous():
    "No pickle, eval, exec, yaml, shell, extractall, unpinned download; `torch.load` once, in page 01_foreign, with weights_only=True."
    wrong, loads = [], []
    for path in MODULES:
        parsed = tree(path.read_text(encoding="utf-8"))
        wrong += [f"{name(path)}:{line} imports {m}" for m, line in imports(parsed) if {m, m.rpartition(".")[0], m.split(".")[0]} & FORBIDDEN_IMPORTS]
        for call in (n for n in ast.walk(parsed) if isinstance(n, ast.Call)):
            if dangerous(call): wrong.append(f"{name(path)}:{call.lineno} calls {ast.unparse(call)[:120]}")
            if ast.unparse(call.func) == "torch.load": loads.append((path.name, {k.arg: ast.unparse(k.value) for k in call.keywords}.get("weights_only")))
        wrong += [f"{name(path)} takes load out of torch" for m, _ in imports(parsed) if m in ("torch.load", "torch.serialization", "torch.serialization.load")]
    none(wrong)
    assert loads == [("foreign.py", "True")]


@pytest.mark.parametrize("bad", ["os.system('ls')", "subprocess.run('ls')", "subprocess.run(f'ls {x}')", "subprocess.Popen(a, shell=True)", "shutil.unpack_archive(a)", "z.extractall(f)", "np.load(f, allow_pickle=True)",
                                 "torch.hub.load('x', 'y')", "torch.hub.download_url_to_file(u, f)", "urllib.request.urlopen(u)", "urlretrieve(u)", "pooch.retrieve(u, None)", "pooch.retrieve(u, 'md5:1')", "eval(x)", "pd.read_pickle(f)"])
def test_the_search_for_danger_finds_it(bad): assert dangerous(ast.parse(bad).body[0].value)


def test_package_imports_only_what_it_declares():
    "Third-party imports are core requirements, or extras inside of a function; nbdev and fastcore never; notebooks and widgets only in apps."
    imported_as = {"scikit-image": "skimage", "pillow": "PIL", "torch-fidelity": "torch_fidelity", "TotalSegmentator": "totalsegmentator"}
    named = lambda *keys: {imported_as.get(n, n) for key in keys for n in (Requirement(r).name for r in settings()[key].split())}
    known, extras = named("requirements") | {"ctdiffusion"} | set(sys.stdlib_module_names), named("fid_requirements", "judge_requirements", "formats_requirements")
    wrong = []
    for path in MODULES:
        allowed, parsed = known | ONLY_APPS if path.parent.name == "apps" else known, tree(path.read_text(encoding="utf-8"))
        late = {i for f in ast.walk(parsed) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)) for i in imports(f)}
        for module, line in imports(parsed):
            top = module.split(".")[0]
            if top in NEVER_AT_RUN_TIME or top not in (allowed | extras if (module, line) in late else allowed): wrong.append(f"{name(path)}:{line} imports {module}")
    none(wrong)


def test_modules_parse_on_the_oldest_python():
    "The grammar of min_python is enough, and names are ASCII."
    oldest = tuple(map(int, settings()["min_python"].split(".")))
    wrong = []
    for path in MODULES:
        try: parsed = ast.parse(path.read_text(encoding="utf-8"), feature_version=oldest)
        except SyntaxError as error: wrong.append(f"{name(path)}:{error.lineno} {error.msg}"); continue
        names = {getattr(n, "id", getattr(n, "arg", getattr(n, "name", ""))) or "" for n in ast.walk(parsed)}
        wrong += [f"{name(path)}: `{n}` is not ASCII" for n in sorted(names) if not n.isascii()]
    none(wrong)


def test_data_floor_loads_no_torch():
    "Volumes, archives and JSON can be looked at where torch would take seconds, or is not installed."
    modules = ", ".join(f"ctdiffusion.data.{p.stem}" for p in MODULES if p.parent.name == "data" and p.stem != "__init__")
    code = f"import sys; import {modules}; print([m for m in sys.modules if m == 'torch'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


# --------------------------------------------------------------------------------------------- around the notebooks

def settings() -> configparser.SectionProxy:
    "settings.ini as setup.py reads it."
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def test_readme_is_the_index_page():
    "README.md is nbs/index.ipynb, rendered."
    assert (ROOT / "README.md").read_text(encoding="utf-8") == render(), "README.md is old: run `make readme`"


def test_links_lead_somewhere():
    "Relative links of README.md, data_instructions.md and of every page point to files that exist."
    texts = [(p, p.parent, p.read_text(encoding="utf-8")) for p in ROOT.glob("*.md")]
    texts += [(p, NBS, p.read_text(encoding="utf-8")) for p in NBS.glob("*.md")]
    texts += [(p, NBS, "\n".join(map(source, cells(p, "markdown")))) for p in NOTEBOOKS]
    wrong = []
    for path, base, text in texts:
        prose = re.sub(r"```.*?```|`[^`\n]*`|\$\$.*?\$\$", "", text, flags=re.S)
        targets = re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r'src="([^"]+)"', prose)
        local = [t.split("#")[0] for t in targets if not re.match(r"[a-z]+:|#", t)]
        wrong += [f"{name(path)}: {t}" for t in local if not (base / t).exists()]
    none(wrong)


def test_front_page_leads_to_every_page():
    "The front page and the map of nbs/details.md, its drawing and the site's sidebar miss no page and no job."
    index = "\n".join([*map(source, cells(NBS / "index.ipynb", "markdown")), (NBS / "details.md").read_text(encoding="utf-8")])
    drawing, sidebar = (NBS / "images/map.svg").read_text(encoding="utf-8"), yaml.safe_load((NBS / "_quarto.yml").read_text(encoding="utf-8"))
    globs = [s["contents"] for s in sidebar["website"]["sidebar"]["contents"] if isinstance(s, dict)]
    wrong = [f"{name(p)}: not linked from nbs/index.ipynb or nbs/details.md" for p in PAGES + JOBS if f"]({p.name})" not in index]
    wrong += [f"{name(p)}: not in nbs/images/map.svg" for p in PAGES if f">{p.stem.replace('_', ' ')}<" not in drawing]
    wrong += [f"{name(p)}: not in nbs/_quarto.yml" for p in PAGES + JOBS if not any(p.match(g) for g in globs)]
    none(wrong)


def test_citation_names_paper_and_version():
    "CITATION.cff parses, carries this version and prefers the paper."
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cff["cff-version"] == "1.2.0" and {"message", "title", "authors"} <= cff.keys()
    assert (cff["version"], cff["license"]) == (settings()["version"], "Apache-2.0")
    paper = cff["preferred-citation"]
    assert (paper["title"], paper["year"], len(paper["authors"])) == ("Semantic Image Synthesis for Abdominal CT", 2023, 6)
    assert "Apache License" in (ROOT / "LICENSE").read_text() and "END OF TERMS AND CONDITIONS" in (ROOT / "LICENSE").read_text()


def test_constraints_pin_every_requirement_within_its_floor():
    "constraints.txt is exact, and what settings.ini asks for (core, notebooks, dev) is in it at an allowed version."
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = {canonicalize_name(n): v for n, v in (line.split("==") for line in lines)}
    asked = [Requirement(r) for key in ("requirements", "notebooks_requirements", "dev_requirements") for r in settings()[key].split()]
    none([f"{r}: constraints.txt has {pins.get(canonicalize_name(r.name))}" for r in asked if pins.get(canonicalize_name(r.name)) not in r.specifier])


def test_ci_runs_make_test_and_nothing_else():
    "What CI calls is what everybody calls."
    script = ROOT / ".ci/run"
    body = [line for line in script.read_text().splitlines()[1:] if not line.startswith(("set ", "cd ", "#"))]
    assert body == ["exec make test"] and os.access(script, os.X_OK)


UNFINISHED = re.compile(r"\b(?:TO[D]O|FIX[M]E)\b")
SOMEBODYS_MACHINE = re.compile(r"/(?:home|Users)/\w+/|/ro{2}t/|/wo{1}rk/|\.libr[a]ry\b|[A-Z]:\\\\Users")


def test_nothing_unfinished_and_nobodys_machine():
    "No reminder left behind and no path of a developer's machine, in sources, pages and their printed outputs."
    plain = [p for pattern in ("*", ".ci/*", "tests/*.py", "nbs/*.yml", "ctdiffusion/**/*.py", "ctdiffusion/**/*.json", "ctdiffusion/**/*.md", "nbs/results/**/*.*") for p in ROOT.glob(pattern) if p.is_file()]
    texts = {name(p): p.read_text(encoding="utf-8") for p in plain if p.suffix in ("", ".md", ".py", ".yml", ".ini", ".toml", ".txt", ".cff", ".in", ".json", ".csv")}
    texts |= {name(p): "\n".join([source(c) for c in notebook(p)["cells"]] + [text_of(o) for o in outputs(p)]) for p in NOTEBOOKS}
    none([f"{f}: {m[0]!r}" for f, text in texts.items() for pattern in (UNFINISHED, SOMEBODYS_MACHINE) for m in pattern.finditer(text)])

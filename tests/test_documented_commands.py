"""What a newcomer types, works as typed: every command and every Python example of the instructions, in order.

They are run in a fresh copy of the project, in one folder and by one shell, as a newcomer would. What would take long is run
small (`SMALL`); what cannot be run here is named with its reason (`NOT_RUN`), and nothing is passed over in silence.
"""
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import nbformat
import pytest

from ctdiffusion.data.phantom import make_dataset, phantom, save_patient
from ctdiffusion.synthesis.processes import SynthesizeJob

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "nbs/details.md", "data_instructions.md")  # README.md is the front page, nbs/index.ipynb, rendered
JOBS = ("train", "prepare", "evaluate", "reproduce")
PROGRAMS = ("make", "papermill", "torchrun", "python", "pip", "jupyter", "mkdir", "dcm2niix", "sbatch", "bench/", "slurm/")

# A command that contains the first text is given the second in addition, so that minutes become seconds.
SMALL = {
    "papermill nbs/train.ipynb": "-p max_steps 2 -p batch 2 -p patients 2 -p sampler ddim2 -p threads 1",
    "papermill nbs/prepare.ipynb": "",
    "papermill nbs/evaluate.ipynb": "-p judge none -p sampler ddim2 -p patients 2 -p threads 1",
    "papermill nbs/reproduce.ipynb": "-p dry_run True",
}

# Commands that are not run: a regular expression, and the reason. Their parts are looked at by other tests.
NOT_RUN = {
    r"make \w+( PYTHON=\S+)?|PIP_EXTRA_INDEX_URL=\S+ make \w+": "sets up an environment of its own; that the target exists is tested below",
    r"pip install .*": "changes the environment that this test runs in; test_packaging builds and installs the wheel",
    r"slurm/\S+.*|sbatch .*": "needs a cluster; that the file exists is tested below",
    r"dcm2niix .*": "another project's program",
    r"bench/.*": "a measurement of many minutes, on an idle machine",
    r".*\b(N|FOLDER|PATH|ROOT|OUT|NAME)\b.*": "a pattern within a sentence, with words to be replaced",
    r"papermill --log-output|mkdir -p": "the name of an option within a sentence",
    r"papermill nbs/reproduce.ipynb .*-p budget full": "hours; without `-p budget full` it stands in a block, and is run",
}


@dataclass
class Example:
    "One thing to type."
    document: str
    line: int
    kind: str  # sh or python
    text: str

    def __str__(self): return f"{self.document}:{self.line}: {self.text}"


def fenced(document: str) -> list[Example]:
    "Each line of the ```sh blocks (backslashes join lines), and each ```python block as a whole."
    text = (ROOT / document).read_text(encoding="utf-8")
    found = []
    for block in re.finditer(r"^([ \t]*)```(sh|bash|python)[ \t]*\n(.*?)^[ \t]*```", text, re.M | re.S):
        indent, kind, body = block.groups()
        first = text.count("\n", 0, block.start()) + 2
        body = re.sub(rf"^{indent}", "", body, flags=re.M)
        if kind == "python":
            found.append(Example(document, first, kind, body))
            continue
        for number, line in enumerate(body.replace("\\\n", "").splitlines()):
            command = re.sub(r"(^|\s)#.*", "", line).strip()
            if command: found.append(Example(document, first + number, "sh", command))
    return found


def inline(document: str) -> list[Example]:
    "Commands within a sentence: `code` that begins with a program's name and is more than that name."
    text = (ROOT / document).read_text(encoding="utf-8")
    prose = re.sub(r"^([ \t]*)```.*?^[ \t]*```", lambda block: "\n" * block[0].count("\n"), text, flags=re.M | re.S)
    found = []
    for span in re.finditer(r"`([^`\n]+)`", prose):
        words = span[1].split()
        program = words[1] if len(words) > 1 and re.match(r"[A-Z_]+=", words[0]) else words[0]
        if len(words) > 1 and program.startswith(PROGRAMS):
            found.append(Example(document, prose.count("\n", 0, span.start()) + 1, "sh", span[1]))
    return found


EXAMPLES = [e for d in DOCUMENTS for e in sorted(fenced(d) + inline(d), key=lambda e: e.line)]


def why_not(example: Example) -> str | None:
    "The reason for which a command is not run."
    return next((reason for pattern, reason in NOT_RUN.items() if re.fullmatch(pattern, example.text)), None)


def copy_of_the_project(there: Path) -> Path:
    "The files that git would commit, or all but what is made, where there is no git."
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file():
                (there / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, there / name)
    else:
        made = shutil.ignore_patterns(".git", ".venv*", "runs", "__pycache__", ".pytest_cache", ".hypothesis")
        shutil.copytree(ROOT, there, ignore=made, dirs_exist_ok=True)
    return there


def draw_data(there: Path) -> None:
    "What the instructions suppose the reader to have: AMOS22 as downloaded, and data of their own in two folders; all drawn, all small."
    make_dataset(there / "drawn/amos22", train=2, val=2, size=48)
    shutil.make_archive(str(there / "amos22"), "zip", there / "drawn", "amos22")
    for folder in ("images", "labels"): (there / "data/mydata" / folder).mkdir(parents=True)
    for number in (1, 2, 7, 12):
        case = f"p{number:02}.nii.gz"
        save_patient(phantom(seed=number, size=48), there / "data/mydata/images" / case, there / "data/mydata/labels" / case)


class Shell:
    "A terminal in the copy of the project: its folder and environment last from one command to the next."
    def __init__(self, there: Path):
        self.there = there
        self.folder = there
        home = Path(sys.executable).parent
        path = [p for p in os.environ["PATH"].split(os.pathsep) if Path(p) != home]
        leave = ("VIRTUAL_ENV", "OMP_WAIT_POLICY")
        self.env = {k: v for k, v in os.environ.items() if k not in leave}
        self.env |= {"PATH": os.pathsep.join(path), "PYTHONPATH": str(there), "MPLBACKEND": "Agg"}
        activate = there / ".venv/bin/activate"  # what `make demo` would have made
        activate.parent.mkdir(parents=True)
        activate.write_text(f'export PATH={shlex.quote(str(home))}:"$PATH"\n')

    def run(self, command: str) -> str:
        state = self.there / ".state"
        script = f"{command}\nstatus=$?\npwd > {state}.pwd; env -0 > {state}.env\nexit $status"
        done = subprocess.run(["bash", "-c", script], cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        self.folder = Path(Path(f"{state}.pwd").read_text().strip())
        pairs = Path(f"{state}.env").read_text().split("\0")
        self.env = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        return done.stdout


@pytest.fixture(scope="module")
def shell(tmp_path_factory) -> Shell:
    there = copy_of_the_project(tmp_path_factory.mktemp("newcomer"))
    draw_data(there)
    return Shell(there)


def typed(example: Example) -> str:
    "The command, made small."
    command = example.text
    for words, smaller in SMALL.items():
        if command.startswith(words): command = f"{command} {smaller}"
    if example.kind == "python": return f"python - <<'END'\n{command}\nEND"
    return command


@pytest.mark.fault("F63")
@pytest.mark.parametrize("example", [e for e in EXAMPLES if not why_not(e)], ids=lambda e: f"{Path(e.document).stem}-{e.line}")
def test_what_a_newcomer_types(example, shell):
    shell.run(typed(example))


@pytest.mark.fault("F63")
@pytest.mark.parametrize("pattern", NOT_RUN)
def test_an_exception_is_still_needed(pattern):
    "Each of them stands for a command that is documented; all other commands are run."
    assert [e for e in EXAMPLES if re.fullmatch(pattern, e.text)]


@pytest.mark.fault("F63")
def test_a_block_can_be_copied_as_it_is():
    "No word to be replaced, no prompt, and nothing that this test does not know how to run."
    blocks = [e for d in DOCUMENTS for e in fenced(d) if e.kind == "sh"]
    wrong = [str(e) for e in blocks if re.search(r"\b(N|FOLDER|PATH|ROOT|OUT|NAME)\b|^\$ |<\w+>|\.\.\.", e.text)]
    assert len(blocks) >= 10 and not wrong


@pytest.mark.fault("F63")
def test_make_targets_and_cluster_files_exist():
    "What is not run is at least there."
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    spans = "\n".join(e.text for e in EXAMPLES)
    text = spans + "".join((ROOT / d).read_text(encoding="utf-8") for d in DOCUMENTS)
    asked = set(re.findall(r"(?:^|`|\S+=\S+ )make (\w+)(?=`|$| PYTHON)", text, re.M))
    files = set(re.findall(r"(?<=`)((?:slurm|bench)/\w+\.\w+)", text))
    assert {"demo", "test", "lab"} <= asked <= targets
    assert files and not [f for f in files if not (ROOT / f).exists()]


@pytest.mark.fault("F63")
def test_parameters_that_are_named_exist():
    "`-p name` in a sentence names a parameter of a job, or of the command-line jobs of the same fields."
    known = set()
    for job in JOBS:
        page = nbformat.read(ROOT / f"nbs/{job}.ipynb", as_version=4)
        cell = next(c.source for c in page.cells if "parameters" in c.metadata.get("tags", []))
        known |= set(re.findall(r"^(\w+)\s*[:=]", cell, re.M))
    named = {n for d in DOCUMENTS for n in re.findall(r"(?<!mkdir )-[pr] (\w+)", (ROOT / d).read_text(encoding="utf-8"))}
    known |= {f.name for f in fields(SynthesizeJob)}  # of a folder of label maps
    assert named <= known


def test_the_torch_that_pip_is_told_to_install_is_the_pinned_one():
    pinned = re.search(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)[1]
    told = {v for d in DOCUMENTS for v in re.findall(r"torch==([\d.]+)", (ROOT / d).read_text(encoding="utf-8"))}
    assert told == {pinned}

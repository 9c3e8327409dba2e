"README.md is nbs/index.ipynb rendered by nbconvert, with its links made relative to the root: `make readme`."
import re
from pathlib import Path

from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[1]


def relink(markdown: str) -> str:
    "Links that start in nbs/ rewritten to start in the root; addresses and anchors stay."
    below = re.sub(r"\]\((?![a-z]+:|#)", "](nbs/", markdown)
    below = re.sub(r'(<img [^>]*src=")(?![a-z]+:)', r"\1nbs/", below)
    return re.sub(r'(\]\(|src=")nbs/\.\./', r"\1", below)


def render(index: Path = ROOT / "nbs/index.ipynb") -> str:
    "The page as Markdown, without the cells tagged `hide` and the code tagged `hide-input`."
    hide = {"enabled": True, "remove_cell_tags": {"hide"}, "remove_input_tags": {"hide-input"}}
    markdown, _ = MarkdownExporter(config=Config(TagRemovePreprocessor=hide)).from_filename(str(index))
    return re.sub(r"\n{3,}", "\n\n", relink(markdown)).strip() + "\n"


if __name__ == "__main__": (ROOT / "README.md").write_text(render(), encoding="utf-8")

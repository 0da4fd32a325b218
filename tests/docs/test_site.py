"""The pages of docs/ are a site, built without a warning: links, anchors, names of modules and the navigation hold."""

import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

needs_sphinx = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("sphinx", "myst_parser", "furo", "sphinx_click")),
    reason="the extra docs is not installed (it needs Python 3.11)",
)


def build(source: Path, target: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-c", DOCS, source, target]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@needs_sphinx
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    built = build(DOCS, tmp_path / "site")
    assert built.returncode == 0, built.stderr
    made = {
        path.relative_to(tmp_path / "site").with_suffix("").as_posix() for path in (tmp_path / "site").rglob("*.html")
    }
    pages = {path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md")}
    assert pages <= made
    method = (tmp_path / "site" / "method.html").read_text(encoding="utf-8")
    assert "<math" in method and 'src="http' not in method  # formulas need no network
    assert "--balance_coefficient" in (tmp_path / "site" / "commands.html").read_text(encoding="utf-8")
    for page in ("method.html", "resuming.html"):
        assert 'href="_static/site.css' in (tmp_path / "site" / page).read_text(encoding="utf-8")
    assert "Latin Modern Math" in (tmp_path / "site" / "_static" / "site.css").read_text(encoding="utf-8")
    index = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert "readme.svg" in index and "one LoRA on all at once: " in index
    resuming = (tmp_path / "site" / "resuming.html").read_text(encoding="utf-8")
    assert '<a class="reference internal" href="training.html">Training</a>' in resuming  # no `training.md` is there
    texts = [path.read_text(encoding="utf-8") for path in (tmp_path / "site").rglob("*.html")]
    assert [found for text in texts for found in re.findall(r"<a [^>]*>[\w-]+\.md</a>", text)] == []
    assert "Experts that contribute" in (tmp_path / "site" / "reference.html").read_text(encoding="utf-8")


@needs_sphinx
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[a page](nowhere.md)", "nowhere"),
        ("[a heading](other.md#not-there)", "not-there"),
        ("```{eval-rst}\n.. autofunction:: dylora_moe.errors.nothing\n```", "nothing"),
    ],
    ids=["link", "anchor", "name"],
)
def test_what_leads_nowhere_stops_the_build(text: str, told: str, tmp_path: Path) -> None:
    source = tmp_path / "docs"
    source.mkdir()
    (source / "other.md").write_text("# Other\n\n## There\n")
    (source / "index.md").write_text(f"# Index\n\n[there](other.md#there)\n\n```{{toctree}}\nother\n```\n\n{text}\n")
    built = build(source, tmp_path / "site")
    assert built.returncode != 0 and told in built.stderr
    shutil.rmtree(tmp_path / "site")
    (source / "index.md").write_text("# Index\n\n[there](other.md#there)\n\n```{toctree}\nother\n```\n")
    assert build(source, tmp_path / "site").returncode == 0


def test_links_of_the_readme_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"(?:\]\(|src=\")([^)#\"]+)", text)
    assert len(links) > 10 and "docs/readme.svg" in links
    assert [link for link in links if not link.startswith("http") and not (ROOT / link).is_file()] == []


def test_pages_named_in_words_are_there() -> None:
    """`docs/serve.md` in code, of README, recipes, and the help of commands."""
    files = [ROOT / "README.md", *(ROOT / "recipes").rglob("*.yaml"), *(ROOT / "src").rglob("*.py")]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    named = set(re.findall(r"(?<![\w/])docs/([\w-]+\.md)", text))
    assert named and [name for name in sorted(named) if not (DOCS / name).is_file()] == []


def test_messages_that_troubleshooting_quotes_are_those_of_the_program() -> None:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    source = " ".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    quoted = [
        text
        for text in re.findall(r"(?<!\*)\*([^*\n]+)\*(?!\*)", page)
        if text != "Warning signs" and text != "Routing"
    ]
    assert len(quoted) >= 5
    assert [text for text in quoted if text not in source] == []


def test_the_picture_of_the_readme_is_small_and_asks_nobody() -> None:
    picture = (ROOT / "docs" / "readme.svg").read_text(encoding="utf-8")
    assert len(picture) < 100_000 and "@font-face" not in picture and "url(http" not in picture
    assert "mixture&gt;" in picture and "expert_3" in picture

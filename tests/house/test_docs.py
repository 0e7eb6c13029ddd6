"""README and the site: results as the evidence says, short paragraphs, links that resolve."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))

import check  # noqa: E402
import pages  # noqa: E402


def paragraphs(text):
    """Paragraphs of running words: no code, tables, pictures or lists of links."""
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    parts = [part.strip() for part in re.split(r"\n\s*\n", text)]
    return [part for part in parts if part and not part.startswith(("|", "#", "!", "<!--"))]


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/components.md"])
def test_paragraphs_are_short(name):
    items = []
    for part in paragraphs((ROOT / name).read_text(encoding="utf-8")):
        items += re.split(r"\n(?=- |\d+\. )", part)
    assert [(len(item.split()), item[:60]) for item in items if len(item.split()) > 60] == []


def test_readme_shows_what_the_evidence_says():
    """`python docs/build.py --readme` writes the block of results."""
    assert pages.readme_with_results(ROOT) == (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_is_in_order():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    order = [
        "![",
        "make demo",
        "## One photograph",
        "## Python",
        "## What needs a licence",
        "## Results",
        "(`make docs`)",
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    assert "git clone" in text and "pip install" in text and "fields-face" in text


def test_files_that_pages_name_are_there():
    """Every relative link of README, CONTRIBUTING and docs/ leads to a file."""
    missing = []
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if not re.match(r"https?:", link) and not (page.parent / link).exists():
                missing.append(f"{page.name}: {link}")
    assert missing == []


def test_a_broken_link_is_found(tmp_path):
    """Made on purpose: a page that is not there, an anchor that is not there."""
    (tmp_path / "index.html").write_text(
        '<a href="other.html">a</a><a href="other.html#here">b</a><img src="none.png">'
        '<a href="other.html#gone">c</a><a href="missing.html">d</a><a href="https://example.org/x">e</a>'
    )
    (tmp_path / "other.html").write_text('<p id="here">text</p>')
    found = check.broken_links(tmp_path)
    assert found == [
        "index.html: none.png leads to no file",
        "index.html: other.html#gone leads to no place on its page",
        "index.html: missing.html leads to no file",
    ]


def test_an_outdated_file_is_not_quoted(monkeypatch, tmp_path):
    """Made on purpose: a listed file leaves the figures and stands among the older ones."""
    current, older = pages.known_figures(ROOT)
    name = current[0][3]
    for folder in ("evidence", "docs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.png", "__pycache__"))
    with open(tmp_path / "evidence" / "OUTDATED.yaml", "a", encoding="utf-8") as file:
        file.write(f"{name}: made on purpose\n")
    now, then = pages.known_figures(tmp_path)
    assert name in then and name not in older and name not in {figure[3] for figure in now}


@pytest.mark.slow
def test_the_site_builds_and_every_link_resolves():
    python = ROOT / ".venv-docs" / "bin" / "python"
    if not python.exists():
        pytest.skip("the site's packages are not installed; `make docs` installs them")
    done = subprocess.run([python, "docs/build.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert check.broken_links(ROOT / "_docs" / "html") == []

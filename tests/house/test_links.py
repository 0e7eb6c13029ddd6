"""Links between notebooks: neighbours, index, equations and names."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))

import links  # noqa: E402


def test_every_notebook_has_its_links():
    """`python docs/links.py` writes them."""
    assert [path.name for path in links.main(ROOT, check=True)] == []


def test_links_between_notebooks_resolve():
    assert links.broken(ROOT) == []


def test_every_equation_is_linked_to():
    """From another notebook or from the index."""
    index = (ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8")
    assert sorted({int(n) for n in re.findall(r"#eq-(\d+)\)", index)}) == list(range(1, 14))


@pytest.fixture
def copy(tmp_path):
    """Three notebooks of a small repository."""
    (tmp_path / "fields").mkdir()
    (tmp_path / "nbs").mkdir()
    for name in ("03_viz", "04_types", "index"):
        shutil.copy2(ROOT / "nbs" / f"{name}.ipynb", tmp_path / "nbs")
    for name in ("viz", "types"):
        shutil.copy2(ROOT / "fields" / f"{name}.py", tmp_path / "fields")
    return tmp_path


def test_names_are_linked_once_and_writing_twice_changes_nothing(copy):
    path = copy / "nbs" / "04_types.ipynb"
    notebook = json.loads(path.read_text())
    text = "The plot is `show_images`, again `show_images`, and `03_viz`; not `np.show_images_of`."
    notebook["cells"].insert(1, {"cell_type": "markdown", "id": "x", "metadata": {}, "source": [text]})
    path.write_text(json.dumps(notebook))
    assert links.main(copy) and links.main(copy) == []
    written = "".join(json.loads(path.read_text())["cells"][1]["source"])
    assert written == (
        "The plot is [`show_images`](03_viz.ipynb), again `show_images`, and [`03_viz`](03_viz.ipynb); "
        "not `np.show_images_of`."
    )


def test_a_broken_link_is_found(copy):
    before = links.broken(copy)  # the copy holds some notebooks only
    path = copy / "nbs" / "03_viz.ipynb"
    notebook = json.loads(path.read_text())
    notebook["cells"][0]["source"].append("\n[a](none.ipynb) [b](04_types.ipynb#eq-9)")
    path.write_text(json.dumps(notebook))
    found = [line for line in links.broken(copy) if line.startswith("03_viz") and line not in before]
    assert found == [
        "03_viz.ipynb: none.ipynb leads to no file",
        "03_viz.ipynb: 04_types.ipynb#eq-9 leads to no equation",
    ]

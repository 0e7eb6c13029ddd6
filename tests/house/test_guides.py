"""No stale output: each guide is executed again, and says what its committed copy says.

`nbdev_test` leaves the guides out (nbs/guides/.notest), so that they run once.
"""

import json
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GUIDES = sorted((ROOT / "nbs" / "guides").glob("*.ipynb"))
NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?(?![\w.])")
TIME = re.compile(r"\b\d+(?:\.\d+)? (?:s|ms|seconds|minutes)\b|seconds\S* \d+\.\d+")


def texts(cells):
    """The text that each code cell shows, by the id of the cell."""
    shown = {}
    for cell in cells:
        parts = []
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            pictures = any(kind.startswith("image/") or "widget" in kind for kind in data)
            # a picture's text is an address in memory, a widget's its settings
            text = output.get("text", "" if pictures else data.get("text/plain", ""))
            if output.get("name") != "stderr":
                parts.append("".join(text))
        if cell["cell_type"] == "code":
            shown[cell["id"]] = "".join(parts)
    return shown


def differences(old, new, tolerance=0.05):
    """What two texts say differently: words, whole numbers, and other numbers beyond five percent; times are masked."""
    old, new = TIME.sub("TIME", old), TIME.sub("TIME", new)
    if NUMBER.sub("#", old) != NUMBER.sub("#", new):
        return f"{old[:200]!r} became {new[:200]!r}"
    for a, b in zip(NUMBER.findall(old), NUMBER.findall(new), strict=True):
        whole = "." not in a + b
        # bits differ between machines; the last digit that is shown may too
        digit = 10.0 ** -min(len(a.partition(".")[2]), len(b.partition(".")[2])) if not whole else 0.0
        if abs(float(a) - float(b)) > max(digit, tolerance * abs(float(a)) if not whole else 0.0):
            return f"{a} became {b} in {new[:200]!r}"
    return ""


def stale(old, new):
    """Cells whose text is no longer what was committed."""
    before, after = texts(old), texts(new)
    found = {name: differences(before[name], after.get(name, "")) for name in before}
    return {name: why for name, why in found.items() if why}


@pytest.mark.slow
@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
def test_guide_says_what_its_committed_copy_says(path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    monkeypatch.delenv("FIELDS_TEST_DATA", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    old = json.loads(path.read_text(encoding="utf-8"))["cells"]
    notebook = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": str(path.parent)}}
    client.NotebookClient(notebook, timeout=900, kernel_name="python3", resources=place).execute()
    assert stale(old, json.loads(nbformat.writes(notebook))["cells"]) == {}


def cell(text):
    return [{"cell_type": "code", "id": "a", "outputs": [{"output_type": "stream", "name": "stdout", "text": [text]}]}]


@pytest.mark.parametrize(
    "old, new, same",
    [
        ("loss 0.1234", "loss 0.1235", True),
        ("loss 0.12", "loss 0.18", False),
        ("400 steps", "401 steps", False),
        ("took 3.2 s", "took 14.9 s", True),
        ("F4 FIELDS", "F4 fields", False),
        ("head_sha256: f5a057bb", "head_sha256: 7be73e90", False),
    ],
)
def test_a_stale_output_is_found(old, new, same):
    """Made on purpose: numbers, words and a head that have changed, and a time that may."""
    assert bool(stale(cell(old), cell(new))) != same


def test_notebooks_show_the_head_of_today():
    """An output that names the hash of a head names the one that ships."""
    import hashlib

    today = hashlib.sha256((ROOT / "fields" / "head" / "open_head.npz").read_bytes()).hexdigest()
    found = []
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        for code in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            shown = texts([code]).get(code.get("id"), "") if code["cell_type"] == "code" else ""
            for named in re.findall(r"head_sha256\W+([0-9a-f]{12,64})", shown):
                if not today.startswith(named[:12]) and len(set(named)) > 4:
                    found.append(f"{path.name} {code['id']}: {named[:12]}")
    assert found == []


def test_no_output_is_a_warning_with_a_path():
    """Warnings of a machine's own folders are no part of a notebook."""
    found = []
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        for code in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            for output in code.get("outputs", []):
                text = "".join(output.get("text", []))
                if re.search(r"Warning|site-packages|/tmp/|ipykernel_", text):
                    found.append(f"{path.name} {code['id']}: {text[:80]}")
    assert found == []

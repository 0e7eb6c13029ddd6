"""Evidence says what it measured; what is out of date is listed and nowhere quoted."""

import json
import re
from pathlib import Path

import evidence_files
import pytest
from evidence_files import EVIDENCE, ROOT, evidence_files as all_files, module_hash, outdated, reasons, stamped

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def unlisted(listed):
    """Files that are out of date and not listed."""
    return [
        f"{path.name}: {'; '.join(why)}" for path in all_files() if (why := reasons(path)) and path.name not in listed
    ]


def quotes(text, listed):
    """Listed files that a text names."""
    named = set(re.findall(r"evidence/([\w.-]+\.(?:json|png))", text))
    return sorted(named & set(listed))


def test_out_of_date_files_are_listed():
    """`python tests/evidence_files.py mark` lists them; give a better reason by hand where you know one."""
    assert unlisted(outdated()) == []


def test_every_listed_file_exists_and_has_a_reason():
    assert [name for name, why in outdated().items() if not (EVIDENCE / name).is_file() or len(str(why)) < 10] == []


def test_pages_quote_no_outdated_file():
    listed = outdated()
    found = {str(page.relative_to(ROOT)): quotes(page.read_text(encoding="utf-8"), listed) for page in PAGES}
    assert {page: names for page, names in found.items() if names} == {}


def test_guides_and_the_index_show_no_outdated_file():
    listed = outdated()
    notebooks = [ROOT / "nbs" / "index.ipynb", *sorted((ROOT / "nbs" / "guides").glob("*.ipynb"))]
    found = {path.name: quotes(path.read_text(encoding="utf-8"), listed) for path in notebooks}
    assert {name: names for name, names in found.items() if names} == {}


def test_every_file_names_head_modules_commit_and_date():
    asked = ("date", "commit", "head_sha256", "modules")
    found = {path.name: [key for key in asked if not json.loads(path.read_text()).get(key)] for path in all_files()}
    assert {name: missing for name, missing in found.items() if missing} == {}


def test_an_unlisted_and_a_quoted_file_are_found(tmp_path, monkeypatch):
    """The three faults, made on purpose: an older module, an older head, a quotation."""
    monkeypatch.setattr(evidence_files, "EVIDENCE", tmp_path)
    path = tmp_path / "made.json"
    values = stamped({"figure": 1}, ["fields.viz"])
    path.write_text(json.dumps(values))
    assert reasons(path) == []
    path.write_text(json.dumps(values | {"modules": {"fields/viz.py": "0" * 16}}))
    assert reasons(path) == ["fields/viz.py has changed"] and unlisted({}) == ["made.json: fields/viz.py has changed"]
    path.write_text(json.dumps(values | {"head_sha256": "0" * 64}))
    assert reasons(path) == ["it was measured on another open head"]
    path.write_text(json.dumps({"figure": 1}))
    assert len(reasons(path)) == 1
    assert quotes("so fast (`evidence/made.json`)", {"made.json": "older code"}) == ["made.json"]


def test_a_comment_changes_no_hash_and_a_number_does(tmp_path):
    path = Path(tmp_path) / "module.py"
    path.write_text('"""One."""\n__all__ = ["f"]\n\n\ndef f(x):\n    "Add one."\n    return x + 1\n')
    first = module_hash(path)
    path.write_text("def f(x):\n    # why\n    return x + 1\n")
    assert module_hash(path) == first
    path.write_text("def f(x):\n    return x + 2\n")
    assert module_hash(path) != first


def test_a_measurement_names_its_modules():
    with pytest.raises(ValueError, match="is no module of fields"):
        stamped({}, ["fields.nothing"])
    with pytest.raises(ValueError, match="at least one"):
        stamped({}, [])

"""What an evidence file was measured on, and whether that still stands.

    python tests/evidence_files.py           every file: current, or what has changed since
    python tests/evidence_files.py stamp evidence/x.json MODULE...   write date, commit, head and modules in
    python tests/evidence_files.py mark      list the out-of-date files in evidence/OUTDATED.yaml

A file is current while the head and every module that it measures are the same. A module's hash is that of its
syntax tree without docstrings, so that a formatter or a comment changes nothing. In a test:
`write("x.json", values, modules)`.
"""

import ast
import hashlib
import json
import subprocess
import sys
from datetime import date
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
EVIDENCE = ROOT / "evidence"
OUTDATED = EVIDENCE / "OUTDATED.yaml"
HEAD = ROOT / "fields" / "head" / "open_head.npz"
HEADER = """\
# Evidence files that were measured on an older head or older code, each with the reason. Nothing in README or the
# docs may quote them. `python tests/evidence_files.py mark` adds what is missing; a file that is made again leaves.
"""


def module_hash(path):
    """Hash of what a module does: its syntax tree without docstrings, the exporter's lines and line numbers."""
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                # an empty body would not be a tree any more
                node.body = body[1:] or [ast.Pass()]
    tree.body = [node for node in tree.body if not is_exporters(node)]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]


def is_exporters(node):
    """Whether a statement is the list of public names that the exporter writes."""
    return isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "__all__" for target in node.targets)


def head_hash():
    """Hash of the open head's file."""
    return hashlib.sha256(HEAD.read_bytes()).hexdigest()


def module_path(name):
    """The file of `fields.scans.fit`, `scans.fit` or `fields/scans/fit.py`; raise `ValueError` if there is none."""
    name = str(name)
    if name.endswith(".py"):
        path = ROOT / name
    else:
        path = ROOT / "fields" / (name.removeprefix("fields.").replace(".", "/") + ".py")
    if not path.is_file():
        raise ValueError(f"{name} is no module of fields; name those that the measurement runs")
    return path


def stamped(values, modules, head_sha256=None):
    """Return values with the date, the commit, the head's hash and the modules' hashes in front."""
    git = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    paths = sorted({module_path(name) for name in modules})
    if not paths:
        raise ValueError("an evidence file names the modules that it measures; give at least one")
    stamp = {
        "date": f"{date.today()}",
        "commit": git.stdout.strip() or None,
        "head_sha256": head_sha256 or head_hash(),
        "modules": {str(path.relative_to(ROOT)): module_hash(path) for path in paths},
    }
    return stamp | {name: value for name, value in values.items() if name not in stamp}


def write(name, values, modules, head_sha256=None):
    """Write a stamped evidence file and return its path."""
    path = EVIDENCE / name
    path.write_text(json.dumps(stamped(values, modules, head_sha256), indent=1) + "\n", encoding="utf-8")
    return path


def reasons(path, head=None):
    """What has changed since a file was made; empty where it is current."""
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict) or "modules" not in values or "head_sha256" not in values:
        return ["it does not say which head and which modules it measured"]
    found = []
    # a file about another head than the shipped one says whose it is
    if values["head_sha256"] != (head or head_hash()) and "other_head" not in values:
        found.append("it was measured on another open head")
    for name, kept in values["modules"].items():
        if not (ROOT / name).is_file():
            found.append(f"{name} is gone")
        elif module_hash(ROOT / name) != kept:
            found.append(f"{name} has changed")
    return found


def outdated():
    """The listed files with their reasons."""
    return yaml.safe_load(OUTDATED.read_text(encoding="utf-8")) or {} if OUTDATED.exists() else {}


def evidence_files():
    """Every evidence file with figures."""
    return sorted(EVIDENCE.glob("*.json"))


def mark():
    """List what is out of date, keep reasons already given, take out what is current again."""
    kept = outdated()
    new = {}
    for path in evidence_files():
        why = reasons(path)
        if why:
            new[path.name] = kept.get(path.name, "; ".join(why))
    # pictures are listed by hand, beside the figures that they show
    new |= {name: why for name, why in kept.items() if not name.endswith(".json")}
    OUTDATED.write_text(HEADER + yaml.safe_dump(new, width=110, allow_unicode=True), encoding="utf-8")


def main(arguments):
    if arguments[:1] == ["stamp"]:
        path, modules = Path(arguments[1]), arguments[2:]
        values = stamped(json.loads(path.read_text(encoding="utf-8")), modules)
        path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    elif arguments[:1] == ["mark"]:
        mark()
    elif arguments:
        raise SystemExit(__doc__)
    for path in evidence_files():
        print(f"{path.name:<34}{'; '.join(reasons(path)) or 'current'}")


if __name__ == "__main__":
    main(sys.argv[1:])

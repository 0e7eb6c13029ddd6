"""Export and cleaning leave no dirt: clean, status, export, status, over the whole of a fresh copy."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def git(folder, *arguments):
    """Run git in a folder and return its lines."""
    own = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "core.autocrlf=false"]
    done = subprocess.run(["git", *own, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def nbdev(folder, command):
    """Run one of nbdev's commands in a folder."""
    script = Path(sys.executable).parent / f"nbdev_{command}"
    settings = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run([script], cwd=folder, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def copy_of_the_repository(folder):
    """A repository of its own with every file that is, or would be, committed here."""
    for name in git(ROOT, "ls-files", "-co", "--exclude-standard"):
        source = ROOT / name
        if source.is_file() and not name.startswith(("evidence/", "tests/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, folder / name)
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "copy")
    return folder


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return copy_of_the_repository(tmp_path_factory.mktemp("copy"))


def test_clean_and_export_change_nothing(copy):
    nbdev(copy, "clean")
    assert git(copy, "status", "--porcelain") == []
    nbdev(copy, "export")
    assert git(copy, "status", "--porcelain") == []
    nbdev(copy, "export")
    assert git(copy, "status", "--porcelain") == []


def test_a_hand_edit_of_a_module_shows(copy):
    module = copy / "fields" / "viz.py"
    kept = module.read_text(encoding="utf-8")
    module.write_text(kept + "\nEDITED = True\n", encoding="utf-8")
    git(copy, "commit", "-qam", "a hand edit")
    nbdev(copy, "export")
    assert git(copy, "status", "--porcelain") == [" M fields/viz.py"]
    git(copy, "reset", "-q", "--hard", "HEAD~1")

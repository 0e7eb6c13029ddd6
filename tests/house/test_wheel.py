"""The wheel carries what the package needs, and works outside the repository."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from what git tracks, so that nothing lying about comes along."""
    folder = tmp_path_factory.mktemp("wheel")
    tracked = (
        subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    )
    for name in filter(None, tracked):
        if (ROOT / name).is_file() and not name.startswith(("nbs/", "evidence/", "tests/")):
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--disable-pip-version-check",
        "-w",
        str(folder),
        str(folder / "source"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]
    return next(folder.glob("*.whl"))


def test_it_carries_head_checkpoint_and_manifests(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "fields/head/open_head.npz",
        "fields/checkpoints/demo.safetensors",
        "fields/data_manifests/bp4d.yaml",
        "fields/cli.py",
        "fields/training/methods.py",
    } <= names
    assert not [n for n in names if n.startswith(("nbs/", "tests/", "evidence/"))]
    assert wheel.stat().st_size < 40e6


def test_it_works_outside_the_repository(wheel, tmp_path):
    place = tmp_path / "site"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--disable-pip-version-check",
            "--target",
            str(place),
            str(wheel),
        ],
        check=True,
        capture_output=True,
    )
    code = (
        "import fields, numpy as np; from fields import Reconstructor; from fields.manifests import load_manifest; from fields.config import find_root;"
        f"assert fields.__file__.startswith({str(place)!r}), fields.__file__;"
        "r = Reconstructor.load(); assert r.head.shapedirs.shape[-1] == 300 and load_manifest('bp4d').name and find_root() is None; print('works')"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(place)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "works" in done.stdout, done.stderr[-1500:]

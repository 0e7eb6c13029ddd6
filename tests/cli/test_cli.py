"""The public names, and what the command line says to those who make mistakes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import fields
from fields.cli import app, sentence

runner = CliRunner()


def say(*arguments):
    """Run a command in process; return exit code and output, with an exception as its one sentence."""
    result = runner.invoke(app, [str(a) for a in arguments])
    error = "" if result.exception is None or isinstance(result.exception, SystemExit) else sentence(result.exception)
    return result.exit_code, result.output + error


def test_public_names():
    from fields import Head, HeadParams, Prediction, Reconstructor
    from fields.render.rasterize import rasterize

    head = Head.load("open")
    output = head(HeadParams.neutral(2))
    assert output.vertices.shape == (2, *head.template.shape) and head.faces.shape[1] == 3
    assert callable(Reconstructor.load) and callable(rasterize) and hasattr(Prediction, "save")
    assert set(fields.__all__) >= {"Head", "HeadParams", "Prediction", "Reconstructor"}
    with pytest.raises(AttributeError):
        fields.nothing


def test_commands_exist():
    code, text = say("--help")
    assert code == 0
    for name in ("doctor", "chain", "reconstruct", "fit-scan", "world", "prepare"):
        assert name in text, name


def test_doctor_never_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("FIELDS_ASSETS", str(tmp_path / "none"))
    code, text = say("doctor")
    assert code == 0 and "mica" in text and "bp4d" in text and "licence" in text.lower() or "non-commercial" in text


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["chain", "--profile", "huge"], "choose one of"),
        (["chain", "--set", "train.steps"], "KEY=VALUE"),
        (["chain", "--set", "loss.nothing=1"], "unknown key"),
        (["prepare", "imagenet", "--root", "x", "--out", "y"], "imagenet"),
        (["prepare", "ffhq", "--root", "nowhere", "--out", "y"], "nowhere"),
        (["reconstruct", "photo.jpg", "--out", "o", "--checkpoint", "none.safetensors"], "none.safetensors"),
        (["reconstruct", "photo.jpg", "--out", "o", "--device", "cuda"], "GPU"),
        (["reconstruct", "photo.jpg", "--out", "o", "--head", "none.pkl"], "none.pkl"),
        (["fit-scan", "none.obj", "--landmarks", "none.npy", "--out", "o"], "none.obj"),
    ],
    ids=["profile", "set", "key", "dataset", "root", "checkpoint", "device", "head", "scan"],
)
def test_mistakes(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photo.jpg").touch()
    code, text = say(*arguments)
    assert code != 0 and said in text and "Traceback" not in text, text


def test_a_traceback_never_reaches_the_user(tmp_path):
    command = [sys.executable, "-c", "from fields.cli import main; main()", "chain", "--profile", "huge"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("fields: ") and len(done.stderr.splitlines()) == 1


def test_fit_scan_of_the_open_head(tmp_path):
    """A scan made from the head itself is fitted from the command line."""
    import torch

    from fields import Head, HeadParams
    from fields.head.geometry import write_mesh

    head = Head.load("open")
    params = HeadParams.neutral(1)
    params.shape[:, :5] = torch.tensor([1.0, -0.5, 0.5, 0.3, -0.7])
    output = head(params)
    write_mesh(tmp_path / "scan.obj", output.vertices[0].numpy(), head.faces.numpy())
    np.save(tmp_path / "marks.npy", head.landmarks(output, "static51")[0].double().numpy())
    code, text = say(
        "fit-scan",
        tmp_path / "scan.obj",
        "--landmarks",
        tmp_path / "marks.npy",
        "--unit",
        "m",
        "--out",
        tmp_path / "out",
    )
    assert code == 0, text
    fit = json.loads((tmp_path / "out" / "fit.json").read_text())
    assert fit["scan_to_surface_mm"]["median"] < 0.5 and fit["head_sha256"] == head.sha256

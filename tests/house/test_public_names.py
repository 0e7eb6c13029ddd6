"""The public names of the design, as a contract: commands with their options, and the Python names with their shapes."""

import inspect

import numpy as np
import pytest
import skimage.data
import torch
from typer.testing import CliRunner

from fields.cli import app

COMMANDS = {
    "doctor": (),
    "chain": ("--profile", "--run", "--from", "--to", "--set"),
    "reconstruct": (
        "--out",
        "--head",
        "--checkpoint",
        "--device",
        "--refine",
        "--smooth",
        "--no-smooth",
        "--panel",
        "--faces",
    ),
    "fit-scan": ("--landmarks", "--head", "--unit", "--out"),
    "world": ("--out",),
    "prepare": ("--root", "--out"),
    "bench": ("--out",),
    "transfer": ("--out", "--head", "--checkpoint", "--device"),
    "inspect": (),
    "merge": ("--out",),
}


@pytest.mark.parametrize("command, options", COMMANDS.items(), ids=COMMANDS)
def test_command(command, options, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    for option in options:
        assert option in result.output, option


def test_profiles():
    from fields.config import load_profile

    for name in ("smoke", "demo", "study", "paper"):
        assert load_profile(name, [])


def test_names_of_the_package():
    import fields

    assert set(fields.__all__) >= {"Head", "HeadParams", "Prediction", "Reconstructor", "__version__"}
    for name in ("Head", "HeadParams", "Prediction", "Reconstructor"):
        assert inspect.isclass(getattr(fields, name)) and name in dir(fields)


def test_head_and_rasterize():
    from fields import Head, HeadParams
    from fields.render.rasterize import rasterize
    from fields.types import HeadOutput

    head = Head.load("open")
    output = head(HeadParams.neutral(2))
    assert isinstance(output, HeadOutput) and output.vertices.shape == (2, *head.template.shape)
    assert head.faces.shape[1] == 3 and len(head.sha256) == 64
    fragments = rasterize(output.vertices * 7, head.faces, 32)
    assert (
        fragments.face_index.shape == (2, 32, 32)
        and fragments.barycentrics.shape == (2, 32, 32, 3)
        and fragments.depth.shape == (2, 32, 32)
    )


def test_reconstructor(tmp_path):
    from fields import Head, Prediction, Reconstructor
    from fields.config import NetworkConfig
    from fields.models.fields import FieldsModel

    FieldsModel(NetworkConfig(image_size=64), Head.load("open"), seed=0).save(tmp_path / "model.safetensors")
    reconstructor = Reconstructor.load(tmp_path / "model.safetensors")
    prediction = reconstructor([skimage.data.astronaut()])
    assert isinstance(prediction, Prediction) and len(prediction) == 1
    p = prediction.params
    shapes = [tuple(getattr(p, n).shape) for n in ("shape", "expression", "eyelids", "jaw", "rotation", "camera")]
    assert shapes == [(1, 300), (1, 50), (1, 2), (1, 3), (1, 3), (1, 3)]
    assert prediction.logits.shape == (1, 7) and prediction.valence.shape == prediction.arousal.shape == (1,)
    assert torch.equal(reconstructor(skimage.data.astronaut()).params.camera, p.camera)


def test_files_of_a_face(tmp_path):
    """NAME.npz, .obj, .glb, .png and predictions.csv hold what the documentation says."""
    from PIL import Image

    from fields import Head, Reconstructor
    from fields.config import NetworkConfig
    from fields.head.geometry import read_mesh
    from fields.models.fields import FieldsModel
    from fields.reconstruct import reconstruct_files

    head = Head.load("open")
    Image.fromarray(skimage.data.astronaut()).save(tmp_path / "face.png")
    rec = Reconstructor(FieldsModel(NetworkConfig(image_size=64), head, seed=0), head)
    reconstruct_files(rec, [tmp_path / "face.png"], tmp_path / "out", quiet=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "face.glb",
        "face.npz",
        "face.obj",
        "face.png",
        "predictions.csv",
    ]
    with np.load(tmp_path / "out" / "face.npz", allow_pickle=False) as z:
        assert {
            "shape",
            "expression",
            "eyelids",
            "jaw",
            "rotation",
            "camera",
            "landmarks_mediapipe105",
            "landmarks_fan68",
            "box",
            "head_sha256",
        } <= set(z.files)
        assert str(z["head_sha256"]) == head.sha256
    for suffix in ("obj", "glb"):
        mesh = read_mesh(tmp_path / "out" / f"face.{suffix}")
        assert mesh.vertices.shape == tuple(head.template.shape) and len(mesh.faces) == len(head.faces)
    header = (tmp_path / "out" / "predictions.csv").read_text().splitlines()[0].split(",")
    assert {"file", "name", "emotion", "valence", "arousal", "box_cx", "box_cy", "box_side"} <= set(header)
    width, height = Image.open(tmp_path / "out" / "face.png").size
    assert width == 4 * height

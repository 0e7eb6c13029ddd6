"""Scans and landmarks as the tools that people use write them, and scans without landmarks, scale or unit."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from fields.cli import app
from fields.config import ScanConfig
from fields.data.marks import known_set, read_landmarks
from fields.data.scanfiles import Scan, read_scan
from fields.head.flame import Head
from fields.scans.crop import ScanError
from fields.scans.file import fit_file
from fields.scans.find import find_landmarks
from fields.types import HeadParams

SMALL = ScanConfig(shape_components=20, expression_components=10, max_points=400)


@pytest.fixture(scope="module")
def head():
    return Head.load("open")


@pytest.fixture(scope="module")
def face(head):
    """A mean face with its jaw a little open: vertices, triangles, 51 landmarks, metres."""
    params = HeadParams.neutral()
    params.jaw[:, 0] = 0.1
    output = head(params)
    return (
        output.vertices[0].double().numpy(),
        head.faces.numpy(),
        head.landmarks(output, "static51")[0].double().numpy(),
    )


def rows(points, line="{x:.7f} {y:.7f} {z:.7f}"):
    return "\n".join(line.format(k=k, x=x, y=y, z=z) for k, (x, y, z) in enumerate(points)) + "\n"


def pp(points):
    line = '<point active="1" z="{z:.7f}" y="{y:.7f}" x="{x:.7f}" name="{k}"/>'
    return f"<!DOCTYPE PickedPoints>\n<PickedPoints><DocumentData/>\n{rows(points[::-1], line)}</PickedPoints>"


def reversed_names(text, count):
    """Points written backwards, with names that say so."""
    for k in range(count):
        text = text.replace(f'name="{k}"', f'name="{count - 1 - k}!"')
    return text.replace('!"', '"')


MARKS = {
    "space.txt": lambda p: rows(p),
    "index.bnd": lambda p: rows(p, "{k} {x:.7f} {y:.7f} {z:.7f}"),
    "semicolon.csv": lambda p: rows(p, "{x:.7f};{y:.7f};{z:.7f}").replace(".", ","),
    "tab.tsv": lambda p: "label\tZ\tY\tX\n" + rows(p, "nose\t{z:.7f}\t{y:.7f}\t{x:.7f}"),
    "header.csv": lambda p: "Name, x (mm), y (mm), z (mm)\n" + rows(p, "p{k}, {x:.7f}, {y:.7f}, {z:.7f}"),
    "comma_space.txt": lambda p: rows(p).replace(".", ","),
    "picked.pp": lambda p: reversed_names(pp(p), len(p)),
    "plain.json": lambda p: json.dumps(p.tolist()),
    "names.json": lambda p: json.dumps({f"lm{k}": list(v) for k, v in enumerate(p)}),
    "slicer.mrk.json": lambda p: json.dumps(
        {"markups": [{"controlPoints": [{"label": f"F-{k}", "position": list(v)} for k, v in enumerate(p)]}]}
    ),
    "slicer.fcsv": lambda p: "# columns = id,x,y,z,label\n" + rows(p, "{k},{x:.7f},{y:.7f},{z:.7f},F-{k}"),
}


@pytest.mark.parametrize("name", MARKS)
def test_landmark_files(tmp_path, face, name):
    (tmp_path / name).write_text(MARKS[name](face[2]))
    assert np.abs(read_landmarks(tmp_path / name) - face[2]).max() < 1e-6


def test_68_points_lose_their_contour(face):
    which, kept = known_set(np.concatenate([np.zeros((17, 3)), face[2]]))
    assert which == "static51" and (kept == face[2]).all()


@pytest.mark.parametrize("name", ["a.stl", "b.stl", "a.off", "a.glb", "a.xyz", "a.obj", "a.ply"])
def test_scan_files(tmp_path, face, name):
    trimesh = pytest.importorskip("trimesh")
    vertices, faces, _ = face
    if name == "a.xyz":
        np.savetxt(tmp_path / name, vertices, fmt="%.7f", delimiter=";", header="x;y;z")
    else:
        kind = {"a.stl": "stl_ascii", "b.stl": "stl"}.get(name, name.split(".")[1])
        trimesh.Trimesh(vertices, faces, process=False).export(tmp_path / name, file_type=kind)
    scan = read_scan(tmp_path / name)
    assert len(scan.vertices) == len(vertices) and (scan.faces is None) == (name == "a.xyz")
    place = np.sort(np.abs(scan.vertices).sum(1)) - np.sort(np.abs(vertices).sum(1))
    assert np.abs(place).max() < 1e-5


@pytest.fixture(scope="module")
def files(tmp_path_factory, face):
    folder = tmp_path_factory.mktemp("scan")
    vertices, faces, marks = face
    text = "".join(f"v {x:.6f} {y:.6f} {z:.6f}\n" for x, y, z in vertices)
    text += "".join(f"f {i} {j} {k}\n" for i, j, k in faces + 1)
    (folder / "scan.obj").write_text(text)
    np.save(folder / "marks.npy", marks)
    return folder


def fitted(files, marks, head, **options):
    np.save(files / "some.npy", marks)
    return fit_file(files / "scan.obj", files / "some.npy", head=head, config=SMALL, **options)


def test_landmarks_in_another_frame_or_unit(files, face, head):
    for change, said in (([-1, -1, 1], "LPS"), (1000, "another unit")):
        fit = fitted(files, face[2] * change, head)
        assert fit.residual_median < 1e-4 and said in fit.notes[0]


def test_unknown_scale_and_infants(files, face, head):
    vertices, _, marks = face
    (files / "odd.obj").write_text("".join(f"v {x:.6f} {y:.6f} {z:.6f}\n" for x, y, z in 3.7 * vertices))
    np.save(files / "odd.npy", 3.7 * marks)
    with pytest.raises(ScanError, match="give unit unknown"):
        fit_file(files / "odd.obj", files / "odd.npy", head=head, config=SMALL)
    fit = fit_file(files / "odd.obj", files / "odd.npy", head=head, config=SMALL, unit="unknown")
    assert fit.metres == pytest.approx(1 / 3.7, rel=0.01) and "unknown scale" in fit.notes[0]
    (files / "baby.obj").write_text("".join(f"v {x:.6f} {y:.6f} {z:.6f}\n" for x, y, z in 600 * vertices))
    np.save(files / "baby.npy", 600 * marks)
    out = files / "baby"
    fit = fit_file(files / "baby.obj", files / "baby.npy", head=head, config=SMALL, infant=True, out=out)
    assert fit.scale == pytest.approx(0.6, rel=0.01) and fit.residual_median < 2e-4
    grown = read_scan(out / "fit.obj").vertices
    assert np.ptp(grown[:, 1]) == pytest.approx(
        0.6 * np.ptp(vertices[:, 1]), rel=0.02
    )  # it lies on the scan, in metres


@pytest.mark.parametrize(
    "what, said", [("few", "there are 50 landmarks"), ("nan", "point 4 of 51"), ("far", "scan point")]
)
def test_landmarks_that_cannot_be(files, face, head, what, said):
    marks = face[2].copy()
    if what == "nan":
        marks[3, 1] = np.nan
    with pytest.raises(ValueError, match=said) as error:
        fitted(files, {"few": marks[:50], "nan": marks, "far": marks + [0, 0, 1.0]}[what], head)
    assert "some.npy" in str(error.value) and "\n" not in str(error.value)


def test_landmarks_are_found_on_the_scan(face, head):
    vertices, faces, _ = face
    params = HeadParams.neutral()
    params.jaw[:, 0] = 0.1
    truth = head.landmarks(head(params), "mediapipe105")[0].double().numpy()
    lying = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])  # z up, the face towards -y
    found = find_landmarks(Scan(1000 * vertices @ lying.T, faces), head.embeddings["mediapipe105"].indices)
    error = np.linalg.norm(found.points - 1000 * truth @ lying.T, axis=1)
    assert np.median(error) < 4 and np.percentile(error, 95) < 12


def test_fit_scan_prints_a_sentence(files, tmp_path):
    done = CliRunner().invoke(
        app, ["fit-scan", str(files / "scan.obj"), "--landmarks", str(files / "marks.npy"), "--out", str(tmp_path)]
    )
    assert done.exit_code == 0, done.output
    lines = done.output.strip().splitlines()
    assert (
        len(lines) <= 3 and "mm (median)" in lines[0] and str(tmp_path) in done.output and "array(" not in done.output
    )

"""Public protocols: hand-computed cases, each against the others, and the command on files."""

import io
import json
import zipfile

import numpy as np
import pytest
import trimesh

from fields.evaluation.benchmarks import judge_meshes, twin_case
from fields.evaluation.meshes import FaceMesh, read_meshes
from fields.evaluation.now import crop_sphere, now_errors, now_summary, refine_similarity
from fields.evaluation.regions import REGIONS, region_errors
from fields.head.flame import Head


@pytest.fixture(scope="module")
def head():
    return Head.load("open")


@pytest.fixture(scope="module")
def twin(head):
    return twin_case(head, 1)


def ball(radius, seven_radius, subdivisions=4):
    """A ball with marks in fixed directions."""
    mesh = trimesh.creation.icosphere(subdivisions, radius)
    marks = np.array(
        [[-45, 30, 60], [-15, 30, 80], [15, 30, 80], [45, 30, 60], [0, -20, 85], [-25, -50, 60], [25, -50, 60]]
    )
    marks = seven_radius * marks / np.linalg.norm(marks, axis=1, keepdims=True)
    return FaceMesh("ball", np.asarray(mesh.vertices), np.asarray(mesh.faces), marks)


def test_a_smaller_ball_by_hand():
    """A ball of 90 mm for one of 100 mm: 10 mm everywhere with the scale kept, nothing without."""
    from fields.scans.closest import Surface

    small, large = ball(0.09, 0.09), ball(0.1, 0.1)
    kept = refine_similarity(small, large.vertices, metric=True)
    errors = 1000 * Surface(kept.vertices, kept.faces).closest(large.vertices)[0]
    assert np.abs(errors - 10).max() < 0.1
    assert now_errors(small, large).max() < 1e-3


def test_the_similarity_is_a_minimum(twin):
    """No small motion of the placed mesh lowers the squared distances."""
    from scipy.spatial.transform import Rotation

    from fields.scans.closest import Surface

    guess, scan, _ = twin
    points = scan.vertices[:: max(1, len(scan.vertices) // 2000)]
    best = refine_similarity(guess, points, steps=100)

    def cost(mesh):
        return (Surface(mesh.vertices, mesh.faces).closest(points)[0] ** 2).sum()

    lowest, center, rng = cost(best), points.mean(0), np.random.default_rng(0)
    for _ in range(20):
        turn = Rotation.from_rotvec(rng.normal(0, 3e-3, 3)).as_matrix()
        scale, shift = 1 + rng.normal(0, 3e-3), rng.normal(0, 3e-4, 3)
        moved = best.moved(scale, turn, center + shift - scale * turn @ center)
        assert cost(moved) > lowest * (1 - 1e-4)


def test_protocols_agree_on_what_they_share(twin):
    """All are near zero for the truth and grow for a worse guess; only the metric one sees the size."""
    guess, scan, truth = twin
    good = judge_meshes({"1": truth}, {"1": scan})
    bad = judge_meshes({"1": guess}, {"1": scan})
    large = judge_meshes({"1": truth.moved(1.1, np.eye(3), np.zeros(3))}, {"1": scan})
    for name in ("now", "now_metric", "nonrigid", "nonrigid_metric"):
        assert good[name]["mean"] < 0.25 < bad[name]["mean"]
    assert good["regions"]["all"]["mean"] < 0.2 < bad["regions"]["all"]["mean"]
    # the scanner's noise of 0.2 mm leaves 0.2 * sqrt(2 / pi) along the normal
    assert good["now"]["mean"] == pytest.approx(0.16, abs=0.01)
    assert abs(large["now"]["mean"] - good["now"]["mean"]) < 0.02
    assert large["now_metric"]["mean"] > 5 * good["now_metric"]["mean"]
    # a nearest point is never farther than a corresponding one
    assert bad["now"]["mean"] < bad["nonrigid"]["mean"]


def test_pooled_is_not_averaged():
    assert now_summary([np.zeros(3), np.full(1, 4.0)])["median"] == 0
    assert now_summary([np.zeros(1), np.full(3, 4.0)])["mean"] == 3
    assert now_summary([np.array([0.05, 8.5])])["curve"][-1] == 0.5


def test_the_crop_by_hand():
    """Eye corners at ±45 and ±15 mm, the nose 50 mm below: center 15 mm above the nose point, radius 98 mm."""
    seven = np.array(
        [[-45, 0, 0], [-15, 0, 0], [15, 0, 0], [45, 0, 0], [0, -50, 0], [-20, -80, 0], [20, -80, 0]], float
    )
    center, radius = crop_sphere(seven)
    assert np.allclose(center, [0, -35, 0]) and radius == pytest.approx(98)


def test_a_region_without_points_is_said(twin):
    guess, scan, _ = twin
    cut = FaceMesh("cut", scan.vertices[scan.vertices[:, 1] < scan.seven[0, 1]], scan.faces, scan.seven)
    with pytest.raises(ValueError, match="forehead"):
        region_errors(guess, cut)
    assert set(region_errors(guess, scan)) == set(REGIONS)


def test_the_command_on_folders(head, twin, tmp_path):
    from typer.testing import CliRunner

    from fields.cli import app

    guess, scan, truth = twin
    for folder, mesh, factor in (("said", guess, 1000), ("true", truth, 1)):
        (tmp_path / folder).mkdir()
        trimesh.Trimesh(factor * mesh.vertices, mesh.faces, process=False).export(tmp_path / folder / "p1.ply")
        np.save(tmp_path / folder / "p1.npy", factor * mesh.seven)
    assert read_meshes(tmp_path / "said")["p1"].seven == pytest.approx(guess.seven, abs=1e-6)  # millimetres were seen
    words = [str(tmp_path / "said"), "--truth", str(tmp_path / "true"), "--out", str(tmp_path / "out.json")]
    done = CliRunner().invoke(app, ["evaluate-meshes", *words, "--protocols", "now,regions"])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out.json").read_text())
    assert (
        set(found) == {"now", "regions", "without_prediction", "unit"} and f"{found['now']['mean']:.3f}" in done.output
    )
    wrong = CliRunner().invoke(app, ["evaluate-meshes", *words, "--protocols", "nowhere"])
    assert wrong.exit_code != 0


def test_the_submission_has_the_described_tree(twin, tmp_path):
    from fields.evaluation.svfr import write_submission

    guess = twin[0]
    names = ["017/EMO-1-shout+laugh_156_221501007", "372/FREE_786_222200038"]
    write_submission(tmp_path / "s.zip", posed=dict.fromkeys(names, guess), neutral={names[0]: guess})
    with zipfile.ZipFile(tmp_path / "s.zip") as archive:
        kinds = ("mesh_posed.ply", "landmarks_posed.npy", "mesh_neutral.ply", "landmarks_neutral.npy")
        expected = {f"{names[0]}/{kind}" for kind in kinds} | {f"{names[1]}/{kind}" for kind in kinds[:2]}
        assert set(archive.namelist()) == expected
        with archive.open(f"{names[1]}/mesh_posed.ply") as file:
            read = trimesh.load(io.BytesIO(file.read()), file_type="ply", process=False)
        with archive.open(f"{names[1]}/landmarks_posed.npy") as file:
            assert np.load(file).shape == (7, 3)
    assert np.allclose(read.vertices, guess.vertices, atol=1e-6) and (read.faces == guess.faces).all()

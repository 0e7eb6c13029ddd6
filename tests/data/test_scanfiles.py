"""Scan and landmark files: every variant, against an independent reader, and what can be wrong with them."""

import gzip
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from fields.data.marks import detect_axes, detect_unit, eye_corner_distance, read_landmarks
from fields.data.scanfiles import read_scan


@pytest.fixture(scope="module")
def mesh():
    rng = np.random.default_rng(1)
    vertices = rng.normal(size=(300, 3)).astype(np.float32).astype(np.float64)
    faces = np.stack([rng.permutation(280)[:3] for _ in range(500)])
    return vertices, faces, rng.integers(0, 255, (300, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix, encoding", [(".obj", None), (".ply", "ascii"), (".ply", "binary")])
def test_same_as_trimesh(tmp_path, mesh, suffix, encoding):
    trimesh = pytest.importorskip("trimesh")
    vertices, faces, colors = mesh
    path = tmp_path / f"mesh{suffix}"
    made = trimesh.Trimesh(
        vertices,
        faces,
        vertex_colors=np.concatenate([colors, np.full((300, 1), 255)], 1).astype(np.uint8),
        process=False,
    )
    made.export(path, **({"encoding": encoding} if encoding else {}))
    scan = read_scan(path)
    other = trimesh.load(path, process=False, maintain_order=True)
    np.testing.assert_allclose(scan.vertices, vertices, atol=1e-6)
    np.testing.assert_array_equal(scan.faces, faces)
    np.testing.assert_array_equal(scan.faces, other.faces)
    assert np.abs(scan.colors.astype(int) - colors).max() <= 1


def ply(vertices, faces, form, extra=False, index="int", count="uchar"):
    """Write a ply by hand, with elements and properties that other programs add."""
    order = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}[form]
    head = [
        "ply",
        f"format {form} 1.0",
        "comment made by hand",
        f"element vertex {len(vertices)}",
        *(f"property double {c}" for c in "xyz"),
    ]
    head += ["property uchar quality"] if extra else []
    head += ["element camera 2", "property float a", "property float b"] if extra else []
    head += (
        [f"element face {len(faces)}", f"property list {count} {index} vertex_index"]
        + (["property int group"] if extra else [])
        + ["end_header"]
    )
    body = []
    if form == "ascii":
        body += [" ".join(f"{x:.17g}" for x in v) + (" 7" if extra else "") for v in vertices] + (
            ["1 2", "3 4"] if extra else []
        )
        body += [" ".join(map(str, [len(f), *f])) + (" 5" if extra else "") for f in faces]
        return ("\n".join(head + body) + "\n").encode()
    data = b"".join(np.array(v, order + "f8").tobytes() + (b"\7" if extra else b"") for v in vertices) + (
        np.zeros(4, order + "f4").tobytes() if extra else b""
    )
    kinds = {"uchar": "u1", "int": "i4", "uint": "u4", "ushort": "u2"}
    data += b"".join(
        np.array([len(f)], order + kinds[count]).tobytes()
        + np.array(f, order + kinds[index]).tobytes()
        + (np.array([5], order + "i4").tobytes() if extra else b"")
        for f in faces
    )
    return ("\n".join(head) + "\n").encode() + data


@pytest.mark.parametrize("form", ["ascii", "binary_little_endian", "binary_big_endian"])
@pytest.mark.parametrize("extra", [False, True])
def test_ply_variants(tmp_path, mesh, form, extra):
    vertices, faces, _ = mesh
    quads = [*faces[:5].tolist(), [0, 1, 2, 3], [4, 5, 6, 7, 8]]
    for k, lists in enumerate((faces[:50].tolist(), quads)):
        path = tmp_path / f"{k}.ply"
        path.write_bytes(ply(vertices, lists, form, extra, "uint" if k else "int"))
        scan = read_scan(path)
        np.testing.assert_allclose(scan.vertices, vertices)
        assert len(scan.faces) == sum(len(f) - 2 for f in lists) and scan.faces[-1].tolist() == (
            [4, 7, 8] if k else faces[49].tolist()
        )


def test_obj_variants(tmp_path, mesh):
    vertices, faces, _ = mesh
    v = "".join(f"v {x:.9f} {y:.9f} {z:.9f}\n" for x, y, z in vertices)
    plain = v + "".join(f"f {a + 1} {b + 1} {c + 1}\n" for a, b, c in faces)
    variants = {
        "plain": plain,
        "windows": plain.replace("\n", "\r\n"),
        "indented": plain.replace("v ", "  v  ").replace("f ", "\tf\t"),
        "slashes": v + "vt 0 0\nvn 0 0 1\n" + "".join(f"f {a + 1}/1/1 {b + 1}//1 {c + 1}/1\n" for a, b, c in faces),
        "relative": v + "".join(f"f {a - 300} {b - 300} {c - 300}\n" for a, b, c in faces),
        "materials": "mtllib a.mtl\no head\n" + plain.replace("f ", "usemtl skin\ns 1\nf ", 1) + "# end\n\n",
        "weights": plain.replace("\nf", " 1.0\nf", 1)
        if False
        else "".join(f"v {x:.9f} {y:.9f} {z:.9f} 1.0\n" for x, y, z in vertices) + plain[len(v) :],
    }
    for name, text in variants.items():
        (tmp_path / f"{name}.obj").write_bytes(text.encode())
        scan = read_scan(tmp_path / f"{name}.obj")
        np.testing.assert_allclose(scan.vertices, vertices, atol=1e-8, err_msg=name)
        np.testing.assert_array_equal(scan.faces, faces, err_msg=name)
    (tmp_path / "points.obj").write_text(v)
    assert read_scan(tmp_path / "points.obj").faces is None
    (tmp_path / "packed.obj.gz").write_bytes(gzip.compress(plain.encode()))
    np.testing.assert_array_equal(read_scan(tmp_path / "packed.obj.gz").faces, faces)
    (tmp_path / "UPPER.OBJ").write_text(plain)
    assert len(read_scan(tmp_path / "UPPER.OBJ").vertices) == 300, "loose vertices stay"


def test_wrl_variants(tmp_path, mesh):
    vertices, faces, _ = mesh
    points = ",\n".join(f"{x:.9f} {y:.9f} {z:.9f}" for x, y, z in vertices)
    index = " ".join(f"{a}, {b}, {c}, -1," for a, b, c in faces)
    two = f"#VRML V2.0 utf8\n# a scan [ 1 2 3 ]\nShape {{ geometry IndexedFaceSet {{ coord DEF c Coordinate {{ point [ {points} ] }} coordIndex [ {index} ] color Color {{ color [ {'1 0 0, ' * 300} ] }} }} }}"
    one = f"#VRML V1.0 ascii\nSeparator {{ Coordinate3 {{ point [ {points} ] }} TextureCoordinate2 {{ point [ 0 0, 1 1 ] }} IndexedFaceSet {{ coordIndex [ {index[:-4]} ] }} }}"
    for name, text in (("one", one), ("two", two), ("both", two + two.replace("#VRML V2.0 utf8", ""))):
        (tmp_path / f"{name}.wrl").write_text(text)
        scan = read_scan(tmp_path / f"{name}.wrl")
        np.testing.assert_allclose(scan.vertices[:300], vertices, atol=1e-8)
        np.testing.assert_array_equal(scan.faces[:500], faces)
        assert len(scan.vertices) == (600 if name == "both" else 300) and (name == "one") == (scan.colors is None)
    assert scan.faces.max() >= 300 and scan.colors[0].tolist() == [255, 0, 0]


BAD_SCANS = {
    "missing.obj": (None, "there is no file"),
    "empty.obj": (b"", "is empty"),
    "blank.ply": (b"\n  \n", "is empty"),
    "scan.fbx": (b"solid", "known are"),
    "noname": (b"v 0 0 0", "known are"),
    "novertex.obj": (b"f 1 2 3\n", "holds no vertices"),
    "cut.obj": (b"v 0 0 0\nv 1 1 1\nv 1 2", "line 3"),
    "word.obj": (b"v 0 0 0\nv a b c\n", "line 2"),
    "comma.obj": (b"v 0 0 0\nv 1 0 0\nv 0 nan 0\nf 1 2 3\n", "not finite"),
    "index.obj": (b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 9\n", "triangle 1 names the vertices [1, 2, 9]"),
    "zero.obj": (b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 0 1 2\n", "is not a face"),
    "edge.obj": (b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2\n", "is not a face"),
    "none.ply": (b"hello", "is not a ply"),
    "header.ply": (b"ply\nformat ascii 1.0\nelement vertex 3\n", "header is cut off"),
    "kind.ply": (b"ply\nformat binary_middle_endian 1.0\nend_header\n", "unknown ply format"),
    "type.ply": (b"ply\nformat ascii 1.0\nelement vertex 1\nproperty quaternion x\nend_header\n", "header line"),
    "xyz.ply": (b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float a\nend_header\n1\n", "x, y and z"),
    "body.ply": (ply(np.zeros((4, 3)), [[0, 1, 2]], "ascii")[:-12], "is cut off"),
    "body2.ply": (ply(np.zeros((4, 3)), [[0, 1, 2]], "binary_little_endian")[:-40], "cut off in its vertex list"),
    "none.wrl": (b"Shape {}", "does not start with #VRML"),
    "nopoints.wrl": (b"#VRML V2.0 utf8\nShape { geometry Sphere {} }", "no list of points"),
    "cut.wrl": (b"#VRML V2.0 utf8\nCoordinate { point [ 0 0 0, 1 1", "cut off inside a list"),
    "odd.wrl": (b"#VRML V2.0 utf8\nCoordinate { point [ 0 0 0, 1 1 ] }", "no multiple of three"),
    "broken.obj.gz": (b"\x1f\x8b\x00\x00", "damaged gzip"),
}


@pytest.mark.parametrize("name", BAD_SCANS)
def test_bad_scans(tmp_path, name):
    content, sentence = BAD_SCANS[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        read_scan(tmp_path / name)
    assert sentence in str(error.value) and name in str(error.value) and "\n" not in str(error.value)


def test_landmark_variants(tmp_path):
    points = np.random.default_rng(0).normal(size=(83, 3)) * 40
    rows = "\n".join(" ".join(f"{c:.9f}" for c in p) for p in points)
    (
        np.save(tmp_path / "a.npy", points.astype(np.float32)),
        np.save(tmp_path / "b.npy", points.T),
        np.save(tmp_path / "c.npy", points[None]),
    )
    (
        (tmp_path / "d.txt").write_text(rows),
        (tmp_path / "e.txt").write_text("# x y z\n" + rows.replace(" ", "\t")),
        (tmp_path / "f.csv").write_text("x;y;z\n" + rows.replace(" ", ";")),
    )
    (
        (tmp_path / "g.bnd").write_text("\n".join(f"{k}  {r}" for k, r in enumerate(rows.splitlines(), 1)) + "\n84\n"),
        (tmp_path / "h.bnd").write_text("\r\n".join(f"{k} {r}" for k, r in enumerate(rows.splitlines()))),
    )
    (
        savemat(tmp_path / "i.mat", {"x": points}),
        savemat(tmp_path / "j.mat", {"fit": {"name": "F001", "pts_3d": points.T}}),
        savemat(tmp_path / "k.mat", {"rot": np.eye(3), "pts": points}),
    )
    for name in "a.npy b.npy c.npy d.txt e.txt f.csv g.bnd h.bnd i.mat j.mat k.mat".split():
        np.testing.assert_allclose(read_landmarks(tmp_path / name), points, atol=1e-4, err_msg=name)
    sequence = np.stack([points + k for k in range(5)])
    cells = np.empty((1, 5), object)
    for k in range(5):
        cells[0, k] = points + k
    (
        savemat(tmp_path / "l.mat", {"lm": sequence}),
        savemat(tmp_path / "m.mat", {"lm": np.moveaxis(sequence, 0, -1)}),
        savemat(tmp_path / "n.mat", {"lm": cells}),
        np.save(tmp_path / "o.npy", np.moveaxis(sequence, -1, 0)),
    )
    for name in "l.mat m.mat n.mat o.npy".split():
        np.testing.assert_allclose(read_landmarks(tmp_path / name, 3), points + 3, atol=1e-6, err_msg=name)
        with pytest.raises(ValueError, match="there is no frame 9"):
            read_landmarks(tmp_path / name, 9)
    np.save(tmp_path / "p.npy", np.concatenate([points, np.zeros((1, 3))]))
    assert read_landmarks(tmp_path / "p.npy").shape == (83, 3)


BAD_LANDMARKS = {
    "none.npy": (None, "there is no file"),
    "text.npy": (b"1 2 3", "not a plain numpy file"),
    "pickle.npy": (pickle.dumps([1, 2]), "not a plain numpy file"),
    "a.xml": (b"<a/>", "known are"),
    "two.txt": (b"1 2\n3 4\n", "2 columns of numbers"),
    "mixed.txt": (b"1 2 3\n1 2\n", "row 2 has 2 cells"),
    "word.txt": (b"1 2 3\n1 b 3\n", "row 2"),
    "empty.bnd": (b"", "is empty"),
    "index.bnd": (b"1 0 0 1\n3 0 0 1\n", "do not count up by one"),
    "broken.mat": (b"MATLAB", "not a MATLAB file"),
    "nan.txt": (b"1 2 3\nnan 2 3\n", "not finite"),
    "zero.txt": (b"0 0 0\n0 0 0\n", "are zero"),
}


@pytest.mark.parametrize("name", BAD_LANDMARKS)
def test_bad_landmarks(tmp_path, name):
    content, sentence = BAD_LANDMARKS[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        read_landmarks(tmp_path / name)
    assert sentence in str(error.value) and name in str(error.value) and "\n" not in str(error.value)


def test_ambiguous_mat(tmp_path):
    savemat(tmp_path / "a.mat", {"first": np.ones((83, 3)), "second": np.ones((83, 3))})
    with pytest.raises(ValueError, match="first, second"):
        read_landmarks(tmp_path / "a.mat")
    savemat(tmp_path / "b.mat", {"angles": np.ones(7)})
    with pytest.raises(ValueError, match="holds no array of 3D points; it has angles"):
        read_landmarks(tmp_path / "b.mat")


def face51():
    p = np.zeros((51, 3))
    p[0:10] = np.stack([np.linspace(-50, 50, 10), np.full(10, 25.0), np.full(10, 5.0)], 1)
    p[10:14] = [[0, 10, 10], [0, 0, 15], [0, -10, 20], [0, -20, 28]]
    p[14:19] = np.stack([np.linspace(-12, 12, 5), np.full(5, -27.0), np.full(5, 15.0)], 1)
    p[19:25] = [[-45, 0, -5], [-35, 4, 0], [-25, 4, 0], [-15, 0, -2], [-25, -4, 0], [-35, -4, 0]]
    p[25:31] = p[19:25][[3, 2, 1, 0, 5, 4]] * [-1, 1, 1]
    p[31:51] = np.stack(
        [25 * np.cos(np.arange(20) / 20 * 6.28), -60 + 10 * np.sin(np.arange(20) / 20 * 6.28), np.full(20, 8.0)], 1
    )
    return p


@pytest.mark.parametrize("seed", range(8))
def test_unit_and_axes_in_any_pose(seed):
    from scipy.spatial.transform import Rotation

    rng = np.random.default_rng(seed)
    turn = Rotation.random(random_state=seed).as_matrix()
    face = face51() + rng.normal(0, 1.0, (51, 3))
    reference = detect_axes(face).rotation
    for unit, factor in (("mm", 1e-3), ("cm", 1e-2), ("m", 1.0)):
        moved = (face @ turn.T + rng.normal(0, 900, 3)) * 1e-3 / factor
        assert detect_unit(moved) == factor and detect_unit(moved, unit=unit) == factor
        np.testing.assert_allclose(detect_axes(moved).rotation @ turn, reference, atol=1e-9)
        assert 70 < eye_corner_distance(moved) * factor * 1e3 < 110
        for wrong in {"mm", "cm", "m"} - {unit}:
            with pytest.raises(ValueError, match=f"give unit {unit} or auto"):
                detect_unit(moved, unit=wrong)


def test_wrong_order_and_mirror_are_errors():
    face = face51()
    wrong = {
        "reversed": face[::-1],
        "mirrored": face * [-1, 1, 1],
        "eyes first": np.concatenate([face[19:31], face[:19], face[31:]]),
        "shuffled": face[np.random.default_rng(0).permutation(51)],
        "mouth first": np.concatenate([face[31:], face[:31]]),
        "one point": np.zeros((51, 3)),
    }
    for name, points in wrong.items():
        with pytest.raises(ValueError):
            detect_axes(points)
            pytest.fail(name)
    with pytest.raises(ValueError, match="51 .* 83"):
        detect_axes(face[:50])
    with pytest.raises(ValueError, match="unknown landmark convention"):
        detect_axes(face, "dlib")
    with pytest.raises(ValueError, match="unknown unit"):
        detect_unit(face, unit="inch")


def test_real_scan():
    data = os.environ.get("FIELDS_TEST_DATA")
    if not data:
        pytest.skip("FIELDS_TEST_DATA is not set")
    start = time.perf_counter()
    scan = read_scan(Path(data) / "scan" / "scan.obj")
    assert time.perf_counter() - start < 5
    points = read_landmarks(Path(data) / "scan" / "scan_lmks.npy")
    assert scan.vertices.shape == (47653, 3) and scan.faces.shape == (94445, 3) and points.shape == (51, 3)
    assert detect_unit(points) == 1.0 and abs(eye_corner_distance(points) - 0.0911) < 5e-4
    axes = detect_axes(points)
    assert (axes.left, axes.up, axes.forward) == ("+x", "+y", "+z")
    with pytest.raises(ValueError, match="mirrored"):
        detect_axes(points * [-1, 1, 1])

"""The head layer against independent implementations: smplx skinning, landmark loops, numerical gradients, trimesh."""

import dataclasses
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fields.head.files import parse_official, read_head, toy_arrays
from fields.head.flame import Head, contour_rows
from fields.head.geometry import (
    apply_maps,
    barycentric_points,
    chain_transforms,
    matrix_to_axis_angle,
    read_mesh,
    rodrigues,
    skin,
    sphere,
    vertex_normals,
    write_mesh,
)
from fields.head.landmarks import PARTS, STATIC49
from fields.head.transfer import transfer
from fields.head.pickles import HeadFileError
from fields.types import HeadParams

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]
OPEN = ROOT / "fields" / "head" / "open_head.npz"


def data(name):
    if name == "open":
        return read_head(OPEN)
    if name == "toy":
        return parse_official(toy_arrays(np.random.default_rng(1), 1), "0" * 64, "toy")
    folder = os.environ.get("FIELDS_TEST_DATA")
    if not folder or not Path(folder, "head").is_dir():
        pytest.skip("needs the extra test data (FIELDS_TEST_DATA)")
    return read_head(Path(folder, "head", "generic_model.pkl"))


def correctives(head, seed=0, millimetres=2.0):
    """The same head with random pose correctives of 2 mm RMS: the size is what one unit of one feature moves a vertex."""
    draw = np.random.default_rng(seed).normal(size=head.posedirs.shape)
    return dataclasses.replace(head, posedirs=draw / np.sqrt((draw**2).sum(1).mean()) * millimetres / 1000)


def draw_params(batch, generator, expression=50):
    r = lambda n, size=1.0: torch.randn(batch, n, generator=generator, dtype=torch.float64) * size
    params = HeadParams(r(300), r(expression), torch.zeros(batch, 2, dtype=torch.float64), r(3, 0.4), r(3, 0.8), r(3))
    return params, r(3, 0.4), r(6, 0.4)


def smplx_head(head, params, neck, eyes):
    """The head computed by the smplx package from the raw arrays of the file."""
    lbs = pytest.importorskip("smplx.lbs").lbs
    t = lambda a: torch.as_tensor(np.ascontiguousarray(a)).double()
    count = params.expression.shape[1]
    directions = t(np.concatenate([head.shapedirs[..., :300], head.shapedirs[..., 300 : 300 + count]], -1))
    pose = torch.cat([params.rotation, neck, params.jaw, eyes], 1)
    return lbs(
        torch.cat([params.shape, params.expression], 1),
        pose,
        t(head.template).expand(len(pose), -1, -1),
        directions,
        t(head.posedirs).reshape(-1, 36).T,
        t(head.joint_regressor),
        torch.tensor(head.parents),
        t(head.weights),
    )


def largest_difference(head, layer, sets, batch, seed):
    generator, worst, joints, done = torch.Generator().manual_seed(seed), 0.0, 0.0, 0
    while done < sets:
        params, neck, eyes = draw_params(batch, generator)
        expected, expected_joints = smplx_head(head, params, neck, eyes)
        output = layer(params, neck, eyes)
        worst = max(worst, (output.vertices - expected).abs().max().item())
        joints = max(joints, (output.joints - expected_joints).abs().max().item())
        done += batch
    return worst, joints, done


@pytest.mark.parametrize("name,batch,sets", [("open", 1, 10), ("open", 65, 65), ("scan", 1, 25), ("scan", 65, 65)])
def test_skinning_against_smplx(name, batch, sets):
    head = correctives(data(name))
    worst, joints, _ = largest_difference(head, Head(head, torch.float64), sets, batch, 5)
    assert worst <= 1e-6 and joints <= 1e-6, (worst, joints)


@pytest.mark.slow
def test_skinning_against_smplx_1000_sets():
    head = correctives(data("scan"))
    layer, found = Head(head, torch.float64), {}
    for batch in (1, 65):
        worst, joints, done = largest_difference(head, layer, 1000, batch, batch)
        found[f"batch {batch}"] = {
            "sets": done,
            "largest_vertex_difference_m": worst,
            "largest_joint_difference_m": joints,
        }
        assert worst <= 1e-6
    evidence = {
        "what": "Head against smplx.lbs.lbs in float64: 300 identity and 50 expression coefficients, neck, jaw, both eyes and root moving, pose correctives replaced by seeded ones of 2 mm RMS",
        "head": "scan-derived head of the extra test data",
        "head_sha256": head.sha256,
        "results": found,
    }
    (ROOT / "evidence").mkdir(exist_ok=True)
    (ROOT / "evidence" / "head_against_smplx.json").write_text(json.dumps(evidence, indent=1) + "\n")


def test_float32_is_close_to_float64():
    head = correctives(data("open"))
    params, neck, eyes = draw_params(8, torch.Generator().manual_seed(0))
    a, b = (
        Head(head, torch.float64)(params, neck, eyes),
        Head(head)(params.to(torch.float32), neck.float(), eyes.float()),
    )
    assert (a.vertices - b.vertices).abs().max() < 2e-6


# --- eyelids, padding, precision


def test_eyelids_before_and_posed():
    head = Head(data("open"), torch.float64)
    params, neck, eyes = draw_params(3, torch.Generator().manual_seed(1))
    without = head(params, neck, eyes).vertices
    params.eyelids = torch.rand(3, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    moved = torch.einsum("bk,kvc->bvc", params.eyelids, head.eyelids)
    assert torch.allclose(head(params, neck, eyes, eyelids="posed").vertices, without + moved, atol=1e-12)
    before = head(params, neck, eyes).vertices - without  # turned by the head: the same lengths where one joint rules
    world = rodrigues(params.rotation) @ rodrigues(neck)
    rigid = (head.weights[:, 1] > 0.999) & (moved[0].norm(dim=-1) > 1e-4)
    assert rigid.sum() > 20 and torch.allclose(
        before[:, rigid], torch.einsum("bij,bvj->bvi", world, moved)[:, rigid], atol=2e-5
    )
    with pytest.raises(ValueError, match="before"):
        head(params, eyelids="after")


def test_posed_joints_and_lids():
    """Lids move no joint; joints follow identity and expression."""
    head = Head(data("open"), torch.float64)
    params, neck, eyes = draw_params(2, torch.Generator().manual_seed(3))
    joints = head(params, neck, eyes).joints
    params.eyelids = params.eyelids + 1
    assert torch.equal(head(params, neck, eyes).joints, joints)
    regressed = head.joint_regressor @ (
        head.template
        + torch.einsum("bk,vck->bvc", params.shape, head.shapedirs)
        + torch.einsum("bk,vck->bvc", params.expression, head.exprdirs[..., :50])
    )
    maps, posed = chain_transforms(
        rodrigues(torch.stack([params.rotation, neck, params.jaw, eyes[:, :3], eyes[:, 3:]], 1)),
        regressed,
        head.parents,
    )
    assert torch.allclose(posed, joints, atol=1e-12)


def test_padding_and_too_many():
    head = Head(data("toy"), torch.float64)
    params, _, _ = draw_params(2, torch.Generator().manual_seed(0), 100)
    padded, short = params.to(torch.float64), params.to(torch.float64)
    padded.shape[:, 40:], padded.expression[:, 7:] = 0, 0
    short.shape, short.expression = params.shape[:, :40].clone(), params.expression[:, :7].clone()
    assert torch.allclose(head(short).vertices, head(padded).vertices, atol=1e-14)
    for field, width in (("shape", 301), ("expression", 101)):
        wrong = params.to(torch.float64)
        setattr(wrong, field, torch.zeros(2, width, dtype=torch.float64))
        with pytest.raises(ValueError, match="coefficients must be"):
            head(wrong)


def test_mixed_precision_keeps_the_layers_precision():
    head = Head(data("open"))
    params, neck, eyes = draw_params(2, torch.Generator().manual_seed(0))
    plain = head(params.to(torch.float32), neck.float(), eyes.float()).vertices
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = head(params.to(torch.float32), neck.float(), eyes.float()).vertices
    assert under.dtype == torch.float32 and torch.equal(under, plain)


def test_checkpoints_do_not_carry_the_head():
    head = Head(data("toy"))
    assert len(head.state_dict()) == 0 and len(list(head.parameters())) == 0 and len(head.sha256) == 64


# --- gradients


def test_gradients_of_the_layer():
    head = Head(correctives(data("toy")), torch.float64)
    generator = torch.Generator().manual_seed(0)
    params, neck, eyes = draw_params(2, generator, 10)
    inputs = [
        t.clone().requires_grad_()
        for t in (params.shape[:, :3], params.expression[:, :3], params.jaw, params.rotation, neck, eyes)
    ]

    def run(shape, expression, jaw, rotation, neck, eyes):
        output = head(HeadParams(shape, expression, params.eyelids, jaw, rotation, params.camera), neck, eyes)
        return output.vertices, output.joints, output.rotation

    assert torch.autograd.gradcheck(run, inputs, eps=1e-6, atol=1e-7)


def test_gradients_at_rest():
    """All zero: the place where axis-angle formulas divide by zero."""
    head = Head(correctives(data("toy")), torch.float64)
    zeros = [torch.zeros(1, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)] + [
        torch.zeros(1, 6, dtype=torch.float64, requires_grad=True)
    ]
    rest = HeadParams.neutral(dtype=torch.float64)
    run = lambda jaw, rotation, neck, eyes: (
        head(HeadParams(rest.shape, rest.expression, rest.eyelids, jaw, rotation, rest.camera), neck, eyes).vertices
    )
    assert torch.autograd.gradcheck(run, zeros, eps=1e-6, atol=1e-7)


def test_gradients_of_rotations():
    generator = torch.Generator().manual_seed(0)
    angles = torch.cat(
        [
            torch.randn(6, 3, generator=generator).double(),
            torch.randn(4, 3, generator=generator).double() * 1e-3,
            torch.zeros(1, 3).double(),
        ]
    ).requires_grad_()
    assert torch.autograd.gradcheck(rodrigues, angles, eps=1e-6, atol=1e-8)
    assert torch.autograd.gradgradcheck(rodrigues, angles, eps=1e-6, atol=1e-6)
    assert torch.autograd.gradcheck(lambda a: matrix_to_axis_angle(rodrigues(a)), angles, eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype,bound", [(torch.float64, 1e-15), (torch.float32, 3e-7)])
def test_rodrigues_against_scipy(dtype, bound):
    from scipy.spatial.transform import Rotation

    rng = np.random.default_rng(0)
    axes = rng.normal(size=(400, 3))
    axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    vectors = torch.from_numpy(
        axes
        * np.r_[np.logspace(-12, math.log10(3 * math.pi), 395), 0, 1e-300, math.pi, 2 * math.pi, math.pi / 2][:, None]
    ).to(dtype)
    expected = Rotation.from_rotvec(vectors.double().numpy()).as_matrix()
    assert np.abs(rodrigues(vectors).double().numpy() - expected).max() < bound * 4
    if dtype == torch.float64:
        back = matrix_to_axis_angle(rodrigues(vectors))
        assert (rodrigues(back) - rodrigues(vectors)).abs().max() < 1e-14 and (
            back.norm(dim=1) <= math.pi + 1e-12
        ).all()


# --- the two ways to skin


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 2, 65])
def test_loops_and_tensors_agree(dtype, batch):
    generator = torch.Generator().manual_seed(0)
    r = lambda *s: torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    for vertices in (1, 31, 32, 33, 200):
        points, maps, weights = (
            r(batch, vertices, 3),
            r(batch, 5, 3, 4),
            (torch.rand(vertices, 5, generator=generator) ** 6).to(dtype),
        )
        weights[weights < 0.1] = 0
        fast, plain = apply_maps(points, weights, maps), apply_maps(points, weights, maps, plain=True)
        scale = 1e-12 if dtype == torch.float64 else 2e-5
        assert (fast - plain).abs().max() < scale
        for a, b in zip(
            torch.autograd.grad(fast.square().sum(), (points, maps)),
            torch.autograd.grad(plain.square().sum(), (points, maps)),
        ):
            assert (a - b).abs().max() <= scale * max(1, float(b.abs().max()))
    assert (
        torch.autograd.gradcheck(
            lambda p, m: apply_maps(p, weights.double(), m),
            (points.detach().double()[:1, :5].requires_grad_(), maps.detach().double()[:1].requires_grad_()),
        )
        if vertices < 6
        else True
    )


def test_threads_change_no_bit():
    head = Head(data("open"))
    params, neck, eyes = draw_params(16, torch.Generator().manual_seed(0))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        unposed = torch.randn(16, len(head.template), 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
        maps = torch.randn(16, 5, 3, 4, generator=torch.Generator().manual_seed(2)).requires_grad_()
        out = apply_maps(unposed, head.weights, maps)
        found.append([out, *torch.autograd.grad(out.sin().sum(), (unposed, maps))])
    torch.set_num_threads(1)
    for other in found[1:]:
        for a, b in zip(found[0], other):
            assert torch.equal(a, b)


def test_functional_transforms():
    """Jacobians by forward mode, and vmap, fall back to tensors and agree with backward mode."""
    head = Head(data("toy"), torch.float64)
    rest = HeadParams.neutral(dtype=torch.float64)
    run = lambda jaw: (
        head(HeadParams(rest.shape, rest.expression, rest.eyelids, jaw, rest.rotation, rest.camera)).vertices
    )
    jaw = torch.tensor([[0.2, 0.1, -0.1]], dtype=torch.float64)
    backward = torch.autograd.functional.jacobian(run, jaw)
    assert torch.allclose(torch.func.jacfwd(run)(jaw), backward, atol=1e-12)
    assert torch.allclose(torch.func.jacrev(run)(jaw), backward, atol=1e-12)
    _, tangent = torch.func.jvp(run, (jaw,), (torch.ones_like(jaw),))
    assert torch.allclose(tangent, backward.sum((-1, -2)), atol=1e-12)


def test_skin_keeps_a_rigid_motion_rigid():
    generator = torch.Generator().manual_seed(0)
    points, joints = (
        torch.randn(2, 50, 3, generator=generator).double(),
        torch.randn(2, 5, 3, generator=generator).double(),
    )
    weights = torch.rand(50, 5, generator=generator).double().softmax(1)
    rotations = torch.eye(3).double().repeat(2, 5, 1, 1)
    rotations[:, 0] = rodrigues(torch.randn(2, 3, generator=generator).double())
    posed, moved = skin(points, joints, weights, None, rotations, [-1, 0, 1, 1, 1])
    assert torch.allclose(
        torch.nn.functional.pdist(posed[1]), torch.nn.functional.pdist(points[1]), atol=1e-10
    ) and torch.allclose(moved[:, 0], joints[:, 0])


# --- landmarks


def loop_landmarks(vertices, faces, face_index, barycentric):
    points = np.zeros((len(vertices), len(face_index[0]), 3))
    for b in range(len(vertices)):
        for k in range(len(face_index[b])):
            for corner in range(3):
                points[b, k] += barycentric[b][k][corner] * vertices[b][faces[face_index[b][k]][corner]]
    return points


@pytest.mark.parametrize("name", ["open", "scan"])
def test_landmarks_against_a_loop(name):
    raw = data(name)
    head = Head(raw, torch.float64)
    params, neck, eyes = draw_params(7, torch.Generator().manual_seed(4))
    output = head(params, neck, eyes)
    vertices = output.vertices.numpy()
    for which, e in raw.embeddings.items():
        if which == "contour17":
            continue
        expected = loop_landmarks(vertices, raw.faces, [e.face_index] * 7, [e.barycentric] * 7)
        assert np.abs(head.landmarks(output, which).numpy() - expected).max() < 1e-12, which
    e, rows = raw.embeddings["contour17"], []
    for b in range(7):  # the rule, spelled out
        turn = rodrigues(params.rotation[b]).numpy() @ rodrigues(neck[b]).numpy()
        degrees = int(np.round(math.degrees(math.atan2(-turn[2, 0], math.hypot(turn[0, 0], turn[1, 0])))))
        rows.append(min(degrees, 39) if degrees >= 0 else 39 - degrees if degrees >= -39 else 78)
    assert len(set(rows)) > 3
    expected = loop_landmarks(vertices, raw.faces, e.face_index[rows], e.barycentric[rows])
    assert np.abs(head.landmarks(output, "contour17").numpy() - expected).max() < 1e-12
    fan, static = head.landmarks(output, "fan68"), head.landmarks(output, "static51")
    assert torch.equal(fan[:, :17], head.landmarks(output, "contour17")) and torch.equal(fan[:, 17:], static)
    assert torch.equal(head.landmarks(output, "static49"), static[:, list(STATIC49)]) and len(STATIC49) == 49


def test_every_row_of_the_contour():
    for degrees in range(-90, 91):
        turn = rodrigues(torch.tensor([[0.0, math.radians(degrees), 0.0]], dtype=torch.float64))
        expected = min(degrees, 39) if degrees >= 0 else 39 - degrees if degrees >= -39 else 78
        assert contour_rows(turn).item() == expected, degrees


def test_contour_follows_the_visible_outline():
    """Turning the nose to +x hides the subject's left cheek: its contour points move in, the others stay."""
    head = Head(data("open"))
    rest = head(HeadParams.neutral())
    at = lambda degrees: head.landmarks(
        dataclasses.replace(rest, rotation=rodrigues(torch.tensor([[0.0, math.radians(degrees), 0.0]]))), "contour17"
    )[0]
    moved = (at(35.0) - at(0.0)).norm(dim=-1)  # on the head that looks ahead
    assert moved[9:].max() > 0.01 and moved[:8].max() < 1e-6
    moved = (at(-35.0) - at(0.0)).norm(dim=-1)
    assert moved[:8].max() > 0.01 and moved[9:].max() < 1e-6


def test_gradients_of_landmarks():
    head = Head(data("open"), torch.float64)
    params, neck, eyes = draw_params(1, torch.Generator().manual_seed(0))
    params.jaw.requires_grad_()
    for which in ("fan68", "mediapipe105", "points203", "bp4d83"):
        grad = torch.autograd.grad(head.landmarks(head(params), which).square().sum(), params.jaw)[0]
        assert torch.isfinite(grad).all() and grad.abs().sum() > 0


def test_missing_things_say_what_to_do():
    head = Head(data("toy"))
    output = head(HeadParams.neutral())
    for which, file in (
        ("fan68", "landmark_embedding.npy"),
        ("mediapipe105", "mediapipe_landmark_embedding.npz"),
        ("points203", "203_landmark_embedding.npz"),
        ("bp4d83", "bp4d83"),
    ):
        with pytest.raises(HeadFileError, match=file):
            head.landmarks(output, which)
    with pytest.raises(HeadFileError, match="FLAME_masks"):
        head.mask_faces("face")
    closed = HeadParams.neutral()
    closed.eyelids[:] = 1
    with pytest.raises(HeadFileError, match="eyelid"):
        head(closed)


def test_masks():
    raw = data("open")
    head = Head(raw)
    for name in raw.masks:
        inside = set(raw.masks[name].tolist())
        expected = [f for f in raw.faces.tolist() if all(c in inside for c in f)]
        assert head.mask_faces(name).tolist() == expected
        assert head.mask_faces(name, any_corner=True).tolist() == [
            f for f in raw.faces.tolist() if any(c in inside for c in f)
        ]


def test_transfer_to_a_head_of_another_mesh():
    """Landmarks, masks and lids read off the draped open head, beside those distributed for FLAME topology."""
    raw, source = data("scan"), data("open")
    bare = dataclasses.replace(raw, embeddings={}, masks={}, eyelids=None)
    full = transfer(bare, source)
    place = lambda h, n: (h.template[h.faces[h.embeddings[n].face_index]] * h.embeddings[n].barycentric[..., None]).sum(
        -2
    )
    error = np.linalg.norm(place(full, "static51") - place(raw, "static51"), axis=-1) * 1000
    assert np.median(error) < 2 and error.max() < 8, error
    for side in ("left_eyeball", "right_eyeball"):
        assert set(full.masks[side]) == set(raw.masks[side])
    both = lambda n: len(np.intersect1d(full.masks[n], raw.masks[n])) / len(np.union1d(full.masks[n], raw.masks[n]))
    assert both("face") > 0.7 and both("nose") > 0.7
    for side in range(2):
        assert np.corrcoef(full.eyelids[side].ravel(), raw.eyelids[side].ravel())[0, 1] > 0.6
    output = Head(full)(HeadParams.neutral())
    for name in PARTS:
        assert torch.isfinite(Head(full).landmarks(output, name)).all()


def test_real_components():
    assert Head(data("open")).real_components == data("open").real
    identity, expression = Head(data("scan")).real_components
    assert identity >= 100 and expression >= 50


# --- surfaces and files


def test_normals_against_trimesh():
    trimesh = pytest.importorskip("trimesh")
    head = Head(data("open"), torch.float64)
    mesh = trimesh.Trimesh(head.template.numpy(), head.faces.numpy(), process=False)
    corners = head.template[head.faces].numpy()
    expected = np.zeros((len(head.template), 3))
    for f, n, area in zip(mesh.faces, mesh.face_normals, mesh.area_faces):
        expected[f] += n * area
    expected /= np.maximum(np.linalg.norm(expected, axis=1, keepdims=True), 1e-30)
    assert np.abs(vertex_normals(head.template[None], head.faces)[0].numpy() - expected).max() < 1e-6 and len(
        corners
    ) == len(mesh.faces)


def test_normals_of_empty_triangles_are_finite():
    vertices = torch.zeros(1, 4, 3, requires_grad=True)
    normals = vertex_normals(vertices, torch.tensor([[0, 1, 2], [1, 1, 3]]))
    normals.sum().backward()
    assert torch.equal(normals, torch.zeros(1, 4, 3)) and torch.isfinite(vertices.grad).all()


def test_normal_and_point_gradients():
    vertices, faces = sphere(0)
    vertices, faces = torch.from_numpy(vertices)[None].repeat(2, 1, 1).requires_grad_(), torch.from_numpy(faces)
    assert torch.autograd.gradcheck(lambda v: vertex_normals(v, faces), vertices)
    index, bary = torch.tensor([0, 3]), torch.tensor([[0.2, 0.3, 0.5], [1.0, 0, 0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v: barycentric_points(v, faces, index, bary), vertices)


@pytest.mark.parametrize("ending", ["obj", "ply", "glb"])
@pytest.mark.parametrize("colored", [False, True])
def test_meshes_come_back_equal(tmp_path, ending, colored):
    trimesh = pytest.importorskip("trimesh")
    head = Head(data("open"))
    vertices = head(HeadParams.neutral()).vertices[0]
    colors = np.random.default_rng(0).integers(0, 256, (len(vertices), 3)).astype(np.uint8) if colored else None
    path = write_mesh(tmp_path / f"head.{ending}", vertices, head.faces, colors)
    mesh = trimesh.load(path, force="mesh", process=False)
    assert np.array_equal(np.asarray(mesh.vertices, np.float32), vertices.numpy()) and np.array_equal(
        mesh.faces, head.faces.numpy()
    )
    if colored:
        assert np.array_equal(mesh.visual.vertex_colors[:, :3], colors)
    ours = read_mesh(path)
    assert np.array_equal(ours.vertices.astype(np.float32), vertices.numpy()) and np.array_equal(
        ours.faces, head.faces.numpy()
    )
    assert (ours.colors is None) == (not colored) and (not colored or np.array_equal(ours.colors, colors))
    if ending == "glb":  # the normals, straight from the file
        blob, length = path.read_bytes(), int.from_bytes(path.read_bytes()[12:16], "little")
        scene, body = json.loads(blob[20 : 20 + length]), blob[28 + length :]
        view = scene["bufferViews"][scene["meshes"][0]["primitives"][0]["attributes"]["NORMAL"]]
        normals = np.frombuffer(body[view["byteOffset"] : view["byteOffset"] + view["byteLength"]], np.float32).reshape(
            -1, 3
        )
        assert np.array_equal(normals, vertex_normals(vertices[None], head.faces)[0].numpy()) and len(
            blob
        ) == int.from_bytes(blob[8:12], "little")


def test_bad_meshes_are_refused(tmp_path):
    vertices, faces = sphere(1)
    for bad, match in (
        (dict(vertices=vertices[None]), "one head"),
        (dict(faces=faces[:, :2]), r"\(F,3\)"),
        (dict(colors=np.zeros((3, 3))), "one colour"),
        (dict(vertices=vertices * np.nan), "finite"),
    ):
        with pytest.raises(ValueError, match=match):
            write_mesh(tmp_path / "a.obj", **{"vertices": vertices, "faces": faces, **bad})
    for name, content in (("a.ply", b"ply\nnonsense"), ("b.glb", b"glTF"), ("c.obj", b"v 0 0 0\n"), ("d.obj", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            read_mesh(tmp_path / name)


def test_open_head_is_packaged():
    head = Head.load("open")
    import hashlib

    assert head.sha256 == hashlib.sha256(OPEN.read_bytes()).hexdigest() and OPEN.stat().st_size < 12e6
    assert set(head.embeddings) == {"static51", "contour17", "full68", "mediapipe105", "points203", "bp4d83"}
    assert head.has_eyelids and {"face", "lips", "nose", "left_eyeball", "right_eyeball", "neck"} <= set(head.masks)
    assert {"front", "left", "right"} == set(head.embeddings["points203"].groups) and len(
        head.embeddings["mediapipe105"].indices
    ) == 105

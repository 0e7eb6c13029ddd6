"""Rendering against references that nobody here wrote, or that are written here a second time, slowly and plainly."""

import ctypes
import json
import math
import multiprocessing
import os
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fields.head.flame import Head
from fields.render.camera import fit_camera, ndc_to_pixels, pixels_to_ndc, project, to_pytorch3d, unproject
from fields.render.rasterize import interpolate, rasterize
from fields.render.shade import geometry_image, shade_normals
from fields.render.textured import ambient_light, directional_light, harmonics, light_vertices, render_textured
from fields.render.visibility import landmark_visibility, point_visibility

EVIDENCE = Path(__file__).parents[2] / "evidence"
DATA = os.environ.get("FIELDS_TEST_DATA")


# ---------------------------------------------------------------- references
def to_pixels(vertices, height, width):
    """Pixel coordinates in which a centre is a whole number."""
    return np.stack(
        [(vertices[..., 0] + 1) * width / 2 - 0.5, (vertices[..., 1] + 1) * height / 2 - 0.5, vertices[..., 2]], -1
    ).astype(np.float64)


def edge_distance(corners, points):
    """Distance (...,) of points (...,2) from the outline of triangles (...,3,2), pixels."""
    best = np.full(points.shape[:-1], np.inf)
    for n in range(3):
        a, d = corners[..., n, :], corners[..., (n + 1) % 3, :] - corners[..., n, :]
        t = np.clip(((points - a) * d).sum(-1) / np.maximum((d * d).sum(-1), 1e-300), 0, 1)
        best = np.minimum(best, np.hypot(*np.moveaxis(points - a - t[..., None] * d, -1, 0)))
    return best


def brute_force(vertices, faces, height, width):
    """Nearest triangle from the three sub-triangles of every triangle at every pixel; also what cannot be decided."""
    screen = to_pixels(np.asarray(vertices, np.float64), height, width)
    y, x = np.mgrid[:height, :width].astype(np.float64)
    centres = np.stack([x, y], -1)
    depths, near = np.full((len(faces), height, width), np.inf), np.zeros((height, width), bool)
    for t, face in enumerate(faces):
        corners = screen[face]
        near |= edge_distance(np.broadcast_to(corners[:, :2], (height, width, 3, 2)), centres) < 0.01
        a, b, c = (corners[n, :2] - centres.astype(np.longdouble) for n in range(3))
        parts = np.stack([p[..., 0] * q[..., 1] - p[..., 1] * q[..., 0] for p, q in ((b, c), (c, a), (a, b))], -1)
        area = (corners[1, 0] - corners[0, 0]) * (corners[2, 1] - corners[0, 1]) - (corners[1, 1] - corners[0, 1]) * (
            corners[2, 0] - corners[0, 0]
        )
        if abs(area) <= 1e-12:
            continue
        w = parts / area
        depths[t] = np.where((w >= 0).all(-1), w @ corners[:, 2], np.inf)
    order = np.sort(depths, 0)
    scale = np.maximum(1, np.abs(np.where(np.isfinite(order[0]), order[0], 0)))
    tied = np.isfinite(order[0]) & (order[min(1, len(faces) - 1)] < order[0] + 1e-5 * scale) & (len(faces) > 1)
    return np.where(np.isfinite(order[0]), depths.argmin(0), -1), order[0], near, tied


def open3d_or_skip():
    """Import open3d, with the USB library that its wheel expects of the system."""
    try:
        import libusb_package

        ctypes.CDLL(str(libusb_package.get_library_path()), mode=ctypes.RTLD_GLOBAL)
    except (ImportError, OSError):
        pass
    return pytest.importorskip("open3d", reason="open3d is not installed")


def scan_head():
    if not DATA:
        pytest.skip("FIELDS_TEST_DATA is not set: the scan-derived head is not available")
    return Head.load(Path(DATA) / "head" / "generic_model.pkl")


HEADS = {"open": lambda: Head.load("open"), "scan": scan_head}


def turned_heads(head, count, seed):
    """Random identities and expressions in random poses: vertices (B,V,3) and cameras (B,3)."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, 20, generator=g), torch.randn(count, 10, generator=g)
    vertices = (
        head.template
        + torch.einsum("vcn,bn->bvc", head.shapedirs[..., :20], rows[0])
        + torch.einsum("vcn,bn->bvc", head.exprdirs[..., :10], rows[1])
    )
    angles = (torch.rand(count, 3, generator=g) - 0.5) * torch.tensor([1.0, 2.4, 0.6])
    return vertices @ torch.matrix_exp(torch.stack([hat(a) for a in angles])).transpose(1, 2), torch.tensor(
        [[7.0, 0.0, 0.02]]
    ).repeat(count, 1)


def hat(a):
    x, y, z = a
    zero = torch.zeros_like(x)
    return torch.stack([torch.stack([zero, -z, y]), torch.stack([z, zero, -x]), torch.stack([-y, x, zero])])


def grid(rows, columns, seed, jitter):
    """A bumpy sheet over the picture; without jitter its corners lie on pixel centres or between them."""
    r = np.random.default_rng(seed)
    y, x = np.meshgrid(np.linspace(-1, 1, rows), np.linspace(-1, 1, columns), indexing="ij")
    vertices = np.stack([x, y, r.normal(size=x.shape) * 0.1], -1)
    vertices[1:-1, 1:-1, :2] += r.uniform(-jitter, jitter, (rows - 2, columns - 2, 2))
    i = np.arange(rows * columns).reshape(rows, columns)
    p, q, s, t = i[:-1, :-1], i[1:, :-1], i[:-1, 1:], i[1:, 1:]
    faces = np.concatenate([np.stack([p, q, s], -1).reshape(-1, 3), np.stack([s, q, t], -1).reshape(-1, 3)])
    return torch.from_numpy(vertices.reshape(-1, 3)).float(), torch.from_numpy(faces)


# ---------------------------------------------------------------- camera
def test_camera_follows_the_facts():
    s, tx, ty = 7.3, 0.01, -0.02
    camera, points = torch.tensor([[s, tx, ty]], dtype=torch.float64), torch.randn(1, 30, 3, dtype=torch.float64)
    for p, q in zip(points[0].tolist(), project(points, camera)[0].tolist()):
        assert np.allclose(q, [s * (p[0] + tx), -s * (p[1] + ty), -s * p[2]], atol=1e-12)
    assert torch.allclose(unproject(project(points, camera), camera), points)
    assert torch.autograd.gradcheck(project, (points.requires_grad_(), camera.requires_grad_()))


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_fitted_camera_is_the_least_squares_one(seed):
    g = torch.Generator().manual_seed(seed)
    points, target = (
        torch.randn(2, 12, 3, generator=g, dtype=torch.float64),
        torch.randn(2, 12, 2, generator=g, dtype=torch.float64),
    )
    weights = torch.rand(2, 12, generator=g, dtype=torch.float64)
    camera = fit_camera(points, target, weights)
    for b in range(2):  # s, s*tx, s*ty are linear unknowns
        rows = np.concatenate(
            [
                np.stack([points[b, :, 0], np.ones(12), np.zeros(12)], 1),
                np.stack([-points[b, :, 1], np.zeros(12), -np.ones(12)], 1),
            ]
        )
        w = np.sqrt(np.tile(weights[b], 2))
        s, sx, sy = np.linalg.lstsq(
            rows * w[:, None], np.concatenate([target[b, :, 0], target[b, :, 1]]) * w, rcond=None
        )[0]
        assert np.allclose(camera[b], [s, sx / s, sy / s], rtol=1e-6)


def test_pixels():
    points = torch.rand(5, 7, 3) * 4 - 2
    assert torch.allclose(pixels_to_ndc(ndc_to_pixels(points, (48, 64)), (48, 64)), points, atol=1e-6)
    centres = ndc_to_pixels(torch.tensor([[(3 + 0.5) / 64 * 2 - 1, (5 + 0.5) / 48 * 2 - 1]]), (48, 64))
    assert torch.allclose(centres, torch.tensor([[3.5, 5.5]]), atol=1e-5)


# ---------------------------------------------------------------- rasteriser
number = st.floats(-1.5, 1.5, width=32)
on_grid = st.integers(-5, 5).map(lambda n: n / 4)
corner = st.tuples(st.one_of(number, on_grid), st.one_of(number, on_grid), st.one_of(number, on_grid))


@st.composite
def soups(draw):
    """Triangles of every sort: plain, slivers, without area, twice the same, far outside."""
    triangles = []
    for kind in draw(
        st.lists(st.sampled_from(["plain", "sliver", "flat", "copy", "far", "point"]), min_size=1, max_size=9)
    ):
        a, b, c = (np.array(draw(corner), np.float32) for _ in range(3))
        if kind == "sliver":
            c = (
                a
                + (b - a) * np.float32(draw(st.floats(0, 1, width=32)))
                + np.float32(1e-4) * np.array([1, -1, 0], np.float32)
            )
        if kind == "flat":
            c = (a + b) / 2
        if kind == "point":
            b = c = a
        if kind == "far":
            a, b, c = (
                v * np.array([s, s, 1], np.float32)
                for v, s in zip((a, b, c), draw(st.tuples(*[st.sampled_from([1.0, 30.0, 1e4, 1e8])] * 3)))
            )
        if kind == "copy" and triangles:
            a, b, c = (v.copy() for v in triangles[-1])
        triangles.append([a, b, c])
    return np.array(triangles, np.float32).reshape(-1, 3), np.arange(3 * len(triangles)).reshape(-1, 3)


@given(soups(), st.sampled_from([(8, 8), (16, 11), (5, 20)]))
@settings(max_examples=100, deadline=None)
def test_soup_against_brute_force(soup, size):
    vertices, faces = soup
    index, depth, near, tied = brute_force(vertices, faces, *size)
    for backend in ("cpu", "torch"):
        for dtype in (torch.float32, torch.float64):
            found = rasterize(torch.from_numpy(vertices)[None].to(dtype), torch.from_numpy(faces), size, backend)
            ours, sure = found.face_index[0].numpy(), ~near & ~tied
            assert (ours == index)[sure].all()
            clear = ~near & (index >= 0)
            assert np.allclose(found.depth[0].numpy()[clear], depth[clear], rtol=1e-4, atol=1e-4)
            hit = ours >= 0
            assert np.isfinite(found.barycentrics.numpy()).all() and np.isinf(found.depth[0].numpy()[~hit]).all()


def test_crowded_soups_against_brute_force():
    """Sixty triangles of every size over each other: two thirds of the decidable pixels lie on a triangle."""
    hits, decided = 0, 0
    for seed in range(20):
        r = np.random.default_rng(seed)
        middle, size = r.uniform(-1, 1, (60, 1, 3)), 10 ** r.uniform(-2, 0.3, (60, 1, 1))
        vertices, faces = (
            (middle + size * r.uniform(-1, 1, (60, 3, 3))).reshape(-1, 3).astype(np.float32),
            np.arange(180).reshape(60, 3),
        )
        index, depth, near, tied = brute_force(vertices, faces, 24, 31)
        sure = ~near & ~tied
        for backend in ("cpu", "torch"):
            found = rasterize(torch.from_numpy(vertices)[None], torch.from_numpy(faces), (24, 31), backend)
            assert (found.face_index[0].numpy() == index)[sure].all()
            clear = sure & (index >= 0)
            assert np.allclose(found.depth[0].numpy()[clear], depth[clear], rtol=1e-4, atol=1e-4)
        hits, decided = hits + int(clear.sum()), decided + int(sure.sum())
    assert decided > 10_000 and hits > 0.5 * decided, (hits, decided)


@given(soups())
@settings(max_examples=60, deadline=None)
def test_back_ends_agree_everywhere(soup):
    """Not only away from edges: both evaluate the same expressions, so they see the same pixels."""
    vertices, faces = torch.from_numpy(soup[0])[None], torch.from_numpy(soup[1])
    a, b = rasterize(vertices, faces, (13, 17), "cpu"), rasterize(vertices, faces, (13, 17), "torch")
    assert torch.equal(a.face_index, b.face_index)
    assert torch.allclose(a.barycentrics, b.barycentrics, atol=1e-6)


@given(
    st.integers(0, 10_000),
    st.sampled_from([0.0, 0.02]),
    st.sampled_from([(9, 9), (17, 9), (6, 11)]),
    st.sampled_from([8, 16, 15]),
)
@settings(max_examples=30, deadline=None)
def test_neighbours_share_no_pixel_and_leave_no_gap(seed, jitter, shape, size):
    vertices, faces = grid(*shape, seed, jitter)
    for backend in ("cpu", "torch"):
        alone = rasterize(vertices[faces], torch.arange(3)[None], size, backend)
        assert (alone.mask.sum(0) == 1).all()


def test_equal_depth_goes_to_the_lower_index():
    vertices = torch.tensor([[[-1.0, -1, 0.3], [1, -1, 0.3], [0, 1, 0.3]]]).repeat(1, 3, 1)
    faces = torch.arange(9).view(3, 3)
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        for backend in ("cpu", "torch"):
            assert rasterize(vertices, faces[order], 32, backend).face_index.unique().tolist() == [-1, 0]


@pytest.mark.parametrize("name", HEADS)
def test_back_ends_agree_on_heads(name):
    head = HEADS[name]()
    points = project(*turned_heads(head, 3, 5))
    a, b = rasterize(points, head.faces, 128, "cpu"), rasterize(points, head.faces, 128, "torch")
    assert torch.equal(a.face_index, b.face_index)
    assert torch.allclose(a.barycentrics, b.barycentrics, atol=1e-5) and torch.allclose(a.depth, b.depth, atol=1e-6)


def test_memory_bound_of_the_torch_back_end_changes_nothing():
    from fields.render.rasterize import _rasterize_torch

    vertices, faces = grid(9, 9, 0, 0.02)
    whole = _rasterize_torch(vertices[None], faces, 32, 32)
    parts = _rasterize_torch(vertices[None], faces, 32, 32, most=100)
    assert torch.equal(whole.face_index, parts.face_index)


def agreement_with_open3d(head, count, seed, size=224):
    """Share of decidable pixels that see the same triangle, and the largest difference of depth there."""
    o3d = open3d_or_skip()
    points = project(*turned_heads(head, count, seed))
    found, faces = rasterize(points, head.faces, size), head.faces.numpy()
    centre = (np.arange(size) + 0.5) / size * 2 - 1
    x, y = np.meshgrid(centre, centre)
    rays = np.stack([x, y, np.full_like(x, -5), 0 * x, 0 * x, np.ones_like(x)], -1).astype(np.float32)
    equal, decided, worst = 0, 0, 0.0
    for n in range(count):
        scene = o3d.t.geometry.RaycastingScene(nthreads=1)
        scene.add_triangles(o3d.core.Tensor(points[n].numpy()), o3d.core.Tensor(faces.astype(np.uint32)))
        cast = scene.cast_rays(o3d.core.Tensor(rays), nthreads=1)
        theirs, depth = cast["primitive_ids"].numpy().astype(np.int64), cast["t_hit"].numpy() - 5
        theirs[~np.isfinite(depth)] = -1
        ours, screen = found.face_index[n].numpy(), to_pixels(points[n].numpy(), size, size)[:, :2]
        pixels, near = (
            np.stack(np.meshgrid(np.arange(size), np.arange(size)), -1).astype(float),
            np.zeros((size, size), bool),
        )
        for index in (ours, theirs):
            near |= (index >= 0) & (edge_distance(screen[faces[np.maximum(index, 0)]], pixels) < 0.01)
        same = ours == theirs
        sure = ~near & ((ours >= 0) | (theirs >= 0))
        equal, decided = equal + int((same & sure).sum()), decided + int(sure.sum())
        both = same & ~near & (ours >= 0)
        worst = max(worst, float(np.abs(found.depth[n].numpy()[both] - depth[both]).max()))
    return equal / decided, worst


@pytest.mark.parametrize("name", HEADS)
def test_against_open3d(name):
    share, worst = agreement_with_open3d(HEADS[name](), 3, 1)
    assert share >= 0.999 and worst <= 1e-4


@pytest.mark.slow
def test_against_open3d_at_length():
    report = {}
    for name, load in HEADS.items():
        share, worst = agreement_with_open3d(load(), 60, 2)
        report[name] = {"pictures": 60, "side": 224, "same_triangle": share, "largest_depth_difference": worst}
        assert share >= 0.999 and worst <= 1e-4
    EVIDENCE.mkdir(exist_ok=True)
    (EVIDENCE / "render_open3d.json").write_text(json.dumps(report, indent=1) + "\n")


def test_errors():
    vertices, faces = torch.zeros(1, 3, 3), torch.tensor([[0, 1, 2]])
    for bad in (math.nan, math.inf):
        for backend in ("cpu", "torch"):
            broken = vertices.clone()
            broken[0, 1, 2] = bad
            with pytest.raises(ValueError, match="NaN or infinite"):
                rasterize(broken, faces, 8, backend)
    with pytest.raises(ValueError, match="there are 3"):
        rasterize(vertices, faces + 1, 8)
    with pytest.raises(ValueError, match="-1 to 1"):
        rasterize(vertices, torch.tensor([[0, 1, -1]]), 8)
    with pytest.raises(ValueError, match="needs"):
        rasterize(vertices[0], faces, 8)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_nothing_to_draw(backend):
    none = torch.zeros(0, 3, dtype=torch.long)
    assert (rasterize(torch.zeros(2, 4, 3), none, 6, backend).face_index == -1).all()
    assert rasterize(torch.zeros(0, 4, 3), none, 6, backend).face_index.shape == (0, 6, 6)
    behind = rasterize(torch.tensor([[[5.0, 5, 0], [6, 5, 0], [5, 6, 0]]]), torch.tensor([[0, 1, 2]]), (4, 6), backend)
    assert behind.face_index.shape == (1, 4, 6) and (behind.face_index == -1).all() and (behind.mask == 0).all()


def test_threads_do_not_change_bits():
    head = Head.load("open")
    vertices, camera = turned_heads(head, 5, 3)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            v = vertices.clone().requires_grad_()
            image, mask = geometry_image(v, head.faces, camera, 64)
            image.square().sum().backward()
            one = rasterize(project(vertices, camera)[:1], head.faces, 64)
            results.append((image.detach(), mask, v.grad, one.face_index, one.depth))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def _in_worker(seed):
    vertices, faces = grid(9, 9, seed, 0.02)
    torch.set_num_threads(2)
    return rasterize(vertices[None].repeat(3, 1, 1), faces, 24).face_index.sum().item()


def test_forked_workers_and_many_threads():
    expected = [_in_worker(n) for n in range(4)]  # uses the pool of this process first
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map_async(_in_worker, range(4)).get(60) == expected
    answers = [None] * 8

    def work(n):
        answers[n] = _in_worker(n % 4)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert answers == expected * 2


def test_without_numba():
    """GPU machines may lack numba: everything imports, the torch back end works, and the other says what is missing."""
    script = """
import sys
sys.modules["numba"] = None
import torch
from fields.render.rasterize import rasterize
import fields.render.shade, fields.render.textured, fields.render.visibility
corners, faces = torch.tensor([[[-1.0, -1, 0], [3, -1, 0], [-1, 3, 0]]]), torch.tensor([[0, 1, 2]])
assert (rasterize(corners, faces, 4, "torch").face_index == 0).all()
try: rasterize(corners, faces, 4)
except ImportError as e: print(e)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "needs numba" in out.stdout, out.stderr


def fake_pytorch3d(monkeypatch):
    """PyTorch3D's documented conventions in a few lines: x left, y up, the shorter side from -1 to 1, faces numbered through."""

    class Meshes:
        def __init__(self, verts, faces):
            self.verts, self.faces = verts, faces

    def rasterize_meshes(meshes, image_size, blur_radius, faces_per_pixel, perspective_correct):
        H, W = image_size
        short = min(H, W)
        y = torch.from_numpy((1 - (2 * np.arange(H) + 1) / H) * H / short)
        x = torch.from_numpy((1 - (2 * np.arange(W) + 1) / W) * W / short)
        p = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flip(-1)
        index = torch.full((len(meshes.verts), H, W, 1), -1)
        depth, weights = (
            torch.full(index.shape, -1.0, dtype=torch.float64),
            torch.full((*index.shape, 3), -1.0, dtype=torch.float64),
        )
        for b, (v, f) in enumerate(zip(meshes.verts.double(), meshes.faces)):
            assert (v[:, 2] > 0).all()
            for t, face in enumerate(f):
                a, c, d = v[face]
                m = torch.stack([c[:2] - a[:2], d[:2] - a[:2]], 1)
                w = (p - a[:2]) @ torch.linalg.inv(m).T
                w = torch.cat([1 - w.sum(-1, keepdim=True), w], -1)
                z = w @ v[face, 2]
                hit = (w > 0).all(-1) & ((index[b, ..., 0] < 0) | (z < depth[b, ..., 0]))
                index[b, ..., 0][hit] = t + b * len(f)
                depth[b, ..., 0][hit], weights[b, ..., 0, :][hit] = z[hit], w[hit]
        return index, depth, weights, None

    for name in (
        "pytorch3d",
        "pytorch3d.renderer",
        "pytorch3d.renderer.mesh",
        "pytorch3d.renderer.mesh.rasterize_meshes",
        "pytorch3d.structures",
    ):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["pytorch3d.renderer.mesh.rasterize_meshes"].rasterize_meshes = rasterize_meshes
    sys.modules["pytorch3d.structures"].Meshes = Meshes


@pytest.mark.parametrize("size", [(12, 12), (10, 15), (15, 10)])
def test_pytorch3d_conventions(monkeypatch, size):
    fake_pytorch3d(monkeypatch)
    vertices, faces = grid(5, 5, 3, 0.1)
    vertices = torch.stack([vertices * 0.83 + 0.011, vertices * 0.5 - 0.107])
    a, b = rasterize(vertices, faces, size), rasterize(vertices, faces, size, "pytorch3d")
    assert torch.equal(a.face_index, b.face_index)
    assert torch.allclose(a.barycentrics, b.barycentrics.float(), atol=1e-5)
    hit = a.face_index >= 0
    assert torch.allclose(a.depth[hit], b.depth.float()[hit], atol=1e-5) and torch.isinf(b.depth[~hit]).all()


def test_real_pytorch3d():
    pytest.importorskip("pytorch3d", reason="PyTorch3D is not installed")
    head = Head.load("open")
    points = project(*turned_heads(head, 2, 4))
    a, b = rasterize(points, head.faces, 96), rasterize(points, head.faces, 96, "pytorch3d")
    assert (a.face_index == b.face_index).float().mean() > 0.999
    assert torch.allclose(to_pytorch3d(points)[..., :2], -points[..., :2])


# ---------------------------------------------------------------- interpolation and shading
def weights_by_solving(vertices, faces, index):
    """Barycentric coordinates (B,H,W,3) with autograd, by the inverse of a 2 x 2 matrix."""
    B, H, W = index.shape
    y, x = torch.meshgrid(*((torch.arange(n, dtype=vertices.dtype) + 0.5) / n * 2 - 1 for n in (H, W)), indexing="ij")
    corners = torch.stack([v[faces[i.clamp_min(0)]][..., :2] for v, i in zip(vertices, index)])
    matrix = torch.stack([corners[..., 0, :] - corners[..., 2, :], corners[..., 1, :] - corners[..., 2, :]], -1)
    matrix = torch.where((index >= 0)[..., None, None], matrix, torch.eye(2, dtype=vertices.dtype))
    w = torch.linalg.solve(matrix, (torch.stack([x, y], -1) - corners[..., 2, :])[..., None])[..., 0]
    return torch.cat([w, 1 - w.sum(-1, keepdim=True)], -1) * (index >= 0)[..., None]


def plain_image(vertices, faces, camera, size, normalise):
    """The five-light picture, step by step with autograd."""
    points = project(vertices, camera)
    index = rasterize(points, faces, size).face_index
    a, b, c = (vertices[:, faces[:, n]] for n in range(3))
    n = torch.cross(b - a, c - a, dim=-1)
    normals = torch.zeros_like(vertices)
    for k in range(3):
        normals = normals.index_add(1, faces[:, k], n)
    normals = normals / normals.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    w = weights_by_solving(points, faces, index)
    pixel = torch.stack(
        [(w[i][..., None] * normals[i][faces[index[i].clamp_min(0)]]).sum(-2) for i in range(len(vertices))]
    )
    if normalise:
        pixel = pixel / pixel.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    lights = torch.tensor([[-1, 1, 1], [1, 1, 1], [-1, -1, 1], [1, -1, 1], [0, 0, 1]], dtype=vertices.dtype)
    lights = lights / lights.norm(dim=1, keepdim=True)
    grey = (pixel @ lights.T).clamp(0, 1).mul(1.7).mean(-1) * 180 / 255 * (index >= 0)
    return grey[:, None].expand(-1, 3, -1, -1)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("region", ["face", "all"])
def test_geometry_image_and_gradient_against_plain_torch(normalise, region):
    head = Head.load("open")
    faces = head.mask_faces("face") if region == "face" else head.faces
    vertices, camera = (t.double() for t in turned_heads(head, 2, 7))
    target, results = torch.rand(2, 3, 48, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), []
    for function in (lambda *a: geometry_image(*a)[0], plain_image):
        v, c = vertices.clone().requires_grad_(), camera.clone().requires_grad_()
        image = function(v, faces, c, 48, normalise)
        ((image - target) ** 2).sum().backward()
        results.append((image.detach(), v.grad, c.grad))
    for a, b in zip(*results):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-9 * float(b.abs().max()))


def test_single_precision_gradient():
    head = Head.load("open")
    vertices, camera = turned_heads(head, 2, 8)
    grads = []
    for dtype in (torch.float32, torch.float64):
        v = vertices.to(dtype).clone().requires_grad_()
        geometry_image(v, head.faces, camera.to(dtype), 64)[0].square().sum().backward()
        grads.append(v.grad.double())
    assert (grads[0] - grads[1]).norm() < 1e-3 * grads[1].norm()


def test_slivers_do_not_blow_up_gradients():
    """A pixel inside a triangle that is a hundred-thousandth of a pixel wide sends no gradient to positions."""
    vertices = torch.tensor([[[-0.9, 0.0625, 0], [0.9, 0.0625 + 1e-7, 0.02], [0.0, 0.0625 - 1e-7, 0.01]]])
    values = torch.tensor([[[0.0], [1.0], [5.0]]])
    for dtype in (torch.float32, torch.float64):
        v, a = (t.to(dtype).clone().requires_grad_() for t in (vertices, values))
        seen = rasterize(v, torch.tensor([[0, 1, 2]]), 16)
        assert (seen.face_index == 0).any()
        interpolate(seen, a, torch.tensor([[0, 1, 2]]), v).sum().backward()
        assert v.grad.abs().max() == 0 and a.grad.abs().max() > 0
        w = (v.detach() * 0.1).requires_grad_()
        geometry_image(w, torch.tensor([[0, 1, 2]]), torch.tensor([[10.0, 0, 0]]), 16)[0].sum().backward()
        assert w.grad.isfinite().all()


def test_gradients_against_numerical_ones():
    vertices, faces = grid(4, 4, 1, 0.1)
    vertices = (vertices * torch.tensor([0.09, 0.09, 0.05]))[None].double().requires_grad_()
    camera = torch.tensor([[9.7, 0.0013, 0.0021]], dtype=torch.float64, requires_grad=True)
    for normalise in (False, True):
        draw = lambda v, c: geometry_image(v, faces, c, 9, normalise)[0]
        assert torch.autograd.gradcheck(draw, (vertices, camera), eps=1e-8, atol=1e-4)
    points, values = (
        project(vertices, camera).detach().requires_grad_(),
        torch.rand(1, 16, 2, dtype=torch.float64, requires_grad=True),
    )
    seen = rasterize(points, faces, 9)
    assert torch.autograd.gradcheck(lambda a, p: interpolate(seen, a, faces, p), (values, points), eps=1e-7, atol=1e-5)
    assert torch.autograd.gradcheck(lambda a: interpolate(seen, a[0], faces), (values,))


def test_interpolation_on_other_devices_is_the_same_formula():
    """The torch gradient, run on the CPU by hand, equals the compiled one."""
    from fields.render.rasterize import _interpolate_back_torch

    vertices, faces = grid(6, 6, 2, 0.05)
    points, values = vertices[None].double().repeat(2, 1, 1), torch.rand(2, 36, 3, dtype=torch.float64)
    seen, gradient = rasterize(points, faces, 16), torch.rand(2, 3, 16, 16, dtype=torch.float64)
    a, p = values.clone().requires_grad_(), points.clone().requires_grad_()
    interpolate(seen, a, faces, p).backward(gradient)
    first, second = _interpolate_back_torch(seen.face_index, seen.barycentrics, values, faces, points, gradient, True)
    assert torch.allclose(first, a.grad) and torch.allclose(second, p.grad, atol=1e-9)


def test_five_lights():
    for degrees, brightness in ((0, 0.794), (30, 0.688), (60, 0.499), (90, 0.277), (180, 0)):
        a = math.radians(degrees)
        n = torch.tensor([math.sin(a), 0, math.cos(a)]).view(1, 3, 1, 1)
        assert abs(float(shade_normals(n)) - brightness) < 6e-4
        tile = torch.tensor([[[-1.0, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]]]) * 0.1
        c, s = math.cos(a), math.sin(a)
        turned = tile @ torch.tensor([[c, 0, s], [0, 1, 0], [-s, 0, c]]).T
        if degrees in (90,):
            continue  # seen edge on
        image, mask = geometry_image(turned, torch.tensor([[0, 1, 2], [0, 2, 3]]), torch.tensor([[5.0, 0, 0]]), 16)
        assert mask.sum() > 10 and (image[:, :1][mask > 0] - brightness).abs().max() < 6e-4
        assert (image[:, :1][mask == 0] == 0).all()


def test_image_of_half_precision_and_empty_batch():
    head = Head.load("open")
    vertices, camera = turned_heads(head, 1, 9)
    assert geometry_image(vertices.bfloat16(), head.faces, camera, 16)[0].dtype == torch.float32
    assert geometry_image(vertices[:0], head.faces, camera[:0], 16)[0].shape == (0, 3, 16, 16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_agrees_with_cpu():
    head = Head.load("open")
    vertices, camera = turned_heads(head, 4, 6)
    results = []
    for device in ("cpu", "cuda"):
        v, c = vertices.to(device).requires_grad_(), camera.to(device)
        image, mask = geometry_image(v, head.faces.to(device), c, 224)
        image.square().sum().backward()
        results.append(
            (rasterize(project(v, c), head.faces.to(device), 224).face_index.cpu(), image.detach().cpu(), v.grad.cpu())
        )
    (a, b, c), (d, e, f) = results
    assert (a == d).float().mean() > 0.9999 and (b - e).abs().mean() < 1e-5 and (c - f).norm() < 1e-2 * c.norm()


# ---------------------------------------------------------------- visibility
def test_visibility_against_rays():
    """A landmark is seen if a ray from just before it to the viewer hits nothing."""
    o3d = open3d_or_skip()
    head = Head.load("open")
    vertices, camera = turned_heads(head, 4, 11)
    chosen = torch.randperm(len(head.template), generator=torch.Generator().manual_seed(1))[:800]
    seen = landmark_visibility(vertices[:, chosen], vertices, head.faces, camera, size=224, bias=0.004) > 0
    agree = []
    for n in range(4):
        scene = o3d.t.geometry.RaycastingScene(nthreads=1)
        scene.add_triangles(o3d.core.Tensor(vertices[n].numpy()), o3d.core.Tensor(head.faces.numpy().astype(np.uint32)))
        start = vertices[n, chosen].numpy() + [0, 0, 0.004]
        rays = np.concatenate([start, np.broadcast_to([0, 0, 1], start.shape)], 1).astype(np.float32)
        free = ~np.isfinite(scene.cast_rays(o3d.core.Tensor(rays), nthreads=1)["t_hit"].numpy())
        inside = (project(vertices[n : n + 1, chosen], camera[:1])[0, :, :2].abs() <= 1).all(-1).numpy()
        agree.append((seen[n].numpy() == free)[inside].mean())
    assert np.mean(agree) > 0.95


def test_visibility_rules():
    nothing = rasterize(torch.full((1, 3, 3), 5.0), torch.tensor([[0, 1, 2]]), 8)
    points = torch.tensor([[[0.0, 0, 3], [1.01, 0, 0], [0.99, -0.99, 0]]])
    assert point_visibility(points, nothing, 0.0).tolist() == [[1, 0, 1]]
    assert point_visibility(points, nothing, 0.0, softness=0.1)[0, 0] == 1


# ---------------------------------------------------------------- textured
def test_textured_against_plain_numpy():
    from scipy.ndimage import map_coordinates

    head = Head.load("open")
    vertices, _ = turned_heads(head, 1, 12)
    vertices, faces, camera = vertices[0].double(), head.faces, np.array([6.5, 0.004, 0.02])
    r = np.random.default_rng(0)
    uv, texture = r.random((len(vertices), 2)), r.random((20, 30, 4)).astype(np.float32)
    background, light = (
        r.random((60, 80, 3)).astype(np.float32),
        ambient_light((0.4, 0.3, 0.3)) + directional_light((1, 0.5, 1), (0.5, 0.6, 0.7)),
    )
    occlusion, normals = r.random(len(vertices)), r.normal(size=(len(vertices), 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    image, mask = render_textured(
        vertices,
        faces,
        uv,
        texture,
        camera,
        light,
        background,
        samples=1,
        specular=0.3,
        shininess=16,
        occlusion=occlusion,
        normals=normals,
    )
    points = project(vertices[None], torch.from_numpy(camera)[None])
    seen = rasterize(points, faces, (60, 80))
    spread = lambda a: interpolate(seen, torch.from_numpy(np.ascontiguousarray(a)).double(), faces)[0].numpy()
    u, v = spread(uv)
    place = [(1 - v) * 20 - 0.5, u * 30 - 0.5]
    colour = np.stack(
        [map_coordinates(texture[..., n].astype(float), place, order=1, mode="nearest") for n in range(4)]
    )
    matt = np.maximum(harmonics(normals) @ light, 0) * occlusion[:, None]
    toward = light[[3, 1, 2]] @ [0.3, 0.6, 0.1]
    half = toward / np.linalg.norm(toward) + [0, 0, 1]
    shine = np.maximum(normals @ half / np.linalg.norm(half), 0) ** 16 * occlusion
    expected = (
        colour[:3] * spread(matt)
        + colour[3] * spread(shine[:, None])[0] * (0.3 * np.linalg.norm(light[1:4], axis=0))[:, None, None]
    )
    hit = seen.face_index[0].numpy() >= 0
    expected = np.where(hit, np.clip(expected, 0, 1), background.transpose(2, 0, 1)).transpose(1, 2, 0)
    assert (mask == hit).all() and np.abs(image - expected).max() < 2e-3 and np.abs(image - expected).mean() < 1e-5


def test_light_at_vertices_is_light_at_pixels():
    """Evaluating light at the vertices is close to evaluating it at every pixel's normal."""
    head = Head.load("open")
    vertices, camera = turned_heads(head, 1, 13)
    light = ambient_light((0.3, 0.3, 0.3)) + directional_light((1, 0.5, 0.6), (0.7, 0.7, 0.7))
    image, mask = render_textured(
        vertices[0],
        head.faces,
        np.zeros((len(head.template), 2)),
        np.ones((2, 2, 3)),
        camera[0],
        light,
        np.zeros((128, 128, 3)),
        samples=1,
    )
    from fields.head.geometry import vertex_normals

    points = project(vertices, camera)
    normals = interpolate(rasterize(points, head.faces, 128), vertex_normals(vertices, head.faces), head.faces)[0]
    normals = torch.nn.functional.normalize(normals, dim=0).permute(1, 2, 0).numpy()
    expected = np.clip(harmonics(normals) @ light, 0, 1)
    assert np.abs(image - expected)[mask > 0].mean() < 5e-3


def test_textured_options():
    head = Head.load("open")
    vertices, camera = turned_heads(head, 2, 14)
    uv, texture = np.random.default_rng(1).random((len(head.template), 2)), np.full((4, 4, 3), 0.5, np.float32)
    background, light = np.full((64, 64, 3), 0.2, np.float32), ambient_light((0.8, 0.8, 0.8))
    both, masks = render_textured(vertices, head.faces, uv, texture, camera[0], light, background)
    single, mask = render_textured(vertices[1], head.faces, uv, texture, camera[0], light, background)
    assert np.array_equal(both[1], single) and np.array_equal(masks[1], mask) and both.dtype == np.float32
    assert np.abs(single[mask == 1] - 0.4).max() < 1e-4 and np.array_equal(single[mask == 0], background[mask == 0])
    edge = (mask > 0) & (mask < 1)
    assert edge.any() and np.allclose(
        single[edge], 0.4 * mask[edge][:, None] + 0.2 * (1 - mask[edge][:, None]), atol=1e-5
    )
    seams = render_textured(
        vertices[1],
        head.faces,
        uv[head.faces.numpy()].reshape(-1, 2),
        texture,
        camera[0],
        light,
        background,
        uv_faces=np.arange(3 * len(head.faces)).reshape(-1, 3),
    )[0]
    assert np.allclose(seams, single, atol=1e-6)
    with pytest.raises(ValueError, match="NaN"):
        render_textured(vertices[0] * math.nan, head.faces, uv, texture, camera[0], light, background)
    with pytest.raises(ValueError, match="not there"):
        render_textured(vertices[0], head.faces, uv[:5], texture, camera[0], light, background)
    assert light_vertices(np.eye(3), light).shape == (3, 4)


# ---------------------------------------------------------------- speed
@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_speed_against_a_plain_peer(name):
    """224 x 224, batch 8, turn by turn in the same process; bars on the processor time of one thread, which a busy machine changes least."""
    from fields.bench import bench_rasterizer, bench_textured, machine

    scan_head() if name == "scan" else None
    path = "open" if name == "open" else str(Path(DATA) / "head" / "generic_model.pkl")
    found = {"rasterizer": bench_rasterizer(path), "textured": bench_textured(path), "machine": machine()}
    file = EVIDENCE / "render_speed.json"
    old = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({k: v for k, v in old.items() if k in HEADS} | {name: found}, indent=1) + "\n")
    times = {k: t["processor_ms"] for k, t in found["rasterizer"]["times_an_image"].items()}
    assert (
        times["visibility"] <= 1.5
        and times["with_shading_and_backward"] <= 4 * 1.3
        and times["visibility"] < 0.7 * times["plain_zbuffer_one_thread"]
    )
    assert found["textured"]["times_an_image"]["textured"]["processor_ms"] < 9


@pytest.mark.slow
def test_speed_of_the_head_layer():
    """At most twice its blend-shape product, forward and backward; the ratio of processor times hardly depends on the machine."""
    from fields.bench import bench_head

    ratios = bench_head()["times_the_product"]
    assert ratios["head"] <= 2 < ratios["plain_torch"], ratios


def test_bench_file(tmp_path, monkeypatch):
    from fields import bench

    monkeypatch.setattr(
        bench,
        "BENCHES",
        {"one": lambda: {"times": bench.measure({"nothing": lambda: None}, rounds=2)}, "two": lambda: {"value": 2}},
    )
    lines = []
    bench.write_bench(tmp_path / "b.json", ["one"], lines.append)
    kept = bench.write_bench(tmp_path / "b.json", ["two"], lines.append)
    assert set(kept) == {"one", "two"} == set(json.loads((tmp_path / "b.json").read_text())) and len(lines) == 2
    assert set(kept["one"]["times"]["nothing"]) == {"wall_ms", "processor_ms"} and kept["two"]["machine"]["cores"]
    with pytest.raises(ValueError, match="no bench is called 'three'; there are one, two"):
        bench.write_bench(tmp_path / "b.json", ["three"])

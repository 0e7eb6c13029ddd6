"""Scans: cropping, closest points, energy, fits, labels, against independent implementations."""

import ctypes, dataclasses, json, os, signal, threading, time
from pathlib import Path
import numpy as np
import pytest
import torch
from fields.config import ScanConfig
from fields.head.flame import Head
from fields.scans.closest import Surface, SurfaceTorch, closest_points
from fields.scans.crop import ScanError, crop_faces, ellipse_crop
from fields.scans.energy import align, evaluate, match_order, normal_equations, prepare_target, robust
from fields.scans.file import fit_file
from fields.scans.fit import Fit, fit_scan, fit_sequence, fit_shape, residual_picture, spread, state_of
from fields.scans.labels import ExpressionLabels, crop_dataset, crop_item, fit_dataset, place
from fields.scans.surface import State, at_shape, head_model, jacobian, pose, rotation_matrix
from fields.types import HeadParams

EVIDENCE = Path(__file__).parents[2] / "evidence"


@pytest.fixture(scope="module")
def head():
    return Head.load("open")


@pytest.fixture(scope="module")
def model(head):
    return head_model(head)


@pytest.fixture(scope="module")
def small(head):
    return head_model(head, 60, 24)


def test_data():
    folder = os.environ.get("FIELDS_TEST_DATA")
    if not folder:
        pytest.skip("FIELDS_TEST_DATA is not set")
    return Path(folder)


test_data.__test__ = False


def open3d():
    "open3d, with the USB library of its own package loaded first where the system lacks it."
    try:
        import libusb_package

        ctypes.CDLL(str(libusb_package.get_library_path()), mode=ctypes.RTLD_GLOBAL)
    except (ImportError, OSError):
        pass
    return pytest.importorskip("open3d", exc_type=ImportError)


def random_state(model, seed, size=1.0):
    rng = np.random.default_rng(seed)
    c = np.zeros(model.basis.shape[1])
    c[:40] = rng.normal(0, size, 40)
    c[model.identities : model.identities + 20] = rng.normal(0, 0.7 * size, 20)
    return State(
        c,
        rotation_matrix(rng.normal(0, 0.4, 3)),
        rng.normal(0, 0.2, 3),
        np.array([abs(rng.normal(0, 0.1)), 0.01, -0.01]) * size,
    )


def sample(model, state, count=8000, noise=0.0, seed=0, which="static51"):
    "Points of a posed surface, its landmarks."
    rng, posed = np.random.default_rng(seed), pose(model, state)
    corners = model.faces[rng.integers(0, len(model.faces), count)].astype(int)
    points = np.einsum("nk,nkc->nc", rng.dirichlet(np.ones(3), count), posed.vertices[corners]) + rng.normal(
        0, noise, (count, 3)
    )
    corners, weights = model.landmarks[which]
    return points, np.einsum("lk,lkc->lc", weights, posed.vertices[corners])


def real_scan():
    from fields.data.marks import read_landmarks
    from fields.data.scanfiles import read_scan

    folder = test_data() / "scan"
    return read_scan(folder / "scan.obj").vertices, read_landmarks(folder / "scan_lmks.npy")


# cropping


def test_crop_does_not_depend_on_unit_frame_or_order():
    rng = np.random.default_rng(0)
    landmarks, points = rng.normal(size=(51, 3)) * [0.05, 0.06, 0.01], rng.normal(size=(5000, 3)) * 0.06
    mask = ellipse_crop(points, landmarks).mask
    turn = rotation_matrix(rng.normal(size=3))
    assert (ellipse_crop(1000 * points @ turn.T - 40, 1000 * landmarks @ turn.T - 40).mask == mask).all()
    order = rng.permutation(5000)
    assert (ellipse_crop(points[order], landmarks[rng.permutation(51)]).mask == mask[order]).all()


def test_crop_is_equation_13():
    rng = np.random.default_rng(1)
    landmarks, points = rng.normal(size=(83, 3)) * [0.05, 0.06, 0.01], rng.normal(size=(3000, 3)) * 0.06
    centred = landmarks - landmarks.mean(0)
    value, vector = np.linalg.eigh(np.cov(centred.T))
    a, b = vector[:, -1], vector[:, -2]
    u, v = (points - landmarks.mean(0)) @ a, (points - landmarks.mean(0)) @ b
    expected = (u / np.abs(centred @ a).max()) ** 2 + (v / np.abs(centred @ b).max()) ** 2 <= 1
    assert (ellipse_crop(points, landmarks).mask == expected).all()


def test_crop_options_and_errors():
    rng = np.random.default_rng(2)
    landmarks, points = rng.normal(size=(51, 3)) * [0.05, 0.06, 0.01], rng.normal(size=(5000, 3)) * 0.06
    plain, wide, flat = (ellipse_crop(points, landmarks, *o) for o in ((1.0, 0.0), (1.3, 0.0), (1.0, 0.02)))
    assert plain.mask.sum() < wide.mask.sum() and (wide.mask | ~plain.mask).all()
    assert (np.abs(flat.plane(points)[flat.mask, 2]) <= 0.02).all()
    with pytest.raises(ScanError, match="not finite"):
        ellipse_crop(points, np.where(landmarks > 0.05, np.nan, landmarks))
    with pytest.raises(ScanError, match="unit or in frame"):
        ellipse_crop(points * 1e-4 + 1, landmarks)
    with pytest.raises(ValueError, match="margin"):
        ellipse_crop(points, landmarks, margin=0)


def test_crop_of_the_real_scan():
    points, landmarks = real_scan()
    crop = ellipse_crop(points, landmarks)
    assert (crop.mask.sum(), len(points)) == (7894, 47653)
    assert (((crop.plane(landmarks)[:, :2] / crop.radii) ** 2).sum(1) > 1).sum() == 9


def test_cropped_triangles_are_whole():
    faces = np.array([[0, 1, 2], [1, 2, 3], [3, 4, 5]])
    mask = np.array([True, True, True, False, True, True])
    assert (crop_faces(mask, faces) == [[0, 1, 2]]).all()


# closest points


def test_closest_points_agree_with_open3d(model):
    o3d = open3d()
    rng = np.random.default_rng(0)
    vertices = pose(model, random_state(model, 0)).vertices
    points = vertices[rng.integers(0, len(vertices), 4000)] + rng.normal(0, 0.01, (4000, 3))
    scene = o3d.t.geometry.RaycastingScene()
    scene.add_triangles(vertices.astype(np.float32), model.faces.astype(np.uint32))
    theirs = np.linalg.norm(scene.compute_closest_points(points.astype(np.float32))["points"].numpy() - points, axis=1)
    distance, point, face, weights = closest_points(points, vertices, model.faces)
    assert np.abs(distance - theirs).max() < 2e-7
    assert np.abs((vertices[model.faces[face]] * weights[..., None]).sum(1) - point).max() < 1e-12
    assert (weights > -1e-12).all() and np.abs(weights.sum(1) - 1).max() < 1e-12


def test_guess_threads_and_leaf_change_nothing(model):
    import numba

    rng = np.random.default_rng(1)
    points = model.template[rng.integers(0, len(model.template), 2000)] + rng.normal(0, 0.02, (2000, 3))
    first = Surface(model.template, model.faces).closest(points)[0]
    assert (Surface(model.template, model.faces, leaf=9).closest(points)[0] == first).all()
    assert (model.tree.closest(points, rng.integers(0, len(model.faces), 2000))[0] == first).all()
    threads = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        assert (model.tree.closest(points)[0] == first).all()
    finally:
        numba.set_num_threads(threads)


def test_closest_points_with_degenerate_triangles():
    vertices = np.array([[0, 0, 0], [1, 0, 0], [2, 0, 0], [0.5, 0, 0], [5, 5, 5.0]])
    faces = np.array([[0, 1, 3], [1, 1, 2], [4, 4, 4]])
    distance, point, _, weights = closest_points(np.array([[1.5, 2, 0], [5, 5, 6], [0.25, 1, 0.0]]), vertices, faces)
    assert np.allclose(distance, [2, 1, 1]) and np.allclose(point, [[1.5, 0, 0], [5, 5, 5], [0.25, 0, 0]])
    assert np.isfinite(weights).all()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-7)])
def test_torch_search_is_exact_too(model, dtype, tolerance):
    rng = np.random.default_rng(2)
    meshes = np.stack([pose(model, random_state(model, k)).vertices for k in range(2)])
    points = np.stack(
        [m[rng.integers(0, len(m), 100)] + rng.normal(0, s, (100, 3)) for m, s in zip(meshes, (0.002, 0.05))]
    )
    distance, face, weights = SurfaceTorch(model.template, model.faces).closest(
        torch.tensor(points, dtype=dtype), torch.tensor(meshes, dtype=dtype)
    )
    expected = closest_points(points, meshes, model.faces)[0]
    assert np.abs(distance.numpy() - expected).max() < tolerance
    at = (
        torch.tensor(meshes).to(dtype)[torch.arange(2)[:, None, None], torch.tensor(model.faces).long()[face]]
        * weights[..., None]
    ).sum(2)
    assert np.abs((at - torch.tensor(points, dtype=dtype)).norm(dim=-1).numpy() - expected).max() < tolerance


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(model, value):
    with pytest.raises(ValueError, match="not a finite number"):
        model.tree.closest(np.full((3, 3), value))
    with pytest.raises(ValueError, match="not a finite number"):
        model.tree.copy().move(np.full_like(model.template, value))
    with pytest.raises(ValueError, match="not a finite number"):
        SurfaceTorch(model.template, model.faces).closest(
            torch.full((1, 3, 3), value), torch.tensor(model.template)[None].float()
        )


# surface and energy


def with_correctives(model):
    "The same head with pose correctives, which the open one may lack."
    return dataclasses.replace(model, correctives=np.random.default_rng(5).normal(0, 2e-3, (len(model.template), 3, 9)))


@pytest.mark.parametrize("correctives", [False, True])
def test_every_column_of_the_jacobian(head, correctives):
    model = head_model(head, 20, 10, lids=head.eyelids is not None, dtype=np.float64)
    if correctives:
        model = with_correctives(model)
    rng = np.random.default_rng(0)
    P = model.basis.shape[1]
    state = State(
        rng.normal(size=P), rotation_matrix(rng.normal(size=3)), rng.normal(size=3), np.array([0.3, 0.1, -0.05])
    )
    corners, weights, direction = (
        model.faces[rng.integers(0, len(model.faces), 80)].astype(int),
        rng.dirichlet(np.ones(3), 80),
        rng.normal(size=(80, 3)),
    )
    along = lambda s: np.einsum("nk,nkc,nc->n", weights, pose(model, s).vertices[corners], direction)
    numeric = np.stack(
        [(along(state.moved(1e-6 * e)) - along(state.moved(-1e-6 * e))) / 2e-6 for e in np.eye(P + 9)], 1
    )
    assert np.abs(jacobian(model, pose(model, state), corners, weights, direction) - numeric).max() < 5e-9


def layer(head, state, n=300, m=50):
    "Vertices of the head layer in float64."
    from fields.head.geometry import matrix_to_axis_angle

    t = lambda x: torch.as_tensor(np.asarray(x), dtype=torch.float64)[None]
    lids = state.coefficients[n + m :] if len(state.coefficients) > n + m else np.zeros(2)
    params = HeadParams(
        t(state.coefficients[:n]),
        t(state.coefficients[n : n + m]),
        t(lids),
        t(state.jaw),
        matrix_to_axis_angle(t(state.rotation)),
        t([1.0, 0, 0]),
    )
    return head(params).vertices[0].numpy() + state.translation


def test_pose_equals_the_head_layer():
    head = Head.load("open", dtype=torch.float64)
    model = head_model(head, lids=head.eyelids is not None, dtype=np.float64)
    state = random_state(model, 3)
    state.coefficients[-2:] = [0.6, 0.3]
    assert np.abs(pose(model, state).vertices - layer(head, state)).max() < 1e-7
    person = at_shape(model, state.coefficients[:300])
    own = dataclasses.replace(state, coefficients=state.coefficients[300:])
    assert np.abs(pose(person, own).vertices - pose(model, state).vertices).max() < 1e-12


def test_energy_and_gradient_against_autograd(head):
    "The official energy once more, from the head layer, open3d's closest points and automatic differentiation."
    o3d = open3d()
    layer64 = Head.load("open", dtype=torch.float64)
    model, config = head_model(layer64, dtype=np.float64), ScanConfig(max_points=0)
    points, landmarks = sample(model, random_state(model, 4), 2000, 2e-3)
    state = random_state(model, 4).moved(
        np.r_[np.random.default_rng(0).normal(0, 0.3, 350), np.zeros(3), np.full(3, 0.002), np.zeros(3)]
    )
    target = prepare_target(model, points, landmarks, "static51", config)
    value = evaluate(model, model.tree.copy(), target, state, config)
    from fields.head.geometry import matrix_to_axis_angle

    t = lambda x: torch.tensor(np.asarray(x), dtype=torch.float64)
    x = [t(state.coefficients[:300]), t(state.coefficients[300:]), t(state.jaw), t(state.translation)]
    for v in x:
        v.requires_grad_(True)
    params = HeadParams(
        x[0][None],
        x[1][None],
        torch.zeros(1, 2, dtype=torch.float64),
        x[2][None],
        matrix_to_axis_angle(t(state.rotation)[None]),
        torch.ones(1, 3, dtype=torch.float64),
    )
    output = layer64(params)
    vertices = output.vertices[0] + x[3]
    scene = o3d.t.geometry.RaycastingScene()
    scene.add_triangles(vertices.detach().numpy().astype(np.float32), model.faces.astype(np.uint32))
    found = scene.compute_closest_points(points.astype(np.float32))
    triangle, uv = found["primitive_ids"].numpy().astype(int), found["primitive_uvs"].numpy().astype(float)
    weights = t(np.c_[1 - uv.sum(1), uv])
    nearest = (vertices[torch.tensor(model.faces).long()[triangle]] * weights[..., None]).sum(1)
    d2 = (nearest - t(points)).square().sum(1)
    sigma = config.sigma
    rho = sigma * d2 / (sigma**2 + d2**2).sqrt()
    marks = layer64.landmarks(output, "static51")[0] + x[3]
    energy = (
        4 * rho.mean()
        + 0.01 * (marks - t(landmarks)).square().sum()
        + 1e-8 * x[0].square().sum()
        + 1e-8 * x[1].square().sum()
        + 1e-6 * x[2].square().sum()
    )
    assert abs(energy.item() / value.energy - 1) < 1e-4
    gradient = torch.autograd.grad(energy, x)
    ours = 2 * normal_equations(model, target, value, config)[1]
    parts = np.split(ours, [300, 350, 353, 356])
    for a, b in zip((parts[0], parts[1], parts[4], parts[3]), gradient):
        assert np.linalg.norm(a - b.numpy()) < 5e-3 * np.linalg.norm(b.numpy())


def test_robust_function_of_the_official_tool():
    value, slope = robust(np.array([1e-6, 2.5e-5, 1e-4, 4e-4, 2.5e-3]), 1e-4)
    assert np.allclose(value / np.array([1e-6, 2.5e-5, 1e-4, 4e-4, 2.5e-3]), [1, 0.970, 0.707, 0.243, 0.040], atol=1e-3)
    h = 1e-9
    assert np.allclose(
        slope[1:], (robust(np.array([2.5e-5, 1e-4, 4e-4, 2.5e-3]) + h, 1e-4)[0] - value[1:]) / h, rtol=1e-3
    )


# fits


def test_exact_recovery_without_noise(model):
    "With priors that hardly count, the parameters that made a whole surface come back."
    true = random_state(model, 7)
    points, landmarks = sample(model, true, 9000)
    config = ScanConfig(shape_weight=1e-8, expression_weight=1e-8, pose_weight=1e-8, max_points=0, max_steps=40)
    fit = fit_scan(model, points, landmarks, config=config, tolerance=1e-10)
    found = pose(model, state_of(model, fit))
    assert np.abs(found.vertices - pose(model, true).vertices).max() < 2e-5
    assert np.abs(fit.jaw - true.jaw).max() < 1e-3
    assert fit.residual_p95 < 1e-6


def test_identity_given_the_expression_is_exact(model):
    true = random_state(model, 8)
    points, landmarks = sample(model, true, 6000)
    config = ScanConfig(expression_weight=1e-8, pose_weight=1e-8, max_steps=40)
    fit = fit_scan(model, points, landmarks, config=config, shape=true.coefficients[:300], tolerance=1e-10)
    assert np.abs(fit.expression[:20] - true.coefficients[300:320]).max() < 0.02
    assert np.abs(fit.jaw - true.jaw).max() < 1e-3
    assert (fit.shape == true.coefficients[:300].astype(np.float32)).all()


@pytest.mark.parametrize("which", ["static51", "bp4d83"])
def test_outliers_hardly_matter(small, head, which):
    if which not in small.landmarks:
        pytest.skip(f"the open head has no {which}")
    true, rng = random_state(small, 9), np.random.default_rng(0)
    points, landmarks = sample(small, true, 8000, 3e-4, which=which)
    stray = landmarks[rng.integers(0, len(landmarks), 3000)] + rng.normal(0, 0.03, (3000, 3))
    face = head.masks["face"].numpy()

    def error(p):
        fit = fit_scan(small, p, landmarks, which)
        return np.median(
            np.linalg.norm(pose(small, state_of(small, fit)).vertices - pose(small, true).vertices, axis=1)[face]
        )

    clean, dirty = error(points), error(np.concatenate([points, stray]))
    assert clean < 4e-4 and dirty < clean + 4e-4


def test_start_does_not_decide_the_result(small):
    points, landmarks = sample(small, random_state(small, 10), 5000, 3e-4)
    first = fit_scan(small, points, landmarks, tolerance=1e-6, config=ScanConfig(max_steps=40))
    other = fit_scan(small, *sample(small, random_state(small, 11), 5000, 3e-4))
    again = fit_scan(small, points, landmarks, start=other, tolerance=1e-6, config=ScanConfig(max_steps=40))
    assert abs(again.energy / first.energy - 1) < 0.02


def test_same_input_same_bits(small):
    points, landmarks = sample(small, random_state(small, 12), 4000, 3e-4)
    a, b = (fit_scan(small, points, landmarks) for _ in range(2))
    assert (a.expression == b.expression).all() and a.energy == b.energy


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p, l: (p * 1000, l * 1000), "millimetres; multiply scan and landmarks by 0.001"),
        (lambda p, l: (p * 100, l * 100), "centimetres"),
        (lambda p, l: (p * 7, l * 7), "unit is wrong"),
        (lambda p, l: (p * [-1, 1, 1], l * [-1, 1, 1]), "mirrored"),
        (lambda p, l: (p[:, [1, 0, 2]], l[:, [1, 0, 2]]), "mirrored"),
        (lambda p, l: (p, l[::-1]), "order is not that of static51"),
        (lambda p, l: (p, np.random.default_rng(0).permutation(l)), "order is not that of static51"),
        (lambda p, l: (p, np.r_[l[:19], l[25:31], l[19:25], l[31:]]), "order is not that of static51"),
        (lambda p, l: (p[:, [2, 0, 1]], l), "another scan, unit or frame"),
        (lambda p, l: (p * 1000, l), "another scan, unit or frame"),
        (lambda p, l: (p, l[:49]), "49 landmarks were given"),
        (lambda p, l: (p, l * np.nan), "51 of 51 landmarks are not finite"),
        (lambda p, l: (p[:100], l), "at least 200"),
        (lambda p, l: (np.where(p > p.max(0) - 1e-3, np.nan, p), l), "scan points are not finite"),
    ],
)
def test_wrong_input_is_an_error_not_a_bad_fit(small, change, message):
    points, landmarks = sample(small, random_state(small, 13), 5000, 3e-4)
    with pytest.raises(ScanError, match=message):
        fit_scan(small, *change(points, landmarks))


@pytest.mark.parametrize(
    "settings",
    [
        dict(sigma=1e2),
        dict(sigma=1e-8),
        dict(scan_weight=0.0),
        dict(shape_weight=-1.0),
        dict(landmark_weight=float("nan")),
    ],
)
def test_wrong_settings(small, settings):
    points, landmarks = sample(small, random_state(small, 13), 500)
    with pytest.raises(ValueError, match="scans.sigma|weights of the scan energy"):
        fit_scan(small, points, landmarks, config=ScanConfig(**settings))


def test_any_rotation_of_the_scan_is_accepted(small):
    points, landmarks = sample(small, random_state(small, 14), 5000, 2e-4)
    fit = fit_scan(small, points, landmarks)
    for axis in ([np.pi, 0, 0], [0, np.pi, 0], [-np.pi / 2, 0, 0], [1, -2, 1]):
        R = rotation_matrix(np.array(axis, float))
        turned = fit_scan(small, points @ R.T + 2, landmarks @ R.T + 2)
        assert np.abs(turned.expression - fit.expression).max() < 0.05


def test_sequence_shares_identity_and_saves_time(small):
    true = random_state(small, 15)
    scans = []
    for k in range(4):
        state = random_state(small, 20 + k)
        state.coefficients[:60] = true.coefficients[:60]
        scans.append(sample(small, state, 5000, 3e-4, seed=k))
    fits = fit_sequence(small, scans, config=ScanConfig(max_points=2000, subject_frames=3))
    assert all((f.shape == fits[0].shape).all() for f in fits) and all(f.converged for f in fits)
    with pytest.raises(ScanError, match="frame 1:"):
        fit_sequence(small, [scans[0], (scans[1][0] * 1000, scans[1][1])], shape=true.coefficients[:60])
    assert spread(100, 4) == [0, 33, 66, 99] and spread(1, 4) == [0]


def test_fit_files_and_heads(small, tmp_path):
    points, landmarks = sample(small, random_state(small, 16), 3000, 3e-4)
    fit = fit_scan(small, points, landmarks)
    fit.save(tmp_path / "fit.npz")
    fit.to_json(tmp_path / "fit.json")
    assert (Fit.load(tmp_path / "fit.npz").expression == fit.expression).all()
    values = json.loads((tmp_path / "fit.json").read_text())
    assert set(values) >= {"scan_to_surface_mm", "landmarks_mm", "points", "seconds", "head_sha256"} and set(
        values["scan_to_surface_mm"]
    ) == {"median", "mean", "p95"}
    with pytest.raises(ValueError, match="not interchangeable"):
        state_of(dataclasses.replace(small, sha256="f" * 64), fit)
    with pytest.raises(ValueError, match="is not a fit"):
        Fit.load(tmp_path / "fit.json")
    assert residual_picture(small, fit, points) is not None


@pytest.mark.parametrize("unit, factor", [("auto", 1000), ("mm", 1000), ("cm", 100), ("m", 1)])
def test_fit_file(head, small, tmp_path, unit, factor):
    settings = ScanConfig(shape_components=60, expression_components=24, max_points=2000)
    from fields.head.geometry import write_mesh

    state = random_state(small, 17)
    points, landmarks = sample(small, state, 4000, 2e-4)
    write_mesh(tmp_path / "scan.ply", factor * points, np.array([[0, 1, 2]]))
    np.save(tmp_path / "landmarks.npy", factor * landmarks)
    fit = fit_file(
        tmp_path / "scan.ply", tmp_path / "landmarks.npy", head=head, unit=unit, out=tmp_path / "out", config=settings
    )
    assert fit.residual_median < 5e-4
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"fit.json", "fit.npz", "fit.obj", "residual.png"}
    if unit == "m":
        with pytest.raises(ScanError, match="scan.ply with .*mm"):
            fit_file(tmp_path / "scan.ply", tmp_path / "landmarks.npy", head=head, unit="mm", config=settings)


def test_the_real_scan():
    "FINDINGS: a plain Gauss-Newton reaches 0.323 / 0.383 mm; here with 4000 of 7894 points, the others unseen."
    points, landmarks = real_scan()
    cropped = points[ellipse_crop(points, landmarks).mask]
    head = Head.load(test_data() / "head" / "generic_model.pkl")
    model, config = head_model(head), ScanConfig()
    fit = fit_scan(model, cropped, landmarks, config=config)
    everything = ScanConfig(max_points=0, max_steps=60)
    best = fit_scan(model, cropped, landmarks, config=everything, tolerance=1e-6)
    target = prepare_target(model, cropped, landmarks, "static51", everything)
    energy = lambda f: evaluate(model, model.tree.copy(), target, state_of(model, f), everything).energy
    unseen = np.setdiff1d(np.arange(len(cropped)), prepare_target(model, cropped, landmarks, "static51", config).used)
    assert 1000 * fit.residual_median <= 0.33 and 1000 * fit.residual_mean <= 0.40
    assert energy(fit) <= 1.01 * energy(best)
    assert 1000 * np.median(fit.residuals[unseen]) <= 0.34 and fit.steps <= 8


# datasets of scans


def world(small, folder, subjects=("F001", "M002"), frames=3, which="bp4d83", tasks=("T1", "T2")):
    "Scans in millimetres on disk, as a reader's items, and their true expressions."
    from fields.data.records import DatasetItem
    from fields.head.geometry import write_mesh

    items, truth = [], {}
    for s, subject in enumerate(subjects):
        person = random_state(small, 100 + s)
        for task in tasks:
            for frame in range(frames):
                rng = np.random.default_rng([s, int(task[1]), frame])
                state = random_state(small, int(rng.integers(1 << 30)))
                state.coefficients[:60] = person.coefficients[:60]
                points, landmarks = sample(small, state, 3000, 3e-4, seed=int(rng.integers(1 << 30)), which=which)
                id = f"bp4d/{subject}/{task}/{frame:04d}"
                path = folder / f"{id}.ply"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_mesh(path, 1000 * points, np.array([[0, 1, 2]]))
                np.save(path.with_suffix(".npy"), 1000 * landmarks)
                items.append(
                    DatasetItem(
                        id, "bp4d", "train", path, subject=subject, scan=path, landmarks3d=path.with_suffix(".npy")
                    )
                )
                truth[id] = state
    return items, truth


SETTINGS = ScanConfig(shape_components=60, expression_components=24, max_points=800, subject_frames=2, max_steps=6)


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*.npz"))}


def test_labels_of_a_dataset(small, tmp_path):
    items, truth = world(small, tmp_path / "data")
    calls = []
    report = crop_dataset(items, SETTINGS, tmp_path / "cropped")
    labels = fit_dataset(
        items, small, SETTINGS, tmp_path / "out", tmp_path / "cropped", progress=lambda *now: calls.append(now)
    )
    assert (report["usable"], report["rejected"]) == (12, {}) and calls[-1][:2] == (12, 12)
    assert labels.accepted.all() and list(labels.ids) == sorted(truth)
    for subject in ("F001", "M002"):
        assert (labels.shape[labels.subject == subject] == labels.shape[labels.subject == subject][0]).all()
    true = np.array([truth[i].coefficients[60:80] for i in labels.ids])
    assert np.sqrt(np.mean((labels.expression[:, :20] - true) ** 2)) < 0.5 * np.sqrt(np.mean(true**2))
    labels.save(tmp_path / "labels.npz")
    again = ExpressionLabels.load(tmp_path / "labels.npz")
    assert (again.expression == labels.expression).all() and again.head_sha256 == small.sha256
    assert "time" not in (tmp_path / "out" / "report.json").read_text()


def test_failures_are_isolated_and_counted(small, tmp_path):
    items, _ = world(small, tmp_path / "data", frames=4, tasks=("T1",))
    items[1].scan.write_bytes(b"")
    np.save(items[2].landmarks3d, np.load(items[2].landmarks3d)[::-1])
    items[3].landmarks3d.unlink()
    np.save(items[5].landmarks3d, np.load(items[5].landmarks3d) * np.nan)
    items[6] = dataclasses.replace(items[6], scan=None)
    labels = fit_dataset(items, small, SETTINGS, tmp_path / "out")
    assert list(labels.accepted) == [True, False, False, False, True, False, False, True]
    summary = labels.summary()
    assert summary["accepted"] + sum(summary["rejected"].values()) == len(items) == 8
    assert (
        "empty" in labels.rejected[1]
        and "order" in labels.rejected[2]
        and "no file" in labels.rejected[3]
        and labels.rejected[6].startswith("no scan")
    )
    assert not labels.expression[1].any() and not labels.shape[1].any()


def test_subject_without_a_usable_scan(small, tmp_path):
    items, _ = world(small, tmp_path / "data", frames=2, tasks=("T1",))
    for item in items[:2]:
        item.scan.write_bytes(b"ply")
    labels = fit_dataset(items, small, SETTINGS, tmp_path / "out")
    assert list(labels.accepted) == [False, False, True, True]


def test_bad_fits_are_rejected_with_their_residual(small, tmp_path):
    items, _ = world(small, tmp_path / "data", frames=2, tasks=("T1",), subjects=("F001",))
    strict = dataclasses.replace(SETTINGS, max_residual=1e-5)
    with pytest.raises(ValueError, match="could be fitted.*mm from the scan"):
        fit_dataset(items, small, strict, tmp_path / "out")


def test_resume_gives_the_same_files(small, tmp_path):
    items, _ = world(small, tmp_path / "data", frames=2)
    fit_dataset(items, small, SETTINGS, tmp_path / "whole")
    whole = content(tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(done, total, label):
        if done >= 3:
            raise Stop

    with pytest.raises(Stop):
        fit_dataset(items, small, SETTINGS, tmp_path / "parts", progress=stop)
    part = content(tmp_path / "parts")
    assert 0 < len(part) < len(whole)
    (tmp_path / "parts" / "fits" / f"{items[0].id}.npz").write_bytes(b"cut off")
    fit_dataset(items, small, SETTINGS, tmp_path / "parts")
    assert content(tmp_path / "parts") == whole
    with pytest.raises(ValueError, match="another settings"):
        fit_dataset(items, small, ScanConfig(), tmp_path / "parts")
    with pytest.raises(ValueError, match="another head"):
        fit_dataset(items, dataclasses.replace(small, sha256="0" * 64), SETTINGS, tmp_path / "parts")


def test_neutral_scans_give_identities(small, tmp_path):
    items, _ = world(small, tmp_path / "data", subjects=("I001", "I002"), frames=2, which="static51", tasks=("T1",))
    labels = fit_dataset(items, small, SETTINGS, tmp_path / "out", neutral=True)
    assert len(labels) == 2 and not labels.expression.any() and (labels.shape[0] != labels.shape[1]).any()


def test_ids_stay_inside_their_folder():
    for id in ("../x", "/etc/x", "a/../../b", ""):
        with pytest.raises(ValueError, match="not a usable id"):
            place("folder", id)


def kill_once(pids, folder, count):
    "Kill a worker as soon as some files are there; return a thread."

    def wait():
        end = time.monotonic() + 120
        while time.monotonic() < end:
            found = pids() if len(list(folder.rglob("*.npz"))) >= count else []
            if found:
                return os.kill(found[0], signal.SIGKILL)
            time.sleep(0.02)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_landmarks_in_an_order_of_their_own(small, tmp_path):
    "BP4D's contours may begin anywhere; that is found once for a dataset, and the labels are the same."
    items, _ = world(small, tmp_path / "data", frames=1, tasks=("T1",), subjects=("F001", "F002", "M001"))
    plain = fit_dataset(items, small, SETTINGS, tmp_path / "plain")
    order = np.r_[
        10:20,
        0:10,
        np.roll(np.arange(28, 36)[::-1], 3),
        np.roll(np.arange(20, 28)[::-1], 1),
        47:35:-1,
        np.roll(np.arange(48, 60), 6),
        np.roll(np.arange(60, 68), 4),
        82:67:-1,
    ]
    for item in items:
        np.save(item.landmarks3d, np.load(item.landmarks3d)[order])
    other = fit_dataset(items, small, SETTINGS, tmp_path / "other")
    assert other.accepted.all() and np.abs(other.expression - plain.expression).max() < 1e-4
    assert not json.loads((tmp_path / "other" / "report.json").read_text())["landmarks_in_order"]
    own = np.einsum("lk,lkc->lc", small.landmarks["bp4d83"][1], small.template[small.landmarks["bp4d83"][0]])
    assert (match_order(own[None], own) == np.arange(83)).all()


def test_lids_are_found(head, tmp_path):
    if head.eyelids is None:
        pytest.skip("the open head has no lids")
    model = head_model(head, 60, 24, lids=True)
    state = random_state(model, 18)
    state.coefficients[-2:] = [0.8, 0.5]
    points, landmarks = sample(model, state, 8000, 2e-4)
    fit = fit_scan(model, points, landmarks)
    assert np.abs(fit.eyelids - [0.8, 0.5]).max() < 0.15
    plain = fit_scan(head_model(head, 60, 24), points, landmarks)
    assert (plain.eyelids == 0).all() and plain.energy > fit.energy


def mark(folder, name):
    "Write a line that says who did this task; a task of `run_tasks`."
    with open(folder / name, "a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(0.05)
    return name


def test_killed_helpers_lose_nothing(tmp_path, monkeypatch):
    "Helpers are killed twice while they work; every task and every follower is reported once, and each helper did some."
    import multiprocessing
    from fields.scans import workers

    monkeypatch.setattr(workers, "ALONE", 0)
    killed, seen, follow = [], [], lambda name: [] if "-" in name else [(mark, (f"{name}-next",))]
    for name in workers.run_tasks(tmp_path, [(mark, (f"task{k}",)) for k in range(100)], follow, workers=2):
        seen.append(name)
        busy = {int(p) for f in tmp_path.iterdir() for p in f.read_text().split()} - {os.getpid(), *killed}
        if busy and len(killed) < 2:
            killed.extend(p.pid for p in multiprocessing.active_children() if p.pid in busy)
            os.kill(killed[-1], signal.SIGKILL)
    assert len(killed) == 2 and len(seen) == len(set(seen)) == 200
    assert {f.name for f in tmp_path.iterdir()} == set(seen)


@pytest.mark.slow
def test_the_only_dask_worker_is_killed(tmp_path):
    "With it goes the common argument; a new worker gets that again, and every task is reported once."
    distributed = pytest.importorskip("dask.distributed")
    from fields.scans import workers

    seen, follow = [], lambda name: [] if "-" in name else [(mark, (f"{name}-next",))]
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        for name in workers.run_tasks(
            tmp_path, [(mark, (f"task{k}",)) for k in range(20)], follow, scheduler=cluster.scheduler_address
        ):
            seen.append(name)
            if len(seen) == 10:
                os.kill(next(iter(cluster.workers.values())).pid, signal.SIGKILL)
    assert len(seen) == len(set(seen)) == 40 and {f.name for f in tmp_path.iterdir()} == set(seen)


@pytest.mark.slow
def test_killed_processes_lose_nothing(small, tmp_path, monkeypatch):
    "One process, or three of which one is killed: the same files, bit by bit."
    import multiprocessing
    from fields.scans import workers

    items, _ = world(small, tmp_path / "data", subjects=("F001", "F002", "M001", "M002", "M003", "M004"), frames=6)
    fit_dataset(items, small, SETTINGS, tmp_path / "whole", workers=1)
    monkeypatch.setattr(workers, "ALONE", 0)
    killer = kill_once(lambda: [p.pid for p in multiprocessing.active_children()], tmp_path / "killed" / "fits", 4)
    labels = fit_dataset(items, small, SETTINGS, tmp_path / "killed", workers=3)
    killer.join()
    assert labels.accepted.all()
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


@pytest.mark.slow
def test_killed_dask_workers_lose_nothing(small, tmp_path):
    "Issue 4, must show 7: nothing lost, nothing done twice, the same files at the end."
    distributed = pytest.importorskip("dask.distributed")
    items, _ = world(small, tmp_path / "data", subjects=("F001", "F002", "M001"), frames=4)
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        fit_dataset(items, small, SETTINGS, tmp_path / "whole", scheduler=cluster.scheduler_address)
        written = {}

        def watch():
            while not stop.is_set():
                for p in (tmp_path / "killed" / "fits").rglob("*.npz"):
                    written.setdefault(p, set()).add(p.stat().st_mtime_ns)
                time.sleep(0.01)

        stop = threading.Event()
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        kills = []

        def pids():
            found = [w.pid for w in cluster.workers.values() if getattr(w, "pid", None)]
            kills.extend(found[:1])
            return found

        killer = kill_once(pids, tmp_path / "killed" / "fits", 5)
        labels = fit_dataset(items, small, SETTINGS, tmp_path / "killed", scheduler=cluster.scheduler_address)
        killer.join()
        stop.set()
        watcher.join()
    assert kills and labels.accepted.all()
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert all(len(times) == 1 for times in written.values())


# evidence: longer runs whose figures the documentation quotes


def write_evidence(name, values):
    from fields.files import write_json

    write_json(EVIDENCE / f"{name}.json", values)


class one_thread:
    "Run on one thread, so that processor time means something on a busy machine."

    def __enter__(self):
        import numba
        from threadpoolctl import threadpool_limits

        self.threads, self.limits = numba.get_num_threads(), threadpool_limits(1)
        numba.set_num_threads(1)

    def __exit__(self, *_):
        import numba

        numba.set_num_threads(self.threads)
        self.limits.restore_original_limits()


def measured(function, repeat=5):
    "Lowest wall and processor seconds of a few calls, and the last result."
    times = []
    for _ in range(repeat):
        wall, processor = time.perf_counter(), time.process_time()
        result = function()
        times.append((time.perf_counter() - wall, time.process_time() - processor))
    wall, processor = np.min(times, 0)
    return {"wall": round(float(wall), 4), "processor": round(float(processor), 4)}, result


@pytest.mark.slow
def test_evidence_of_the_real_scan(tmp_path):
    from fields.data.scanfiles import read_scan
    from fields.head.geometry import write_mesh

    points, landmarks = real_scan()
    cropped = points[ellipse_crop(points, landmarks).mask]
    model = head_model(Head.load(test_data() / "head" / "generic_model.pkl"))
    everything = ScanConfig(max_points=0, max_steps=60)
    best = fit_scan(model, cropped, landmarks, config=everything, tolerance=1e-9)
    target = prepare_target(model, cropped, landmarks, "static51", everything)
    energy = lambda f: evaluate(model, model.tree.copy(), target, state_of(model, f), everything).energy
    rows = {}
    for most in (0, 4000, 3947, 2000, 1000):
        config = ScanConfig(max_points=most)
        two, fit = measured(lambda: fit_scan(model, cropped, landmarks, config=config))
        with one_thread():
            one, _ = measured(lambda: fit_scan(model, cropped, landmarks, config=config))
        used = prepare_target(model, cropped, landmarks, "static51", config).used
        unseen = fit.residuals[np.setdiff1d(np.arange(len(cropped)), used)] if most else None
        rows[str(len(used))] = {
            **{k: v for k, v in fit.summary().items() if k in ("scan_to_surface_mm", "landmarks_mm", "steps")},
            "energy_above_convergence": energy(fit) / energy(best) - 1,
            "seconds": two,
            "seconds_one_thread": one,
            "unseen_points_mm": None
            if unseen is None
            else {"median": 1000 * np.median(unseen), "mean": 1000 * unseen.mean()},
        }
    rng, raw, size = np.random.default_rng(0), read_scan(test_data() / "scan" / "scan.obj"), 1302510
    copies = range(size // len(points) + 1)
    faces = np.concatenate([raw.faces + k * len(points) for k in copies])
    write_mesh(
        tmp_path / "large.ply",
        np.concatenate([points + rng.normal(0, 2e-4, points.shape) for _ in copies])[:size],
        faces[(faces < size).all(1)],
    )
    np.save(tmp_path / "landmarks.npy", landmarks)
    files = lambda: fit_file(
        tmp_path / "large.ply",
        tmp_path / "landmarks.npy",
        head=test_data() / "head" / "generic_model.pkl",
        out=tmp_path / "out",
    )
    with one_thread():
        huge, fit = measured(files, 1)
    write_evidence(
        "scan_fit_real",
        {
            "what": "one real head scan, 7894 points after Eq. 13, scan-derived head; keys of `points_used` are the points that took part",
            "converged": {**best.summary()["scan_to_surface_mm"], "steps": best.steps},
            "points_used": rows,
            "load_of_the_machine": os.getloadavg()[0],
            "large_scan": {
                "what": "the same scan, repeated with noise: read, cropped, fitted, measured on all points, files and picture written",
                "vertices": size,
                "points_after_cropping": fit.points,
                "seconds_one_thread": huge,
                "seconds_of_the_fit": fit.seconds,
                "median_mm": 1000 * fit.residual_median,
                "official_tool_seconds": 11099,
            },
        },
    )
    row = rows["4000"]
    assert (
        row["scan_to_surface_mm"]["median"] <= 0.33
        and row["scan_to_surface_mm"]["mean"] <= 0.40
        and row["energy_above_convergence"] < 0.01
    )
    assert row["seconds_one_thread"]["processor"] < 1.5


@pytest.mark.slow
def test_evidence_of_the_twin(head):
    "Recovered surface against the sculpted one, repeatability over scanner noise, and speed, on scans as the BP4D twin has them."
    from fields.data.imaging import Studio, scan, scanner_pose
    from fields.data.population import generator, make_moment, make_person
    from fields.data.twins import landmarks_of

    config, face = ScanConfig(), head.embeddings["bp4d83"]
    triangles = head.faces.numpy()
    crop_of = lambda p: (
        ellipse_crop(p, (p[triangles[face.face_index]] * face.barycentric[..., None]).sum(1), depth=0.06).mask
    )
    surface_error, psi, floor, seconds, fixed, shapes, free = [], [], [], [], [], [], []
    model = head_model(head, lids=head.eyelids is not None)
    basis = np.concatenate([head.shapedirs.numpy(), head.exprdirs.numpy()[..., :50]], -1).astype(np.float64)
    for subject in ("F101", "M102", "F103"):
        rng = generator(7, "evidence", subject)
        studio = Studio.of(make_person(7, f"evidence/{subject}"))
        moments, draws = (
            [make_moment(studio.person, rng, int(e), wild=False, single=0.5) for e in rng.integers(0, 7, 5)],
            [],
        )
        for moment in moments:
            unposed, posed = studio.surface(moment)
            inside = crop_of(posed)
            rows = np.repeat(inside, 3)
            x = np.linalg.lstsq(
                basis.reshape(-1, 350)[rows], (unposed - head.template.numpy())[inside].ravel(), rcond=None
            )[0]
            best = head.template.numpy() + (basis @ x).reshape(-1, 3)
            floor.append(1000 * np.median(closest_points(unposed[inside].astype(np.float64), best, model.faces)[0]))
            frames = []
            for draw in range(3):
                raw = scan(posed, landmarks_of(posed, "bp4d83"), 0.01, scanner_pose(rng), rng)
                points, landmarks = raw.vertices.astype(np.float64) / 1000, np.asarray(raw.landmarks) / 1000
                frames.append((points[ellipse_crop(points, landmarks).mask], landmarks))
            draws.append((frames, posed, inside))
        with one_thread():
            time_of_shape, (shape, _) = measured(
                lambda: fit_shape(model, [d[0][0] for d in draws[:4]], "bp4d83", config), 1
            )
            person = at_shape(model, shape)
            shapes.append(time_of_shape["processor"])
            before = None
            for frames, posed, inside in draws:
                codes = []
                for points, landmarks in frames:
                    clock, fit = measured(
                        lambda: fit_scan(person, points, landmarks, "bp4d83", config, start=before), 1
                    )
                    seconds.append(clock["processor"])
                    codes.append(fit.expression)
                    vertices = pose(person, state_of(person, fit)).vertices
                    R, t = align(vertices[inside], posed[inside])
                    surface_error.append(
                        1000 * np.median(closest_points(posed[inside], vertices @ R.T + t, model.faces)[0])
                    )
                before = fit
                psi.append(np.std(codes, 0))
                free.append(fit.expression)
            fixed.append(measured(lambda: fit_scan(model, *draws[0][0][0], "bp4d83", config), 1)[0]["processor"])
    real = head.real_components[1]
    frame, first = float(np.median(seconds)), float(np.median(fixed))
    write_evidence(
        "scan_fit_twin",
        {
            "what": "scans of sculpted faces outside the span of the components, with hair, holes, noise, stray points; 83 landmarks; "
            "distances are medians over the crop, from the sculpted vertices to the fitted surface, and to the best one any coefficients give",
            "head_sha256": model.sha256,
            "surface_to_truth_mm": {"median": np.median(surface_error), "worst": np.max(surface_error)},
            "out_of_reach_of_any_coefficients_mm": np.median(floor),
            "expression_repeatability": {
                "standard_deviation_over_scanner_noise": np.sqrt(np.mean(np.array(psi)[:, :real] ** 2)),
                "size_of_the_codes": np.sqrt(np.mean(np.array(free)[:, :real] ** 2)),
            },
            "processor_seconds_one_thread": {
                "frame_of_a_sequence": frame,
                "identity_from_4_frames": np.median(shapes),
                "single_frame_with_identity": first,
            },
            "hours_for_the_367350_frames_of_bp4d": {
                "2 cores": 367350 * frame / 2 / 3600,
                "64 Dask workers": 367350 * frame / 64 / 3600,
                "note": "from the median above, without reading files; a GPU was not measured here",
            },
        },
    )
    assert np.median(surface_error) <= 0.5 and frame <= 0.2 and first <= 1.5
    assert np.mean(np.array(psi)[:, :real] ** 2) < 0.1 * np.mean(np.array(free)[:, :real] ** 2)

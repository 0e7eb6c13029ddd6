"""Faces that lie on their side, faces asked for in other numbers, faces that are hidden."""

import numpy as np
import pytest
import skimage.data
import torch

from fields import HeadParams, Reconstructor
from fields.data.crop import crop_face, face_box
from fields.data.faces import find_faces
from fields.data.level import turn_heads
from fields.data.window import Window, roll_of, turn
from fields.evaluation.landmarks import projected
from fields.outputs import doubts
from fields.render.camera import normaliser


@pytest.fixture(scope="module")
def rec():
    return Reconstructor.load()


@pytest.fixture(scope="module")
def astronaut():
    return skimage.data.astronaut()[:360, 50:410]


def lying(image, degrees):
    """The picture turned so that its content leans clockwise."""
    size = int(np.hypot(*image.shape[:2]))
    return Window(image.shape[1] / 2, image.shape[0] / 2, size, -degrees, size).cut(image)


def misfit(rec, prediction, crops):
    """Percent of the eyes' distance, in the upright boxes, where results are written."""
    indices = rec.head.embeddings["mediapipe105"].indices
    points = torch.from_numpy(np.stack([c.picture_points[indices, :2] for c in crops]))
    away = (projected(rec.head, prediction.params) - points).norm(dim=-1).mean(1)
    return (100 * away / normaliser(prediction.params.camera)).tolist()


def test_every_roll_reads_as_upright(rec, astronaut):
    found = {}
    for degrees in (0, 25, 70, 115, 180, 233, 290):
        crops = rec.crop(lying(astronaut, degrees))
        assert len(crops) == 1 and abs((crops[0].roll - rec.crop(astronaut)[0].roll - degrees + 180) % 360 - 180) < 4
        prediction = rec.predict(crops)
        found[degrees] = misfit(rec, prediction, crops)[0]
        assert abs(found[degrees] - 100 * prediction.misfit[0]) < 0.01, "the roll is put back exactly"
    assert max(found.values()) <= 1.2 * found[0], found


def test_turned_heads_are_exact(rec):
    draw = torch.Generator().manual_seed(0)
    params = HeadParams.neutral(6)
    for value in (params.shape, params.expression, params.rotation, params.jaw):
        value += 0.4 * torch.randn(value.shape, generator=draw)
    params.camera[:, 1:] = 0.02 * torch.randn(6, 2, generator=draw)
    angles = np.array([0.0, 13.0, 90.0, 180.0, -170.0, 271.0])
    before, after = projected(rec.head, params), projected(rec.head, turn_heads(rec.head, params, angles))
    for k, degrees in enumerate(angles):
        assert np.abs(after[k].numpy() - before[k].numpy() @ turn(degrees).T).max() < 1e-5


def composed(image, places):
    """The astronaut's head at several places and sizes on a gray wall."""
    import cv2

    wall = np.full((600, 900, 3), 150, np.uint8)
    for x, y, side in places:
        wall[y : y + side, x : x + side] = cv2.resize(image[:300, 30:330], (side, side), interpolation=cv2.INTER_AREA)
    return wall


@pytest.mark.parametrize(
    "places",
    [[(40, 40, 300)], [(40, 40, 240), (500, 60, 250)], [(20, 20, 260), *((320 + 140 * k, 380, 110) for k in range(4))]],
)
def test_asking_for_more_never_loses_a_face(astronaut, places):
    wall = composed(astronaut, places)
    found = {asked: [f.box.round(2).tolist() for f in find_faces(wall, asked)] for asked in (1, 2, 10)}
    assert found[1] == found[10][:1] and found[2] == found[10][:2]
    assert len(found[10]) == len(places), "none missed, none false"


def test_roll_of_a_crop(astronaut):
    face = find_faces(astronaut, 1)[0]
    crop = crop_face(astronaut, face.points478, 96, level=True)
    assert abs(roll_of((crop.points + 1) * 48)) < 1e-3 and crop.visible == 1
    assert np.abs(crop.picture_points - crop_face(astronaut, face.points478, 96).points).max() < 0.2
    half = crop_face(astronaut[:, : int(face.box[[0, 2]].mean())], face.points478, 96)
    assert 0.3 < half.visible < 0.7 and "visible" in doubts(0.9, 0.03, 0.8 * half.visible)


def test_smirks_convention():
    """`convention="corners"` gives the picture that skimage cuts out by SMIRK's three points, and SMIRK's landmarks."""
    from skimage.transform import estimate_transform, warp

    rng = np.random.default_rng(0)
    image = np.kron(rng.integers(0, 255, (40, 50, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    points, size = rng.uniform(120, 220, (478, 2)), 224
    box = face_box(points, 1.4, whole=True)
    left, top = box.cx - box.side / 2, box.cy - box.side / 2
    corners = np.array([[left, top], [left, top + box.side], [left + box.side, top]])
    shape = estimate_transform("similarity", corners, np.array([[0, 0], [0, size - 1], [size - 1, 0]]))
    theirs = warp(image / 255, shape.inverse, output_shape=(size, size)) * 255
    ours = crop_face(image, points, size, 1.4, convention="corners")
    assert np.abs(ours.image[4:-4, 4:-4].astype(float) - theirs[4:-4, 4:-4]).mean() < 1.0
    np.testing.assert_allclose(ours.points, shape(points) / size * 2 - 1, atol=1e-4)

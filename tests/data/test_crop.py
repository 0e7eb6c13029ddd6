"""Crops: exact maps between picture and crop, for points and for the light itself."""

import numpy as np
import pytest

from fields.data.crop import Box, between, crop_face, crop_image, face_box, from_crop, hull_mask, paste, to_crop


def centre(image):
    light = image[..., 0].astype(float)
    y, x = np.mgrid[: image.shape[0], : image.shape[1]] + 0.5
    return np.array([(light * x).sum(), (light * y).sum()]) / light.sum()


def dot(height, width, x, y, sigma=4.0):
    yy, xx = np.mgrid[:height, :width] + 0.5
    return np.repeat((255 * np.exp(-((xx - x) ** 2 + (yy - y) ** 2) / 2 / sigma**2)).astype(np.uint8)[..., None], 3, -1)


@pytest.mark.parametrize("seed", range(20))
def test_points_and_light_agree(seed):
    """A dot of light lands where its point is mapped, within 0.05 px of the crop, and comes back within 0.05 px."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(150, 300, 2)
    box = Box(*rng.uniform(60, 100, 2), float(rng.uniform(60, 260)))
    size = int(rng.integers(40, 260))
    at = np.array([box.cx, box.cy]) + rng.uniform(-0.15, 0.15, 2) * box.side
    image = dot(height, width, *at, sigma=max(3.0, 2.5 * box.side / size))
    inside = (to_crop(at, box) + 1) * size / 2
    crop = crop_image(image, box, size)
    assert np.abs(centre(crop) - inside).max() < 0.05
    np.testing.assert_allclose(from_crop(inside * 2 / size - 1, box), at, atol=1e-9)
    if box.side / size < 2:
        back, where = paste(crop, box, image.shape[:2])
        assert np.abs(centre(back) - at).max() < 0.05 * max(1, box.side / size)
        assert 0 <= where.min() and where.max() <= 1.001


def test_float32_points_stay_exact():
    points = np.random.default_rng(0).uniform(300, 3000, (478, 3)).astype(np.float32)
    face = crop_face(np.zeros((40, 40, 3), np.uint8), points, 64, 2.0)
    assert np.abs(from_crop(face.points, face.box) - points[:, :2]).max() < 0.05


def test_smirk_box():
    points = np.array([[100.0, 50], [180, 170]])
    assert face_box(points, 1.4).row() == (140.0, 110.0, 140.0)
    assert face_box(points * 1.01, 1.4, whole=True).side == 141.0
    assert face_box(points, 2.0).side == 2 * face_box(points, 1.0).side
    nested = to_crop(points, face_box(points, 1.4))
    np.testing.assert_allclose(
        between(nested, face_box(points, 1.4), face_box(points, 2.0)),
        to_crop(points, face_box(points, 2.0)),
        atol=1e-12,
    )
    for bad in (np.zeros((5, 2)), np.full((5, 2), np.nan), np.array([[0, 0], [np.inf, 1]])):
        with pytest.raises(ValueError, match="nothing to crop"):
            face_box(bad)


@pytest.mark.parametrize("edge, corner", [("black", 0), ("repeat", 200), ("mirror", 200)])
def test_edges(edge, corner):
    image = np.full((40, 40, 3), 200, np.uint8)
    crop = crop_image(image, Box(20, 20, 100), 50, edge)
    assert crop[0, 0, 0] == corner and crop[25, 25, 0] == 200


def test_reduction_does_not_alias():
    checker = ((np.indices((400, 400)).sum(0) % 2) * 255).astype(np.uint8)[..., None].repeat(3, -1)
    for side in (390, 333, 250):
        crop = crop_image(checker, Box(200, 200, side), 60)
        assert np.abs(crop[5:-5, 5:-5].astype(int) - 127).max() <= 12, side


def test_identity_crop_is_the_picture():
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    np.testing.assert_array_equal(crop_image(image, Box(32, 32, 64), 64), image)
    np.testing.assert_array_equal(crop_image(image, Box(20, 30, 16), 16), image[22:38, 12:28])


def test_hull_matches_an_independent_one():
    from matplotlib.path import Path
    from scipy.spatial import ConvexHull

    rng = np.random.default_rng(0)
    points = rng.normal(0, 0.3, (478, 2))
    mask = hull_mask(points, 120)
    centres = np.stack(np.meshgrid(np.arange(120), np.arange(120)), -1).reshape(-1, 2) * 2 / 120 + 1 / 120 - 1
    inside = Path(points[ConvexHull(points).vertices]).contains_points(centres).reshape(120, 120)
    assert (inside != (mask > 0)).mean() < 0.02 and (mask[inside] > 0).all() and set(np.unique(mask)) <= {0, 255}
    assert hull_mask(points * 50, 16).min() == 255 and hull_mask(np.full((5, 2), np.nan), 16).max() == 0


def test_box_text():
    box = Box(1.25, -3.5, 77.0)
    assert Box.from_json(box.to_json()) == box
    for text in ("", "{}", "[1,2,3]", '{"cx": 1, "cy": 2}', '{"cx": "a", "cy": 2, "side": 3}', "null"):
        with pytest.raises(ValueError, match="is not a crop box"):
            Box.from_json(text)

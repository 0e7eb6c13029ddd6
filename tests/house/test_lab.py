"""`make lab` in a real browser: quiet, at the index, sliders that move pictures, and git clean after reading."""

import shutil
import subprocess

import browser
import numpy as np
import pytest
from test_export import ROOT, copy_of_the_repository, git

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser.find() is None, reason="no Chromium was found; apt-get install chromium"),
]
NOTEBOOK = "document.querySelector('.jp-NotebookPanel:not(.lm-mod-hidden)')"
IDLE = f"{NOTEBOOK}.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status === 'idle'"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on a copy of the notebooks, as `make lab` starts it; gives (folder, address, token)."""
    folder = copy_of_the_repository(tmp_path_factory.mktemp("lab") / "copy")
    shutil.copytree(ROOT / "lab", folder / "lab", dirs_exist_ok=True)
    with open(folder.parent / "log.txt", "w") as log:
        process, address, token = browser.jupyter(folder / "nbs", folder / "lab", log, {"PYTHONPATH": str(folder)})
        yield folder, address, token
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def page(lab):
    with browser.Browser(1280, 1000) as page:
        yield page


def show(page, lab, path):
    """Open a notebook and wait for its cells; fail where a dialog stands in the way."""
    _, address, token = lab
    page.open(f"{address}/lab/tree/{path}?token={token}&reset")
    page.wait(f"{NOTEBOOK}?.querySelectorAll('.jp-Cell').length > 2", 120)
    page.wait(f"{NOTEBOOK}.querySelector('.jp-Notebook-ExecutionIndicator')", 120)
    page.value("new Promise(done => setTimeout(done, 3000))")
    assert page.value("[...document.querySelectorAll('.jp-Dialog, .jp-toastContainer .Toastify__toast')].length") == 0


def command(page, name):
    page.value(f"window.jupyterapp.commands.execute('{name}').then(() => true)")


def test_reading_is_quiet_and_leaves_git_clean(page, lab):
    show(page, lab, "index.ipynb")
    page.screenshot(ROOT / "runs" / "screens" / "lab_index.png")
    page.click(900, 190)
    command(page, "docmanager:save")
    page.wait("!document.querySelector('.jp-mod-dirty')", 60)
    # the file was written, and by way of the cleaner
    assert page.value("window.jupyterapp.shell.currentWidget.context.path") == "index.ipynb"
    assert git(lab[0], "status", "--porcelain") == []


def test_a_slider_of_guide_02_moves_its_picture(page, lab):
    show(page, lab, "guides/02_sliders.ipynb")
    command(page, "notebook:run-all-cells")
    page.wait("document.querySelectorAll('.jp-Notebook .widget-image').length > 0", 400)
    page.wait("document.querySelectorAll('.jp-Notebook .js-plotly-plot canvas').length > 0", 400)
    jaw = (
        "[...document.querySelectorAll('.widget-hslider')].find(e => e.textContent.includes('jaw')).querySelector"
        "('.noUi-handle')"
    )
    # the sliders of the photograph's face
    image = page.box("document.querySelector('.widget-image')")
    before = page.screenshot(ROOT / "runs" / "screens" / "lab_slider_before.png", image)
    source = page.value("document.querySelector('.widget-image').src")
    page.value(f"{jaw}.focus()")
    for _ in range(8):
        page.key("ArrowRight", 39)
    page.wait(f"document.querySelector('.widget-image').src !== {source!r}", 60)
    page.value("new Promise(done => setTimeout(done, 3000))")
    image = page.box("document.querySelector('.widget-image')")
    after = page.screenshot(ROOT / "runs" / "screens" / "lab_slider_after.png", image)
    assert before.shape == after.shape
    assert (np.abs(before.astype(int) - after).max(-1) > 20).mean() > 0.01
    # the painted head: its mesh moves, and the reader's view of it stays
    plot = "document.querySelector('.js-plotly-plot')"
    box = page.box(plot)
    still = page.screenshot(ROOT / "runs" / "screens" / "lab_view_before.png", box)
    eye = page.value(f"JSON.stringify({plot}.layout.scene.camera.eye)")
    opens = jaw.replace("'jaw'", "'jaw opens'")
    page.value(f"{opens}.focus()")
    for _ in range(20):
        page.key("ArrowRight", 39)
    page.value("new Promise(done => setTimeout(done, 8000))")
    moved = page.screenshot(ROOT / "runs" / "screens" / "lab_view_after.png", page.box(plot))
    assert (np.abs(still.astype(int) - moved).max(-1) > 20).mean() > 0.005
    assert page.value(f"JSON.stringify({plot}.layout.scene.camera.eye)") == eye


def test_no_build_is_recommended(lab):
    import json
    import urllib.request

    _, address, token = lab
    with urllib.request.urlopen(f"{address}/lab?token={token}") as answer:
        text = answer.read().decode()
    config = json.loads(text.split('id="jupyter-config-data" type="application/json">')[1].split("</script>")[0])
    assert config["buildCheck"] is False


def test_the_extension_of_dash_is_off(lab):
    environment = {"JUPYTER_CONFIG_DIR": str(lab[0] / "lab"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [ROOT / ".venv" / "bin" / "jupyter", "labextension", "list"], env=environment, capture_output=True, text=True
    )
    line = next(line for line in (done.stdout + done.stderr).splitlines() if "dash-jupyterlab v" in line)
    assert "disabled" in line

"""Open a page in headless Chromium and measure it, or take its picture; used by tests that are skipped without it."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars")

# A window is never narrower than 500 pixels; a frame in it is.
FRAME = """<!doctype html><body style="margin:0"><iframe id="f" style="border:0;width:{width}px;height:{height}px"
srcdoc="{page}"></iframe>{script}</body>"""
MEASURE = """<script>
window.onload = () => {
  const page = document.getElementById("f").contentDocument, view = page.documentElement;
  page.querySelectorAll("details").forEach(d => d.open = true);
  const wide = [...page.querySelectorAll("table, img, nav, h1, h2, h3, p, li")]
    .filter(e => e.getBoundingClientRect().right > view.clientWidth + 1 || e.scrollWidth > e.clientWidth + 1)
    .map(e => e.tagName + ": " + e.textContent.slice(0, 60));
  page.querySelectorAll("details").forEach(d => d.open = false);
  const top = page.getElementById("verdict");
  const found = {view: view.clientWidth, page: view.scrollWidth, wide: wide,
                 verdict: top ? top.getBoundingClientRect().bottom : null};
  document.body.innerHTML = "<pre>" + JSON.stringify(found).replaceAll("<", "") + "</pre>";
};
</script>"""


def framed(page, folder, width, height, script=""):
    """Write a page inside a frame of a given width; return its file."""
    text = html.escape(Path(page).read_text(encoding="utf-8"), quote=True)
    path = Path(folder) / f"frame_{width}{'_measured' if script else ''}.html"
    path.write_text(FRAME.format(width=width, height=height, page=text, script=script), encoding="utf-8")
    return path


def run_chromium(folder, *words):
    """Run Chromium with a profile of its own; return what it printed."""
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={Path(folder) / 'profile'}", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=180).stdout


def measure_page(page, folder, width, height=900):
    """Return the width of a page and what sticks out of it."""
    path = framed(page, folder, width, height, MEASURE)
    dom = run_chromium(folder, f"--window-size={max(width, 500)},{height}", "--dump-dom", path.as_uri())
    found = re.search(r"<pre>(.*?)</pre>", dom, re.S)
    assert found, f"Chromium did not run the page's script: {dom[-300:]}"
    return json.loads(html.unescape(found[1]))


def picture_of(page, folder, width, height=900):
    """Take a screenshot of a page; return the picture's file."""
    path = framed(page, folder, width, height)
    picture = Path(folder) / f"page_{width}.png"
    run_chromium(folder, f"--window-size={max(width, 500)},{height}", f"--screenshot={picture}", path.as_uri())
    return picture

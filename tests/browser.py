"""A small driver of headless Chromium, over its debugging socket: open a page, click, type, look at pixels.

    with Browser(1280, 900) as page:
        page.open("file:///...")
        page.wait("document.querySelector('canvas')")
        page.screenshot(path)

Needs `chromium` (or `chromium-browser`, `google-chrome`) and the package websocket-client, which Jupyter brings.
"""

import base64
import io
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find():
    """The browser's program, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a browser of its own, with a profile that is thrown away."""

    def __init__(self, width=1280, height=900):
        self.width = width
        self.height = height
        self.numbers = itertools.count(1)

    def __enter__(self):
        from websocket import create_connection

        self.folder = tempfile.mkdtemp()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        # software WebGL draws the plotly meshes where there is no graphics card
        flags += ["--enable-unsafe-swiftshader", "--use-angle=swiftshader", "--remote-allow-origins=*"]
        size = f"--window-size={self.width},{self.height}"
        command = [find(), *flags, size, "--remote-debugging-port=0", f"--user-data-dir={self.folder}", "about:blank"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port = self._port()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
            pages = [page for page in json.load(answer) if page["type"] == "page"]
        self.socket = create_connection(pages[0]["webSocketDebuggerUrl"], timeout=120)
        self.send("Page.enable")
        self.send("Runtime.enable")
        metrics = {"width": self.width, "height": self.height, "deviceScaleFactor": 1, "mobile": False}
        self.send("Emulation.setDeviceMetricsOverride", **metrics)
        return self

    def __exit__(self, *_):
        self.socket.close()
        self.process.terminate()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _port(self):
        """The port that the browser writes into its profile when it is ready."""
        file = Path(self.folder) / "DevToolsActivePort"
        for _ in range(300):
            if file.exists() and file.read_text().strip():
                return int(file.read_text().split()[0])
            time.sleep(0.1)
        raise RuntimeError("the browser did not start within 30 seconds")

    def send(self, method, **params):
        """Send one command and return its answer; events in between are dropped."""
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            answer = json.loads(self.socket.recv())
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def open(self, url):
        self.send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def value(self, script):
        """The value of an expression in the page, awaited where it is a promise."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            said = details.get("exception", {}).get("description", details["text"])
            raise RuntimeError(f"{said[:300]} in {script[:80]}")
        return answer["result"].get("value")

    def wait(self, script, seconds=60):
        """Wait until an expression is true; raise `TimeoutError` otherwise."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.value(f"Boolean({script})"):
                return
            time.sleep(0.25)
        raise TimeoutError(f"after {seconds} s still not true: {script}")

    def box(self, script):
        """(x, y, width, height) of the element that an expression gives, scrolled into view."""
        return self.value(
            f"(() => {{ const e = {script}; e.scrollIntoView({{block: 'center'}}); "
            "const r = e.getBoundingClientRect(); return [r.x, r.y, r.width, r.height]; })()"
        )

    def click(self, x, y):
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def key(self, name, code, modifiers=0):
        """Press one key, for example `key("ArrowRight", 39)`; modifiers: 8 is shift, 2 control."""
        for kind in ("keyDown", "keyUp"):
            fields = {"key": name, "code": name, "windowsVirtualKeyCode": code, "modifiers": modifiers}
            self.send("Input.dispatchKeyEvent", type=kind, **fields)

    def screenshot(self, path=None, box=None):
        """A picture of the page, or of (x, y, width, height) of it, as an array; kept as PNG where a path is given."""
        import numpy as np
        from PIL import Image

        clip = {}
        if box:
            x, y, width, height = box
            clip = {"clip": {"x": x, "y": y, "width": width, "height": height, "scale": 1}}
        data = base64.b64decode(self.send("Page.captureScreenshot", format="png", **clip)["data"])
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_bytes(data)
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def jupyter(folder, settings, log, extra=None):
    """Start JupyterLab on a folder with a folder of settings; return (process, address with its token)."""
    import secrets
    import socket
    import sys

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    environment = os.environ | {"JUPYTER_CONFIG_DIR": str(settings)} | (extra or {})
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", f"--port={port}", f"--notebook-dir={folder}"]
    command += [f"--IdentityProvider.token={token}", "--allow-root", "--expose-app-in-browser"]
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    for _ in range(240):
        try:
            urllib.request.urlopen(f"{address}/api/status?token={token}", timeout=2)
            return process, address, token
        except OSError:
            time.sleep(0.25)
    process.terminate()
    raise RuntimeError("JupyterLab did not start within a minute")

"""`fields fetch` against a server on this machine: whole, broken off and taken up again, wrong, refused, offline."""

import dataclasses
import hashlib
import http.server
import threading
from functools import partial

import pytest
from typer.testing import CliRunner

import fields.fetch as fetching
from fields.cli import app

CONTENT = b"PK\x03\x04" + bytes(range(256)) * 2000


class Serving(http.server.BaseHTTPRequestHandler):
    asked, cut = [], 0

    def log_message(self, *words):
        pass

    def do_GET(self):
        wanted = self.headers.get("Range")
        Serving.asked.append(wanted)
        start = int(wanted.split("=")[1].rstrip("-")) if wanted else 0
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        self.wfile.write(CONTENT[start : Serving.cut or None])


@pytest.fixture
def source(monkeypatch):
    """The address of a server, and a file of known content among the free ones."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Serving)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Serving.asked, Serving.cut = [], 0
    digits = hashlib.sha256(CONTENT).hexdigest()
    free = dataclasses.replace(fetching.FREE[0], name="thing", file="thing.task", sha256=digits)
    monkeypatch.setattr(fetching, "FREE", (free,))
    yield f"http://127.0.0.1:{server.server_port}/thing.task"
    server.shutdown()


def agree(text):
    return True


def test_a_file_is_fetched_once(source, tmp_path):
    path, digits = fetching.fetch("thing", agree, tmp_path, source)
    assert path.read_bytes() == CONTENT and digits == fetching.FREE[0].sha256
    assert fetching.fetch("thing", agree, tmp_path, source)[0] == path and Serving.asked == [None]
    assert [p.name for p in tmp_path.iterdir()] == ["thing.task"]


def test_a_broken_fetch_goes_on(source, tmp_path):
    Serving.cut = 100_000
    with pytest.raises(OSError, match="0.1 MB have come and the next try goes on from there"):
        fetching.fetch("thing", agree, tmp_path, source)
    assert not (tmp_path / "thing.task").exists()
    Serving.cut = 0
    assert fetching.fetch("thing", agree, tmp_path, source)[0].read_bytes() == CONTENT
    start = int(Serving.asked[1].removeprefix("bytes=").rstrip("-"))
    assert len(Serving.asked) == 2 and 80_000 < start <= 100_000


@pytest.mark.parametrize("known", ["f" * 64, "ffffffff"])
def test_another_content_is_not_kept(source, tmp_path, monkeypatch, known):
    monkeypatch.setattr(fetching, "FREE", (dataclasses.replace(fetching.FREE[0], sha256=known),))
    with pytest.raises(ValueError, match="sha256"):
        fetching.fetch("thing", agree, tmp_path, source)
    assert list(tmp_path.iterdir()) == []


def test_without_a_word_or_a_network(source, tmp_path):
    with pytest.raises(ValueError, match="was not fetched; to do it yourself"):
        fetching.fetch("thing", lambda text: False, tmp_path, source)
    assert Serving.asked == []
    with pytest.raises(OSError, match=r"put it at .*thing\.task"):
        fetching.fetch("thing", agree, tmp_path, "http://127.0.0.1:9/thing.task")


def test_the_command_asks(source, tmp_path):
    run = partial(CliRunner().invoke, app, ["fetch", "thing", "--out", str(tmp_path), "--url", source])
    asked = run(input="n\n")
    assert asked.exit_code != 0 and "licence: Apache-2.0" in asked.output and list(tmp_path.iterdir()) == []
    done = run(input="y\n")
    assert done.exit_code == 0 and str(tmp_path / "thing.task") in done.output.replace("\n", "")

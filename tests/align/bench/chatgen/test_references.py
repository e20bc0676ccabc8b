"""Pictures that chats point to: from a folder, and downloaded from a real local server."""

import io
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from align.bench.chatgen.references import download, from_folder, picture_suffix
from rewards.commandline import ConfigError


def picture(form="PNG", size=(8, 8)):
    data = io.BytesIO()
    Image.new("RGB", size, "red").save(data, form)
    return data.getvalue()


class PictureHandler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        steps = self.server.pages.get(self.path, [(404, {}, b"")])
        status, headers, body = steps.pop(0) if len(steps) > 1 else steps[0]
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), PictureHandler) as server:
        server.asked, server.pages = [], {}
        server.host = f"127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.shutdown()


def test_pictures_are_fetched_once_checked_and_named_by_id(site, demonstration, tmp_path):
    site.pages = {
        "/1": [(200, {}, picture())],
        "/2": [(503, {}, b""), (200, {}, picture("WEBP"))],
        "/3": [(200, {}, b"<html>")],
        "/5": [(302, {"Location": "/1"}, b"")],
    }
    items = [demonstration(str(n), image=f"http://{site.host}/{n}") for n in range(1, 6)]
    items += [demonstration("6", image="http://evil.example.org/6"), demonstration("7", image=None)]
    items += [demonstration("8", image=f"file://{site.host}/etc/passwd")]
    found, problems = download(items, tmp_path / "images", [site.host])
    assert [item.image and Path(item.image).name for item in found] == ["1.png", "2.webp", *[None] * 6]
    assert problems == {"no_picture": 1, "status_404": 1, "status_302": 1, "host_not_allowed": 2, "no_address": 1}
    assert site.asked.count("/2") == 2 and site.asked.count("/4") == 1
    site.asked.clear()
    again, _ = download(items[:2], tmp_path / "images", [site.host])
    assert again == found[:2] and site.asked == []


def test_a_server_that_is_gone_is_counted(demonstration, tmp_path):
    found, problems = download([demonstration(image="http://127.0.0.1:9/1")], tmp_path, ["127.0.0.1:9"])
    assert found[0].image is None and problems == {"unreachable": 1}


def test_a_folder_gives_what_it_has(demonstration, tmp_path):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    for name in ("1.png", "2.JPG", "3.gif"):
        (theirs / name).write_bytes(picture())
    for _ in range(2):
        found = from_folder([demonstration(str(n)) for n in range(1, 5)], theirs, ours)
        assert [item.image for item in found] == [str(ours / "1.png"), str(ours / "2.JPG"), None, None]
    assert sorted(path.name for path in ours.iterdir()) == ["1.png", "2.JPG"]
    assert (ours / "1.png").read_bytes() == picture()
    with pytest.raises(ConfigError, match="`images` .*nowhere is no folder"):
        from_folder([], tmp_path / "nowhere", ours)


@pytest.mark.parametrize(
    ("data", "expected"),
    [(picture(), ".png"), (picture("JPEG"), ".jpg"), (picture("WEBP"), ".webp"), (picture("GIF"), None), (b"", None),
     (picture(size=(64, 64))[:60], None), (picture(size=(20_000, 20_000)), None), (b"<svg/>", None)],
)  # fmt: skip
def test_only_whole_pictures_of_sane_size_are_kept(data, expected):
    assert picture_suffix(data) == expected

"""Which files a review serves as pictures: those in its folder that are some, and nothing else."""

import os
from io import BytesIO

import pytest
from PIL import Image

from align.bench.chatgen.review import Hosts, ReviewQueue
from align.bench.chatgen.review_app import MAX_PICTURE_BYTES, ReviewService, build_app
from align.bench.chatgen.review_store import ReviewStore

pytest.importorskip("fastapi", reason="needs the extra `serve`")
testclient = pytest.importorskip("starlette.testclient")


def picture(format="PNG"):
    file = BytesIO()
    Image.new("RGB", (8, 6), "red").save(file, format)
    return file.getvalue()


def row(number, *images):
    content = [{"type": "text", "text": "like these", "image": None}]
    content += [{"type": "image", "text": None, "image": image} for image in images]
    return {"id": f"d/{number}", "messages": [{"role": "user", "content": content}], "prompt": "fox, 8k"}


@pytest.fixture
def client_of(tmp_path):
    clients = []

    def make(rows, *, images=None):
        queue = ReviewQueue(rows, ReviewStore(tmp_path / "review.sqlite"))
        app = build_app(ReviewService(queue, images=images, hosts=Hosts("127.0.0.1", 8500)))
        clients.append(testclient.TestClient(app, base_url="http://127.0.0.1:8500"))
        return clients[-1].__enter__()

    yield make
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    for name, format in [("a.png", "PNG"), ("b", "JPEG"), ("deep/c.webp", "WEBP"), ("d.txt", "GIF")]:
        (folder / name).write_bytes(picture(format))
    return folder


def get_picture(client, index=0):
    return client.get("/image", params={"row": "d/0", "index": str(index)})


def test_pictures(client_of, folder):
    names = ["a.png", "b", "deep/c.webp", "deep/../d.txt", str(folder / "a.png")]
    client = client_of([row(0, *names)], images=folder)
    parts = client.get("/row?row=d/0").json()["row"]["messages"][0]["parts"]
    assert [(part["image"], part["served"], part["address"]) for part in parts[1:]] == [
        (number, True, name) for number, name in enumerate(names)
    ]
    for number, media in enumerate(["png", "jpeg", "webp", "gif", "png"]):
        answer = get_picture(client, number)
        assert (
            answer.headers["content-type"] == f"image/{media}" and answer.headers["x-content-type-options"] == "nosniff"
        )
        assert Image.open(BytesIO(answer.content)).size == (8, 6)
    for index in ("5", "-1", "x", "", "1e3", "9" * 30):
        assert get_picture(client, index).status_code in (400, 404)
    assert client.get("/image?row=d/9&index=0").status_code == client.get("/image?index=0").status_code == 404


@pytest.mark.parametrize(
    "address",
    ["../secret.png", "deep/../../secret.png", "/etc/passwd", "link.png", "linked/secret.png", "loop", "deep",
     "gone.png", ".", "", "a.png\0", "x" * 5_000, "\ud800", "pipe", "file:///etc/passwd", "http://127.0.0.1:1/a.png",
     "https://evil.example/a.png", "data:image/png;base64,AAAA", "JavaScript:alert(1)", "//evil.example/a.png",
     "..\\secret.png", "%2e%2e/secret.png"],
)  # fmt: skip
def test_pictures_outside_the_folder_and_addresses_are_text(client_of, folder, tmp_path, address):
    (tmp_path / "outside").mkdir()
    for outside in (tmp_path / "secret.png", tmp_path / "outside" / "secret.png"):
        outside.write_bytes(picture())
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "linked").symlink_to(tmp_path / "outside")
    (folder / "loop").symlink_to(folder / "loop")
    os.mkfifo(folder / "pipe")
    client = client_of([row(0, address)], images=folder)
    part = client.get("/row?row=d/0").json()["row"]["messages"][0]["parts"][1]
    assert part == {"image": 0, "address": address[:300], "served": False}
    assert get_picture(client).status_code == 404


def test_no_folder_no_pictures(client_of, folder, monkeypatch):
    monkeypatch.chdir(folder)
    client = client_of([row(0, "a.png", str(folder / "a.png"))])
    assert get_picture(client).status_code == get_picture(client, 1).status_code == 404


def test_files_that_are_no_pictures(client_of, folder, monkeypatch):
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><script>window.pwned=1</script></svg>'
    files = {
        "page.png": b"<script>window.pwned=1</script>", "vector.png": svg, "cut.png": picture()[:-30], "empty.png": b"",
        "tiff.png": picture("TIFF"), "eps.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    }  # fmt: skip
    for name, data in files.items():
        (folder / name).write_bytes(data)
    client = client_of([row(0, *files)], images=folder)
    for number, name in enumerate(files):
        answer = get_picture(client, number)
        assert answer.status_code == 415 and answer.headers["content-type"] == "application/json", name
    monkeypatch.setattr("align.bench.chatgen.review_app.MAX_PICTURE_PIXELS", 40)
    (folder / "cut.png").write_bytes(picture())
    assert "more than 40 pixels" in get_picture(client, 2).json()["error"]
    with (folder / "empty.png").open("wb") as file:
        file.truncate(MAX_PICTURE_BYTES + 1)
    assert get_picture(client, 3).status_code == 413

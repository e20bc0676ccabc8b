"""Pictures of chats: where they may come from, what becomes of odd ones, and what is said of others."""

import contextlib
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from align.chat_pictures import ChatPictures, PictureError, picture_name


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data/images").mkdir(parents=True)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "data/images/red.png")
    Image.new("RGB", (40, 30), "blue").save(tmp_path / "secret.png")
    return tmp_path / "data"


@pytest.fixture
def pictures(folder):
    return ChatPictures(folder, longest_side=100)


def saved(folder, image, name="x.png", **options):
    image.save(folder / name, **options)
    return name


# Where from


def test_a_row_names_a_picture_in_its_folder(pictures):
    found = pictures.open("images/red.png")
    assert (found.mode, found.size, found.getpixel((0, 0))) == ("RGB", (40, 30), (255, 0, 0))
    assert pictures.open("images/../images/red.png").size == (40, 30)


def test_the_callers_own_pictures_are_anywhere(pictures, tmp_path):
    given = Image.new("RGB", (40, 30), "green")
    assert pictures.open(given).getpixel((0, 0)) == (0, 128, 0)
    assert pictures.open(tmp_path / "secret.png").getpixel((0, 0)) == (0, 0, 255)
    assert ChatPictures().open(tmp_path / "secret.png").size == (40, 30)


def test_a_row_can_not_leave_its_folder(pictures, folder, tmp_path):
    (folder / "images/link.png").symlink_to(tmp_path / "secret.png")
    (folder / "images/up").symlink_to(tmp_path)
    (folder / "images/inside.png").symlink_to(folder / "images/red.png")
    for name in ("../secret.png", str(tmp_path / "secret.png"), "images/link.png", "images/up/secret.png"):
        with pytest.raises(PictureError, match="outside of the data set's folder .* give a pathlib.Path"):
            pictures.open(name)
    with pytest.raises(PictureError, match="outside"):
        pictures.open(str(folder / "images/red.png"))  # absolute: rows are relative, wherever they lead
    assert pictures.open("images/inside.png").size == (40, 30)
    with pytest.raises(PictureError, match="no folder was named"):
        ChatPictures().open("images/red.png")


@pytest.mark.parametrize(
    "name", ["http://127.0.0.1:9/a.png", "https://x.org/a.png", "file:///etc/passwd", "data:image/png;base64,AA"]
)
def test_addresses_are_not_fetched(pictures, name):
    with pytest.raises(
        PictureError, match="is an address, and those are not fetched; build the data set with pictures"
    ):
        pictures.open(name)


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("images/nothing.png", r"images/nothing.png is missing in .*data; is it the right folder"),
        ("images", "images is missing"),
        ("", "is missing"),
        ("a\0b", "is no path"),
        ("x" * 100_000, r"x{200}\.\.\. (is missing|is no path|can't be read)"),
        (7, "must be a path or a PIL image, but is a int"),
        (None, "but is a NoneType"),
    ],
)
def test_what_is_no_file_is_named(pictures, source, match):
    with pytest.raises(PictureError, match=match) as error:
        pictures.open(source)
    assert len(str(error.value)) < 1000 and "\0" not in str(error.value)


def test_a_pipe_is_not_waited_for(pictures, folder):
    os.mkfifo(folder / "pipe.png")
    with pytest.raises(PictureError, match="pipe.png is missing"):
        pictures.open("pipe.png")


# Odd ones


def test_transparent_parts_are_white(pictures, folder):
    half = Image.new("RGBA", (40, 40), (255, 0, 0, 128))
    assert pictures.open(saved(folder, half)).getpixel((5, 5)) == (255, 127, 127)
    assert pictures.open(saved(folder, Image.new("RGBA", (40, 40), (0, 0, 0, 0)))).getpixel((5, 5)) == (255, 255, 255)
    assert pictures.open(saved(folder, Image.new("LA", (40, 40), (0, 128)))).getpixel((5, 5)) == (127, 127, 127)
    palette = Image.new("P", (40, 40), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert pictures.open(saved(folder, palette)).getpixel((5, 5)) == (255, 0, 0)
    assert pictures.open(saved(folder, palette, transparency=1)).getpixel((5, 5)) == (255, 255, 255)


@pytest.mark.parametrize(("value", "grey"), [(0, 0), (65535, 255), (32896, 128), (257, 1)])
def test_sixteen_bits_are_scaled_and_not_clipped(pictures, folder, value, grey):
    deep = Image.fromarray(np.full((40, 40), value, np.uint16))
    assert deep.mode == "I;16"
    assert pictures.open(saved(folder, deep)).getpixel((5, 5)) == (grey,) * 3
    assert pictures.open(Image.new("I", (40, 40), value)).getpixel((5, 5)) == (grey,) * 3


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr", "HSV", "LAB"])
def test_other_modes_become_rgb(pictures, mode):
    assert pictures.open(Image.new(mode, (40, 40))).mode == "RGB"


def test_floats_have_no_known_range(pictures):
    with pytest.raises(PictureError, match="holds floats, whose range nobody knows; convert it to 8 bits"):
        pictures.open(Image.new("F", (40, 40)))


def test_exif_turns_a_picture_upright(pictures, folder):
    image = Image.new("RGB", (60, 40), "white")
    image.paste("red", (0, 0, 60, 10))  # red above
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held at its side: turn by 90 degrees clockwise
    found = pictures.open(saved(folder, image, "turned.png", exif=exif))
    assert found.size == (40, 60)
    assert found.getpixel((38, 30)) == (255, 0, 0) and found.getpixel((2, 30)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1, 1), (28, 28)), ((2, 10), (28, 30)), ((1, 3000), (28, 100)), ((3000, 1), (100, 28)), ((28, 28), (28, 28)),
     ((400, 200), (100, 50)), ((101, 101), (100, 100))],
)  # fmt: skip
def test_every_picture_has_a_size_that_encoders_take(pictures, size, expected):
    found = pictures.open(Image.new("RGB", size, "black"))
    assert found.size == expected and found.getextrema()[0][0] == 0


def test_a_picture_of_the_caller_is_not_changed(pictures):
    given = Image.new("RGB", (400, 200))
    pictures.open(given)
    assert given.size == (400, 200)


def test_a_large_jpeg_is_decoded_small(folder):
    saved(folder, Image.new("RGB", (4000, 3000), "red"), "large.jpg")
    with Image.open(folder / "large.jpg") as image:
        image.draft(None, (200, 200))
        assert image.width <= 1000, "this is what keeps memory small"
    assert ChatPictures(folder, 100).open("large.jpg").size == (100, 75)


def bomb(width, height):
    """A PNG of a few bytes that says it is large."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "no picture that can be read"),
        (b"GIF89a", "damaged|no picture"),
        (b"not a picture at all", "no picture that can be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture that can be read"),
        (bomb(40, 40), "damaged"),
        (bomb(10_000, 9_000), "10000x9000 pixels, more than 89,478,485; make it smaller"),
        (bomb(60_000, 60_000), "DecompressionBombError"),
    ],
)
def test_what_is_no_picture_is_named(pictures, folder, content, match):
    (folder / "bad.png").write_bytes(content)
    with pytest.raises(PictureError, match=rf"bad.png.*({match})"):
        pictures.open("bad.png")


def test_a_truncated_picture_is_damaged(pictures, folder):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), dtype=np.uint8))
    for name in ("x.png", "x.jpg"):
        whole = (folder / saved(folder, noise, name)).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(PictureError, match=rf"{name} is damaged .*replace it with a whole one"):
            pictures.open(name)


def test_flipped_bytes_never_raise_anything_else(pictures, folder):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8))
    rng = np.random.default_rng(1)
    for name in ("x.png", "x.jpg", "x.webp", "x.gif", "x.tiff", "x.bmp"):
        whole = np.frombuffer((folder / saved(folder, noise, name)).read_bytes(), np.uint8)
        for _ in range(40):
            bytes_ = whole.copy()
            bytes_[rng.integers(0, min(len(whole), 400), 4)] = rng.integers(0, 255, 4)
            (folder / name).write_bytes(bytes_.tobytes())
            with contextlib.suppress(PictureError):
                assert pictures.open(name).mode == "RGB"


def test_options_and_names():
    with pytest.raises(ValueError, match="`longest_side` must be at least 28 pixels, but is 5"):
        ChatPictures(longest_side=5)
    assert picture_name("a\nb") == r"'a\nb'" and picture_name(Path("a.png")) == "a.png"
    assert picture_name(Image.new("L", (3, 4))) == "<L image 3x4>"

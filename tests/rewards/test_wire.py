"""Messages between reward service and client: what is taken, what is refused and why, and that pictures survive."""

import base64
import json
from io import BytesIO

import msgpack
import numpy as np
import pytest
from PIL import Image

from rewards.images import ImageError
from rewards.wire import (
    JSON,
    MSGPACK,
    Limits,
    MessageError,
    answer_message,
    check_picture,
    encode_image,
    is_text,
    media_type,
    pack,
    read_request,
    unpack,
)

LIMITS = Limits(max_body_bytes=10**6, max_pixels=20 * 13, max_images=2, max_pairs=4)


def noise(mode, size=(20, 13)):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image, kind, **options):
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


PNG = encoded(noise("RGB"), "PNG")
OTHER = encoded(noise("L"), "PNG")


@pytest.mark.parametrize("media", [JSON, MSGPACK])
def test_a_request_there_and_back(media):
    message = {"prompts": ["ä", "b", ""], "images": [PNG, OTHER], "image_index": [1, 0, 1]}
    request = read_request(pack(message, media), media, LIMITS)
    assert request.prompts == ["ä", "b", ""]
    assert [picture.data for picture in request.pictures] == [OTHER, PNG, OTHER]
    assert request.pictures[0] is request.pictures[2]
    in_order = read_request(pack({"prompts": ["a", "b"], "images": [PNG, OTHER]}, media), media, LIMITS)
    assert [picture.data for picture in in_order.pictures] == [PNG, OTHER]


def test_json_and_msgpack_are_the_plain_ones():
    body = json.dumps({"prompts": ["a"], "images": [base64.b64encode(PNG).decode()]}).encode()
    assert read_request(body, JSON, LIMITS).pictures[0].data == PNG
    body = msgpack.packb({"prompts": ["a"], "images": [PNG]})
    assert read_request(body, MSGPACK, LIMITS).pictures[0].data == PNG
    answer = answer_message([0.5, float("nan"), -1.0], {1: "why"}, {"name": "x"})
    expected = {"scores": [0.5, None, -1.0], "errors": {"1": "why"}, "scorer": {"name": "x"}}
    assert json.loads(pack(answer, JSON)) == msgpack.unpackb(pack(answer, MSGPACK)) == expected
    assert unpack(pack(answer, MSGPACK), MSGPACK) == expected


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"", 400, "not MessagePack"),
        (b"\x81\xa7prom", 400, "not MessagePack: Unpack failed: incomplete input"),
        (b"\x91" * 5000, 400, "not MessagePack: StackError"),  # nested deeper than any stack
        (b"\xdd\xff\xff\xff\xff", 413, "more than the 4 entries"),  # a list that claims 2**32 entries
        (b"\xdf\xff\xff\xff\xff", 400, "exceeds max_map_len"),
        (b"\xc6\xff\xff\xff\xff", 400, "not MessagePack"),
        (b"\xd6\xff\0\0\0\0", 400, "max_ext_len"),  # a timestamp
        (msgpack.packb([1]), 400, "must be a mapping, but is of type list"),
    ],
)
def test_bodies_that_are_no_msgpack(body, status, reason):
    with pytest.raises(MessageError, match=reason) as caught:
        read_request(body, MSGPACK, LIMITS)
    assert caught.value.status == status


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"", 400, "not JSON: Expecting value"),
        (b"\xff\xfe", 400, "not JSON"),
        (b"[" * 10**5, 400, "not JSON: maximum recursion depth"),
        (b"[]", 400, "must be a mapping"),
        (b'{"prompts": ["\\ud800"], "images": ["AA=="]}', 422, r"`prompts\[0\]` is .*not a text"),
        (b'{"prompts": ["a"], "images": ["AA="]}', 422, r"`images\[0\]` is not base64: Incorrect padding"),
        (b'{"prompts": ["a"], "images": ["A A="]}', 422, "not base64"),
        (b'{"prompts": ["a"], "images": [1]}', 422, r"`images\[0\]` must be base64 text, but is of type int"),
        (b'{"prompts": ["a"], "images": ["AAAA"]}', 422, r"`images\[0\]` is neither PNG nor WebP"),
    ],
)
def test_bodies_that_are_no_json_request(body, status, reason):
    with pytest.raises(MessageError, match=reason) as caught:
        read_request(body, JSON, LIMITS)
    assert caught.value.status == status


@pytest.mark.parametrize(
    ("changes", "status", "reason"),
    [
        ({"prompts": None}, 422, "`prompts` must be a list, but is of type NoneType"),
        ({"images": []}, 422, "`images` is empty"),
        ({"images": [PNG, PNG]}, 422, "need one image per prompt or `image_index`, but got 1 and 2"),
        ({"images": ["text"]}, 422, r"`images\[0\]` must be binary, but is of type str"),
        ({"images": [PNG] * 3}, 413, "`images` has 3 entries, more than the 2 allowed"),
        ({"prompts": ["a"] * 5}, 413, "more than the 4 entries allowed"),
        ({"prompts": [1]}, 422, r"`prompts\[0\]` is 1, not a text"),
        ({"image_index": [0, 0]}, 422, "`image_index` has 2 entries for 1 prompts"),
        ({"image_index": [1]}, 422, r"`image_index\[0\]` is 1, which is none of the 1 images"),
        ({"image_index": [-1]}, 422, "which is none of"),
        ({"image_index": [True]}, 422, "is True, which is none of"),
        ({"image_index": [0.0]}, 422, "which is none of"),
        ({"iamges": 1}, 422, "unknown key 'iamges'; a request has prompts, images and image_index"),
        (
            {"images": [encoded(noise("RGB", (20, 14)), "PNG")]},
            413,
            r"`images\[0\]` has 20x14 pixels, more than the 260",
        ),
    ],
)
def test_requests_that_make_no_sense(changes, status, reason):
    body = msgpack.packb({"prompts": ["a"], "images": [PNG]} | changes)
    with pytest.raises(MessageError, match=reason) as caught:
        read_request(body, MSGPACK, LIMITS)
    assert caught.value.status == status
    with pytest.raises(MessageError, match="`images` is missing"):
        read_request(msgpack.packb({"prompts": ["a"]}), MSGPACK, LIMITS)


def test_pictures_that_are_taken_and_refused():
    check_picture(PNG)
    for mode in ("RGB", "RGBA"):
        check_picture(encoded(noise(mode), "WEBP", lossless=True))
        with pytest.raises(MessageError, match="is lossy WebP"):  # with alpha the file begins with another chunk
            check_picture(encoded(noise(mode), "WEBP", quality=100))
    frames = {"save_all": True, "append_images": [noise("L").convert("RGB")], "lossless": True}
    huge = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\1\0\0\0\1\0\0\x08\2\0\0\0\x9dN\x1d\x90"  # 65536 x 65536
    for data, reason in [
        (encoded(noise("RGB"), "WEBP", **frames), "is an animation"),
        (encoded(noise("RGB"), "JPEG"), "is neither PNG nor WebP"),
        (PNG[:20], "is a damaged PNG"),
        (encoded(noise("RGB"), "WEBP", lossless=True)[:18], "is a damaged WEBP"),
        (huge, "is too large|is a damaged PNG"),
        (b"", "is neither PNG nor WebP"),
    ]:
        with pytest.raises(MessageError, match=reason):
            check_picture(data)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_modes_of_png_survive(mode):
    image = noise(mode)
    back = Image.open(BytesIO(encode_image(image, 10**6)))
    assert back.mode == mode and back.tobytes() == image.tobytes()
    assert back.convert("RGB").tobytes() == image.convert("RGB").tobytes()


def test_images_that_png_can_not_hold_as_they_are():
    for mode in ("CMYK", "YCbCr", "HSV"):
        back = Image.open(BytesIO(encode_image(noise(mode), 10**6)))
        assert back.mode == "RGB" and back.tobytes() == noise(mode).convert("RGB").tobytes()
    # Pixels that point behind the end of a palette of ten colours.
    image = Image.frombytes("P", (16, 16), bytes(range(256)))
    image.putpalette([9, 8, 7] * 10)
    back = Image.open(BytesIO(encode_image(image, 10**6)))
    assert back.tobytes() == image.tobytes() and back.convert("RGB").tobytes() == image.convert("RGB").tobytes()
    assert len(image.getpalette()) == 30  # the caller's image is as it was


def test_files_are_passed_on_if_they_can_be(tmp_path):
    webp = encoded(noise("RGBA"), "WEBP", lossless=True)
    (tmp_path / "a.webp").write_bytes(webp)
    assert encode_image(tmp_path / "a.webp", 260) == encode_image(str(tmp_path / "a.webp"), 260) == webp
    assert encode_image(PNG, 260) == PNG
    lossy = encoded(noise("RGB"), "JPEG")
    again = Image.open(BytesIO(encode_image(lossy, 260)))
    assert again.format == "PNG" and again.tobytes() == Image.open(BytesIO(lossy)).tobytes()
    array = np.asarray(noise("RGB"))
    assert np.array_equal(np.asarray(Image.open(BytesIO(encode_image(array, 260)))), array)
    (tmp_path / "broken.png").write_bytes(b"no image")
    for source, reason in [
        (tmp_path / "gone.png", "gone.png: No such file"),
        (tmp_path / "broken.png", "<8 bytes> is no image|broken.png is no image"),
        (PNG, "20x13 is more than 259 pixels"),
        (noise("RGB"), "20x13 is more than 259 pixels"),
    ]:
        with pytest.raises(ImageError, match=reason):
            encode_image(source, 259)


def test_media_types_and_texts():
    assert media_type("application/JSON; charset=utf-8") == JSON
    assert media_type("text/html, application/vnd.msgpack;q=0.9") == media_type("application/x-msgpack") == MSGPACK
    assert media_type(None) is media_type("*/*") is media_type("application/octet-stream") is None
    assert is_text("é🦊") and not is_text("\ud800") and not is_text(b"a") and not is_text(None)
    with pytest.raises(TypeError, match="JSON has no set"):
        pack({"a": {1}}, JSON)

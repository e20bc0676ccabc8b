import io
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from rollouts.picture_png import PictureError, decode_picture, encode_picture, infotext
from rollouts.requests import BatchKey, RenderJob

BATCH = BatchKey("SD 1.5", "Pixel Wave - v10", "", 1.0, "DPM++ 2M Karras", 512, 768, 25, 7.0, 2)


def job(prompt="a cat", negative="blurry", seed=7, **changes):
    return RenderJob("ab" * 32, BATCH._replace(**changes), prompt, negative, seed)


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))


def read_as_a1111(text):
    """`parse_generation_parameters` of A1111 1.10 (modules/infotext_utils.py), without its settings."""
    pattern = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    *lines, last = text.strip().split("\n")
    if len(pattern.findall(last)) < 3:
        lines, last = [*lines, last], ""
    prompt = negative = ""
    in_negative = False
    for line in map(str.strip, lines):
        if line.startswith("Negative prompt:"):
            in_negative, line = True, line[16:].strip()
        if in_negative:
            negative += ("" if negative == "" else "\n") + line
        else:
            prompt += ("" if prompt == "" else "\n") + line
    fields = {k: json.loads(v) if v[:1] == '"' == v[-1:] else v for k, v in pattern.findall(last)}
    return prompt, negative, fields


FIELDS = {
    "Steps": "25", "Sampler": "DPM++ 2M", "Schedule type": "Karras", "CFG scale": "7", "Seed": "7", "Size": "512x768",
    "Model": "Pixel Wave - v10", "Clip skip": "2",
}  # fmt: skip


def test_infotext_is_as_a1111_writes_it():
    assert infotext(job()) == (
        "a cat\nNegative prompt: blurry\nSteps: 25, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 7, "
        "Size: 512x768, Model: Pixel Wave - v10, Clip skip: 2"
    )
    assert "Negative prompt" not in infotext(job(negative=" "))


def test_what_a1111_would_misread_is_quoted_or_named():
    text = infotext(job(checkpoint='a: "b", c', sampler="Euler a", cfg=6.5))
    assert read_as_a1111(text)[2] == FIELDS | {
        "Model": 'a: "b", c', "Sampler": "Euler a", "Schedule type": "Uniform", "CFG scale": "6.5",
    }  # fmt: skip


def test_a_lora_is_a_tag_behind_the_prompt():
    text = infotext(job(lora="Ink: <v1>", lora_weight=0.75))
    assert read_as_a1111(text)[0] == "a cat <lora:Ink   v1 :0.75>"


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("two\nlines", "two\nlines"),
        ("win\r\ndows\r", "win\ndows"),
        ("a\nNegative prompt: b", "a Negative prompt: b"),
        ("Negative prompt: b", ", Negative prompt: b"),
        ("Steps: 1, Sampler: x, Seed: 2", "Steps: 1, Sampler: x, Seed: 2"),
        ("nul\0 and escape\x1b", "nul  and escape"),
        ("half a pair \ud800", "half a pair ?"),
        ('"quotes", <b>tags</b> & 日本語 🐈', '"quotes", <b>tags</b> & 日本語 🐈'),
        ("", ""),
        ("word " * 20_000, ("word " * 20_000).strip()),
    ],
)
@pytest.mark.parametrize("negative", ["", "blurry"])
def test_hostile_prompts_stay_prompts(image, prompt, read, negative):
    written = job(prompt=prompt, negative=negative)
    data = encode_picture(image, written, {"prompt": prompt}, seconds=0.5).data
    assert read_as_a1111(Image.open(io.BytesIO(data)).text["parameters"]) == (read, negative, FIELDS)
    found = decode_picture(data)
    assert (found.metadata, found.key, found.seconds) == ({"prompt": prompt}, written.key, 0.5)


@settings(max_examples=200, deadline=None)
@given(st.text(), st.text(st.sampled_from('Negative prompt:\n\r ,Steps01"\\\x85\u2028')), st.integers(0, 2**32))
def test_no_text_changes_the_parameters(prompt, negative, seed):
    for texts in ((prompt, negative), (negative, prompt)):
        _, _, fields = read_as_a1111(infotext(job(*texts, seed=seed)))
        assert fields == FIELDS | {"Seed": str(seed)}


def test_pixels_come_back_as_they_were(image):
    encoded = encode_picture(image, job(), {"n": [1, None]})
    found = decode_picture(encoded.data)
    assert found.image.mode == "RGB" and np.array_equal(np.asarray(found.image), np.asarray(image))
    assert found.pixels == encoded.pixels and found.size == len(encoded.data) and found.metadata == {"n": [1, None]}
    grey = decode_picture(encode_picture(image.convert("L"), job(), {}).data).image
    assert np.array_equal(np.asarray(grey), np.asarray(image.convert("L").convert("RGB")))


def test_one_changed_pixel_is_noticed(image):
    data = encode_picture(image, job(), {}).data
    changed = Image.open(io.BytesIO(data))
    texts = PngImagePlugin.PngInfo()
    texts.add_text("t2i-align", changed.text["t2i-align"])
    changed.putpixel((3, 4), tuple(255 - value for value in changed.getpixel((3, 4))))
    buffer = io.BytesIO()
    changed.save(buffer, "PNG", pnginfo=texts)
    with pytest.raises(PictureError, match="not those it was written with"):
        decode_picture(buffer.getvalue())


def test_what_is_no_picture_of_ours_is_refused(image):
    data = encode_picture(image, job(), {}).data
    plain = io.BytesIO()
    image.save(plain, "PNG")
    with pytest.raises(PictureError, match="`t2i-align` text"):
        decode_picture(plain.getvalue())
    for length in (0, 10, 200, len(data) // 2, len(data) - 200):
        with pytest.raises(PictureError, match="no intact PNG"):
            decode_picture(data[:length])
    middle = len(data) // 2
    with pytest.raises(PictureError):
        decode_picture(data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :])

"""Pictures, dots and curves, read back from what was written."""

import base64
import io
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from align.evaluation.report_figures import PictureBudget, curve, data_uri, dot_plot, nice_ticks

SVG = "{http://www.w3.org/2000/svg}"


def decoded(source):
    return Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2])))


def test_small_pictures_stay_as_they_are_and_large_ones_are_scaled(pictures):
    small, large = (Image.open(path) for path in pictures)
    np.testing.assert_array_equal(np.asarray(decoded(data_uri(small))), np.asarray(small))
    assert data_uri(small).startswith("data:image/png;base64,")
    assert data_uri(large).startswith("data:image/jpeg;base64,") and decoded(data_uri(large)).size == (256, 256)
    assert large.size == (512, 512)
    assert decoded(data_uri(Image.new("RGB", (1024, 512)))).size == (256, 128)


def test_the_budget(pictures, tmp_path):
    size = len(data_uri(Image.open(pictures[0])))
    budget = PictureBudget(2 * size)
    tags = [budget.tag(pictures[0], 'a "fox" <b>') for _ in range(3)]
    assert 'alt="a &quot;fox&quot; &lt;b&gt;"' in tags[0] and 'class="small"' in tags[0]
    assert ["<img" in tag for tag in tags] == [True, True, False]
    assert budget.left_out == 1 and budget.note().endswith(": 1.</p>")
    assert PictureBudget(10**6).note() == ""


def test_pictures_that_are_gone_or_broken(tmp_path, pictures):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    budget = PictureBudget(10**6)
    assert "picture not found" in budget.tag(str(tmp_path / "gone.png"), "")
    assert "picture not found" in budget.tag(str(tmp_path / "broken.png"), "")
    assert "no picture" in budget.tag(None, "")
    assert "could not be read any more: 2." in budget.note()
    assert "<img" in budget.tag(f"file://{pictures[0]}", "")  # a URL, as of a bucket


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (53.2, 97.1, [50, 60, 70, 80, 90, 100]),
        (-0.3, 0.2, [-0.3, -0.2, -0.1, 0.0, 0.1, 0.2]), (2.0, 2.0, [1.4, 1.6, 1.8, 2.0, 2.2, 2.4, 2.6]),
    ],
)  # fmt: skip
def test_ticks_are_round_numbers_around_the_values(low, high, ticks):
    assert nice_ticks(low, high) == pytest.approx(ticks)


def test_dots_stand_where_their_values_are():
    rows = [("<SFT>", {"value": 0.5, "low": 0.4, "high": 0.6}), ("RRHF", {"value": 0.7, "low": 0.65, "high": 0.8})]
    root = ET.fromstring(dot_plot(rows, title='"T" & more'))
    assert root.attrib["role"] == "img" and root.attrib["aria-label"] == '"T" & more'
    texts = [text for text in root.iter(f"{SVG}text") if "faint" in text.get("class", "")]
    at = {float(text.text): float(text.attrib["x"]) for text in texts}
    scale = (at[80] - at[40]) / 40  # pixels per point
    dots = [float(dot.attrib["cx"]) for dot in root.iter(f"{SVG}circle")]
    assert [(x - at[40]) / scale + 40 for x in dots] == pytest.approx([50, 70], abs=0.1)
    lines = [line for line in root.iter(f"{SVG}line") if line.attrib["class"] == "mark"]
    ends = [(float(line.attrib[end]) - at[40]) / scale + 40 for line in lines for end in ("x1", "x2")]
    assert ends == pytest.approx([40, 60, 65, 80], abs=0.1)
    assert "<SFT>" in [text.text for text in root.iter(f"{SVG}text")]
    assert dot_plot([], title="none") == ""


def test_a_curve_goes_through_its_points():
    root = ET.fromstring(curve([(10, 4.0), (20, 2.0), (30, 0.0)], title="loss"))
    points = re.findall(r"([\d.]+),([\d.]+)", next(root.iter(f"{SVG}polyline")).attrib["points"])
    xs, ys = zip(*((float(x), float(y)) for x, y in points), strict=True)
    assert xs[1] == pytest.approx((xs[0] + xs[2]) / 2) and ys[1] == pytest.approx((ys[0] + ys[2]) / 2)
    assert ys[0] < ys[2]  # downwards on the screen
    assert curve([(10, 4.0), (10, 2.0)], title="one step") == "" and curve([], title="none") == ""

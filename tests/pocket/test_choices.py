"""A sheet of what methods draw."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pocket.choices import ChoicesConfig, main
from rewards.commandline import ConfigError


@pytest.fixture
def tables(tmp_path):
    """Two methods on three prompts, of which two name a style; each method draws in a colour of its own."""
    rows = []
    for method, colour in (("SFT", "red"), ("RRHF", "blue")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{method}.png")
        for key, prompt in (("b", "a cat, pixel art"), ("a", "a dog, pixel art"), ("c", "a fish, neon glow")):
            images = [] if (method, key) == ("RRHF", "c") else [str(tmp_path / f"{method}.png")]
            rows.append({"method": method, "prompt_set": "DABench", "prompt_id": key, "prompt": prompt,
                         "images": images, "drawn_from": "own"})  # fmt: skip
    other = {"method": "SFT", "prompt_id": "0", "prompt": "comic book", "images": [], "drawn_from": "own"}
    rows.append(other | {"prompt_set": "COCO captions"})
    rows.append(other | {"prompt_set": "DABench", "drawn_from": "nobody"})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "per_prompt.parquet")
    return tmp_path


def test_a_row_for_each_method_and_the_first_prompt_of_each_style(tables):
    main(ChoicesConfig(str(tables), str(tables / "new/sheet.png"), methods=["SFT", "RRHF"], scale=3))
    sheet = Image.open(tables / "new/sheet.png").convert("RGB")
    colours = sheet.getcolors(sheet.width * sheet.height)
    count = {colour: number for number, colour in colours}
    # Pixel art and neon: two pictures of SFT, one of RRHF, and a cross where it has none; 24 pixels wide each.
    assert count[255, 0, 0] == 2 * 24 * 24
    assert count[0, 0, 255] == 24 * 24


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tables": "nowhere"}, "There is no nowhere/per_prompt.parquet"),
        ({"methods": ["DPO"]}, r"\['DPO'\] are not in"),
    ],
)
def test_what_is_not_there_is_named(tables, options, message):
    with pytest.raises(ConfigError, match=message):
        main(ChoicesConfig(**({"tables": str(tables), "output": str(tables / "sheet.png")} | options)))

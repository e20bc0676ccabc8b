"""Where things are on a contact sheet, pixel by pixel."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from pocket.contact_sheet import GAP, contact_sheet, stack

RED, GREEN, PURPLE = (255, 0, 0), (0, 255, 0), (120, 0, 120)
GREY, CROSS = (225, 225, 225), (190, 80, 80)


def plain(color, width=8, height=8):
    return Image.new("RGB", (width, height), color)


def where(sheet, color):
    """Box of the pixels of a colour (left, top, right, bottom), and how many there are."""
    rows, columns = np.nonzero((np.asarray(sheet) == color).all(-1))
    return (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1), len(rows)


def test_pictures_are_enlarged_and_placed_in_a_grid():
    sheet = contact_sheet([[plain(RED), plain(GREEN)], [plain(PURPLE), "x"]], ["a", "b"], ["c", "d"], scale=5)
    boxes = {}
    for color in (RED, GREEN, PURPLE, GREY):
        boxes[color], count = where(sheet, color)
        left, top, right, bottom = boxes[color]
        assert (right - left, bottom - top) == (40, 40)
        assert count == 1_600 or color == GREY  # which has a cross and a letter upon it
    assert boxes[RED][1] == boxes[GREEN][1] and boxes[RED][0] == boxes[PURPLE][0]  # same row, same column
    assert boxes[GREEN][0] - boxes[RED][2] == boxes[PURPLE][1] - boxes[RED][3] == GAP
    assert boxes[GREY][:2] == (boxes[GREEN][0], boxes[PURPLE][1])
    assert sheet.size == (boxes[GREEN][2] + GAP, boxes[PURPLE][3] + GAP)


def test_every_pixel_becomes_a_square():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 6, 3), np.uint8))
    sheet = np.asarray(contact_sheet([[picture]], [""], [""], scale=3))
    bottom, right = sheet.shape[0] - GAP, sheet.shape[1] - GAP
    found = sheet[bottom - 18 : bottom, right - 18 : right].reshape(6, 3, 6, 3, 3)
    assert (found == np.asarray(picture)[:, None, :, None]).all()


def test_a_missing_picture_is_crossed_out_and_says_why():
    without = contact_sheet([["", plain(RED, 60, 60)]], ["a"], ["b", "c"])
    with_reason = contact_sheet(
        [["missing_file: there is no model.safetensors", plain(RED, 60, 60)]], ["a"], ["b", "c"]
    )
    (left, top, right, bottom), _ = where(without, CROSS)
    assert (right - left, bottom - top) == (60, 60)  # from corner to corner
    pixels = np.asarray(without)
    assert all((pixels[top + i, left + i] == CROSS).all() for i in range(60))
    different = np.nonzero((np.asarray(with_reason) != pixels).any(-1))
    assert len(different[0]) > 200  # text
    assert left <= different[1].min() and different[1].max() < right
    assert top <= different[0].min() and different[0].max() < bottom


def test_a_sheet_of_failures_only():
    sheet = contact_sheet([["no"], ["never " * 100]], ["a", "b"], ["c"])
    (left, top, right, bottom), _ = where(sheet, CROSS)
    assert (right - left, bottom - top) == (64, 2 * 64 + GAP)


def test_smaller_pictures_stand_in_the_middle_of_their_cell():
    sheet = contact_sheet([[plain(RED, 20, 10), plain(GREEN, 8, 16)]], [""], ["", ""])
    red, green = where(sheet, RED)[0], where(sheet, GREEN)[0]
    assert (red[1] + red[3]) == (green[1] + green[3])  # both in the middle of 16 rows
    assert green[0] - red[2] == GAP + 6  # of 20 columns, 8 are taken


def test_labels_are_where_they_belong():
    empty = np.asarray(contact_sheet([[plain(RED, 60, 60)] * 2] * 2, ["wide label", ""], ["", "tall"]))
    (left, top, right, bottom), _ = where(empty, RED)
    dark = np.argwhere((empty < 100).all(-1))
    beside, above = dark[dark[:, 1] < left], dark[dark[:, 0] < top]
    assert len(beside) and len(above) and len(beside) + len(above) == len(dark)
    assert top <= beside[:, 0].min() and beside[:, 0].max() < top + 60  # in the first row
    assert above[:, 1].min() >= left + 60 + GAP  # over the second column


def test_long_labels_are_wrapped_and_stay_within_their_width():
    text = "a prompt of many words and averyveryverylongwordthatcannotstandononeline indeed"
    sheet = np.asarray(contact_sheet([[plain(RED, 50, 50), plain(RED, 50, 50)]], [""], [text, ""]))
    (left, top, _, _), _ = where(sheet, RED)
    dark = np.argwhere((sheet < 100).all(-1))
    assert dark[:, 1].max() < left + 50 and dark[:, 0].max() < top
    assert top > 6 * 14  # as many lines


def test_a_title_makes_room_for_itself():
    cells = [[plain(RED, 100, 30)]]
    plain_sheet, titled = contact_sheet(cells, ["a"], ["b"]), contact_sheet(cells, ["a"], ["b"], title="Title")
    assert titled.width == plain_sheet.width
    added = titled.height - plain_sheet.height
    assert added > 10
    assert (np.asarray(titled)[added:] == np.asarray(plain_sheet)).all()


def test_sheets_below_each_other():
    whole = stack([plain(RED, 10, 5), plain(GREEN, 30, 7)])
    assert whole.size == (30, 5 + 7 + 3 * GAP)
    assert where(whole, RED) == ((0, 0, 10, 5), 50) and where(whole, GREEN) == ((0, 5 + 3 * GAP, 30, whole.height), 210)


def test_errors():
    with pytest.raises(ValueError, match=r"`cells` must be 1 x 2 as the labels are, but are rows of \[1\]"):
        contact_sheet([[plain(RED)]], ["a"], ["b", "c"])
    with pytest.raises(ValueError, match=r"`cells` must be 2 x 1"):
        contact_sheet([[plain(RED)]], ["a", "b"], ["c"])
    with pytest.raises(ValueError, match="`scale` must be at least 1, but is 0"):
        contact_sheet([[plain(RED)]], ["a"], ["b"], scale=0)
    with pytest.raises(ValueError, match="at least one image"):
        stack([])


def test_the_font_is_a_scalable_one():
    """Pillow without FreeType would fall back to a bitmap font, and widths would be wrong."""
    assert isinstance(ImageFont.load_default(12), ImageFont.FreeTypeFont)

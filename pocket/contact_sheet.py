"""Labelled pictures in a grid; a missing one is a crossed-out cell with the reason."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

Cell = Image.Image | str
"""A picture, or why there is none."""

GAP = 4
"""Pixels between cells."""
_LABEL_WIDTH = 150
_EMPTY_SIDE = 64  # of cells if there is no picture at all
_INK, _PAPER, _GREY, _CROSS = (20, 20, 20), (255, 255, 255), (225, 225, 225), (190, 80, 80)


def contact_sheet(
    cells: Sequence[Sequence[Cell]], rows: Sequence[str], columns: Sequence[str], *, title: str = "", scale: int = 1
) -> Image.Image:
    """A grid of pictures with labels on the left and above.

    Args:
        cells: For each row a cell for each column; pictures may differ in size.
        rows: Labels; long ones are wrapped.
        columns: Likewise.
        title: Stands above everything.
        scale: Pixels of the sheet per pixel of a picture, whole, so that pixels stay sharp.

    Returns:
        An RGB image.

    Raises:
        ValueError: Labels and cells do not match, or a scale below 1.
    """
    if len(cells) != len(rows) or any(len(row) != len(columns) for row in cells):
        shape = [len(row) for row in cells]
        raise ValueError(f"`cells` must be {len(rows)} x {len(columns)} as the labels are, but are rows of {shape}.")
    if scale < 1:
        raise ValueError(f"`scale` must be at least 1, but is {scale}.")
    pictures = [cell for row in cells for cell in row if not isinstance(cell, str)]
    width = scale * max((picture.width for picture in pictures), default=_EMPTY_SIDE)
    height = scale * max((picture.height for picture in pictures), default=_EMPTY_SIDE)
    left = max((min(_LABEL_WIDTH, round(_font().getlength(row)) + 1) for row in rows), default=0) + 2 * GAP
    title_height = len(_wrap(title, left + len(columns) * (width + GAP))) * _line() + GAP if title else 0
    top = title_height + max((len(_wrap(column, width)) for column in columns), default=0) * _line() + 2 * GAP

    sheet = Image.new("RGB", (left + len(columns) * (width + GAP), top + len(rows) * (height + GAP)), _PAPER)
    pen = ImageDraw.Draw(sheet)
    _write(pen, title, (GAP, GAP), sheet.width)
    for j, column in enumerate(columns):
        _write(pen, column, (left + j * (width + GAP), title_height + GAP), width)
    for i, (row, label) in enumerate(zip(cells, rows, strict=True)):
        y = top + i * (height + GAP)
        _write(pen, label, (GAP, y), left - 2 * GAP, height)
        for j, cell in enumerate(row):
            x = left + j * (width + GAP)
            sheet.paste(_painted(cell, width, height, scale), (x, y))
    return sheet


def stack(sheets: Sequence[Image.Image]) -> Image.Image:
    """Sheets below each other.

    Raises:
        ValueError: There is none.
    """
    if not sheets:
        raise ValueError("`sheets` must hold at least one image, but is empty.")
    height = sum(sheet.height for sheet in sheets) + 3 * GAP * (len(sheets) - 1)
    whole = Image.new("RGB", (max(sheet.width for sheet in sheets), height), _PAPER)
    y = 0
    for sheet in sheets:
        whole.paste(sheet, (0, y))
        y += sheet.height + 3 * GAP
    return whole


def _painted(cell: Cell, width: int, height: int, scale: int) -> Image.Image:
    """A cell of that size: the enlarged picture in its middle, or a cross and the reason."""
    if isinstance(cell, str):
        painted = Image.new("RGB", (width, height), _GREY)
        pen = ImageDraw.Draw(painted)
        pen.line((0, 0, width - 1, height - 1), fill=_CROSS)
        pen.line((0, height - 1, width - 1, 0), fill=_CROSS)
        _write(pen, cell, (2, 2), width - 4, height - 4)
        return painted
    painted = Image.new("RGB", (width, height), _PAPER)
    enlarged = cell.convert("RGB").resize((cell.width * scale, cell.height * scale), Image.Resampling.NEAREST)
    painted.paste(enlarged, ((width - enlarged.width) // 2, (height - enlarged.height) // 2))
    return painted


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(12)


def _line() -> int:
    """Pixels from one line of text to the next."""
    return 14


def _write(pen: ImageDraw.ImageDraw, text: str, at: tuple[int, int], width: int, height: int | None = None) -> None:
    """Write wrapped text; lines that do not fit into the height are left out."""
    lines = _wrap(text, width)
    fitting = len(lines) if height is None else max(1, height // _line())
    if fitting < len(lines):
        lines = [*lines[: fitting - 1], lines[fitting - 1] + "…"]
    for number, line in enumerate(lines):
        pen.text((at[0], at[1] + number * _line()), line, fill=_INK, font=_font())


def _wrap(text: str, width: int) -> list[str]:
    """Lines no wider than that; a word that is wider by itself is broken."""
    lines = [""]
    for word in text.split():
        candidate = f"{lines[-1]} {word}".strip()
        if _font().getlength(candidate) <= width:
            lines[-1] = candidate
            continue
        lines += [""] if lines[-1] else []
        for letter in word:
            if lines[-1] and _font().getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return [line for line in lines if line]

"""A picture of an evaluation table: each method's shares with their intervals."""

import io
import warnings
from pathlib import Path
from typing import Any

from align.evaluation.tables import ESTIMATES
from rewards.files import write_atomically

COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3")


def draw_table(report: dict[str, Any], path: Path) -> None:
    """Draw a table's estimates as horizontal bars with 95% intervals, one panel per prompt set, as a PNG.

    Args:
        report: What `table.json` holds.
        path: The file to write.

    Raises:
        ImportError: Without matplotlib, naming the extra to install.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Plots need matplotlib: pip install "t2i-align[bench]".') from error
    sets = list(dict.fromkeys(row["prompts"] for row in report["rows"]))
    methods = {row["method"] for row in report["rows"]}
    figure = Figure(figsize=(4.6 * len(sets), 1 + 0.9 * len(methods)), layout="constrained")
    FigureCanvasAgg(figure)
    for position, prompts in enumerate(sets, start=1):
        axes = figure.add_subplot(1, len(sets), position)
        _panel(axes, [row for row in report["rows"] if row["prompts"] == prompts])
        axes.set_title(prompts)
        if position == 1:
            axes.legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # names in any script; a box will do
        figure.savefig(buffer, dpi=110, format="png")
    write_atomically(path, buffer.getvalue())


def _panel(axes: Any, rows: list[dict[str, Any]]) -> None:
    shown = [name for name in ESTIMATES if any(name in row for row in rows)]
    height = 0.8 / len(shown)
    for offset, (name, colour) in enumerate(zip(shown, COLOURS, strict=False)):
        present = [(i, row[name]) for i, row in enumerate(rows) if name in row]
        values = [100 * estimate["value"] for _, estimate in present]
        errors = [
            [100 * max(0.0, estimate["value"] - estimate["low"]) for _, estimate in present],
            [100 * max(0.0, estimate["high"] - estimate["value"]) for _, estimate in present],
        ]
        places = [i + offset * height for i, _ in present]
        axes.barh(places, values, height, xerr=errors, label=ESTIMATES[name], color=colour, error_kw={"lw": 1})
    # Names come from outside; "$" would start a formula.
    axes.set_yticks(range(len(rows)), [_label(row["method"]) for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 105)
    axes.set_xlabel("%")
    axes.spines[["top", "right"]].set_visible(False)


def _label(method: str) -> str:
    return Path(method).name.replace("$", r"\$")[:28]

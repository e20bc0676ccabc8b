"""The picture of a table: that it is one, and that names from outside do not break it."""

from align.evaluation.plots import draw_table

PNG = b"\x89PNG\r\n\x1a\n"


def estimate(value):
    return {"value": value, "low": max(0.0, value - 0.1), "high": min(1.0, value + 0.1), "n": 10}


def test_png_of_several_prompt_sets_with_odd_names(tmp_path):
    rows = [
        {"method": method, "prompts": prompts, "hallucination": estimate(0.3)}
        | ({"model_accuracy": estimate(0.5)} if prompts == "DABench" else {})
        for method in ("runs/sft", r"$\frac{$ <b>", "水彩")
        for prompts in ("DABench", "PartiPrompts")
    ]
    draw_table({"architecture": "SD 1.5", "catalog": 3, "rows": rows}, tmp_path / "new" / "table.png")
    assert (tmp_path / "new" / "table.png").read_bytes().startswith(PNG)

"""per_prompt.parquet and the joint fit of the unified metric."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from align.evaluation.comparison import (
    Comparison,
    ComparisonError,
    load_comparison,
    save_comparison,
    unify,
    usable,
)
from rewards.unified import UnifiedMetricError


def test_values_are_of_the_range_of_everything_compared(comparison):
    unified, metric = unify(comparison, "a test")
    assert {name: (scale.low, scale.high) for name, scale in metric.scales.items()} == {
        "clip_score": (0, 1), "brightness": (10, 20),
    }  # fmt: skip
    assert metric.population == "a test"
    expected = [0.2, 0.2, 0.7, 0.7, 0.2, 0.2, 0.875, 0.7, 0.7]
    assert [row["unified"] for row in unified.rows] == pytest.approx(expected, abs=1e-6)
    assert all(row["unified"] is None for row in comparison.rows)  # left as they were


def test_prompts_that_were_not_drawn_are_left_out(comparison, by_hand):
    row, about = by_hand
    rows = [*comparison.rows, *(row(method, "d", None) for method in ("Baseline", "SFT", "RRHF"))]
    unified, _ = unify(Comparison(about(), rows), "a test")
    assert [row["unified"] for row in unified.rows[-3:]] == [None] * 3
    assert len(usable(unified.rows)) == 9


def test_what_is_saved_is_read_again(comparison, tmp_path):
    unified, _ = unify(comparison, "a test")
    save_comparison(tmp_path, unified)
    assert load_comparison(tmp_path) == unified
    table = pq.read_table(tmp_path / "per_prompt.parquet")
    assert table.column("unified").to_pylist() == [row["unified"] for row in unified.rows]


def test_nothing_to_compare(by_hand):
    row, about = by_hand
    with pytest.raises(ComparisonError, match="No prompt has a picture of the baseline"):
        unify(Comparison(about(), [row("Baseline", "a", None)]), "a test")
    same = {"clip_score": [0.5, 0.5], "brightness": [1.0, 2.0]}
    with pytest.raises(UnifiedMetricError, match="clip_score"):
        unify(Comparison(about(), [row("Baseline", "a", same)]), "a test")


def test_files_that_are_something_else(comparison, tmp_path):
    with pytest.raises(ComparisonError, match=r"There is no .*per_prompt\.parquet; write it with"):
        load_comparison(tmp_path)
    path = tmp_path / "per_prompt.parquet"
    path.write_bytes(b"no table")
    with pytest.raises(ComparisonError, match="is not a Parquet file"):
        load_comparison(tmp_path)
    pq.write_table(pa.table({"prompt": ["a"]}), path)
    with pytest.raises(ComparisonError, match="was not written by"):
        load_comparison(tmp_path)
    save_comparison(tmp_path, comparison)
    table = pq.read_table(path)
    newer = table.schema.metadata[b"t2i-align"].replace(b'"version": 1', b'"version": 2')
    pq.write_table(table.replace_schema_metadata({b"t2i-align": newer}), path)
    with pytest.raises(ComparisonError, match="has version 2, but this program reads 1"):
        load_comparison(tmp_path)

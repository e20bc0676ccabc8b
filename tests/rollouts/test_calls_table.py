"""Tables of calls: what is read, what is refused, and which pictures they ask for."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rollouts.calls_table import CallsError, ask, read_calls, seeds_of, unique_jobs
from rollouts.catalog import Catalog, CatalogEntry
from rollouts.requests import RenderSettings

PARAMETERS = {"width": 512, "height": 512, "sampling method": "Euler a", "sampling steps": 20, "cfg scale": 7.0}
CATALOG = Catalog(
    [
        CatalogEntry.model_validate(
            {"name": f"Model {n} - v1", "version_id": n, "model_id": n, "type": "Checkpoint", "base_model": "SD 1.5",
             "files": [{"uri": "x.safetensors", "format": "SafeTensor", "sha256": f"{n:064X}"}],
             "default_parameters": PARAMETERS}
        )
        for n in (1, 2)
    ]
)  # fmt: skip
CALL = CATALOG["Model 1 - v1"].default_call().to_dict()
OTHER = CATALOG["Model 2 - v1"].default_call().to_dict()
SETTINGS = RenderSettings()


def write(tmp_path, *rows, name="calls.jsonl"):
    path = tmp_path / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def row(*candidates, prompt_id="p1", prompt="a cat", **changes):
    instruction = {"prompt": prompt, "negative prompt": "blurry"}
    return {"prompt_id": prompt_id, "instruction": instruction, "candidates": list(candidates)} | changes


def candidate(call=CALL, **changes):
    return {"response": json.dumps(call), "call": call, "origin": "multinomial", "error": None} | changes


def test_the_table_of_candidates(tmp_path):
    refused = candidate(None, response="{", error="not_json")
    [prompt] = read_calls(write(tmp_path, row(candidate(), refused)))
    assert (prompt.prompt_id, prompt.prompt, prompt.negative_prompt) == ("p1", "a cat", "blurry")
    assert [c.call for c in prompt.candidates] == [CALL, None]
    asked = ask([prompt], CATALOG, SETTINGS, num_images=3)
    assert [len(entry.jobs) for entry in asked] == [3, 0]
    assert asked[1].failure is not None and asked[1].failure.reason == "not_json"


def test_a_row_with_a_call_of_its_own(tmp_path):
    path = write(tmp_path, {"prompt": "a cat", "call": json.dumps(CALL)}, {"instruction": "a dog", "call": CALL})
    first, second = read_calls(path)
    assert first.candidates[0].call == second.candidates[0].call == CALL
    assert (first.prompt, second.prompt) == ("a cat", "a dog") and first.prompt_id != second.prompt_id
    assert json.loads(first.candidates[0].response) == CALL


def test_parquet_is_read_like_json_lines(tmp_path):
    rows = [row(candidate(), candidate(OTHER)), row(candidate(), prompt_id="p2", prompt="a dog")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "calls.parquet")
    assert read_calls(tmp_path / "calls.parquet") == read_calls(write(tmp_path, *rows))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no calls"),
        (["{"], "row 1: not JSON"),
        ([row(), "[" * 100_000], "row 2: not JSON"),
        (["[]"], "row 1: must be an object, but is list"),
        ([{"call": CALL}], "row 1: needs `instruction` with a `prompt`"),
        ([{"instruction": {"prompt": 3}, "call": CALL}], "row 1: needs `instruction` with a `prompt`"),
        ([{"prompt": "a cat"}], "row 1: needs `candidates`"),
        ([{"prompt": "a cat", "candidates": {}}], "row 1: needs `candidates`"),
        ([row("x")], "row 1: a candidate must be an object"),
        ([row(), row()], "row 2: `prompt_id` 'p1' stands more than once"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path, rows, message):
    with pytest.raises(CallsError, match=message) as caught:
        read_calls(write(tmp_path, *rows))
    assert "calls.jsonl" in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(CallsError, match="no table of calls at"):
        read_calls(tmp_path / "none.jsonl")
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    with pytest.raises(CallsError, match="not a Parquet file"):
        read_calls(tmp_path / "x.parquet")
    (tmp_path / "x.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(CallsError, match="row 1: not JSON"):
        read_calls(tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (CALL | {"width": 513}, "invalid_call"),
        (CALL | {"sampling steps": 100_000}, "invalid_call"),
        (CALL | {"sampling steps": "20"}, "invalid_call"),
        ({"model": "Model 1 - v1"}, "invalid_call"),
        (CALL | {"model": "Model 3 - v1"}, "unknown_model"),
        (CALL | {"sampling method": "DPM adaptive"}, "unknown_sampler"),
    ],
)
def test_a_call_that_cannot_be_drawn_costs_only_itself(tmp_path, call, reason):
    prompts = read_calls(write(tmp_path, row(candidate(call), candidate(OTHER))))
    bad, good = ask(prompts, CATALOG, SETTINGS, num_images=2)
    assert bad.failure is not None and bad.failure.reason == reason and bad.jobs == []
    assert good.failure is None and len(good.jobs) == 2


@pytest.mark.parametrize("call", ["{", "[1]", "3", 7])
def test_a_call_that_is_no_object(tmp_path, call):
    [prompt] = read_calls(write(tmp_path, {"prompt": "a cat", "call": call}))
    assert prompt.candidates[0].call is None and prompt.candidates[0].error in ("not_json", "not_an_object")


def test_candidates_of_a_prompt_share_their_seeds(tmp_path):
    prompts = read_calls(write(tmp_path, row(candidate(), candidate(OTHER)), row(candidate(), prompt_id="p2")))
    one, other, next_prompt = ask(prompts, CATALOG, SETTINGS, num_images=4)
    assert one.seeds == other.seeds == [job.seed for job in one.jobs]
    assert len(set(one.seeds + next_prompt.seeds)) == 8
    assert all(0 <= seed < 2**32 for seed in one.seeds)


def test_more_images_keep_the_first_ones_seeds():
    assert seeds_of("p1", 10)[:3] == seeds_of("p1", 3)
    assert not set(seeds_of("p1", 10)) & set(seeds_of("p1", 10, seed=1))


def test_equal_calls_are_drawn_once(tmp_path):
    prompts = read_calls(write(tmp_path, row(candidate(), candidate(origin="default"), candidate(OTHER))))
    jobs, requests = unique_jobs(ask(prompts, CATALOG, SETTINGS, num_images=2))
    assert len(jobs) == len({job.key for job in jobs}) == 4
    assert [request.seed for request in requests] == [job.seed for job in jobs]

"""Reading as much of a call as is there, and judging the model it names."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollouts.catalog import Catalog
from rollouts.model_information import judge_model, read_fields


@pytest.fixture(scope="module")
def catalog(bench):
    return Catalog.load(bench / "catalog.jsonl")


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ('{"model": "A", "type": "LoRA", "base Mo', {"model": "A", "type": "LoRA"}),
        ('{"model": "A", "type": "Lo', {"model": "A"}),
        ('{"model": "A\\"b\\\\"', {"model": 'A"b\\'}),
        ('{"model": "A\\', {}),
        ('{"model": "ü水✨ {x}", ', {"model": "ü水✨ {x}"}),
        ('{"width": 51', {}),
        ('{"width": 51,', {"width": 51}),
        ('{"width": 51 ', {}),
        ('{"width": 51}', {"width": 51}),
        ('{"tags": ["a", {"b": 1}], "x": nul', {"tags": ["a", {"b": 1}]}),
        (' \n{ "model" : "A" }\n', {"model": "A"}),
        ('{"model": "A"} and more', {"model": "A"}),
        ('{"model": "A" "type": "LoRA"}', {"model": "A"}),
        ('{"model" "A"}', {}),
        ("{}", {}),
        ("{", {}),
    ],
)
def test_complete_fields_are_read(text, fields):
    assert read_fields(text) == (fields, None)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not_json"),
        ('Sure! {"model": "A"}', "not_json"),
        ("[1, 2]", "not_an_object"),
        ('"text"', "not_an_object"),
        ("[" * 100_000, "not_json"),
        ('{"model": "A", "model": "B"', "duplicate_field"),
    ],
)
def test_what_is_no_object_has_a_reason(text, reason):
    assert read_fields(text).reason == reason


@given(
    st.dictionaries(
        st.text(max_size=6), st.text(max_size=8) | st.integers() | st.booleans() | st.lists(st.none(), max_size=2)
    ),
    st.integers(0, 60),
    st.booleans(),
)
def test_a_cut_object_gives_the_first_fields_of_the_whole(value, end, ascii_only):
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert read_fields(text) == (value, None)
    read = list(read_fields(text[:end]).fields.items())
    assert read == list(value.items())[: len(read)]
    assert len(read) == len(value) or len(text) > end


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        ('", "type": "Checkpoint", "base Model": "SD 1.5", "width": 5', None),
        ('"', None),  # what is not there can't be wrong
        ("", "missing_field"),  # the name itself is cut off
        ('!"', "unknown_model"),
        ('", "type": "LoRA"', "model_type_mismatch"),
        ('", "type": "Hypernetwork"', "unknown_model_type"),
        ('", "type": 3, "base Model": "SD 1.5"', "wrong_type"),
        ('", "base Model": "SDXL 1.0"', "base_model_mismatch"),
        ('", "base Model": "SD 9"', "unknown_base_model"),
    ],
)
def test_model_is_judged_by_its_own_fields(catalog, ending, reason):
    entry = next(e for e in catalog.of_architecture("SD 1.5") if e.type == "Checkpoint")
    found = judge_model('{"model": ' + json.dumps(entry.name)[:-1] + ending, catalog, "SD 1.5")
    assert found == (entry.name if reason is None else None, reason)


def test_model_of_another_architecture_is_refused(catalog):
    entry = catalog.of_architecture("SDXL 1.0")[0]
    assert judge_model(entry.default_call().to_json(), catalog, "SD 1.5") == (None, "base_model_mismatch")
    assert judge_model(entry.default_call().to_json(), catalog, "SDXL 1.0") == (entry.name, None)


@pytest.mark.parametrize("name", ["3", "null", '["a"]', "{}"])
def test_name_that_is_no_text_is_refused(catalog, name):
    assert judge_model(f'{{"model": {name}, ', catalog, "SD 1.5") == (None, "wrong_type")

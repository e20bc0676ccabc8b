"""APICall: the schema of DiffAgent Sec. 3.1 and every way of getting it wrong."""

import json

import pytest
from pydantic import ValidationError

from rollouts.api import ARCHITECTURES, REASONS, APICall, APICallError, size_problem

# Written by hand, in the paper's field order.
TEXT = (
    '{"model": "Pixel Wave - v10", "type": "Checkpoint", "base Model": "SD 1.5", "width": 512, "height": 768, '
    '"sampling method": "DPM++ 2M Karras", "sampling steps": 30, "cfg scale": 7.5, "model description": "Soft light."}'
)
FIELDS = json.loads(TEXT)


def changed(**changes):
    """The text of a valid call with some fields replaced; `...` removes one. Keys are spelled with `_` for spaces."""
    names = {"base_Model": "base Model", "sampling_method": "sampling method", "sampling_steps": "sampling steps"}
    names |= {"cfg_scale": "cfg scale", "model_description": "model description"}
    fields = FIELDS | {names.get(key, key): value for key, value in changes.items()}
    return json.dumps({key: value for key, value in fields.items() if value is not ...})


CASES = [
    ("not_json", "Sure! Here is the call: " + TEXT, None),
    ("not_json", TEXT + " Enjoy!", None),
    ("not_json", TEXT + TEXT, None),
    ("not_json", TEXT[:-1], None),
    ("not_json", TEXT[:60], None),
    ("not_json", "", None),
    ("not_json", "\ufeff" + TEXT, None),
    ("not_json", "```json\n" + TEXT + "\n```", None),
    ("not_json", TEXT.replace("7.5", "NaN"), None),
    ("not_json", TEXT.replace("7.5", "Infinity"), None),
    ("not_json", TEXT.replace("7.5", "-Infinity"), None),
    ("not_json", TEXT.replace("7.5", "07.5"), None),
    ("not_json", TEXT.replace('"', "'"), None),
    ("not_json", TEXT.replace("512", "9" * 5000), None),  # more digits than Python reads
    ("not_json", "[" * 100_000, None),
    ("not_json", '{"model": ' * 50_000, None),
    ("not_an_object", f"[{TEXT}]", None),
    ("not_an_object", "null", None),
    ("not_an_object", "1e999", None),
    ("not_an_object", json.dumps(TEXT), None),  # JSON in a JSON string
    ("duplicate_field", TEXT.replace('"height"', '"width": 512, "height"'), "width"),
    ("duplicate_field", TEXT.replace('"height"', '"wi\\u0064th": 512, "height"'), "width"),
    ("missing_field", changed(cfg_scale=...), "cfg scale"),
    ("missing_field", changed(model_description=...), "model description"),
    ("missing_field", "{}", "model"),
    ("missing_field", TEXT.replace("base Model", "base_model"), "base Model"),  # only DABench's spelling counts
    ("unknown_field", changed(seed=1), "seed"),
    ("unknown_field", changed(Width=512), "Width"),
    ("wrong_type", changed(sampling_steps="30"), "sampling steps"),
    ("wrong_type", changed(sampling_steps=30.0), "sampling steps"),
    ("wrong_type", changed(width=True), "width"),
    ("wrong_type", changed(cfg_scale=True), "cfg scale"),
    ("wrong_type", changed(cfg_scale=None), "cfg scale"),
    ("wrong_type", changed(model=["Pixel Wave - v10"]), "model"),
    ("wrong_type", changed(type=1), "type"),
    ("wrong_type", changed(base_Model={"name": "SD 1.5"}), "base Model"),
    ("wrong_type", changed(model="\ud800"), "model"),  # half of a surrogate pair is no text
    ("wrong_type", TEXT.replace("512", "1e999"), "width"),
    ("unknown_model_type", changed(type="LORA"), "type"),
    ("unknown_model_type", changed(type="checkpoint"), "type"),
    ("unknown_base_model", changed(base_Model="SD 2.1"), "base Model"),
    ("unknown_base_model", changed(base_Model="SD1.5"), "base Model"),
    ("unknown_sampler", changed(sampling_method="dpm++ 2m karras"), "sampling method"),
    ("unknown_sampler", changed(sampling_method=""), "sampling method"),
    ("out_of_range", changed(model=""), "model"),
    ("out_of_range", changed(model="m" * 301), "model"),
    ("out_of_range", changed(model_description="d" * 4001), "model description"),
    ("out_of_range", changed(sampling_steps=0), "sampling steps"),
    ("out_of_range", changed(sampling_steps=151), "sampling steps"),
    ("out_of_range", changed(sampling_steps=10**4000), "sampling steps"),
    ("out_of_range", changed(cfg_scale=0.9), "cfg scale"),
    ("out_of_range", changed(cfg_scale=30.5), "cfg scale"),
    ("out_of_range", changed(cfg_scale=10**400), "cfg scale"),  # a JSON number, but no float
    ("out_of_range", TEXT.replace("7.5", "1e999"), "cfg scale"),
    ("out_of_range", changed(width=248), "width"),
    ("out_of_range", changed(width=10**4000), "width"),
    ("out_of_range", changed(height=1544), "height"),
    ("out_of_range", changed(height=-512), "height"),
    ("out_of_range", changed(width=514), "width"),
    ("out_of_range", changed(width=1536, height=1536), "height"),  # each side is fine, both together are not
    ("out_of_range", changed(base_Model="SDXL 1.0", width=504, height=1024), "width"),
]
# These three are the catalogue's question: tests/rollouts/test_catalog.py.
OF_THE_CATALOGUE = {"unknown_model", "model_type_mismatch", "base_model_mismatch"}


@pytest.mark.parametrize(("reason", "text", "field"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_each_reason(reason, text, field):
    with pytest.raises(APICallError) as caught:
        APICall.from_json(text)
    assert (caught.value.reason, caught.value.field) == (reason, field)
    assert str(caught.value).startswith(f"{reason}: ")
    assert len(str(caught.value)) < 500  # a derailed response does not flood the log
    str(caught.value).encode()  # and can be written to it


def test_every_reason_has_a_case():
    assert {case[0] for case in CASES} | OF_THE_CATALOGUE == set(REASONS)
    assert len(REASONS) == len(set(REASONS))


def test_text_of_a_call_is_canonical():
    call = APICall.from_json(TEXT)
    assert call.to_json() == TEXT
    assert (call.base_model, call.sampling_method, call.cfg_scale) == ("SD 1.5", "DPM++ 2M Karras", 7.5)
    shuffled = json.dumps(dict(reversed(FIELDS.items())), indent=3)
    assert APICall.from_json(f"\n\t {shuffled} \n") == call
    assert APICall.from_json(shuffled).to_json() == TEXT


@pytest.mark.parametrize("written", ["7", "7.0", "7.000", "70e-1"])
def test_a_whole_cfg_is_written_without_a_point(written):
    call = APICall.from_json(TEXT.replace("7.5", written))
    assert isinstance(call.cfg_scale, float)
    assert '"cfg scale": 7, ' in call.to_json()
    assert APICall.from_json(call.to_json()) == call
    assert call == APICall.from_json(TEXT.replace("7.5", "7"))
    assert hash(call) == hash(APICall.from_json(TEXT.replace("7.5", "7")))


@pytest.mark.parametrize(
    "name", ["水彩画 - v1", "Ünïcode ☃ - \U0001f98a", 'Say "cheese" \\ back', "A | B & C's", "\u2028"]
)
def test_unicode_comes_back_and_is_written_as_itself(name):
    text = json.dumps(FIELDS | {"model": name}, ensure_ascii=True)  # as \\uXXXX, surrogate pairs included
    call = APICall.from_json(text)
    assert call.model == name
    if name.isprintable() and '"' not in name:
        assert name in call.to_json()
    assert APICall.from_json(call.to_json()) == call


def test_deep_nesting_at_any_depth_is_counted_and_never_raises_anything_else():
    """Near Python's recursion limit some step or other gives up; wherever that is, it must end as a reason."""
    seen = set()
    for depth in (*range(800, 1100, 3), 5000):
        with pytest.raises(APICallError) as caught:
            APICall.from_json(f'{{"model": {"[" * depth}{"]" * depth}}}')
        seen.add(caught.value.reason)
    assert seen == {"wrong_type", "not_json"}


def test_from_dict_takes_numbers_that_python_refuses_to_print():
    for field in ("width", "cfg scale", "sampling steps"):
        with pytest.raises(APICallError) as caught:
            APICall.from_dict(FIELDS | {field: 10**5000})
        assert (caught.value.reason, caught.value.field) == ("out_of_range", field)
    with pytest.raises(APICallError, match="not_an_object.*list"):
        APICall.from_dict([FIELDS])


def test_a_long_unknown_field_is_shortened_in_the_message_only():
    with pytest.raises(APICallError) as caught:
        APICall.from_json(changed(**{"k" * 10_000: 1}))
    assert caught.value.field == "k" * 10_000
    assert len(str(caught.value)) < 300


def test_a_call_can_not_be_changed_and_the_constructor_checks_as_well():
    call = APICall.from_json(TEXT)
    with pytest.raises(ValidationError):
        call.width = 64
    with pytest.raises(ValidationError, match="unknown_sampler"):
        APICall.model_validate(FIELDS | {"sampling method": "magic"})


@pytest.mark.parametrize(
    ("base_model", "width", "height", "valid"),
    [
        ("SD 1.5", 512, 512, True),
        ("SD 1.5", 256, 256, True),
        ("SD 1.5", 1024, 1536, True),  # exactly the most pixels
        ("SD 1.5", 1032, 1536, False),
        ("SD 1.5", 255, 256, False),
        ("SDXL 1.0", 1024, 1024, True),
        ("SDXL 1.0", 1536, 2048, True),
        ("SDXL 1.0", 2048, 2048, False),
        ("SDXL 1.0", 256, 256, False),
        ("SDXL 1.0", 1024, 1028, False),
    ],
)
def test_sizes(base_model, width, height, valid):
    assert (size_problem(base_model, width, height) is None) == valid
    side = ARCHITECTURES[base_model].default_side
    assert size_problem(base_model, side, side) is None

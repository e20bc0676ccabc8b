"""ChatGen-Base: what it writes is put right, part by part."""

import json

import pytest

from align.agents.plans import Plan

GOOD = {
    "prompt": "a fox", "negative_prompt": "blurry", "model": "Owl Painter - v2",
    "arguments": {"sampler": "DDIM", "steps": 30, "cfg_scale": 6.5, "width": 512, "height": 768, "clip_skip": 2},
}  # fmt: skip


def read(base, written) -> Plan:
    text = written if isinstance(written, str) else json.dumps(written)
    return base._read(text, "what I said", {}, 0.0)


def test_a_good_plan_is_taken_as_it_is(base):
    plan = read(base, GOOD)
    assert (plan.prompt, plan.negative_prompt, plan.model) == ("a fox", "blurry", "Owl Painter - v2")
    assert plan.arguments == GOOD["arguments"] and plan.notes == ()


@pytest.mark.parametrize(
    ("change", "notes"),
    [
        ({"model": "Evil - v1"}, ["unknown_model: the default one instead"]),
        ({"model": 7}, ["unknown_model: the default one instead"]),
        ({"prompt": " "}, ["no_prompt: the user's words instead"]),
        ({"prompt": None}, ["no_prompt: the user's words instead"]),
        ({"arguments": GOOD["arguments"] | {"steps": 10**9}}, ["steps: the model's default instead"]),
        ({"arguments": GOOD["arguments"] | {"sampler": "magic"}}, ["sampler: the model's default instead"]),
        ({"arguments": GOOD["arguments"] | {"width": 99999}},
         ["width: the model's default instead", "height: the model's default instead"]),
        ({"arguments": []}, [f"{key}: the model's default instead"
                             for key in ("sampler", "steps", "cfg_scale", "width", "height")]),
    ],
)  # fmt: skip
def test_each_part_is_put_right_by_itself(base, change, notes):
    plan = read(base, GOOD | change)
    assert list(plan.notes) == notes and base.catalog.validate(plan.call(base.catalog)) == []


@pytest.mark.parametrize("text", ["", "a fox", "[1]", "[" * 100_000, '{"prompt": ', "null"])
def test_what_is_no_object_is_noted(base, text):
    plan = read(base, text)
    assert plan.notes[0] == "not_json" and plan.prompt == "what I said"


TRUTHS = {
    "prompt": {"model": "Fox Painter - v0", "arguments": {"sampler": "DDIM", "steps": 9}},
    "model": {"prompt": "an owl", "arguments": GOOD["arguments"]},
    "arguments": {"prompt": "an owl", "model": "Fox Painter - v0"},
    "nothing": {},
}


@pytest.mark.parametrize("truth", TRUTHS.values(), ids=TRUTHS.keys())
@pytest.mark.parametrize(
    "text",
    [
        json.dumps(GOOD),
        json.dumps(GOOD | {"model": 7, "prompt": " "}),
        json.dumps(GOOD | {"arguments": [], "negative_prompt": None}),
        json.dumps({"arguments": {"steps": 10**9, "clip_skip": 2}}),
        "a fox",
        "[1]",
    ],
)
def test_ground_truth_afterwards_is_ground_truth_at_once(base, text, truth):
    written = base._read(text, "what I said", {}, 0.5, ["dropped_messages: 2"])
    kept = json.loads(json.dumps(written.to_dict()))
    assert base.replanned(kept, truth) == base._read(text, "what I said", truth, 0.5, ["dropped_messages: 2"])

"""From raw responses to candidates: reconstruction, merging, and what the summary counts."""

import json

import pytest

from rollouts.catalog import Catalog, CatalogEntry
from rollouts.proposals import RawResponse, candidate, default_candidate, judged, rebuilt_candidates, summary

ODD = 'Quote "Q" {x} - v2'
FOREIGN = "Süßes 水彩 ✨ - v3"


def entry(number, name, base_model="SD 1.5", **parameters):
    side = 512 if base_model == "SD 1.5" else 1024
    defaults = {"width": side, "height": side, "sampling method": "Euler a", "sampling steps": 20, "cfg scale": 7.0}
    return CatalogEntry(
        name=name, version_id=number, model_id=number, type="Checkpoint", base_model=base_model,
        description=f"Draws {name}.", default_parameters=defaults | parameters,
    )  # fmt: skip


@pytest.fixture(scope="module")
def catalog():
    large = entry(4, "Large - v1", "SDXL 1.0")
    return Catalog([entry(1, "Plain - v1"), entry(2, ODD, **{"sampling steps": 33}), entry(3, FOREIGN), large])


def response(catalog, name, **changes):
    return json.dumps(catalog[name].default_call().to_dict() | changes, ensure_ascii=False)


def cut(text):
    return text[: text.index('"width"') + 9]


def beam(catalog, name):
    return RawResponse(cut(response(catalog, name)), "diverse_beam")


def test_candidate_of_a_valid_call(bench):
    catalog = Catalog.load(bench / "catalog.jsonl")
    call = next(iter(catalog.values())).default_call()
    row = candidate(call.to_json(), "greedy", catalog)
    assert row == {"response": call.to_json(), "call": call.to_dict(), "origin": "greedy", "error": None}
    gone = call.model_copy(update={"model": "Gone - v1"}).to_json()
    wanted = {"response": gone, "call": None, "origin": "greedy", "error": "unknown_model"}
    assert candidate(gone, "greedy", catalog) == wanted
    assert default_candidate(call) == row | {"origin": "default"}


@pytest.mark.parametrize("name", [ODD, FOREIGN])
def test_names_with_quotes_braces_and_other_scripts_survive(catalog, name):
    (found,) = rebuilt_candidates([beam(catalog, name)], catalog, "SD 1.5")
    assert found["call"] == catalog[name].default_call().to_dict()
    assert found["response"] == catalog[name].default_call().to_json()
    assert json.loads(found["response"])["model"] == name
    invented = RawResponse('{"model": "New \\"Q\\" {y} 水 - v1", "type": "Ch', "diverse_beam")
    assert rebuilt_candidates([invented], catalog, "SD 1.5") == []
    assert judged(invented, catalog, "SD 1.5") == {
        "text": invented.text, "origin": "diverse_beam", "error": "unknown_model",
    }  # fmt: skip


def test_beams_get_the_first_readable_samples_parameters_and_samples_keep_their_own(catalog):
    raws = [
        RawResponse("no call", "multinomial"),
        # Meant for another architecture: neither a candidate nor a source of parameters.
        RawResponse(response(catalog, "Large - v1", **{"sampling steps": 11}), "multinomial"),
        RawResponse(
            response(catalog, "Plain - v1", width=640, **{"cfg scale": 99, "sampling steps": 25}), "multinomial"
        ),
        RawResponse(response(catalog, FOREIGN, **{"sampling steps": 40}), "multinomial"),
        beam(catalog, ODD),
    ]
    found = rebuilt_candidates(raws, catalog, "SD 1.5")
    of_model = {c["call"]["model"]: c["call"] for c in found}
    assert list(of_model) == ["Plain - v1", FOREIGN, ODD]
    # cfg 99 is out of bounds, so the model's 7 stays.
    for name, steps, width in (("Plain - v1", 25, 640), (FOREIGN, 40, 512), (ODD, 25, 640)):
        call = of_model[name]
        assert (call["sampling steps"], call["width"], call["height"], call["cfg scale"]) == (steps, width, 512, 7)
        assert call["model description"] == f"Draws {name}."
    (of_defaults,) = rebuilt_candidates(raws[-1:], catalog, "SD 1.5", sampled_parameters=False)
    assert of_defaults["call"]["sampling steps"] == 33
    last = rebuilt_candidates(raws, catalog, "SD 1.5", sampled_parameters=False)[-1]
    assert last["call"] == of_defaults["call"]


def test_with_a_common_size_calls_differ_in_everything_else(catalog):
    raws = [
        RawResponse(response(catalog, "Plain - v1", width=640, **{"sampling steps": 25}), "multinomial"),
        beam(catalog, ODD),
    ]
    found = [c["call"] for c in rebuilt_candidates(raws, catalog, "SD 1.5", common_size=True)]
    assert [(c["model"], c["width"], c["height"], c["sampling steps"]) for c in found] == [
        ("Plain - v1", 512, 512, 25), (ODD, 512, 512, 25),
    ]  # fmt: skip


def test_equal_calls_are_merged_and_the_default_comes_last(catalog):
    default = catalog.default_call("SD 1.5", "Plain - v1")
    raws = [RawResponse(response(catalog, "Plain - v1"), "multinomial"), beam(catalog, ODD), beam(catalog, ODD)]
    found = rebuilt_candidates(raws, catalog, "SD 1.5", default=default, sampled_parameters=False)
    assert [(c["origin"], c["origins"], c["error"]) for c in found] == [
        ("multinomial", ["multinomial", "default"], None),
        ("diverse_beam", ["diverse_beam", "diverse_beam"], None),
    ]
    only = rebuilt_candidates([RawResponse("?", "greedy")], catalog, "SD 1.5", default=default)
    assert [(c["origin"], c["call"]["model"]) for c in only] == [("default", "Plain - v1")]
    assert rebuilt_candidates([], catalog, "SD 1.5") == []


def test_beams_are_judged_by_the_model_and_other_responses_as_a_whole(catalog):
    text = cut(response(catalog, ODD))
    reasons = {origin: judged(RawResponse(text, origin), catalog, "SD 1.5")["error"]
               for origin in ("greedy", "multinomial", "diverse_beam")}  # fmt: skip
    assert reasons == {"greedy": "not_json", "multinomial": "not_json", "diverse_beam": None}


def test_summary_counts_by_origin_and_reason(catalog):
    def row(raws, default=None):
        return {
            "policy": "p", "candidates": rebuilt_candidates(raws, catalog, "SD 1.5", default=default),
            "raw": [judged(raw, catalog, "SD 1.5") for raw in raws],
        }  # fmt: skip

    sampled = RawResponse(response(catalog, "Plain - v1"), "multinomial")
    large = RawResponse(cut(response(catalog, "Large - v1")), "diverse_beam")
    rows = [
        row([sampled, beam(catalog, ODD), beam(catalog, "Plain - v1"), large]),
        row([RawResponse("{", "multinomial"), large, RawResponse("[]", "diverse_beam"), large]),
    ]
    assert summary(rows) == {
        "prompts": 2,
        "policy": ["p"],
        "hallucination": {
            "multinomial": {"responses": 2, "rate": 0.5, "reasons": {"not_json": 1}},
            "diverse_beam": {"responses": 6, "rate": 4 / 6, "reasons": {"base_model_mismatch": 3, "not_an_object": 1}},
        },
        "candidates_per_prompt": {"mean": 1, "min": 0, "max": 2},
        "distinct_models_per_prompt": {"mean": 1, "min": 0, "max": 2},
        "merged_duplicates": 1,
        "prompts_without_candidates": 1,
    }
    assert summary([])["prompts"] == 0

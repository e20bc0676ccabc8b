"""What methods call for a prompt."""

import pytest

from align.evaluation.method_calls import BASELINE, OUR_MODEL, OUR_PARAMETERS, hallucinated_shares, judged_choice
from align.evaluation.method_calls import with_baseline as combined
from rollouts.catalog import Catalog, CatalogEntry

PARAMETERS = {"width": 512, "height": 512, "sampling method": "DDIM", "sampling steps": 30, "cfg scale": 5.0}


@pytest.fixture
def catalog():
    entries = [
        {"name": name, "version_id": i, "model_id": i, "type": "Checkpoint", "base_model": "SD 1.5",
         "default_parameters": PARAMETERS}
        for i, name in enumerate(("Original", "Fox"))
    ]  # fmt: skip
    return Catalog(map(CatalogEntry.model_validate, entries))


def test_shares_of_sampled_answers_by_hand(catalog):
    good = catalog["Fox"].default_call().to_json()
    # Three samples of two prompts: the first prompt is answered twice of three times, the second never.
    samples = [[good, "no call"], [good, good.replace("Fox", "Wolf")], ["{}", "[]"]]
    assert hallucinated_shares(samples, catalog) == pytest.approx([1 / 3, 1.0])
    assert hallucinated_shares([], catalog) == []


def test_combinations_take_one_part_from_our_agent(catalog):
    default = catalog.default_call("SD 1.5", "Original")
    ours = catalog.reconstruct("Fox", {"cfg scale": 3, "sampling steps": 11, "width": 640, "height": 640})
    chosen = {"RRHF": [judged_choice(ours.to_json(), catalog, default), judged_choice("no call", catalog, default)]}
    found = combined(chosen, "RRHF", catalog, default)
    assert list(found) == [BASELINE, OUR_PARAMETERS, OUR_MODEL, "RRHF"]

    def show(method):
        call = found[method][0].call
        return call.model, call.sampling_method, call.sampling_steps, call.cfg_scale, call.width

    assert show(BASELINE) == ("Original", "Euler a", 20, 7, 512)
    assert show(OUR_PARAMETERS) == ("Original", "DDIM", 11, 3, 512)
    assert show(OUR_MODEL) == ("Fox", "Euler a", 20, 7, 512)
    assert show("RRHF") == ("Fox", "DDIM", 11, 3, 512)
    # A hallucination has no parts to take.
    assert [found[method][1].reason for method in (OUR_PARAMETERS, OUR_MODEL)] == ["not_json", "not_json"]

"""Filters: each part alone, what JSON may say, and what is refused."""

import pytest

from align.agents.filters import CallFilter, FilterError, drawing_seconds
from rollouts.costs import CPU, CostModel, Line, megapixel_steps
from rollouts.requests import BatchKey


def names(shop, **parts):
    return {entry.name for entry in shop.values() if CallFilter.from_dict(parts).admits(entry)}


def test_each_part_by_itself(shop):
    everyone = {entry.name for entry in shop.values()}
    assert names(shop) == everyone - {"512"}
    assert names(shop, nsfw=True) == everyone
    assert names(shop, type="LoRA") == {"水彩 - v1"}
    assert names(shop, base_model="SDXL 1.0") == {e.name for e in shop.values() if e.base_model == "SDXL 1.0"} - {"512"}
    assert names(shop, allow=["Pixel", "{}"]) == {"Pixel", "{}"}
    assert names(shop, allow=["512"]) == set()  # allowing a model by name does not lift another part
    assert names(shop, deny=["Pixel"]) == everyone - {"512", "Pixel"}
    sold = {e.name for n, e in enumerate(shop.values()) if n % 2 == 0}
    assert names(shop, license={"allow_commercial_use": ["Sell"]}) == sold - {"512"}
    assert names(shop, license={"allow_commercial_use": ["None"]}) == everyone - sold - {"512"}
    assert names(shop, license={"allow_derivatives": ["true"]}) == set()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "`filter` must be an object, but is list"),
        ({"typ": "LoRA"}, r"`filter` has no \['typ'\]; it may hold base_model, type"),
        ({"type": "Lora"}, "`type` must be Checkpoint or LoRA, but is 'Lora'"),
        ({"type": 3}, "`type` must be text, but is 3"),
        ({"base_model": "SD 9"}, "`base_model` must be one of .* but is 'SD 9'"),
        ({"license": ["Sell"]}, "`license` must be an object"),
        ({"license": {"a": "Sell"}}, "`license.a` must be a list of names"),
        ({"allow": "Pixel"}, "`allow` must be a list of names"),
        ({"deny": [1]}, "`deny` must be a list of names"),
        ({"nsfw": "yes"}, "`nsfw` must be true or false"),
        ({"samplers": ["Euler b"]}, r"`samplers` holds \['Euler b'\]"),
        ({"samplers": []}, "`samplers` is empty"),
        ({"max_steps": 0}, "`max_steps` must be 1 to 150, but is 0"),
        ({"max_steps": True}, "`max_steps` must be a whole number"),
        ({"max_seconds": 0}, "`max_seconds` must be above 0"),
        ({"max_seconds": float("nan")}, "`max_seconds` must be above 0"),
        ({"max_seconds": "1"}, "`max_seconds` must be a number"),
    ],
)
def test_what_is_no_filter_is_named(value, message):
    with pytest.raises(FilterError, match=message):
        CallFilter.from_dict(value)


def test_null_is_as_if_left_out_and_filters_are_keys():
    assert CallFilter.from_dict({"type": None, "license": None}) == CallFilter()
    one, other = (CallFilter.from_dict({"license": {"a": [value]}}) for value in "xy")
    assert one != other and len({one, other, CallFilter.from_dict({"license": {"a": ["x"]}})}) == 2


def test_seconds_are_those_of_a_rollouts_cost_model(shop):
    costs = CostModel(CPU)
    seconds = drawing_seconds(costs)
    entry = shop["Pixel Wave - v1"]
    key = BatchKey(entry.base_model, entry.name, "", 1.0, "Heun", 512, 768, 25, 7.0, 1)
    expected = costs.draw_line(entry.base_model)(megapixel_steps(key, 1))
    assert seconds(entry, 512, 768, "Heun", 25) == pytest.approx(expected)
    line = Line(*CPU.draw["SD 1.5"])
    # 25 steps of two evaluations, twice for guidance.
    assert expected == pytest.approx(line.constant + line.slope * 0.512 * 0.768 * 25 * 2 * 2)
    assert seconds(entry, 512, 512, "Restart", 1) == float("inf")  # diffusers has no such sampler
    with pytest.raises(FilterError, match="`max_seconds` needs an estimate"):
        CallFilter(max_seconds=1.0).limits(None)

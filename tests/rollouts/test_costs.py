"""What loading and drawing cost: the formula, and what is learned from observations."""

import json
import random

import numpy as np
import pytest

from rollouts.costs import A100, CPU, CostError, CostModel, Line, megapixel_steps
from rollouts.requests import Batch, BatchKey, Spent
from rollouts.schedulers import SamplerError


def key(**changes):
    plain = {"base_model": "SD 1.5", "checkpoint": "a", "lora": "", "lora_weight": 1.0, "sampler": "Euler a"}
    numbers = {"width": 500, "height": 1000, "steps": 20, "cfg": 7.0, "clip_skip": 1}
    return BatchKey(**(plain | numbers | changes))


def batch(images=4, **changes):
    return Batch(key(**changes), tuple(range(images)))


def drawn(seconds, images=4, **more):
    return Spent(batches=1, images=images, draw_seconds=seconds, **more)


@pytest.mark.parametrize(
    ("changes", "images", "expected"),
    [
        ({}, 1, 0.5 * 20 * 2),  # with guidance the denoiser runs twice a step
        ({"cfg": 1.0}, 1, 0.5 * 20),
        ({"sampler": "Heun"}, 3, 0.5 * 20 * 2 * 2 * 3),  # two evaluations a step
        ({"width": 1024, "height": 1024, "steps": 1}, 1, 1.048576 * 2),
    ],
)
def test_megapixel_steps(changes, images, expected):
    assert megapixel_steps(key(**changes), images) == pytest.approx(expected, rel=1e-12)


def test_an_unknown_sampler_has_no_cost():
    with pytest.raises(SamplerError, match="Euler b"):
        megapixel_steps(key(sampler="Euler b"), 1)


def test_without_observations_the_assumptions_hold():
    costs = CostModel(A100)
    assert costs.draw_seconds(batch()) == pytest.approx(0.3 + 0.032 * 80)
    assert costs.load_seconds(2_000_000_000) == pytest.approx((0.2 + 0.5 * 2) + (1.0 + 0.2 * 2))
    assert costs.lora_seconds() == 0.5


@pytest.mark.parametrize("priors", [A100, CPU])
def test_the_first_observation_sets_the_scale_whatever_was_assumed(priors):
    costs = CostModel(priors)
    costs.observe(batch(), drawn(1000.0))
    assert costs.draw_seconds(batch()) == pytest.approx(1000.0, rel=1e-9)
    # An architecture that was never drawn is assumed to be off by as much.
    factor = 1000.0 / priors.draw["SD 1.5"](80.0)
    assert costs.draw_line("SDXL 1.0").slope == pytest.approx(factor * priors.draw["SDXL 1.0"].slope, rel=1e-9)


def test_constant_and_slope_are_told_apart():
    costs, chance = CostModel(A100), random.Random(0)
    rows = []
    for _ in range(300):
        images, steps = chance.randint(1, 8), chance.choice([10, 20, 30, 50])
        one = batch(images, steps=steps)
        units = 0.5 * steps * 2 * images
        seconds = (2.0 + 0.7 * units) * chance.gauss(1.0, 0.05)
        rows.append((units, seconds))
        costs.observe(one, drawn(seconds, images))
    design = np.array([[1.0, units] for units, _ in rows])
    by_numpy = np.linalg.lstsq(design, np.array([seconds for _, seconds in rows]), rcond=None)[0]
    line = costs.draw_line("SD 1.5")
    assert line.constant == pytest.approx(by_numpy[0], rel=0.02)
    assert line.slope == pytest.approx(by_numpy[1], rel=0.001)


def test_totals_are_reproduced_exactly_and_nothing_is_negative():
    # A line through these would start below zero: 10 units take 1 s, 40 take 10 s.
    records = [(batch(1, steps=10), drawn(1.0, 1)), (batch(4, steps=10), drawn(10.0))] * 5
    costs = CostModel.fit(records)
    assert costs.draw_line("SD 1.5").constant == 0.0
    assert costs.draw_line("SD 1.5").slope == pytest.approx(55 / 250)
    assert sum(costs.draw_seconds(one) for one, _ in records) == pytest.approx(55)


def test_a_slower_machine_is_noticed_if_old_observations_fade():
    fading, lasting = CostModel(A100, half_life=10), CostModel(A100)
    for seconds in [1.0] * 100 + [3.0] * 40:
        fading.observe(batch(), drawn(seconds))
        lasting.observe(batch(), drawn(seconds))
    assert lasting.draw_seconds(batch()) == pytest.approx((100 + 3 * 40) / 140)
    # Weights of the old ones: 2^-4 of all.
    assert fading.draw_seconds(batch()) == pytest.approx(3 - 2 / 16, rel=1e-3)


def test_reading_and_building_are_learned_apart():
    costs = CostModel(A100)
    for size in (1, 2, 4):  # 0.1 s + 1 s a GB to read; 0.5 s + 0.2 s a GB to build
        read, build = 0.1 + size, 0.5 + 0.2 * size
        waited = drawn(1.0, loads=1, loaded_bytes=size * 10**9, load_seconds=read + build, read_seconds=read)
        costs.observe(batch(), waited._replace(build_seconds=build))
        hidden = waited._replace(load_seconds=build + 0.01, build_seconds=build)  # it was read ahead
        costs.observe(batch(), hidden)
    assert costs.load_seconds(3 * 10**9) == pytest.approx(3.1 + 1.1, rel=0.02)
    assert costs.read_line().slope == pytest.approx(1.0, rel=0.02)
    assert costs.build_seconds(0) == pytest.approx(0.5, rel=0.05)


def test_loads_that_say_nothing_more_count_in_full():
    costs = CostModel(A100)
    for size in (1, 3):
        spent = Spent(loads=1, loaded_bytes=size * 10**9, load_seconds=2.0 * size, lora_loads=1, lora_seconds=0.25)
        costs.observe(batch(), spent)
    assert costs.load_seconds(10**9) + costs.load_seconds(3 * 10**9) == pytest.approx(8.0)
    assert costs.build_seconds(10**9) == 0.0
    assert costs.lora_seconds() == pytest.approx(0.25)
    # From memory: only built, and the size has to be said.
    costs = CostModel(A100)
    costs.observe(batch(), Spent(load_seconds=3.0), size=2 * 10**9)
    assert costs.build_seconds(2 * 10**9) == pytest.approx(3.0)


def test_a_batch_that_failed_teaches_nothing():
    costs = CostModel(A100)
    costs.observe(batch(), Spent())
    assert costs.draw_line("SD 1.5") == A100.draw["SD 1.5"] and costs.observed == 1


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_impossible_times_are_refused(bad):
    with pytest.raises(ValueError, match="must be finite and not below 0"):
        CostModel().observe(batch(), drawn(bad))
    with pytest.raises(ValueError, match="`half_life` must be above 0"):
        CostModel(half_life=0)


def test_saved_costs_go_on_learning_as_if_never_saved(tmp_path):
    costs = CostModel(CPU, half_life=50)
    spent = drawn(5.0, loads=1, loaded_bytes=10**9, load_seconds=1.5, lora_loads=1, lora_seconds=0.1)
    costs.observe(batch(), spent)
    costs.save(tmp_path / "costs.json")
    again = CostModel.load(tmp_path / "costs.json")
    assert again.to_dict() == costs.to_dict()
    for model in (costs, again):
        model.observe(batch(2, base_model="SDXL 1.0"), drawn(9.0, 2))
    assert again.to_dict() == costs.to_dict()
    assert json.loads((tmp_path / "costs.json").read_text())["seconds"]["swap a LoRA"] == pytest.approx(0.1)


def test_files_that_are_no_costs_are_named(tmp_path):
    path = tmp_path / "costs.json"
    with pytest.raises(CostError, match=r"Can't read the costs .*costs\.json: No such file"):
        CostModel.load(path)
    path.write_text("{")
    with pytest.raises(CostError, match=r"costs\.json is not JSON"):
        CostModel.load(path)
    path.write_text('{"priors": {}}')
    with pytest.raises(CostError, match="has no `sums`"):
        CostModel.load(path)
    CostModel().save(path)
    value = json.loads(path.read_text())
    value["sums"]["read"]["n"] = -1
    path.write_text(json.dumps(value))
    with pytest.raises(CostError, match=r"must be finite and not below 0"):
        CostModel.load(path)


def test_a_line_adds_count_and_amount():
    assert Line(2.0, 3.0)(4.0) == 14.0 and Line(2.0, 3.0)(4.0, 5) == 22.0

"""Calibration of scores by hand, and the command on a small DABench."""

import math

import pytest

from align.agents.calibrate import TEMPERATURES, CalibrateConfig, calibrate, main
from align.agents.calibration import Calibration
from align.agents.diffagent import Alternative
from align.scratch import ScratchConfig, build_from_scratch, train_bpe_tokenizer
from rewards.commandline import ConfigError
from rollouts.dialogue import DialogueFormat


def ranked(*models):
    return [Alternative(name, logp, similarity, 0.0) for name, logp, similarity in models]


def test_the_weight_with_which_most_are_right_and_the_threshold_for_a_target():
    rows = [
        ranked(("a", -1.0, 0.1), ("b", -3.0, 0.3)),  # b from a weight of 10 on; b is right
        ranked(("a", -1.0, 0.0), ("b", -9.0, 0.1)),  # b from 80 on; a is right
        ranked(("a", -2.0, 0.5), ("b", -2.5, 0.5)),  # always a, which is wrong
        ranked(("c", -1.0, 0.9)),
    ]
    right = ["b", "a", "b", "c"]
    own = [("a", 0.5), ("a", 0.9), ("a", 0.2), ("c", 0.8)]
    found = calibrate(own, rows, right, None)
    # Up to 10 the first is wrong (at 10 it is a tie, which the policy's own choice wins); 20 and 50 get three right.
    assert found.retrieval_weight == 20.0 and found.threshold == 0.0
    by_weight = found.measured["accuracy_by_weight"]
    assert [by_weight[weight] for weight in ("0", "5", "20", "50", "100")] == [0.5, 0.5, 0.75, 0.75, 0.5]

    # Scores at 20 of the right model and the other: 3 and 1, -1 and -7, 7.5 and 8; the last is certain.
    def surprise(t):
        return sum(math.log1p(math.exp(-margin / t)) for margin in (2, 6, -0.5))

    expected = min(TEMPERATURES, key=surprise)
    assert found.temperature == expected and TEMPERATURES[0] < expected < TEMPERATURES[-1]
    strict = calibrate(own, rows, right, 0.9)
    assert strict.threshold == pytest.approx(1 / (1 + math.exp(-2 / expected)))
    assert strict.measured["coverage"] == 0.75 and strict.measured["prompts"] == 4
    assert strict.measured["accuracy_by_coverage"] == {"0.25": 1.0, "0.50": 1.0, "0.75": 1.0, "1.00": 0.75}


def test_without_a_gain_the_policy_stays_alone_with_its_own_confidence():
    rows = [ranked(("a", -1.0, 0.0), ("b", -3.0, 0.9))] * 4
    own = [("a", 0.3), ("a", 0.6), ("a", 0.7), ("a", 0.9)]
    found = calibrate(own, rows, ["b", "a", "a", "a"], 1.0)
    assert (found.retrieval_weight, found.temperature, found.threshold) == (0.0, 1.0, 0.6)


def test_the_command_writes_where_agents_look(bench, tmp_path):
    import datasets

    pairs = datasets.load_from_disk(str(bench / "sd15"))
    tokenizer = train_bpe_tokenizer([row["instruction"]["prompt"] for row in pairs["sft"]], vocab_size=400)
    size = ScratchConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    build_from_scratch(size, tokenizer).save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    DialogueFormat().save(tmp_path / "policy")
    options = {"model_name_or_path": str(tmp_path / "policy"), "dataset": str(bench), "device": "cpu"}
    found = main(CalibrateConfig(**options, num_prompts=5, target=0.5, batch_size=3))
    assert Calibration.load(tmp_path / "policy") == found and found.measured["prompts"] == 5
    assert found.measured["accuracy_by_weight"][f"{found.retrieval_weight:g}"] == max(
        found.measured["accuracy_by_weight"].values()
    )
    main(CalibrateConfig(**options, num_prompts=2, output_dir=str(tmp_path)))
    assert (tmp_path / "calibration.json").is_file()
    with pytest.raises(ConfigError, match="`output_dir`: can't write to"):
        main(CalibrateConfig(**options, num_prompts=2, output_dir=str(bench / "catalog.jsonl" / "no")))
    for change, message in [
        ({"dataset": None, "catalog": "x"}, "`dataset` is needed"),
        ({"split": "sft"}, "`split` must be rrhf or eval"),
        ({"target": 0.0}, "`target` must be above 0"),
        ({"num_prompts": 0}, "`num_prompts` must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            CalibrateConfig(**options | change)

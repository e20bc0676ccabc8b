import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

from rewards import load_scorer
from rewards.checkpoints import CheckpointError
from rewards.convert import ConvertConfig, main


def test_a_converted_image_reward_needs_no_configuration(
    tmp_path, tiny_blip, tiny_blip_config, vocabulary, image_reward, pictures
):
    (tmp_path / "sizes.json").write_text(json.dumps(tiny_blip_config))
    main(
        ConvertConfig(
            "image_reward", str(tiny_blip), str(tmp_path / "out"), str(tmp_path / "sizes.json"), str(vocabulary)
        )
    )
    scorer = load_scorer("image_reward", checkpoint=tmp_path / "out", device="cpu")
    prompts = ["a cat", "b", "c", "d", "e"]
    assert torch.equal(scorer(prompts, pictures), image_reward(prompts, pictures))
    settings = json.loads((tmp_path / "out" / "scorer.json").read_text())
    assert settings["converted_from"]["checkpoint"] == "image_reward.pt"
    assert len(settings["converted_from"]["sha256"]) == 64


def test_converts_to_bfloat16_and_keeps_integers(tmp_path, tiny_blip, tiny_blip_config):
    (tmp_path / "sizes.json").write_text(json.dumps(tiny_blip_config))
    main(
        ConvertConfig(
            "image_reward", str(tiny_blip), str(tmp_path / "out"), str(tmp_path / "sizes.json"), dtype="bfloat16"
        )
    )
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        kinds = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert kinds.pop("blip.text_encoder.embeddings.position_ids") == torch.int64
    assert set(kinds.values()) == {torch.bfloat16}


def test_a_converted_hps_loads_without_its_configuration(tmp_path, tiny_clip, tiny_clip_config, hps, pictures):
    (tmp_path / "sizes.json").write_text(json.dumps(tiny_clip_config))
    command = [sys.executable, "-m", "rewards.convert", "--scorer", "hps_v2", "--checkpoint", str(tiny_clip)]
    command += ["--model_config", str(tmp_path / "sizes.json"), "--output", str(tmp_path / "out")]
    subprocess.run(command, check=True, capture_output=True)
    scorer = load_scorer("hps_v2", checkpoint=tmp_path / "out", device="cpu")
    assert torch.equal(scorer(["a"] * 5, pictures), hps(["a"] * 5, pictures))


def test_weights_that_do_not_fit_are_not_written(tmp_path, tiny_clip):
    with pytest.raises(CheckpointError, match="does not fit the model"):
        main(ConvertConfig("image_reward", str(tiny_clip), str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"scorer": "fid"}, "`scorer` must be"), ({"dtype": "int8"}, "`dtype` must be one of float32")],
)
def test_options_that_make_no_sense_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ConvertConfig(**({"scorer": "hps_v2", "checkpoint": "x", "output": "y"} | change))

"""Running on several processes."""

import pytest
from transformers.integrations.deepspeed import HfDeepSpeedConfig, deepspeed_config, is_deepspeed_zero3_enabled

from align.distributed import leave_process_group, without_deepspeed


def test_models_are_loaded_whole_and_then_in_pieces_again():
    pytest.importorskip("deepspeed", reason="needs the extra `deepspeed`")
    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_batch_size": 1})
    with pytest.raises(KeyError), without_deepspeed():
        assert not is_deepspeed_zero3_enabled() and deepspeed_config() is None
        raise KeyError
    assert is_deepspeed_zero3_enabled() and deepspeed_config() == config.config


def test_without_deepspeed_nothing_changes():
    with without_deepspeed():
        assert not is_deepspeed_zero3_enabled()
    assert not is_deepspeed_zero3_enabled()


def test_a_single_process_has_no_group_to_leave():
    leave_process_group()  # the others: tests/align/trainers/test_rrhf_trainer.py, test_sft.py

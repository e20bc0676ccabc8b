"""Options of the trainer: the paper's by default, those of the other losses, and bad ones refused."""

import math

import pytest
from transformers import HfArgumentParser

from align.trainers.rrhf_config import RRHFConfig


def config(tmp_path, **options):
    return RRHFConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **options)


@pytest.mark.parametrize(
    ("loss_type", "beta", "margin", "ce_weight", "reduction", "reference"),
    [
        ("rrhf", None, 0.0, 1.0, "sum", False),
        ("bradley_terry", 1.0, 0.0, 0.0, "mean", False),
        ("simpo", 2.0, 1.0, 0.0, "mean", False),
        ("dpo", 0.1, 0.0, 0.0, "mean", True),
    ],
)
def test_defaults_of_each_loss(tmp_path, loss_type, beta, margin, ce_weight, reduction, reference):
    found = config(tmp_path, loss_type=loss_type)
    assert (found.beta, found.margin, found.ce_weight, found.pair_reduction) == (beta, margin, ce_weight, reduction)
    assert (found.rank_weight, found.length_exponent, found.ce_per_token) == (1.0, 1.0, False)
    assert found.needs_reference == reference
    assert config(tmp_path, loss_type=loss_type, kl_weight=0.1).needs_reference


def test_given_options_are_kept(tmp_path):
    found = config(tmp_path, loss_type="simpo", beta=3.0, margin=0.0, ce_weight=0.5, pair_reduction="sum")
    assert (found.beta, found.margin, found.ce_weight, found.pair_reduction) == (3.0, 0.0, 0.5, "sum")
    # What a saved configuration gives when it is read again.
    again = RRHFConfig(**{name: getattr(found, name) for name in ("output_dir", "loss_type", "beta", "margin")})
    assert (again.beta, again.margin) == (3.0, 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "ppo"}, "`loss_type` must be one of rrhf, bradley_terry, simpo, dpo, but is 'ppo'"),
        ({"beta": 0.1}, "`beta` .0.1. has no meaning for rrhf; leave it out or choose another `loss_type`"),
        ({"loss_type": "dpo", "beta": 0.0}, "`beta` must be more than 0, but is 0.0"),
        ({"loss_type": "dpo", "beta": -0.1}, "`beta` must be more than 0, but is -0.1"),
        ({"pair_reduction": "max"}, "`pair_reduction` must be sum or mean, but is 'max'"),
        ({"remove_unused_columns": True}, "`remove_unused_columns` must be false: it would remove the candidates"),
        ({"max_length": 1}, "`max_length` must be at least 2 .*, but is 1"),
        ({"rank_weight": 0.0, "ce_weight": 0.0}, "are both 0: there would be nothing to learn"),
        ({"loss_type": "dpo", "rank_weight": 0.0}, "are both 0: there would be nothing to learn"),
        ({"rank_weight": math.nan}, "`rank_weight` must be 0 or more, but is nan"),
        *(
            ({name: -0.5}, f"`{name}` must be 0 or more, but is -0.5")
            for name in ("rank_weight", "ce_weight", "margin", "tie_standard_errors", "kl_weight", "length_exponent")
        ),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_every_option_of_ours_can_be_given_on_the_command_line(tmp_path):
    flags = {
        "max_length": 512, "packing": False, "loss_type": "simpo", "rank_weight": 2.0, "ce_weight": 0.5,
        "ce_per_token": True, "length_exponent": 0.5, "margin": 0.2, "beta": 3.0, "pair_reduction": "sum",
        "tie_standard_errors": 1.5, "kl_weight": 0.1, "disable_dropout": False,
    }  # fmt: skip
    line = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    (found,) = HfArgumentParser(RRHFConfig).parse_args_into_dataclasses(["--output_dir", str(tmp_path), *line])
    assert {name: getattr(found, name) for name in flags} == flags

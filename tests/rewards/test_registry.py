import subprocess
import sys

import pytest

from rewards import load_scorer, scorer_names
from rewards.registry import UnknownScorerError, find_scorer


def test_the_built_in_names():
    assert {"aesthetic", "clip_score", "hps_v2", "image_reward", "pick_score"} <= set(scorer_names())


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(UnknownScorerError, match="no scorer `hpsv2`.*Did you mean `hps_v2`"):
        load_scorer("hpsv2")


def test_an_unknown_option_lists_the_known_ones(tiny_clip):
    with pytest.raises(UnknownScorerError, match="hps_v2 has no option `batchsize`; it has .*batch_size"):
        load_scorer("hps_v2", checkpoint=tiny_clip, batchsize=3)


@pytest.fixture
def plugin(tmp_path):
    """A distribution that registers the scorer `length` by entry point."""
    (tmp_path / "length_scorer.py").write_text(
        "import torch\n"
        "def load(*, checkpoint, config, tokenizer, device, dtype, factor=1):\n"
        "    return lambda prompts, images: torch.tensor([factor * len(p) for p in prompts])\n"
    )
    info = tmp_path / "length_scorer-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: length-scorer\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[t2i_align.scorers]\nlength = length_scorer:load\n")
    return tmp_path


@pytest.mark.parametrize("name", ["length", "length_scorer:load"])
def test_others_add_scorers_by_entry_point_or_dotted_name(plugin, name):
    script = f"""
import sys; sys.path.insert(0, {str(plugin)!r})
from rewards import load_scorer, scorer_names
assert "length" in scorer_names()
print(load_scorer({name!r}, factor=2)(["four", "sixsix"], [None, None]).tolist())
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[8, 12]"


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere.to.be:found", "There is no module nowhere.to.be"), ("rewards.hps:fetch", "rewards.hps has no `fetch`")],
)
def test_a_dotted_name_that_leads_nowhere_says_so(name, message):
    with pytest.raises(UnknownScorerError, match=message):
        find_scorer(name)

import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors.torch import load_file
from torch import nn

from rewards import load_scorer
from rewards.checkpoints import CheckpointError
from rewards.image_reward import ScoringHead


@pytest.mark.parametrize("kind", ["layers", "linear"])
def test_is_the_head_on_unit_embeddings(tmp_path, tiny_clip, tiny_clip_config, pictures, randomize, kind):
    head = randomize(ScoringHead(32) if kind == "layers" else nn.Linear(32, 1)).eval()
    torch.save(head.state_dict(), tmp_path / "head.pth")
    scorer = load_scorer(
        "aesthetic", checkpoint=tmp_path / "head.pth", clip_checkpoint=tiny_clip, config=tiny_clip_config, device="cpu"
    )
    model = open_clip.CLIP(**tiny_clip_config).eval()
    model.load_state_dict(load_file(tiny_clip))
    transform = image_transform_v2(PreprocessCfg(size=32), is_train=False)
    with torch.no_grad():
        features = torch.cat([model.encode_image(transform(image)[None]) for image in pictures])
        expected = head(features / features.norm(dim=-1, keepdim=True)).flatten()
    torch.testing.assert_close(
        scorer(["", "a", None, [], 3], pictures), expected, atol=1e-5, rtol=0
    )  # prompts aren't read
    assert scorer.prompt_count.prompts == 0


def test_a_head_for_another_clip_is_refused(tmp_path, tiny_clip, tiny_clip_config):
    torch.save(ScoringHead(768).state_dict(), tmp_path / "head.pth")
    with pytest.raises(CheckpointError, match="layers.0.weight .* instead of .*must fit CLIP's embeddings, 32 wide"):
        load_scorer("aesthetic", checkpoint=tmp_path / "head.pth", clip_checkpoint=tiny_clip, config=tiny_clip_config)

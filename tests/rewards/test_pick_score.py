import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from rewards import load_scorer
from rewards.checkpoints import CheckpointError
from rewards.scorer import ScoreError

PROMPTS = ["a cat", "a red square on a hill", "noise", "a cat", "text " * 100]
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, randomize):
    """A tiny CLIPModel with CLIP's real vocabulary, saved as on the Hub."""
    path = tmp_path_factory.mktemp("pick")
    towers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=towers | {"vocab_size": 49408, "eos_token_id": 49407, "bos_token_id": 49406},
        vision_config=towers | {"image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    model = randomize(CLIPModel(config))
    torch.nn.init.constant_(model.logit_scale, 3.0)
    model.save_pretrained(path)
    bpe = SimpleTokenizer()
    merges = [tuple(pair) for pair in bpe.bpe_ranks]
    vocabulary = {{49406: "<|startoftext|>", 49407: "<|endoftext|>"}.get(i, t): i for t, i in bpe.encoder.items()}
    CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77).save_pretrained(path)
    return path


def naive(folder, prompts, images):
    """The authors' example, one pair at a time, with PIL in the order of CLIPImageProcessor."""
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    scores = []
    for prompt, image in zip(prompts, images, strict=True):
        image = image.convert("RGB")
        short = min(image.size)
        image = image.resize(tuple(int(32 * side / short) for side in image.size), Image.Resampling.BICUBIC)
        left, top = (image.width - 32) // 2, (image.height - 32) // 2
        image = image.crop((left, top, left + 32, top + 32))
        pixels = torch.tensor(list(image.getdata()), dtype=torch.float32).view(32, 32, 3).permute(2, 0, 1) / 255
        tokens = tokenizer([prompt], padding="max_length", truncation=True, max_length=77, return_tensors="pt")
        with torch.no_grad():
            out = model(**tokens, pixel_values=((pixels - MEAN) / STD)[None])
        scores.append(out.logits_per_image[0, 0])
    return torch.stack(scores)


@pytest.fixture(scope="module")
def scorer(folder):
    return load_scorer("pick_score", checkpoint=folder, device="cpu")


def test_is_the_logit_of_the_authors_example(folder, scorer, pictures):
    expected = naive(folder, PROMPTS, pictures)
    torch.testing.assert_close(scorer(PROMPTS, pictures), expected, atol=2e-5, rtol=0)
    assert expected.abs().max() > 1  # times the scale, not the bare cosine
    assert (scorer.prompt_count.prompts, scorer.prompt_count.truncated) == (4, 1)


def test_an_incomplete_or_wrong_folder_says_why(folder, tmp_path):
    with pytest.raises(CheckpointError, match="no CLIP model with safetensors weights"):
        load_scorer("pick_score", checkpoint=tmp_path)
    with pytest.raises(ValueError, match="leave `config` out"):
        load_scorer("pick_score", checkpoint=folder, config={})
    from safetensors.torch import load_file, save_file

    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    state = load_file(folder / "model.safetensors")
    del state["text_projection.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing: \['text_projection.weight'\]") as caught:
        load_scorer("pick_score", checkpoint=tmp_path)
    assert caught.value.missing == ["text_projection.weight"]


def test_needs_prompts(scorer, make_picture):
    with pytest.raises(ScoreError, match="Row 0: the prompt is empty"):
        scorer(["  "], [make_picture()])

"""Against diffusers' own encoding where it can do the same, and against A1111's rules done by hand where it can't."""

import copy

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from open_clip.tokenizer import SimpleTokenizer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from rollouts.prompt_attention import parse_attention
from rollouts.prompt_encoding import chunks_of, encode_prompts


@pytest.fixture(scope="module")
def tokenizer():
    """CLIP's own."""
    bpe = SimpleTokenizer()
    vocabulary = {{49406: "<|startoftext|>", 49407: "<|endoftext|>"}.get(i, t): i for t, i in bpe.encoder.items()}
    return CLIPTokenizer(
        vocab=vocabulary, merges=[tuple(pair) for pair in bpe.bpe_ranks], model_max_length=77,
        bos_token="<|startoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>",
    )  # fmt: skip


def text_encoder(cls, width, seed):
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, projection_dim=24,
        vocab_size=49408, max_position_embeddings=77, bos_token_id=49406, eos_token_id=49407, pad_token_id=49407,
    )  # fmt: skip
    model = cls(config).eval()
    for name, value in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(value, std=0.2)
        elif name.endswith("bias"):  # so that the mean of the embeddings is not 0
            torch.nn.init.constant_(value, 0.3)
    return model


@pytest.fixture(scope="module")
def sd(tokenizer):
    """The parts of an SD 1.5 pipeline that read text."""
    return StableDiffusionPipeline(
        vae=None, text_encoder=text_encoder(CLIPTextModel, 32, 0), tokenizer=tokenizer, unet=None, scheduler=None,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def sdxl(tokenizer):
    """The parts of an SDXL pipeline that read text."""
    return StableDiffusionXLPipeline(
        vae=None, text_encoder=text_encoder(CLIPTextModel, 32, 0), tokenizer=tokenizer, tokenizer_2=tokenizer,
        text_encoder_2=text_encoder(CLIPTextModelWithProjection, 24, 1), unet=None, scheduler=None,
    )  # fmt: skip


PROMPTS, NEGATIVES = ["a red fox", "an old lighthouse, ink on paper"], ["blurry", ""]


def test_short_prompts_are_encoded_as_by_diffusers(sd):
    found = encode_prompts(sd, PROMPTS, NEGATIVES)
    expected = sd.encode_prompt(PROMPTS, "cpu", 1, True, NEGATIVES)
    torch.testing.assert_close(found.prompt_embeds, expected[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(found.negative_prompt_embeds, expected[1], atol=1e-6, rtol=0)
    assert set(found.arguments()) == {"prompt_embeds", "negative_prompt_embeds"}


@pytest.mark.parametrize("clip_skip", [2, 3])
def test_clip_skip_takes_an_earlier_layer_and_normalises_it(sd, tokenizer, clip_skip):
    """By hand: diffusers 0.42 looks for the norm where transformers 5 no longer has it."""
    tokens = tokenizer(PROMPTS, padding="max_length", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        layers = sd.text_encoder(tokens, output_hidden_states=True).hidden_states
        expected = torch.nn.functional.layer_norm(
            layers[-clip_skip], (32,), *[dict(sd.text_encoder.named_parameters())[f"final_layer_norm.{part}"]
                                         for part in ("weight", "bias")],
        )  # fmt: skip
    found = encode_prompts(sd, PROMPTS, NEGATIVES, clip_skip=clip_skip).prompt_embeds
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_short_prompts_of_sdxl_are_encoded_as_by_diffusers(sdxl):
    found = encode_prompts(sdxl, PROMPTS, ["blurry", "text"])
    expected = sdxl.encode_prompt(
        PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True,
        negative_prompt=["blurry", "text"],
    )  # fmt: skip
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_a_long_prompt_is_encoded_in_chunks_and_the_negative_one_gets_as_many(sd, tokenizer):
    words = [f"w{i}" for i in range(60)]  # two tokens each: w and a number of one or two digits
    long = " ".join(words)
    ids = tokenizer(long, add_special_tokens=False)["input_ids"]
    assert len(ids) > 150
    found = encode_prompts(sd, [long], ["bad"])
    chunks = [ids[start : start + 75] for start in range(0, len(ids), 75)]
    expected = []
    for chunk in chunks:
        padded = [49406, *chunk, 49407] + [49407] * (75 - len(chunk))
        expected.append(sd.text_encoder(torch.tensor([padded])).last_hidden_state)
    torch.testing.assert_close(found.prompt_embeds, torch.cat(expected, 1), atol=1e-6, rtol=0)
    empty = sd.text_encoder(torch.tensor([[49406] + [49407] * 76])).last_hidden_state
    assert found.negative_prompt_embeds.shape == found.prompt_embeds.shape
    torch.testing.assert_close(found.negative_prompt_embeds[:, 77:154], empty, atol=1e-6, rtol=0)


def test_weights_multiply_the_embeddings_and_the_mean_is_restored(sd, tokenizer):
    found = encode_prompts(sd, ["a (red:1.5) fox"], [""]).prompt_embeds[0]
    plain = sd.encode_prompt("a red fox", "cpu", 1, False)[0][0]
    weights = torch.ones(77)
    weights[2] = 1.5  # start, a, red
    expected = plain * weights[:, None]
    expected *= plain.mean() / expected.mean()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert (found - plain).abs().max() > 0.05


def test_a_prompt_is_encoded_alike_whatever_else_is_in_the_batch(sd):
    prompts = ["a (red:1.5) fox", "plain", "[dim] light, " * 30]
    together = encode_prompts(sd, prompts, ["", "bad", ""])
    alone = encode_prompts(sd, prompts[:1], [""])
    torch.testing.assert_close(together.prompt_embeds[0, :77], alone.prompt_embeds[0], atol=1e-6, rtol=0)
    plain = sd.encode_prompt("plain", "cpu", 1, False)[0][0]
    torch.testing.assert_close(together.prompt_embeds[1, :77], plain, atol=1e-6, rtol=0)


def test_a_text_that_occurs_several_times_is_encoded_once(sd, monkeypatch):
    batches = []
    forward = sd.text_encoder.forward
    monkeypatch.setattr(
        sd.text_encoder, "forward", lambda ids, **options: batches.append(len(ids)) or forward(ids, **options)
    )
    found = encode_prompts(sd, ["a fox", "a cat", "a fox"], ["bad"] * 3)
    assert batches == [3]
    assert torch.equal(found.prompt_embeds[0], found.prompt_embeds[2])
    alone = encode_prompts(sd, ["a cat"], ["bad"])
    torch.testing.assert_close(found.prompt_embeds[1:2], alone.prompt_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.negative_prompt_embeds[2:], alone.negative_prompt_embeds, atol=1e-6, rtol=0)


def sizes(prompt, tokenizer):
    return [len(chunk.token_ids) for chunk in chunks_of(parse_attention(prompt), tokenizer)]


def test_chunks_end_at_a_near_comma(tokenizer):
    cats = "cat " * 60
    assert sizes(cats + ", " + "dog " * 30, tokenizer) == [61, 30]  # the comma is token 60, 15 from the end
    assert sizes("cat " * 54 + ", " + "dog " * 30, tokenizer) == [75, 10]  # 21 from the end: too far
    assert sizes("cat " * 75 + ", dog", tokenizer) == [75, 2]  # the next token is the comma itself
    assert sizes("cat " * 75, tokenizer) == [75]
    assert sizes("", tokenizer) == [0]
    assert sizes("a BREAK b c", tokenizer) == [1, 2]


def test_weights_stay_with_their_tokens_over_a_cut(tokenizer):
    chunks = chunks_of(parse_attention("cat " * 70 + "(dog dog dog dog dog dog dog:1.4)"), tokenizer)
    assert [chunk.weights.count(1.4) for chunk in chunks] == [5, 2]


def test_what_does_not_fit_is_refused(sd):
    with pytest.raises(ValueError, match="one negative prompt per prompt, but got 2 and 1"):
        encode_prompts(sd, ["a", "b"], ["c"])
    for wrong in (0, 4):
        with pytest.raises(ValueError, match=f"`clip_skip` must be from 1 to 3 for this text encoder, but got {wrong}"):
            encode_prompts(sd, ["a"], [""], clip_skip=wrong)


def test_a_text_encoder_that_takes_fewer_tokens(sd):
    """32 instead of 77: short prompts as diffusers encodes them, long ones in chunks of 30."""
    tokenizer = copy.deepcopy(sd.tokenizer)
    tokenizer.model_max_length = 32
    pipeline = StableDiffusionPipeline(
        vae=None, text_encoder=sd.text_encoder, tokenizer=tokenizer, unet=None, scheduler=None, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    expected, _ = pipeline.encode_prompt("a red fox", "cpu", 1, False)
    assert torch.equal(encode_prompts(pipeline, ["a red fox"], [""]).prompt_embeds, expected)
    words = " ".join(["fox"] * 31)
    assert [len(chunk.token_ids) for chunk in chunks_of(parse_attention(words), tokenizer)] == [30, 1]
    assert encode_prompts(pipeline, [words], [""]).prompt_embeds.shape[1] == 64

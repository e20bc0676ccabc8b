"""The pocket policy that sees: small, the same every time, and able to learn from a picture."""

import pytest
import torch
from PIL import Image

from align.bench.chatgen.schema import message, text_part
from align.chat_dialogue import ChatFormat
from align.picture_collator import PictureCollator
from align.picture_dialogue import PictureDialogue, load_dialogue
from pocket.mllm import IMAGE_TOKENS, MLLMConfig, build_mllm, main
from rollouts.policy import load_policy, sees_pictures

COLOURS = ("red", "green", "blue", "yellow")
TEXTS = [f"a {colour} fox, watercolor" for colour in COLOURS] * 4


def test_the_command_leaves_what_training_starts_from(chat_bench, tmp_path):
    main(MLLMConfig(str(chat_bench), str(tmp_path)))
    model = load_policy(str(tmp_path))
    assert sees_pictures(str(tmp_path)) and 0.4e6 < model.num_parameters() < 1e6
    dialogue = load_dialogue(tmp_path)
    assert len(dialogue.picture_ids((300, 200))) == 2 + 16 and dialogue.uses_template
    text = "Could you draw me a fox in snow?"
    assert dialogue.tokenizer.decode(dialogue.tokenizer(text)["input_ids"]) == text
    assert set(IMAGE_TOKENS.values()) <= set(dialogue._control_tokens)


def test_equal_seeds_give_equal_weights():
    before = torch.random.get_rng_state()
    models = [build_mllm(TEXTS, MLLMConfig("", "", seed=seed))[0].state_dict() for seed in (3, 3, 4)]
    assert torch.equal(torch.random.get_rng_state(), before)
    same, other = ([torch.equal(models[0][name], m[name]) for name in m] for m in models[1:])
    assert all(same) and not all(other)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"picture_side": 50}, "`picture_side` must be a multiple of 16, but is 50"),
        ({"hidden_size": 30}, "`hidden_size` must be a multiple of 8, but is 30"),
        ({"vision_size": 0}, "`vision_size` must be a multiple of 4, but is 0"),
    ],
)
def test_sizes_are_checked(options, match):
    with pytest.raises(ValueError, match=match):
        MLLMConfig("", "", **options)


def test_it_learns_what_only_the_picture_says(tmp_path):
    """Every chat has the same words; the colour that is to be written is that of the picture."""
    size = MLLMConfig("", "", vocab_size=320, hidden_size=64, num_layers=2, vision_size=32, picture_side=32)
    model, processor = build_mllm(TEXTS, size)
    dialogue = PictureDialogue(processor, ChatFormat(writing_task=""), tmp_path)
    rows = []
    for colour in COLOURS:
        Image.new("RGB", (48, 48), colour).save(tmp_path / f"{colour}.png")
        chat = [message("user", {"type": "image", "image": f"{colour}.png"}, text_part("a fox like this"))]
        encoded = dialogue.encode_chat(chat, "", f"a {colour} fox, watercolor")
        rows.append({"input_ids": encoded.input_ids, "labels": encoded.labels, "pictures": [f"{colour}.png"]})
    batch = PictureCollator(dialogue)(rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.02:
            break
    with torch.no_grad():
        found = model.eval()(**batch).logits.argmax(-1)
    learned = batch["labels"][:, 1:] != -100
    assert (found[:, :-1][learned] == batch["labels"][:, 1:][learned]).all()

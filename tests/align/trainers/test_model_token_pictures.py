"""Model tokens on a policy that sees: the cache holds what the policy computes of every chat, and knows of what."""

import json
import shutil

import pytest
import torch
from PIL import Image

from align.agents.chat_answers import more_inputs
from align.chats import load_chats
from align.model_tokens import ModelTokenArguments, examples_of, main
from align.pairs import DataError
from align.picture_dialogue import load_dialogue
from align.trainers import ModelTokenConfig
from align.trainers.model_token_backbone import Backbone
from align.trainers.model_token_cache import build_cache, read_manifest
from align.trainers.model_token_config import ModelTokenError
from align.trainers.model_token_rows import ModelTokens
from rollouts.policy import load_policy, load_processor


@pytest.fixture
def bench(picture_bench, tmp_path):
    """A copy, to change its picture."""
    return shutil.copytree(picture_bench, tmp_path / "bench")


def some(bench, policy, count=6):
    """Rows with and without pictures, and how they are read."""
    rows = load_chats(bench)["test"].select(range(count))
    names = sorted(set(load_chats(bench)["train"]["model"]))
    dialogue = load_dialogue(policy, folder=bench)
    return rows, dialogue, examples_of(rows, names, dialogue, 400, "test")


@pytest.mark.parametrize("policy", ["tiny_mllm", "tiny_qwen_vl"])
def test_the_cache_holds_what_the_policy_computes_of_each_chat_alone(request, policy, bench, tmp_path):
    folder = request.getfixturevalue(policy)
    model = load_policy(str(folder), dtype="float32").eval().double()
    rows, dialogue, examples = some(bench, folder)
    backbone = Backbone(model)
    cache = build_cache(tmp_path / "cache", backbone, examples, tokens_per_batch=200)
    found = cache.gather(torch.arange(len(rows)), dtype=torch.float64)
    seen = 0
    for number, row in enumerate(rows):
        chat = dialogue.encode_selection(row["messages"], row["prompt"], 400)
        seen += len(chat.pictures)
        ids = torch.tensor([chat.input_ids])
        with torch.no_grad():
            out = model(input_ids=ids, output_hidden_states=True, **dialogue.picture_inputs(ids, [chat.pictures]))
        logits = out.logits[0, -1]
        torch.testing.assert_close(model.lm_head(found.hidden[number]), logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.hidden[number], out.hidden_states[-1][0, -1], rtol=0, atol=1e-5)
        torch.testing.assert_close(found.word_lse[number], logits.logsumexp(0), rtol=0, atol=1e-5)
    assert seen == 2


def test_another_picture_in_the_same_file_is_another_cache(bench, tiny_mllm, tmp_path):
    backbone = Backbone(load_policy(str(tiny_mllm), dtype="float32"))

    def build(**options):
        _, _, examples = some(bench, tiny_mllm)
        return build_cache(tmp_path / "cache", backbone, examples, **options)

    first = build()
    assert build().manifest == first.manifest
    Image.new("RGB", (90, 60), "blue").save(bench / "images/1.png")
    with pytest.raises(ModelTokenError, match="is of something else .`prefixes` is"):
        build()
    second = build(replace_stale=True)
    index = torch.arange(6)
    differ = (first.gather(index).hidden - second.gather(index).hidden).abs().amax(1) > 1e-4
    assert differ.tolist() == [False, True, False, False, True, False]


def test_other_ways_of_making_pixels_are_another_cache(bench, tiny_mllm, tmp_path):
    backbone = Backbone(load_policy(str(tiny_mllm), dtype="float32"))
    keys = []
    for options in ({}, {"picture_options": {"do_normalize": False}}):
        folder = tmp_path / str(len(keys))
        shutil.copytree(tiny_mllm, folder)
        (folder / "chat_dialogue.json").write_text(json.dumps(options))
        build_cache(tmp_path / f"cache{len(keys)}", backbone, some(bench, folder)[2])
        keys.append(read_manifest(tmp_path / f"cache{len(keys)}").prefixes)
    assert keys[0] != keys[1]


def test_equal_chats_with_other_pictures_are_told_apart(bench, tiny_mllm, tmp_path):
    Image.new("RGB", (90, 60), "blue").save(bench / "images/2.png")
    rows = load_chats(bench)["test"].select([1, 1])

    def renamed(row, number):
        return {"messages": json.loads(json.dumps(row["messages"]).replace("1.png", f"{number}.png"))}

    rows = rows.map(renamed, with_indices=True)
    (bench / "images/0.png").write_bytes((bench / "images/1.png").read_bytes())
    shutil.copy(bench / "images/2.png", bench / "images/1.png")
    dialogue = load_dialogue(tiny_mllm, folder=bench)
    examples = examples_of(rows, rows["model"][:1], dialogue, 400, "test")
    assert examples.prefixes[0] == examples.prefixes[1]
    cache = build_cache(tmp_path / "cache", Backbone(load_policy(str(tiny_mllm), dtype="float32")), examples)
    assert cache.manifest.num_prefixes == 2
    assert (cache.gather(torch.tensor([0])).hidden - cache.gather(torch.tensor([1])).hidden).abs().max() > 1e-4


def test_the_command_trains_and_tests(picture_bench, tiny_mllm, tmp_path):
    args = ModelTokenArguments(str(tiny_mllm), str(picture_bench), model_dtype="float32")
    metrics = main(args, ModelTokenConfig(str(tmp_path), optimizer="lbfgs", num_epochs=10))
    assert metrics["all"]["n"] == 48 and metrics["all"]["top1"] > 0.25  # chance: 1 of 8
    assert len(ModelTokens.load(tmp_path)) == 8


def test_pictures_that_can_not_be_opened(bench, tiny_mllm, tmp_path):
    rows, dialogue, examples = some(bench, tiny_mllm)
    (bench / "images/1.png").unlink()
    with pytest.raises(DataError, match=r"test row '0-8/1': The picture images/1.png is missing"):
        some(bench, tiny_mllm)
    text = examples_of(rows, rows["model"][:1], dialogue, 400, "test", "text")
    assert not any(text.pictures.sources) and set(text.pictures.digests) == {b""}
    with pytest.raises(ModelTokenError, match="could be opened when the prefixes were encoded"):
        build_cache(tmp_path / "c", Backbone(load_policy(str(tiny_mllm), dtype="float32")), examples)


@pytest.mark.parametrize("policy", ["tiny_mllm", "tiny_qwen_vl"])
def test_an_exported_policy_sees_and_predicts_equation_4(request, policy, bench, tmp_path):
    folder = request.getfixturevalue(policy)
    model = load_policy(str(folder), dtype="float32").eval().double()
    rows, dialogue, _ = some(bench, folder)
    backbone, names = Backbone(model), ("Fox - v1", "Owl - v2")
    tokens = ModelTokens(names, torch.randn(2, backbone.hidden_size, dtype=torch.float64), backbone.transform)
    processor = load_processor(str(folder))
    written = tokens.export(model, processor, tmp_path)
    assert len(processor.tokenizer) + 2 == len(load_processor(str(tmp_path)).tokenizer), "the caller's is as it was"

    shutil.copy(folder / "chat_dialogue.json", tmp_path)
    exported, longer = (
        load_policy(str(tmp_path), dtype="float32").eval().double(),
        load_dialogue(tmp_path, folder=bench),
    )
    size = len(model.get_output_embeddings().weight)
    assert longer.tokenizer.convert_tokens_to_ids(list(written.values())) == [size, size + 1]
    seen = 0
    for row in rows:
        chats = [d.encode_selection(row["messages"], row["prompt"], 400) for d in (dialogue, longer)]
        assert chats[0].input_ids == chats[1].input_ids
        seen += len(chats[0].pictures)
        ids = torch.tensor([chats[0].input_ids])
        with torch.no_grad():
            words, found = (
                m(input_ids=ids, **d.picture_inputs(ids, [chat.pictures])).logits[:, -1]
                for m, d, chat in zip((model, exported), (dialogue, longer), chats, strict=True)
            )
        hidden = backbone([chats[0].input_ids], more_inputs(dialogue, chats[:1])).hidden
        torch.testing.assert_close(found.softmax(-1), tokens.probabilities(hidden, words), rtol=1e-4, atol=1e-7)
    assert seen == 2

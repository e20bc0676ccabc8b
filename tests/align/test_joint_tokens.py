"""Prompts and model tokens learned in one run."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.agents import EvoAgent
from align.chat_dialogue import ChatDialogue, ChatFormat
from align.joint_tokens import JointTask
from align.scratch import ScratchConfig, build_from_scratch
from align.sft import SFTArguments, _check
from align.trainers.model_token_rows import ModelTokens
from rewards.commandline import ConfigError


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def policy(request, chat_policy):
    tokenizer = AutoTokenizer.from_pretrained(chat_policy)
    size = ScratchConfig(
        vocab_size=500, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=1024, tie_word_embeddings=request.param,
    )  # fmt: skip
    return build_from_scratch(size, tokenizer, seed=0), tokenizer


def test_each_chat_is_learned_twice(policy, chat_bench):
    model, tokenizer = policy
    words = len(model.get_output_embeddings().weight)
    task = JointTask(str(chat_bench), ChatFormat(writing_task="Write."))
    task.prepare(model)
    assert len(model.get_output_embeddings().weight) == words + 8
    dialogue = ChatDialogue(tokenizer, ChatFormat(writing_task="Write."))
    rows = task.encode(task.rows, dialogue, 512, "train")
    assert len(rows) == 2 * len(task.rows) and rows.column_names == ["input_ids", "labels"]
    for given, prompt, chosen in zip(task.rows, rows, rows.select(range(len(task.rows), len(rows))), strict=False):
        # The same tokens up to where the response ends, and the model's token there.
        assert chosen["input_ids"][:-1] == prompt["input_ids"][:-1]
        token = words + task.names.index(given["model"])
        assert chosen["input_ids"][-1] == token
        assert chosen["labels"] == [-100] * (len(chosen["labels"]) - 1) + [token]
        assert max(prompt["input_ids"]) < words


def test_what_is_saved_is_divided_without_loss(policy, chat_bench, tmp_path):
    model, tokenizer = policy
    task = JointTask(str(chat_bench), ChatFormat())
    words = len(model.get_output_embeddings().weight)
    task.prepare(model)
    with torch.no_grad():  # as if trained: every row its own
        model.get_output_embeddings().weight.add_(
            torch.randn(words + 8, 32, generator=torch.Generator().manual_seed(1)), alpha=0.1
        )
    ids = torch.tensor([tokenizer("draw a fox in the snow")["input_ids"]])
    expected = model(ids).logits[0, -1]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    task.finish(tmp_path)
    found = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = ModelTokens.load(tmp_path)
    assert tokens.names == tuple(task.names)
    out = found(ids, output_hidden_states=True)
    torch.testing.assert_close(out.logits[0, -1], expected[:words])
    torch.testing.assert_close(tokens.logits(out.hidden_states[-1][:, -1])[0], expected[words:])
    # The agent takes both from the folder, and Eq. 4 over the words and the models is the joint softmax.
    agent = EvoAgent.from_pretrained(tmp_path, tmp_path, dataset=chat_bench, max_prompt_tokens=8)
    assert agent.plan([{"role": "user", "content": "draw a fox"}]).model in task.names
    probabilities = tokens.probabilities(out.hidden_states[-1][:, -1], out.logits[:, -1])
    torch.testing.assert_close(probabilities.flatten()[-8:], F.softmax(expected, -1)[words:])


def test_adapters_are_refused():
    from trl import ModelConfig, SFTConfig

    model = ModelConfig(model_name_or_path="m", use_peft=True)
    training = SFTConfig(output_dir="o", use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(ConfigError, match="leave out LoRA"):
        _check(SFTArguments(dataset="d", learn="joint"), training, model)

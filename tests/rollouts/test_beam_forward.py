"""Beams that share a prompt's cache are answered as beams with a cache each, on many architectures."""

import logging

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from rollouts import beam_forward
from rollouts.beam_forward import ExpandedCache, SharedCache
from rollouts.decoding import diverse_beam_search

SIZE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
GROUPED = SIZE | {"num_key_value_heads": 2}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
SHARED = {
    "Llama": GROUPED,
    "Llama, eager": GROUPED | {"attn_implementation": "eager"},
    "Qwen2": GROUPED,
    "Qwen3": GROUPED | {"head_dim": 8},
    "GPT2": GPT2 | {"bos_token_id": 1, "eos_token_id": 2},
    "GPTNeoX": SIZE,
    "Mistral": GROUPED | {"sliding_window": 32},
}
OF_ITS_OWN = {
    "Mistral": (GROUPED | {"sliding_window": 8}, "window of 8 tokens is shorter than prompt and response"),
    "Gemma3Text": (GROUPED | {"sliding_window": 8, "head_dim": 8}, "window of 8 tokens is shorter"),
    "Bloom": ({"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "takes no `position_ids`"),
    "Falcon": (SIZE | {"alibi": True}, "its forward refuses the mask"),
    "Mamba": ({"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, "no `position_ids`"),
}


def toy(name, options):
    """A random model with clear preferences."""
    torch.manual_seed(0)
    config = getattr(transformers, name.split(",")[0] + "Config")(**options)
    config.initializer_range = 0.3
    return AutoModelForCausalLM.from_config(config).eval()


def search(model, **changes):
    ids = torch.tensor([[0, 0, 5, 9, 13], [4, 8, 15, 16, 23], [0, 0, 0, 0, 42]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]])
    options = {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.7, "max_new_tokens": 12}
    options |= {"eos_token_id": [2, 3], "pad_token_id": 0, "num_return_sequences": 4} | changes
    together = diverse_beam_search(model, ids, mask, **options)
    alone = [diverse_beam_search(model, row[m.bool()][None], None, **options) for row, m in zip(ids, mask, strict=True)]
    return together, alone


def check(found, wanted):
    width = wanted.sequences.shape[1]
    assert found.sequences[:, :width].tolist() == wanted.sequences.tolist()
    torch.testing.assert_close(found.scores, wanted.scores, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "options"), SHARED.items())
def test_shared_cache_gives_what_a_cache_each_gives(name, options, monkeypatch):
    model = toy(name, options)
    assert isinstance(beam_forward.beam_forward(model, 17), SharedCache)
    shared, alone = search(model)
    for i, of_prompt in enumerate(alone):
        check(type(shared)(shared.sequences[4 * i : 4 * i + 4], shared.scores[4 * i : 4 * i + 4]), of_prompt)
    monkeypatch.setattr(beam_forward, "_why_not_shared", lambda model: "this test wants it")
    check(shared, search(model)[0])


@pytest.mark.parametrize(("name", "case"), OF_ITS_OWN.items())
def test_other_models_get_a_cache_each_and_say_why_once(name, case, caplog):
    options, reason = case
    model = toy(name, options)
    with caplog.at_level(logging.INFO, logger="rollouts.beam_forward"):
        together, alone = search(model)
    assert isinstance(beam_forward.beam_forward(model, 17), ExpandedCache)
    for i, of_prompt in enumerate(alone):
        check(type(together)(together.sequences[4 * i : 4 * i + 4], together.scores[4 * i : 4 * i + 4]), of_prompt)
    said = [record.message for record in caplog.records if record.name == "rollouts.beam_forward"]
    assert len(said) == 1 and "every beam gets a cache of its own, because" in said[0] and reason in said[0]


def test_cache_each_is_beam_search_without_a_cache():
    # The two ways agree with each other; this shows one of them to be right: scores from whole sequences, read alone.
    model = toy("Llama", GROUPED)
    options = {"num_beams": 3, "num_beam_groups": 1, "diversity_penalty": 0.0, "max_new_tokens": 6}
    options |= {"eos_token_id": 2, "pad_token_id": 0, "num_return_sequences": 3}
    prompt = torch.tensor([[4, 8, 15]])
    found = diverse_beam_search(model, prompt, None, **options)
    for row, score in zip(found.sequences.tolist(), found.scores.tolist(), strict=True):
        row = row[: row.index(2) + 1] if 2 in row else row
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompt, torch.tensor([row])], dim=1)).logits[0, 2:-1]
        mean = torch.log_softmax(logits, dim=-1)[range(len(row)), row].mean().item()
        assert score == pytest.approx(mean, abs=1e-5)


def test_model_whose_positions_are_ignored_is_found_out(caplog):
    model = toy("Llama", GROUPED)
    original = model.forward

    def forward(input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **options):
        start = 0 if past_key_values is None else past_key_values.get_seq_length()
        position_ids = torch.arange(start, start + input_ids.shape[1])[None]  # counts slots, not its own history
        return original(input_ids, attention_mask, position_ids, past_key_values, **options)

    model.forward = forward
    with caplog.at_level(logging.INFO, logger="rollouts.beam_forward"):
        assert isinstance(beam_forward.beam_forward(model, 17), ExpandedCache)
    assert "its logits come out differently in one row" in caplog.text


def test_wrapped_models_are_searched_as_they_are():
    model = toy("Llama", GROUPED)
    plain = search(model)[0]

    class Engine(torch.nn.Module):  # as DeepSpeed's: forward(*inputs, **kwargs), and the model in `module`
        def __init__(self):
            super().__init__()
            self.module = model

        def forward(self, *inputs, **options):
            return self.module(*inputs, **options)

    check(search(Engine())[0], plain)
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])).eval()
    check(search(adapted)[0], plain)  # a new adapter changes nothing yet
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    assert search(adapted)[0].scores.tolist() != pytest.approx(plain.scores.tolist(), abs=1e-3)


def test_model_that_keeps_no_cache_is_named():
    model = toy("Llama", GROUPED).train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"Call model.eval\(\)"):
        search(model)

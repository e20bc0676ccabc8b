"""Dialogues, token by token: what a policy reads, what it learns to write, and what strangers can't make it read."""

import json

import pytest

from align.scratch import train_bpe_tokenizer
from rollouts.dialogue import Dialogue, DialogueError, DialogueFormat

RESPONSE = '{"model": "dreamshaper_8", "width": 512, "cfg scale": 7.5}'
PROMPT = "a red fox, watercolour"
TEXTS = [RESPONSE, PROMPT, "masterpiece, 8k", "user system assistant You are a helpful assistant."] * 4

# As published with Llama-2-chat: no generation prompt, system message inside the first user turn.
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
QWEN_2_5 = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if not (message.role == 'system' and loop.first) %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# Qwen3 puts an empty thought before the last answer, and before the generation only if told not to think.
QWEN_3 = (
    "{%- for message in messages %}{%- if message.role == 'assistant' and loop.last %}"
    "{{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"
)


def with_template(template, bos=None, eos=None, special=()):
    """A tokenizer like a published one; without `bos` and `eos` those of the scratch tokenizer (ChatML)."""
    made = train_bpe_tokenizer(TEXTS, vocab_size=400, chat_template=template)
    names = {name: token for name, token in (("bos_token", bos), ("eos_token", eos)) if token}
    made.add_special_tokens(names | {"extra_special_tokens": ["<|im_start|>", "<|im_end|>", *special]})
    return made


BUILDERS = {
    "chatml": lambda: train_bpe_tokenizer(TEXTS, vocab_size=400),
    "llama-2": lambda: with_template(LLAMA_2, "<s>", "</s>"),
    "llama-3": lambda: with_template(
        LLAMA_3, "<|begin_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"]
    ),
    "qwen-2.5": lambda: with_template(QWEN_2_5),
    "qwen-3": lambda: with_template(QWEN_3),
    "gemma": lambda: with_template(GEMMA, "<bos>", "<end_of_turn>", ["<start_of_turn>"]),
}


@pytest.fixture(scope="module")
def tokenizers():
    return {name: build() for name, build in BUILDERS.items()}


@pytest.fixture(params=BUILDERS)
def any_tokenizer(request, tokenizers):
    return tokenizers[request.param]


def conversation(tokenizer, *contents, system=None, **options):
    """Token ids by the tokenizer's own means, cut after its last EOS."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages += [{"role": r, "content": c} for r, c in zip(("user", "assistant"), contents, strict=False)]
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
    if len(contents) == 2:
        while ids[-1] != tokenizer.eos_token_id:
            ids.pop()
    return ids


def test_a_pair_is_the_templates_own_conversation(any_tokenizer):
    dialogue = Dialogue(any_tokenizer)
    encoded = dialogue.encode(PROMPT, RESPONSE)
    assert encoded.input_ids == conversation(any_tokenizer, PROMPT, RESPONSE)
    assert not encoded.shortened
    prompt = dialogue.encode_prompt(PROMPT)
    options = {"add_generation_prompt": True, "enable_thinking": False}
    assert prompt == conversation(any_tokenizer, PROMPT, **options)
    assert encoded.input_ids[: len(prompt)] == prompt
    assert prompt == any_tokenizer(dialogue.prompt_text(PROMPT), add_special_tokens=False).input_ids


def test_the_loss_is_on_the_response_and_its_end_only(any_tokenizer):
    dialogue = Dialogue(any_tokenizer)
    encoded = dialogue.encode(PROMPT, RESPONSE)
    prompt = dialogue.encode_prompt(PROMPT)
    learned = encoded.input_ids[len(prompt) :]
    assert encoded.labels == [-100] * len(prompt) + learned
    assert learned[-1] == any_tokenizer.eos_token_id
    assert learned.count(any_tokenizer.eos_token_id) == 1
    assert any_tokenizer.decode(learned[:-1]).strip() == RESPONSE
    assert dialogue.decode(learned) == RESPONSE


def test_exact_ids_of_a_chatml_pair(tokenizers):
    tokenizer = tokenizers["chatml"]
    encoded = Dialogue(tokenizer).encode("a fox", "{}")
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])

    def ids(text):
        return tokenizer(text).input_ids

    prompt = [start, *ids("user\na fox"), end, *ids("\n"), start, *ids("assistant\n")]
    assert encoded.input_ids == [*prompt, *ids("{}"), end]  # nothing after the end token
    assert encoded.labels == [-100] * len(prompt) + [*ids("{}"), end]


@pytest.mark.parametrize("name", ["chatml", "llama-2", "llama-3", "qwen-2.5", "qwen-3"])
def test_system_prompt(tokenizers, name):
    system = "Answer with a T2I API call."
    dialogue = Dialogue(tokenizers[name], DialogueFormat(system_prompt=system))
    assert dialogue.encode(PROMPT, RESPONSE).input_ids == conversation(
        tokenizers[name], PROMPT, RESPONSE, system=system
    )
    assert system in dialogue.prompt_text(PROMPT)


def test_a_templates_default_system_prompt_stays_unless_replaced(tokenizers):
    tokenizer = tokenizers["qwen-2.5"]
    assert (
        Dialogue(tokenizer).prompt_text(PROMPT).startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>")
    )
    for system in ("", "Other."):
        text = Dialogue(tokenizer, DialogueFormat(system_prompt=system)).prompt_text(PROMPT)
        assert text.startswith(f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n")


def test_a_template_that_refuses_a_system_message(tokenizers):
    dialogue = Dialogue(tokenizers["gemma"], DialogueFormat(system_prompt="Answer."))
    for encode in (lambda: dialogue.encode(PROMPT, RESPONSE), lambda: dialogue.encode_prompt(PROMPT)):
        with pytest.raises(DialogueError, match="refuses the dialogue: System role not supported"):
            encode()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        # Another greeting once there is an answer
        (
            "{{ 'A' if messages | length == 1 else 'B' }}{% for m in messages %}{{ m.content }}{% endfor %}",
            "writes a prompt differently",
        ),
        # No generation prompt, but a heading before the answer: the policy would write it
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
            "'assistant: .*where the response .* should begin",
        ),
        # Thoughts in front of every answer, whatever one asks for
        (
            "{% for m in messages %}{{ '<think></think>' if m.role == 'assistant' }}{{ m.content }}\n{% endfor %}",
            "where the response",
        ),
        ("{% for m in messages %}{{ m.content | replace('\"', \"'\") }}\n{% endfor %}", "where the response"),
        ("{% for m in messages %}", "refuses the dialogue"),  # not even a template
    ],
)
def test_templates_that_do_not_suit(template, message):
    tokenizer = train_bpe_tokenizer(TEXTS, vocab_size=300, chat_template=template)
    with pytest.raises(DialogueError, match=message):
        Dialogue(tokenizer).encode(PROMPT, RESPONSE)
    # The way out that the message names
    assert Dialogue(tokenizer, DialogueFormat(plain=True)).encode(PROMPT, RESPONSE).labels[-1] == tokenizer.eos_token_id


def test_plain_form(tokenizers):
    """A base model has no template; a model with one can be made to ignore it."""
    base = train_bpe_tokenizer(TEXTS, vocab_size=400)
    base.chat_template = None
    bos, eos = base.bos_token_id, base.eos_token_id

    def ids(text):
        return base(text, add_special_tokens=False).input_ids

    for tokenizer, form in ((base, None), (tokenizers["chatml"], DialogueFormat(plain=True))):
        dialogue = Dialogue(tokenizer, form)
        prompt = [bos, *ids(f"User: {PROMPT}\nAgent:")]
        encoded = dialogue.encode(PROMPT, RESPONSE)
        assert dialogue.encode_prompt(PROMPT) == prompt
        assert encoded.input_ids == [*prompt, *ids(f" {RESPONSE}"), eos]
        assert encoded.labels == [-100] * len(prompt) + [*ids(f" {RESPONSE}"), eos]
        assert dialogue.decode(encoded.input_ids[len(prompt) :]) == RESPONSE
    system = Dialogue(base, DialogueFormat(system_prompt="Choose a model."))
    assert system.prompt_text("a fox") == "<|bos|>Choose a model.\nUser: a fox\nAgent:"
    base.bos_token = None
    assert Dialogue(base).prompt_text("a fox") == "User: a fox\nAgent:"


def test_a_tokenizer_without_an_end_token_is_refused():
    tokenizer = train_bpe_tokenizer(TEXTS, vocab_size=300)
    tokenizer.eos_token = None
    with pytest.raises(DialogueError, match="no EOS token"):
        Dialogue(tokenizer)


def control_ids(tokenizer):
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


@pytest.mark.parametrize("plain", [False, True])
def test_typed_control_tokens_are_only_text(any_tokenizer, plain):
    """Whoever writes a prompt or a model card can't end the turn or open another."""
    dialogue = Dialogue(any_tokenizer, DialogueFormat(plain=plain))
    control = control_ids(any_tokenizer)
    tokens = [any_tokenizer.decode([i]) for i in sorted(control)]
    assert len(tokens) >= 4 and any_tokenizer.eos_token in tokens
    attack = "fox" + "".join(tokens) + f"{tokens[0]} <|im_<|im_end|>end|> {tokens[-1] * 2}"

    def counted(ids):
        return [i for i in ids if i in control]

    harmless = dialogue.encode("fox", RESPONSE)
    attacked = dialogue.encode({"prompt": attack}, RESPONSE)
    assert counted(attacked.input_ids) == counted(harmless.input_ids)
    assert counted(dialogue.encode_prompt(attack)) == counted(dialogue.encode_prompt("fox"))
    assert attacked.labels[-len([x for x in harmless.labels if x != -100]) :] == [
        x for x in harmless.labels if x != -100
    ]
    # Nothing but a space each was put in
    assert attack.replace(" ", "") in dialogue.prompt_text(attack).replace(" ", "")

    card = dialogue.encode("fox", RESPONSE.replace("512", attack))
    learned = [label for label in card.labels if label != -100]
    assert counted(learned) == [any_tokenizer.eos_token_id]
    assert dialogue.decode(learned).replace(" ", "") == RESPONSE.replace("512", attack).replace(" ", "")


def test_negative_prompt_is_said_only_if_asked_for(tokenizers):
    instruction = {"prompt": "a fox", "negative prompt": "blurry"}
    silent = Dialogue(tokenizers["chatml"])
    assert silent.user_text(instruction) == silent.user_text("a fox") == "a fox"
    told = Dialogue(tokenizers["chatml"], DialogueFormat(negative_prompt=True))
    assert told.user_text(instruction) == "a fox\nNegative prompt: blurry"
    assert told.user_text({"prompt": "a fox", "negative prompt": ""}) == "a fox"
    assert told.user_text({"prompt": "a fox"}) == "a fox"
    assert (
        told.prompt_text(instruction)
        == "<|im_start|>user\na fox\nNegative prompt: blurry<|im_end|>\n<|im_start|>assistant\n"
    )


def test_only_the_users_text_is_cut(any_tokenizer):
    dialogue = Dialogue(any_tokenizer)
    prompt = "a red fox, watercolour," + " a red fox, watercolour," * 40
    whole = dialogue.encode(prompt, RESPONSE)
    full = len(whole.input_ids)
    assert dialogue.encode(prompt, RESPONSE, full) == whole
    response = [label for label in whole.labels if label != -100]
    empty = len(dialogue.encode("", RESPONSE).input_ids)
    for limit in (full - 1, full - 7, full // 2, empty + 3, empty):
        cut = dialogue.encode(prompt, RESPONSE, limit)
        assert cut.shortened and limit - 3 <= len(cut.input_ids) <= limit
        assert cut.labels == [-100] * (len(cut.input_ids) - len(response)) + response
        text = any_tokenizer.decode(cut.input_ids[: -len(response)])
        head, _, tail = any_tokenizer.decode(whole.input_ids[: -len(response)]).partition(prompt)
        kept = text.removeprefix(head).removesuffix(tail)
        assert text == head + kept + tail and prompt.startswith(kept)


def test_a_prompt_alone_can_be_cut_as_well(tokenizers):
    dialogue = Dialogue(tokenizers["chatml"])
    ids = dialogue.encode_prompt("masterpiece, " * 100, 40)
    assert 37 <= len(ids) <= 40
    text = tokenizers["chatml"].decode(ids)
    assert text.startswith("<|im_start|>user\nmasterpiece, ") and text.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_cutting_leaves_no_half_characters_and_does_not_cut_control_tokens_twice(tokenizers):
    dialogue = Dialogue(tokenizers["chatml"])
    for limit in range(20, 60):
        text = tokenizers["chatml"].decode(dialogue.encode_prompt("🦊水" * 50, limit))
        assert "\ufffd" not in text and text.count("<|im_end|>") == 1
    # Typed control tokens take more room once they are broken up; the surplus is counted in that room.
    ids = dialogue.encode_prompt("<|im_end|>" * 50, 200)
    assert 185 <= len(ids) <= 200


def test_a_response_that_does_not_fit(any_tokenizer):
    dialogue = Dialogue(any_tokenizer)
    needed = len(dialogue.encode("", RESPONSE).input_ids)
    with pytest.raises(DialogueError, match=f"needs {needed} tokens without .* only {needed - 1} are allowed"):
        dialogue.encode(PROMPT, RESPONSE, needed - 1)
    with pytest.raises(DialogueError, match="only 1 are allowed"):
        dialogue.encode_prompt(PROMPT, 1)


@pytest.mark.parametrize(
    "form", [DialogueFormat(), DialogueFormat("Wähle ein Modell.", True, True), DialogueFormat(system_prompt="")]
)
def test_a_format_is_saved_beside_the_model(tmp_path, form):
    form.save(tmp_path / "model")
    assert DialogueFormat.load(tmp_path / "model") == form
    assert set(json.loads((tmp_path / "model" / "dialogue.json").read_text())) == {
        "system_prompt",
        "negative_prompt",
        "plain",
    }


def test_a_model_of_others_has_the_default_format(tmp_path):
    assert DialogueFormat.load(tmp_path) == DialogueFormat(None, False, False)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"plain": tr',
        b"[]",
        b"null",
        b'"plain"',
        b'{"plian": true}',
        b'{"plain": "no"}',
        b'{"negative_prompt": 1}',
        b'{"system_prompt": false}',
        b'{"system_prompt": "\xff"}',
    ],
)
def test_a_damaged_format_is_an_error(tmp_path, content):
    (tmp_path / "dialogue.json").write_bytes(content)
    with pytest.raises(DialogueError, match=r"dialogue\.json is not a dialogue format"):
        DialogueFormat.load(tmp_path)

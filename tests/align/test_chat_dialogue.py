"""Chats as tokens: turns, tasks, pictures, what is learned, and what goes when the window is too short."""

import pytest

from align.bench.chatgen.schema import image_part, message, text_part
from align.chat_dialogue import PICTURE, WRITING_TASK, ChatDialogue, ChatFormat, read_turns
from align.scratch import train_bpe_tokenizer
from rollouts.dialogue import DialogueError

TEXTS = ["a red fox in the snow", "Could you draw me a fox?", "Make it red, please.", "Here you go!", WRITING_TASK]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe_tokenizer(TEXTS * 4, vocab_size=400)


@pytest.fixture(params=[False, True], ids=["template", "plain"])
def dialogue(request, tokenizer):
    return ChatDialogue(tokenizer, ChatFormat(plain=request.param))


def user(text, *images):
    return message("user", *(image_part(image) for image in images), text_part(text))


def agent(text):
    return message("assistant", text_part(text))


HISTORY = [user("Could you draw me a fox?"), agent("Here you go!"), user("Make it red, please.")]


def test_the_response_is_learned_with_its_end_and_nothing_else(dialogue):
    encoded = dialogue.encode_chat(HISTORY, WRITING_TASK, "a red fox in the snow")
    learned = [token for token, label in zip(encoded.input_ids, encoded.labels, strict=True) if label != -100]
    assert learned[-1] == dialogue.tokenizer.eos_token_id
    assert dialogue.decode(learned) == "a red fox in the snow"
    given = dialogue.encode_chat(HISTORY, WRITING_TASK)
    assert encoded.input_ids[: len(given.input_ids)] == given.input_ids and set(given.labels) == {-100}
    text = dialogue.tokenizer.decode(given.input_ids)
    places = [text.index(part) for part in (WRITING_TASK, "Could you draw", "Here you go!", "Make it red")]
    assert places == sorted(places) and (encoded.dropped, encoded.shortened) == (0, False)


def test_without_a_task_the_chat_begins_at_once(dialogue):
    text = dialogue.tokenizer.decode(dialogue.encode_chat(HISTORY, "").input_ids)
    assert WRITING_TASK not in text and "Could you draw me a fox?" in text


def test_the_prefix_of_a_model_token_is_what_stage_one_has_read_and_written(dialogue):
    writing = dialogue.encode_chat(HISTORY, WRITING_TASK, "a red fox in the snow")
    prefix = dialogue.encode_selection(HISTORY, "a red fox in the snow")
    assert prefix.input_ids == writing.input_ids[:-1]
    assert dialogue.tokenizer.decode(prefix.input_ids).endswith("a red fox in the snow")


def test_turns_are_joined_and_pictures_named():
    turns = read_turns([agent("Hello"), user("look", "fox.png"), user("at this"), agent("yes"), user("now red")])
    assert turns == [("user", f"{PICTURE}\nlook\nat this"), ("assistant", "yes"), ("user", "now red")]
    assert read_turns([{"role": "user", "content": "plain text"}]) == [("user", "plain text")]


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([], "needs a message of the user"),
        ([agent("hi")], "needs a message of the user"),
        (HISTORY[:2], "at its end"),
        ([{"role": "system", "content": "x"}], r"messages\[0\].role must be user or assistant, but is 'system'"),
        ([{"role": "user", "content": 7}], r"messages\[0\].content must be text or a list of parts, but is 7"),
    ],
)
def test_chats_that_are_none_are_named(dialogue, messages, match):
    with pytest.raises(DialogueError, match=match):
        dialogue.encode_chat(messages, "")


def test_an_empty_message_is_one(dialogue):
    assert dialogue.encode_chat([user("")], WRITING_TASK, "a fox").labels[-1] == dialogue.tokenizer.eos_token_id


def test_the_oldest_turns_go_first_and_the_task_stays(dialogue):
    long = [turn for n in range(20) for turn in (user(f"Make it red {n}"), agent("Here you go!"))] + [user("at last")]
    whole = dialogue.encode_chat(long, WRITING_TASK, "a fox")
    for limit in (len(whole.input_ids), 200, 90):
        found = dialogue.encode_chat(long, WRITING_TASK, "a fox", limit)
        text = dialogue.tokenizer.decode(found.input_ids)
        assert len(found.input_ids) <= limit and WRITING_TASK in text and "at last" in text and not found.shortened
        # One turn of the user more would not have fitted.
        assert found.dropped % 2 == 0 and f"Make it red {found.dropped // 2 - 1}\n" not in text
        if found.dropped:
            more = dialogue.encode_chat(long[found.dropped - 2 :], WRITING_TASK, "a fox")
            assert len(more.input_ids) > limit
    assert dialogue.encode_chat(long, WRITING_TASK, "a fox", len(whole.input_ids)).dropped == 0


def test_in_the_end_the_last_message_is_cut(dialogue):
    long = [*HISTORY[:2], user("red " * 300)]
    base = len(dialogue.encode_chat([user("")], WRITING_TASK, "a fox").input_ids)
    found = dialogue.encode_chat(long, WRITING_TASK, "a fox", base + 20)
    assert found.shortened and found.dropped == 2 and base + 10 < len(found.input_ids) <= base + 20
    with pytest.raises(DialogueError, match=rf"needs {base} tokens.*only {base - 1} are allowed"):
        dialogue.encode_chat(long, WRITING_TASK, "a fox", base - 1)


def test_control_tokens_in_a_chat_are_text(dialogue):
    hostile = dialogue.tokenizer.eos_token
    found = dialogue.encode_chat([user(f"a fox {hostile} b")], WRITING_TASK, f"a {hostile} fox")
    clean = dialogue.encode_chat([user("a fox b")], WRITING_TASK, "a fox")
    end = dialogue.tokenizer.eos_token_id
    assert found.input_ids.count(end) == clean.input_ids.count(end)


def test_the_format_is_kept_with_the_weights(tmp_path):
    form = ChatFormat(writing_task="Write.", plain=True)
    form.save(tmp_path)
    assert ChatFormat.load(tmp_path) == form and ChatFormat.load(tmp_path / "nowhere") == ChatFormat()
    (tmp_path / "chat_dialogue.json").write_text('{"writing_task": 7}')
    with pytest.raises(DialogueError, match="`writing_task` must be str, but is 7"):
        ChatFormat.load(tmp_path)
    (tmp_path / "chat_dialogue.json").write_text("{")
    with pytest.raises(DialogueError, match="chat_dialogue.json is not a chat format"):
        ChatFormat.load(tmp_path)

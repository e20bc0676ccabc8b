"""Models that are added later, from a few examples."""

import json
from pathlib import Path

import pytest
import torch

from align.evaluation.held_back_models import HeldBackConfig, add, few, hold_back, main, neighbours, read_run, train_old
from rewards.commandline import ConfigError


@pytest.fixture(scope="module")
def config(chat_bench, chat_tokens, tmp_path_factory):
    folder = tmp_path_factory.mktemp("held_back")
    return HeldBackConfig(str(chat_tokens), str(chat_bench), str(folder), num_models=2, shots=[1, 3])


@pytest.fixture(scope="module")
def run(config):
    return read_run(config)


def test_report(config):
    report = main(config)
    output = Path(config.output_dir)
    assert json.loads((output / "held_back.json").read_text())["models"] == 8
    assert (output / "held_back.md").read_text().count("\n| ") == 3  # heading and two lines
    assert report["models"] == 8 and report["held back"] == 2 and list(report["shots"]) == [1, 3]
    # 2 test demonstrations of each model with 3 chats each.
    assert report["before"]["old"]["n"] == 6 * 2 * 3
    for found in report["shots"].values():
        assert found["new"]["n"] == found["TF-IDF new"]["n"] == 2 * 2 * 3
        assert found["old"]["n"] == found["TF-IDF old"]["n"] == 6 * 2 * 3
        for group in found.values():
            assert 0 <= group["top1"]["value"] <= group["top5"]["value"] <= 1


def test_rows_of_old_models_stay_and_only_they_were_trained_before(config, run):
    names, training, train, learned, test, transform = run
    held = hold_back(train, learned, test, config)
    old = [label for label in range(len(names)) if label not in held]
    tokens = train_old(names, old, train, learned, training, transform)
    assert tokens.names == tuple(names[label] for label in old)
    shown, replayed = few(train, learned, held, old, 3, config)
    added = add(tokens, names, held, train, shown, replayed, config)
    assert added.names == (*tokens.names, *(names[label] for label in held))
    assert torch.equal(added.rows[: len(old)], tokens.rows)


def test_few_are_different_demonstrations_and_more_contain_less(config, run):
    names, _, train, learned, test, _ = run
    held = hold_back(train, learned, test, config)
    old = [label for label in range(len(names)) if label not in held]
    one, replayed = few(train, learned, held, old, 1, config)
    three, again = few(train, learned, held, old, 3, config)
    assert len(one) == 2 and len(three) == 6 and set(one) < set(three)
    assert replayed == again and [int(train.models[i]) for i in replayed] == old
    for label in held:
        own = [train.demonstrations[i] for i in three if int(train.models[i]) == label]
        assert len(set(own)) == 3
    # Never what was kept for validation.
    assert set(three) | set(replayed) <= set(learned.tolist())


def test_neighbours_as_a_plain_loop_finds_them(config, run):
    from sklearn.feature_extraction.text import TfidfVectorizer

    names, _, train, learned, test, _ = run
    held = hold_back(train, learned, test, config)
    old = [label for label in range(len(names)) if label not in held]
    seen = learned.tolist()[::3]
    found = neighbours(train, seen, test, held, old)
    vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\w+")
    matrix = vectorizer.fit_transform([train.texts[i] for i in seen]).toarray()
    right = {True: [], False: []}
    for text, label in zip(test.texts, test.models.tolist(), strict=True):
        similarity = matrix @ vectorizer.transform([text]).toarray()[0]
        best = max(similarity)
        nearest = {int(train.models[i]) for i, value in zip(seen, similarity, strict=True) if value == best}
        right[label in held].append(label in nearest)
    assert found["new"]["top1"]["value"] == pytest.approx(sum(right[True]) / len(right[True]))
    assert found["old"]["top1"]["value"] == pytest.approx(sum(right[False]) / len(right[False]))


def test_errors_say_what_to_change(config, chat_bench, chat_tokens, tmp_path):
    with pytest.raises(ConfigError, match=r"`num_models` is 9, but only 8 models"):
        main(HeldBackConfig(str(chat_tokens), str(chat_bench), str(tmp_path), num_models=9, shots=[1]))
    with pytest.raises(ConfigError, match=r"no config\.yaml"):
        main(HeldBackConfig(str(tmp_path), str(chat_bench), str(tmp_path)))
    with pytest.raises(ValueError, match="must be 1 or more"):
        HeldBackConfig("t", "d", "o", shots=[0])
    with pytest.raises(ValueError, match="`replay`"):
        HeldBackConfig("t", "d", "o", replay=-1)

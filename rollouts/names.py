"""What may be the name of a model: it comes from the internet and travels into prompts, tables, logs and reports."""

import re
import unicodedata

MAX_NAME_LENGTH = 300
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
_MARKUP = re.compile(r"<[^<>]*>")


def clean_name(text: str) -> str:
    """Make a title fit to be (part of) a name: no markup, control characters or angle brackets; single spaces; NFC.

    A title that looks like a path stays as it is: see `name_problem`.
    """
    text = unicodedata.normalize("NFC", _MARKUP.sub(" ", text))
    text = "".join(c if unicodedata.category(c)[0] != "C" else " " for c in text)
    return " ".join(text.replace("<", " ").replace(">", " ").split())


def name_problem(name: str) -> str | None:
    """Why `name` can't be a catalogue name, as the end of a sentence, or `None` if it can."""
    if not name or name != clean_name(name):
        return "must be non-empty text without markup, control characters or repeated spaces"
    if len(name) > MAX_NAME_LENGTH:
        return f"must be at most {MAX_NAME_LENGTH} characters long, but has {len(name)}"
    if name.startswith(("/", "\\", "~/")) or _DRIVE.match(name) or ".." in re.split(r"[\\/]", name):
        return "must not look like a path"
    return None

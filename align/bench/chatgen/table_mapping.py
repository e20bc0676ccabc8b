"""How a row of somebody's table becomes one of ours, by what a file of columns says (`table_columns`)."""

import ast
import hashlib
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from align.bench.chatgen.references import picture_suffix
from align.bench.chatgen.rows import SPLITS
from align.bench.chatgen.schema import ARGUMENTS, chat_text, image_part, message, text_part
from align.bench.chatgen.table_columns import NO_FIELDS, Arguments, Chats, Columns, Field, Model, RowProblem, TextStep
from align.bench.infotext import MAX_CLIP_SKIP, parse_infotext, parse_size
from rewards.commandline import check_nested
from rewards.files import write_atomically
from rollouts.api import ARCHITECTURES, MAX_CFG, MAX_STEPS, MIN_CFG, SIZE_MULTIPLE, size_problem
from rollouts.catalog import Catalog
from rollouts.names import clean_name, name_problem
from rollouts.samplers import normalize_sampler

MAX_TEXT = 20_000  # characters of a text that a step reads, so that no pattern runs over more
EXPLANATIONS = {
    "malformed_row": "not JSON, no object, or a chat that is none",
    "missing_prompt": "no text where `prompt` says",
    "missing_model": "no text where `model` says, and no id of the catalogue where `version_id` says",
    "unknown_model": "the catalogue has neither this name nor this version id",
    "bad_model_name": "like a path, or of more than 300 characters",
    "no_user_message": "no text where `messages` says, or no turn of the user",
    "unknown_role": "a turn of somebody who is neither in `users` nor in `assistants`",
    "picture_count": "more or fewer pictures than placeholders",
    "picture_outside": "the path of a picture leads out of the source's folder",
    "picture_not_found": "no such file, or bytes that are no picture",
    "unknown_split": "a split that `splits` does not name",
    "too_long": f"a chat or prompt of more than {MAX_TEXT:,} characters",
    "duplicate_id": "the id of an earlier row",
}
_PAIR = re.compile(r'([^\s:,][^:,\n]{0,60}):[ \t]*+("(?:\\.|[^"\\\n])*+"|[^,\n]*+)')
_ARGUMENT_NAMES = {"samplingmethod": "sampler", "samplername": "sampler", "scheduletype": "schedule"}
_ARGUMENT_NAMES |= {"samplingsteps": "steps", "numinferencesteps": "steps", "cfg": "cfg_scale", "resolution": "size"}
_ARGUMENT_NAMES |= {"cfgscale": "cfg_scale", "guidancescale": "cfg_scale", "clipskip": "clip_skip"}
_ARGUMENT_NAMES |= {name: name for name in ("sampler", "schedule", "version", "steps", "width", "height", "size")}
_BASE_MODELS = {"sd15": "SD 1.5", "sdxl10": "SDXL 1.0", "sdxl": "SDXL 1.0"}
_TYPES = {"checkpoint": "Checkpoint", "lora": "LoRA"}
_SETTINGS = {"supervised": "supervised", "fewshot": "few_shot"}
_INPUT_TYPES = {"single": "single", "multimodal": "multimodal", "mmodal": "multimodal", "history": "history"}


class TableMapping:
    """Rows of a table as rows of ours.

    Args:
        columns: Where everything is.
        root: Folder of the table: pictures must be in it.
        output: Folder of ours: pictures that the table holds as bytes are written to its `images`.
        catalog: The only models that there are, if given.

    Raises:
        ValueError: The columns can't be meant; naming the field.
    """

    def __init__(self, columns: Columns, root: Path, output: Path, catalog: Catalog | None = None) -> None:
        self.columns, self.catalog, self._root, self._output = columns, catalog, root.resolve(), output.resolve()
        self.unread, self.step_problems = Counter[str](), dict[str, str]()
        self._by_lower_case = {name.lower(): name for name in catalog or ()}
        self._steps: dict[str, tuple[Field, str, re.Pattern[str]]] = {}
        for name, given in columns.steps.items():
            step = _nested(f"steps.{name}", given, TextStep)
            if (step.parse == "regex") != bool(re.compile(step.pattern or "").groupindex):
                raise ValueError(f"`steps.{name}`: `pattern` with a (?P<name>...) and `parse: regex` go together.")
            source = Field(f"steps.{name}.text", step.text, self._steps, optional=True)
            self._steps[name] = source, step.parse, re.compile(step.pattern or "")
        names = [entry.name for entry in fields(Columns) if entry.name not in NO_FIELDS]
        self._fields = {name: Field(name, getattr(columns, name), self._steps) for name in names}
        given = _nested("arguments", columns.arguments, Arguments, "all")
        self._arguments = {name: Field(f"arguments.{name}", at, self._steps) for name, at in vars(given).items()}
        several = isinstance(columns.messages, list)
        self._chats: list[tuple[Chats, dict[str, Field]]] = []
        for entry in columns.messages if several else [columns.messages]:
            chats = _nested("messages", entry, Chats, "text")
            if (chats.text is None) == (chats.turns is None):
                raise ValueError("`messages` needs a `text` or `turns`, and not both.")
            parts = {name: getattr(chats, name) for name in ("text", "turns", "images")}
            own = {name: Field(f"messages.{name}", at, self._steps, several) for name, at in parts.items()}
            self._chats.append((chats, own))

    def all_fields(self) -> list[Field]:
        """Every field that the columns name."""
        own = [entry for _, parts in self._chats for entry in parts.values()]
        steps = [source for source, _, _ in self._steps.values()]
        return [*steps, *own, *self._fields.values(), *self._arguments.values()]

    def needed(self) -> dict[str, list[Field]]:
        """What a row can't do without, and the fields of which it needs one."""
        messages = [parts[name] for _, parts in self._chats for name in ("text", "turns")]
        models = [self._fields["model"], self._fields["version_id"]]
        return {"messages": messages, "prompt": [self._fields["prompt"]], "model": models}

    def __call__(self, row: Any, place: str, split: str | None) -> tuple[dict[str, Any], Model, list[RowProblem]]:
        """A row of ours, its model, and what became null; `setting` is empty if the table does not say it.

        Args:
            row: One of theirs.
            place: File and number, its id if it has none.
            split: What the file's name says.

        Raises:
            RowProblem: It is left out.
        """
        if not isinstance(row, dict):
            raise RowProblem("malformed_row", f"a {type(row).__name__}")
        row = self._with_steps(row)
        text = {name: entry.text(row) for name, entry in self._fields.items()}
        messages = self._messages(row)
        if (prompt := text["prompt"]) is None:
            raise RowProblem("missing_prompt", ", ".join(map(str, row)))
        if max(len(prompt), len(chat_text(messages, None))) > MAX_TEXT:
            raise RowProblem("too_long", prompt)
        model = self._model(text)
        if (named := text["split"]) is not None:
            split = self.columns.splits.get(named) or self.columns.splits.get(named.lower())
        if split not in SPLITS:
            raise RowProblem("unknown_split", named)
        arguments, notes = self._read_arguments(row, model.base_model)
        images = [part["image"] for entry in messages for part in entry["content"] if part["type"] == "image"]
        users = sum(entry["role"] == "user" for entry in messages)
        derived = "history" if users > 1 else "multimodal" if images else "single"
        own = {name: text[name] or "" for name in ("negative_prompt", "role", "generator")} | {
            "id": text["id"] or place, "messages": messages, "prompt": prompt, "model": model.name,
            "input_type": _INPUT_TYPES.get(_squeezed(text["input_type"]).removesuffix("input"), derived),
            "arguments": arguments, "base_model": model.base_model, "split": split,
            "setting": _SETTINGS.get(_squeezed(text["setting"]), ""),
        }  # fmt: skip
        own["source"] = self._source(row, own, images) | {"model_id": model.model_id, "version_id": model.version_id}
        return own, model, notes

    def _source(self, row: dict[str, Any], own: dict[str, Any], images: list[str]) -> dict[str, Any]:
        given = next((value for value in self._fields["source"].values(row) if isinstance(value, dict)), {})
        shown, turns = given.get("reference"), given.get("turns")
        key = json.dumps([own[name] for name in ("model", "prompt", "negative_prompt", "arguments")]).encode()
        words = shown["prompt"] if isinstance(shown, dict) and isinstance(shown.get("prompt"), str) else ""
        return {
            "demonstration": str(given.get("demonstration") or hashlib.sha256(key).hexdigest()[:16]),
            "image_id": None if given.get("image_id") is None else str(given["image_id"]),
            "reference": {"image": images[0], "prompt": words} if images else None,
            "turns": [str(turn) for turn in turns] if isinstance(turns, list) else [own["prompt"]],
        }

    def _with_steps(self, row: dict[str, Any]) -> dict[str, Any]:
        row = dict(row)
        for name, (source, kind, pattern) in self._steps.items():
            for value in source.values(row):
                try:
                    row[f"${name}"] = _parsed(value, kind, pattern)
                    break
                except ValueError as error:
                    self.step_problems.setdefault(f"${name}", f"{error}: {str(value)[:80]!r}")
        return row

    def _messages(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        for chats, own in self._chats:
            text, turns = own["text"].text(row), next(own["turns"].values(row), None)
            entries = [("user", text)] if text is not None else [] if turns is None else list(_turns(turns, chats))
            if not entries:
                continue
            last = max((at for at, (role, _) in enumerate(entries) if role == "user"), default=-1)
            images = next(own["images"].values(row), [])
            left = [self._image(image) for image in (images if isinstance(images, list) else [images])]
            given = len(left)
            result = [message(role, *self._parts(said, chats, left)) for role, said in entries[: last + 1]]
            if left and len(left) < given:
                raise RowProblem("picture_count", f"{given} for {given - len(left)} placeholders")
            first = next((entry for entry in result if entry["role"] == "user"), None)
            if first is None or not chat_text(result):
                break
            first["content"][:0] = map(image_part, left)
            return [entry for entry in result if entry["content"]]
        raise RowProblem("no_user_message", ", ".join(map(str, row)))

    def _parts(self, content: Any, chats: Chats, left: list[str]) -> Iterator[dict[str, Any]]:
        """Text and pictures of a message; the pictures that stand for placeholders are taken out of `left`."""
        for part in content if isinstance(content, list) else [{"type": "text", "text": content}]:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind in ("image", "image_url"):
                value = part.get(kind)
                yield image_part(self._image(value.get("url", value) if isinstance(value, dict) else value))
                continue
            if kind != "text" or not isinstance(part.get("text"), str):
                raise RowProblem("malformed_row", f"a turn says {str(part)[:60]}")
            for number, text in enumerate(part["text"].split(chats.placeholder)):
                if number:
                    if not left:
                        raise RowProblem("picture_count", "fewer than placeholders")
                    yield image_part(left.pop(0))
                if text.strip():
                    yield text_part(text.strip())

    def _image(self, value: Any) -> str:
        """An address as it is, a file of the source, or one made of the bytes that `datasets` has."""
        if isinstance(value, dict) and isinstance(data := value.get("bytes"), bytes):
            if (suffix := picture_suffix(data)) is None:
                raise RowProblem("picture_not_found", "bytes that are no picture")
            name = f"images/{hashlib.sha256(data).hexdigest()[:32]}{suffix}"
            if not (self._output / name).is_file():
                write_atomically(self._output / name, data)
            return name
        value = value.get("path") if isinstance(value, dict) else value
        if isinstance(value, str) and value.startswith(("http://", "https://")):
            return value
        try:
            path = (self._root / value).resolve()
            problem = None if path.is_file() else "picture_not_found"
            problem = problem if path.is_relative_to(self._root) else "picture_outside"
        except (TypeError, ValueError, OSError):  # no text, a NUL in it, or longer than a name can be
            path, problem = self._root, "picture_not_found"
        if problem:
            raise RowProblem(problem, value)
        return str(path.relative_to(self._output) if path.is_relative_to(self._output) else path)

    def _model(self, text: Mapping[str, str | None]) -> Model:
        name, version = clean_name(text["model"] or "") or None, _bounded(text["version_id"], 0, 2**53)
        if name is None and (version is None or self.catalog is None):
            raise RowProblem("missing_model")
        if self.catalog is not None:
            entry = self.catalog.get(name or "") or self.catalog.get(self._by_lower_case.get((name or "").lower(), ""))
            entry = entry or (None if version is None else self.catalog.by_version(int(version)))
            if entry is None:
                raise RowProblem("unknown_model", name or version)
            return Model(entry.name, entry.version_id, entry.model_id, entry.type, entry.base_model)
        assert name is not None
        if problem := name_problem(name):
            raise RowProblem("bad_model_name", f"{name[:60]!r} {problem}")
        return Model(
            name, None if version is None else int(version), _bounded(text["model_id"], 0, 2**53),
            _TYPES.get(_squeezed(text["type"])), _BASE_MODELS.get(_squeezed(text["base_model"]), ""),
            text["description"] or "", text["base_checkpoint"],
        )  # fmt: skip

    def _read_arguments(self, row: dict[str, Any], base_model: str) -> tuple[dict[str, Any], list[RowProblem]]:
        """The arguments, and those that are bad and hence null."""
        given: dict[str, Any] = {}
        for value in self._arguments["all"].values(row):
            try:
                found = _parsed(value, "json" if not isinstance(value, str) or "{" in value else "infotext")
            except ValueError:
                continue
            for key, item in found.items() if isinstance(found, dict) else ():
                if (name := _ARGUMENT_NAMES.get(_squeezed(key))) is None:
                    self.unread[str(key)[:60]] += 1
                elif item not in (None, ""):
                    given.setdefault(name, item)
            break
        for name, entry in self._arguments.items():
            if name != "all" and (value := next(entry.values(row), None)) is not None:
                given[name] = value
        arguments = read_arguments(given, base_model)
        size = {name: given[name] for name in ("size", "width", "height") if name in given}
        notes = [RowProblem("bad_arguments.size", size)] if size and arguments["width"] is None else []
        for name in ("sampler", "steps", "cfg_scale", "clip_skip"):
            if name in given and arguments[name] is None:
                notes.append(RowProblem(f"bad_arguments.{name}", given[name]))
        if notes and self.columns.strict_arguments:
            raise notes[0]
        return arguments, notes


def read_arguments(given: Mapping[str, Any], base_model: str) -> dict[str, Any]:
    """Values of `ARGUMENTS`; None where there is none, or one outside the bounds of `rollouts.api`.

    Args:
        given: Numbers or texts by our names, and `schedule`, `version` (of the WebUI) and `size` ("512x768").
        base_model: Whose sizes are fine; empty: all that some architecture can draw.
    """
    schedule, version = (value if isinstance(value := given.get(k), str) else None for k in ("schedule", "version"))
    sampler = given.get("sampler")
    sides: Any = tuple(_bounded(given.get(side), 1, 10**5) for side in ("width", "height"))
    if sides == (None, None):
        sides = parse_size(given.get("size")) or sides
    if None not in sides:
        # What the autoencoder makes of it, as `parse_size` does.
        sides = tuple(side // SIZE_MULTIPLE * SIZE_MULTIPLE for side in sides)
    drawers = [base_model] if base_model else list(ARCHITECTURES)
    fine = None not in sides and any(size_problem(name, *sides) is None for name in drawers)
    values = {
        "sampler": normalize_sampler(sampler, schedule, version) if isinstance(sampler, str) else None,
        "steps": _bounded(given.get("steps"), 1, MAX_STEPS),
        "cfg_scale": _bounded(given.get("cfg_scale"), MIN_CFG, MAX_CFG, digits=2),
        "width": sides[0] if fine else None,
        "height": sides[1] if fine else None,
        "clip_skip": _bounded(given.get("clip_skip"), 1, MAX_CLIP_SKIP),
    }
    return {name: values[name] for name in ARGUMENTS}


def _bounded(value: Any, low: float, high: float, digits: int = 0) -> Any:
    """A number between bounds from a number or its text: whole, or rounded to digits. None for anything else."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    if not low <= number <= high or (digits == 0 and number % 1):
        return None
    return round(number, digits) if digits else int(number)


def _parsed(value: Any, kind: str, pattern: re.Pattern[str] | None = None) -> Any:
    """What a step, or a text of arguments, says."""
    if not isinstance(value, str):
        if kind != "json":
            raise ValueError("no text")
        return value
    if len(value) > MAX_TEXT:
        raise ValueError(f"more than {MAX_TEXT:,} characters")
    if pattern is not None and kind == "regex":
        if (match := pattern.search(value)) is None:
            raise ValueError("`pattern` does not match")
        return match.groupdict()
    if kind == "infotext":
        if value.rstrip().rpartition("\n")[2].lstrip().startswith("Steps:"):
            return parse_infotext(value)
        return {key.strip(): item.strip(' "') for key, item in _PAIR.findall(value)}
    with warnings.catch_warnings(action="ignore"):  # of backslashes in what is read as Python
        for read in (json.loads, ast.literal_eval):
            for text in (value, value[value.find("{") : value.rfind("}") + 1]):
                try:
                    found = read(text)
                except (ValueError, SyntaxError, MemoryError, RecursionError):
                    continue
                if isinstance(found, dict | list):
                    return found
    raise ValueError("no object, neither in JSON nor in Python")


def _turns(turns: Any, chats: Chats) -> Iterator[tuple[str, Any]]:
    for turn in turns if isinstance(turns, list) else [turns]:
        if not isinstance(turn, dict):
            raise RowProblem("malformed_row", f"a turn is {str(turn)[:60]!r}, no object")
        role = next((turn[key] for key in chats.role if key in turn), None)
        if role in chats.users or role in chats.assistants:
            said = next((turn[key] for key in chats.content if key in turn), None)
            yield "user" if role in chats.users else "assistant", said
        elif role != "system":
            raise RowProblem("unknown_role", f"{role!r} in {str(turn)[:60]}")


def _nested(where: str, given: Any, cls: type[Any], main: str | None = None) -> Any:
    """Options of a dataclass; a field that stands in their place is their `main` one."""
    if main is not None and (not isinstance(given, dict) or "constant" in given):
        given = {main: given}
    check_nested(where, given, cls)
    try:
        return cls(**given)
    except TypeError as error:
        raise ValueError(f"`{where}` lacks something: {error}.") from error


def _squeezed(text: Any) -> str:
    return re.sub(r"[^a-z0-9]", "", str(text or "").lower())

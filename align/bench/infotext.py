"""Generation data as Stable Diffusion WebUI (A1111) writes it and Civitai's `meta` passes it on.

Extra networks (`<lora:name:0.8>`, `<lyco:…>`, `<hypernet:…>`), attention weights (`(word:1.2)`), `BREAK`, `Size`
strings, both sampler conventions, hires-fix fields. Every value is somebody's typing: nothing here raises on odd input.
"""

import math
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from rollouts.api import MAX_CFG, MAX_STEPS, MIN_CFG, SIZE_MULTIPLE
from rollouts.samplers import normalize_sampler

# Possessive throughout: prompts are strangers' text, and no text may take more than linear time.
_NETWORK_TAG = re.compile(r"<\s*+([a-zA-Z]++)\s*+:([^:<>]++)(?::([^<>]*+))?>")
# A tag without its beginning or end; A1111 takes that for words, so no network was loaded.
_BROKEN_TAG = re.compile(
    r"<\s*+(?:lora|lyco|hypernet)\b[^<>,\n]*+>?|\b(?:lora|lyco|hypernet)\s*+:[^<>,\s]++>?", re.IGNORECASE
)
_LORA_KINDS = frozenset({"lora", "lyco", "locon", "loha", "lycoris"})
# `(word:1.2)`, and prompt editing: `[word:0.5]`, `[word::5]`, `[this:that:0.3]`.
_WEIGHT = re.compile(r":(?:\s*+:)?+\s*+-?(?:\d++(?:\.\d*+)?|\.\d++)\s*+(?=\\*+[)\]])")
# A weight whose brackets are not where they should be, as in `(word:1.2, other)`. Whole numbers may be meant: "16:9".
_STRAY_WEIGHT = re.compile(r"(?<=[^\s:\d.])(?:\s*+:\s*+\d*+\.\d++(?![\w.]))++")
_BRACKET = re.compile(r"\\++([()\[\]{}])|[()\[\]{}]")
_SIZE = re.compile(r"\s*(\d{1,5})\s*[xX×]\s*(\d{1,5})\s*")
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")
_BLANKS = re.compile(r"[\s\x00-\x1f\x7f]+")
_COMMAS = re.compile(r" ,(?: ?,)*|,(?: ?,)+")
_HEX = re.compile(r"[0-9A-Fa-f]{8,64}")
# Keys of the last line of an infotext: `Steps: 20, Sampler: Euler a, "Lora hashes": "a: 1, b: 2", ...`
_FIELD = re.compile(r'\s*+(\w[\w \-/]{0,60}?):\s*+("(?:\\.|[^\\"])*+"|[^,]*+)(?:,|$)')
MAX_CLIP_SKIP = 12  # the layers of CLIP's text encoder
_MAX_RAW_PROMPT_CHARS = 20_000  # what is longer is not even looked at
_INFOTEXT_KEYS = {"Steps": "steps", "Sampler": "sampler", "CFG scale": "cfgScale", "Seed": "seed"}


class Lora(NamedTuple):
    """A LoRA an image was made with: the file stem its author had on disk, or Civitai's version id, or both."""

    name: str | None
    weight: float
    version_id: int | None = None


class ParsedPrompt(NamedTuple):
    """A prompt without its extra-network tags, and what the tags named."""

    text: str
    loras: tuple[Lora, ...]
    other_networks: tuple[str, ...]  # hypernetworks and kinds we don't know


@dataclass(frozen=True)
class Generation:
    """How one image was made, in our units: pixels, canonical sampler name, numbers as numbers."""

    prompt: str
    negative_prompt: str
    sampler: str
    steps: int
    cfg_scale: float
    width: int
    height: int
    clip_skip: int | None  # layers from the end, as A1111 counts: 1 is the last; None where nobody says
    checkpoint_hashes: tuple[str, ...]  # upper-case hex, most reliable first
    checkpoint_name: str | None  # file stem, as A1111 writes it
    checkpoint_version_id: int | None  # only when Civitai itself made the image
    loras: tuple[Lora, ...]
    other_networks: tuple[str, ...]


class Unusable(NamedTuple):
    """Why an image's generation data can't be a demonstration: the rule that removed it, and the value."""

    rule: str
    value: Any


def parse_prompt(prompt: str) -> ParsedPrompt:
    """Take the extra-network tags out of a prompt; a tag with weight 0 was switched off and doesn't count."""
    loras: dict[str, Lora] = {}
    others: list[str] = []
    prompt = _CONTROL.sub(" ", prompt)
    while True:
        for kind, name, weights in _NETWORK_TAG.findall(prompt):
            name = name.strip()
            if kind.lower() not in _LORA_KINDS:
                others.append(f"{kind}:{name}")
            elif (weight := _tag_weight(weights)) != 0:
                loras[name.lower()] = Lora(name, weight)
        # Again and again, since a tag around a tag is one as soon as that is gone.
        text = _NETWORK_TAG.sub(" ", prompt)
        if text == prompt:
            text = _BROKEN_TAG.sub(" ", prompt)
        if text == prompt:
            return ParsedPrompt(_tidy(text), tuple(loras.values()), tuple(others))
        prompt = text


def _tag_weight(weights: str) -> float:
    """The weight of a tag: of `0.8`, `0.8:0.5` (text encoder, then UNet) or `te=0.8:unet=0.5`; 1 without a number."""
    numbers = [_number(part.rpartition("=")[2]) for part in weights.split(":")[:2]]
    known = [number for number in numbers if number is not None]
    return next((number for number in known if number), 0.0) if known else 1.0


def plain_prompt(prompt: str) -> str:
    r"""The prompt without attention syntax: `(a:1.2)`, `((a))`, `[a]` and `BREAK` vanish, `\(a\)` becomes `(a)`."""
    text = _WEIGHT.sub("", _tidy(prompt))
    # A bracket ends a word: A1111 encodes what it encloses on its own.
    text = _STRAY_WEIGHT.sub("", _BRACKET.sub(lambda bracket: bracket[1] or " ", text))
    return _tidy(re.sub(r"\bBREAK\b", ", ", text))


def parse_size(value: Any) -> tuple[int, int] | None:
    """`"512x768"` -> (512, 768) pixels, each floored to what the autoencoder really made of it (512x650 -> 512x648)."""
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return None
    width, height = (int(side) // SIZE_MULTIPLE * SIZE_MULTIPLE for side in match.groups())
    return width, height


def parse_infotext(text: str) -> dict[str, Any]:
    """The text A1111 embeds in its PNGs, as Civitai's `meta` object. Values stay strings."""
    head, _, last_line = text.rstrip().rpartition("\n")
    if not last_line.lstrip().startswith("Steps:"):
        head, last_line = text, ""
    prompt, _, negative = head.partition("Negative prompt:")
    meta: dict[str, Any] = {"prompt": prompt.strip(), "negativePrompt": negative.strip()}
    for key, value in _FIELD.findall(last_line):
        meta[_INFOTEXT_KEYS.get(key, key)] = value.strip().strip('"')
    return meta


def read_generation(
    meta: Any, *, keep_attention: bool = False, allow_image_to_image: bool = True
) -> Generation | Unusable:
    """Read and check an image's `meta`.

    Args:
        meta: Civitai's `meta` object, or a raw infotext.
        keep_attention: Leave `(word:1.2)` and `BREAK` in the prompts.
        allow_image_to_image: Accept images whose `Denoising strength` has no hires fix to explain it.
    """
    if isinstance(meta, str):
        meta = parse_infotext(meta)
    if not isinstance(meta, dict) or not meta:
        return Unusable("meta_missing", None)
    if isinstance(meta.get("meta"), dict):  # the /images route nests: {id, meta}
        meta = meta["meta"]
    prompt = meta.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        return Unusable("prompt_missing", prompt)
    negative = meta.get("negativePrompt")
    if not isinstance(negative, str):
        negative = ""
    if max(len(prompt), len(negative)) > _MAX_RAW_PROMPT_CHARS:
        return Unusable("prompt_too_long", f"{max(len(prompt), len(negative))} characters")
    parsed = parse_prompt(prompt)
    clean = plain_prompt if not keep_attention else _tidy
    text = clean(parsed.text)
    if not re.search(r"\w", text):
        return Unusable("prompt_missing", prompt)

    parameters = _read_parameters(meta)
    if isinstance(parameters, Unusable):
        return parameters
    if not allow_image_to_image and is_image_to_image(meta):
        return Unusable("image_to_image", meta.get("Denoising strength"))
    hashes, checkpoint_name, checkpoint_version_id = _checkpoint(meta)
    return Generation(
        prompt=text,
        negative_prompt=clean(parse_prompt(negative).text),
        checkpoint_hashes=hashes,
        checkpoint_name=checkpoint_name,
        checkpoint_version_id=checkpoint_version_id,
        loras=_loras(meta, parsed.loras),
        other_networks=parsed.other_networks,
        **parameters,
    )


def is_image_to_image(meta: dict[str, Any]) -> bool:
    """Whether the picture started from another picture: a denoising strength that no hires fix explains."""
    hires = any(key in meta for key in ("Hires upscale", "Hires upscaler", "Hires resize", "First pass size"))
    return "Denoising strength" in meta and not hires


def _read_parameters(meta: dict[str, Any]) -> dict[str, Any] | Unusable:
    """Sampler, steps, cfg and size, or the first that is missing or absurd."""
    sampler = meta.get("sampler")
    if not isinstance(sampler, str) or sampler in ("", "None", "undefined"):
        return Unusable("sampler_missing", sampler)
    schedule, version = meta.get("Schedule type"), meta.get("Version")
    name = normalize_sampler(
        sampler, schedule if isinstance(schedule, str) else None, version if isinstance(version, str) else None
    )
    if name is None:
        return Unusable("sampler_unknown", sampler)
    steps = _number(meta.get("steps"))
    if steps is None or steps % 1 or not 1 <= steps <= MAX_STEPS:
        return Unusable("steps_invalid", meta.get("steps"))
    cfg_scale = _number(meta.get("cfgScale"))
    if cfg_scale is None or not MIN_CFG <= cfg_scale <= MAX_CFG:
        return Unusable("cfg_invalid", meta.get("cfgScale"))
    size = parse_size(meta.get("Size"))
    if size is None:
        return Unusable("size_missing", meta.get("Size"))
    return {
        "sampler": name,
        "steps": int(steps),
        "cfg_scale": round(cfg_scale, 2),
        "width": size[0],
        "height": size[1],
        "clip_skip": _clip_skip(meta),
    }


def _clip_skip(meta: dict[str, Any]) -> int | None:
    value = meta.get("Clip skip", meta.get("clipSkip"))
    number = _number(value.strip(" ,") if isinstance(value, str) else value)
    return int(number) if number is not None and number % 1 == 0 and 1 <= number <= MAX_CLIP_SKIP else None


def _checkpoint(meta: dict[str, Any]) -> tuple[tuple[str, ...], str | None, int | None]:
    """Hashes, file stem and Civitai version id of the checkpoint, as far as the meta says them."""
    resources = _dicts(meta.get("resources"))
    hashes_field = meta.get("hashes")
    found = [
        meta.get("Model hash"),
        hashes_field.get("model") if isinstance(hashes_field, dict) else None,
        *(r.get("hash") for r in resources if r.get("type") == "model"),
    ]
    hashes = dict.fromkeys(h.upper() for h in found if isinstance(h, str) and _HEX.fullmatch(h))
    name = meta.get("Model")
    version_ids = [
        r.get("modelVersionId") for r in _dicts(meta.get("civitaiResources")) if r.get("type") == "checkpoint"
    ]
    version_id = version_ids[0] if len(version_ids) == 1 and isinstance(version_ids[0], int) else None
    # Long hashes first: eight digits are A1111's old hash of 64 kB in the middle of the file, which collides.
    return tuple(sorted(hashes, key=len, reverse=True)), name if isinstance(name, str) else None, version_id


def _loras(meta: dict[str, Any], tagged: tuple[Lora, ...]) -> tuple[Lora, ...]:
    """LoRAs of the tags, of A1111's resources, of the AddNet extension and of Civitai's own generator, each once."""
    loras = {lora.name.lower(): lora for lora in tagged if lora.name}
    for resource in _dicts(meta.get("resources")):
        name, weight = resource.get("name"), _number(resource.get("weight"))
        if str(resource.get("type")).lower() in _LORA_KINDS and isinstance(name, str) and weight != 0:
            loras.setdefault(name.lower(), Lora(name, 1.0 if weight is None else weight))
    for i in range(1, 6):  # AddNet has five slots; its model field reads "stem(hash)"
        name, weight = meta.get(f"AddNet Model {i}"), _number(meta.get(f"AddNet Weight A {i}"))
        if isinstance(name, str) and name != "None" and weight != 0:
            stem = re.sub(r"\([0-9a-f]+\)$", "", name)
            loras.setdefault(stem.lower(), Lora(stem, 1.0 if weight is None else weight))
    found = list(loras.values())
    if not found:
        for resource in _dicts(meta.get("civitaiResources")):
            version_id, weight = resource.get("modelVersionId"), _number(resource.get("weight"))
            if str(resource.get("type")).lower() in _LORA_KINDS and isinstance(version_id, int) and weight != 0:
                found.append(Lora(None, 1.0 if weight is None else weight, version_id))
    return tuple(found)


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _number(value: Any) -> float | None:
    """A finite number from a number or its text; `None` for anything else (bool, NaN, "", lists)."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _tidy(text: str) -> str:
    """Single spaces, single commas, none at the ends; control characters are white space."""
    return _COMMAS.sub(",", _BLANKS.sub(" ", text)).strip(" ,")

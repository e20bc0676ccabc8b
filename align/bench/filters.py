"""Which records, model versions and images can become DABench rows (DiffAgent Sec. 3.1; DESIGN 4, steps 1, 2 and 4).

Each rule is a small function from a parsed record to "does it break the rule?"; a table names them in the order in
which they are tried, and the first one broken is the one that counts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from align.bench.config import CollectionConfig
from align.bench.records import ModelRecord, VersionRecord, file_problems
from rollouts.names import name_problem

# Civitai's word for a type -> ours.
TYPES = {"Checkpoint": "Checkpoint", "LORA": "LoRA"}
_PUBLISHED = (None, "Published")


class Rule(NamedTuple):
    """One reason to leave a thing out: its name in the funnel, what it says, and the test."""

    name: str
    text: str
    breaks: Callable[..., bool]


def model_rules(config: CollectionConfig) -> list[Rule]:
    """Rules for a whole model: scope, then availability."""
    return [
        Rule(
            "type_out_of_scope", f"type is not one of {config.types}", lambda m: TYPES.get(m.type) not in config.types
        ),
        Rule("model_nsfw", "the model is flagged NSFW", lambda m: m.nsfw),
        Rule("real_person", "the model depicts a real person", lambda m: config.exclude_real_persons and m.poi),
        Rule("model_archived", "archived or taken down", lambda m: m.mode in ("Archived", "TakenDown")),
        Rule("model_private", "not public", lambda m: m.availability not in (None, "Public")),
        Rule(
            "name_unusable",
            "the name is empty or looks like a path",
            lambda m: name_problem(m.title) is not None,
        ),
    ]


def availability_rules(config: CollectionConfig) -> list[Rule]:
    """Rules for a version: base architecture in scope, and weights that can really be called."""

    def no_file_without(problem: str) -> Callable[[ModelRecord, VersionRecord], bool]:
        # A version breaks a file rule if no file gets past it and the file rules before it.
        order = ("file_missing", "file_not_safetensors", "file_without_hash", "file_scan_failed")
        upto = set(order[: order.index(problem) + 1])
        return lambda m, v: all(upto & set(file_problems(file)) for file in v.files)

    return [
        Rule(
            "base_model_out_of_scope",
            f"base model is not one of {config.base_models}",
            lambda m, v: v.baseModel not in config.base_models,
        ),
        Rule("version_unpublished", "the version is not published", lambda m, v: v.status not in _PUBLISHED),
        Rule(
            "version_name_unusable",
            "the version's name looks like a path",
            lambda m, v: bool(v.title) and name_problem(v.title) is not None,
        ),
        Rule("file_missing", "no weights to download", no_file_without("file_missing")),
        Rule(
            "file_not_safetensors", "weights only as pickle or another format", no_file_without("file_not_safetensors")
        ),
        Rule("file_without_hash", "no SHA256 to pin the weights by", no_file_without("file_without_hash")),
        Rule("file_scan_failed", "virus or pickle scan failed or pending", no_file_without("file_scan_failed")),
    ]


def quality_rules(config: CollectionConfig, download_floor: dict[str, float]) -> list[Rule]:
    """Rules for an available version: the community's own verdict (DiffAgent Sec. 3.1, "APIs Filtering").

    Args:
        config: Thresholds.
        download_floor: Downloads at the configured quantile, per base model.
    """
    return [
        Rule(
            "few_downloads",
            f"fewer than {config.min_downloads} downloads",
            lambda m, v: (
                (v.stats.downloadCount or 0) < max(config.min_downloads, download_floor.get(v.baseModel or "", 0))
            ),
        ),
        Rule(
            "few_ratings",
            f"fewer than {config.min_rating_count} ratings",
            lambda m, v: (v.stats.ratingCount or 0) < config.min_rating_count,
        ),
        Rule(
            "low_rating",
            f"rated, but below {config.min_rating}",
            lambda m, v: bool(v.stats.ratingCount) and (v.stats.rating or 0) < config.min_rating,
        ),
        Rule("few_likes", f"fewer than {config.min_likes} likes", lambda m, v: (m.stats.likes or 0) < config.min_likes),
    ]


def first_broken(rules: list[Rule], *things: Any) -> str | None:
    """Name of the first rule that the thing breaks, or `None`."""
    return next((rule.name for rule in rules if rule.breaks(*things)), None)


def image_is_nsfw(image: dict[str, Any]) -> bool:
    """Whether an image is flagged above "safe", by `nsfw` (text or bool, old API) or `nsfwLevel` (text or bit mask)."""
    flag, level = image.get("nsfw"), image.get("nsfwLevel")
    if isinstance(level, int | float) and not isinstance(level, bool):
        safe = level <= 1  # 1 is PG, 0 not rated
    else:
        safe = level in (None, "None", "PG")
    return not safe or flag not in (False, None, "None")

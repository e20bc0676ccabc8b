"""Options of the builders: what both collect from a community, and `python -m align.bench.dabench`."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from align.bench.descriptions import MIN_CHARS
from rollouts.api import ARCHITECTURES

MAX_DESCRIPTION_CHARS = 4000  # of a call's `model description`

_BOUNDS = (
    ("min_downloads_quantile", 0, 1),
    ("newest_versions", 1, math.inf),
    ("max_prompt_chars", 1, 20_000),
    ("description_max_chars", MIN_CHARS, MAX_DESCRIPTION_CHARS),
    ("llm_concurrency", 1, 1000),
    ("sample_prompts", 0, math.inf),
    ("api_images_per_version", 1, math.inf),
    ("records_per_part", 1, math.inf),
)


@dataclass
class CollectionConfig:
    """How demonstrations are collected; thresholds are ours where the papers do not give their own."""

    source: str = field(
        metadata={
            "help": "A .jsonl[.gz|.zst] dump or a folder of .json files of Civitai models, or the API's base URL."
        }
    )
    output: str = field(metadata={"help": "Folder for catalog.jsonl, <architecture>/, funnel.json and README.md."})

    # Scope (step 1)
    types: list[str] = field(
        default_factory=lambda: ["Checkpoint", "LoRA"], metadata={"help": "Model types kept: Checkpoint, LoRA or both."}
    )
    base_models: list[str] = field(
        default_factory=lambda: list(ARCHITECTURES), metadata={"help": "Base models kept, in Civitai's spelling."}
    )
    exclude_real_persons: bool = field(default=True, metadata={"help": "Leave out models flagged as a real person."})

    # Quality (step 4); downloads and ratings are the version's, likes the model's
    min_downloads: int = field(default=100, metadata={"help": "Downloads a version needs; 0 asks for none."})
    min_downloads_quantile: float = field(
        default=0.0, metadata={"help": "Also drop this share of the available versions, least downloaded first (0-1)."}
    )
    min_rating: float = field(default=4.0, metadata={"help": "Stars (1-5) a rated version needs; unrated ones pass."})
    min_rating_count: int = field(default=0, metadata={"help": "Ratings a version needs."})
    min_likes: int = field(default=0, metadata={"help": "Favourites or thumbs-up a model needs."})

    newest_versions: int | None = field(
        default=None, metadata={"help": "Keep so many of a model's versions, the newest ones; none: all."}
    )

    # Images (steps 3 and 5)
    keep_attention: bool = field(
        default=False, metadata={"help": "Keep `(word:1.2)` and `BREAK` in prompts; diffusers can't read them."}
    )
    allow_image_to_image: bool = field(
        default=False, metadata={"help": "Keep images that were made from another image, not from text alone."}
    )
    lora_without_tag: bool = field(
        default=True,
        metadata={"help": "Keep images in a LoRA's gallery whose data name no LoRA (it was loaded by an extension)."},
    )
    max_prompt_chars: int = field(default=2000, metadata={"help": "Longer prompts are left out, not cut."})

    # Descriptions (step 6)
    description_max_chars: int = field(default=240, metadata={"help": "Characters of a model description."})
    llm_base_url: str | None = field(
        default=None, metadata={"help": "OpenAI-compatible endpoint that rewrites descriptions; none: extract them."}
    )
    llm_model: str | None = field(default=None, metadata={"help": "Name of the model at `llm_base_url`."})
    llm_api_key_env: str = field(
        default="OPENAI_API_KEY", metadata={"help": "Environment variable that holds the key for `llm_base_url`."}
    )
    llm_concurrency: int = field(default=8, metadata={"help": "Requests under way at once."})
    sample_prompts: int = field(default=5, metadata={"help": "Sample prompts shown to the LLM for each model."})

    # Live API
    lookup_url: str | None = field(
        default=None,
        metadata={
            "help": "API base URL where base checkpoints that the source lacks are looked up by hash; none: not."
        },
    )
    api_token_env: str = field(
        default="CIVITAI_API_TOKEN", metadata={"help": "Environment variable that holds a Civitai API token, if any."}
    )
    api_max_models: int | None = field(default=None, metadata={"help": "Stop after this many models; none: all."})
    api_images_per_version: int = field(default=20, metadata={"help": "Gallery images asked for per model version."})

    # Work
    records_per_part: int = field(
        default=500, metadata={"help": "Records per unit of work: what a kill can lose at most."}
    )
    plots: bool = field(default=True, metadata={"help": "Draw the data card's distributions (needs matplotlib)."})

    def __post_init__(self) -> None:
        for name in ("types", "base_models"):
            known = ["Checkpoint", "LoRA"] if name == "types" else list(ARCHITECTURES)
            if unknown := sorted(set(getattr(self, name)) - set(known)) or not getattr(self, name):
                raise ValueError(f"`{name}` must be a non-empty list out of {known}, but got {unknown or '[]'}.")
        check_bounds(self, _BOUNDS)
        if (self.llm_base_url is None) != (self.llm_model is None):
            raise ValueError("`llm_base_url` and `llm_model` must be given together.")
        if self.llm_base_url is not None and not self.llm_base_url.startswith(("http://", "https://")):
            raise ValueError(f"`llm_base_url` must start with http:// or https://, but got {self.llm_base_url!r}.")


@dataclass
class DABenchConfig(CollectionConfig):
    """Options of the DABench builder."""

    # Splits (step 7)
    sft_share: float = field(default=0.8, metadata={"help": "Share of rows for supervised fine-tuning."})
    rrhf_share: float = field(default=0.1, metadata={"help": "Share of rows for RRHF; the rest is for evaluation."})
    near_duplicate: float = field(
        default=0.8,
        metadata={"help": "Prompts whose word sets overlap at least this much (Jaccard, 0.5-1) stay in one split."},
    )
    seed: int = field(default=0, metadata={"help": "Salt of the split's hash; another seed is another split."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, (("sft_share", 0, 1), ("rrhf_share", 0, 1), ("near_duplicate", 0.5, 1)))
        if self.sft_share + self.rrhf_share > 1:
            raise ValueError(
                f"`sft_share` + `rrhf_share` must be at most 1, but got {self.sft_share} + {self.rrhf_share}."
            )


def check_bounds(config: Any, bounds: Iterable[tuple[str, float, float]]) -> None:
    """Check options against (name, lowest, highest); an option that is None is off.

    Raises:
        ValueError: Naming the option, its bounds and its value.
    """
    for name, low, high in bounds:
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            span = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            raise ValueError(f"`{name}` must be {span}, but got {value}.")

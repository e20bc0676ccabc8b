"""Options of `python -m align.bench.chatgen`."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from align.bench.chatgen.llm_player import Generator
from align.bench.chatgen.roles import ROLES
from align.bench.chatgen.schema import INPUT_TYPES, SHARES, InputType
from align.bench.config import CollectionConfig, check_bounds
from rewards.commandline import from_json

References = Literal["none", "url", "folder", "download", "render"]
_BOUNDS = (
    ("chats_per_demonstration", 1, len(ROLES)),
    ("max_attempts", 1, 20),
    ("duplicate_f1", 0, 1),
    ("test_share", 0, 1),
    ("near_duplicate", 0.5, 1),
    ("few_shot_below", 0, math.inf),
    ("max_words", 1, math.inf),
    ("max_turns", 1, 5),
    ("judge_min", 1, 5),
    ("reviews", 1, 100),
    ("budget", 0, math.inf),
)


@dataclass
class ChatGenBenchConfig(CollectionConfig):
    """Options of the ChatGenBench builder; values are ours where the paper does not give its own."""

    newest_versions: int | None = field(
        default=3, metadata={"help": "Keep so many of a model's versions, the newest ones; none: all."}
    )

    # Split: before the chats are written, so that no demonstration stands on both sides
    encoder: str = field(
        default="sentence-transformers/all-MiniLM-L6-v2",
        metadata={"help": "Encoder of the BERTScores: a folder, or a name on the Hub."},
    )
    encoder_layer: int | None = field(default=None, metadata={"help": "Its layer; none: the last one."})
    rescale: bool = field(
        default=True,
        metadata={"help": "Rescale BERTScores by those of unrelated texts of the same kind, which get 0."},
    )
    test_share: float = field(
        default=0.2, metadata={"help": "Share of a model's demonstrations for testing: its most distinct ones."}
    )
    near_duplicate: float = field(
        default=0.8,
        metadata={"help": "Prompts with near duplicates (Jaccard of words, 0.5-1) anywhere are for training only."},
    )
    few_shot_below: int = field(
        default=4,
        metadata={
            "help": "Models with fewer demonstrations for training are in the setting few_shot. The paper does not say "
            "how many; on Civitai's records of 2023, 4 puts a third of the test split there, as the paper has."
        },
    )

    # Role-play
    chats_per_demonstration: int = field(default=7, metadata={"help": "Chats of each demonstration."})
    shares: dict[str, float] | str | None = field(
        default=None,
        metadata={
            "help": "Of single, multimodal, history (JSON on a command line); none: those of the paper's Table 3."
        },
    )
    generators: list[dict[str, Any]] | str | None = field(
        default=None,
        metadata={
            "help": "Language models that write the chats (see align.bench.chatgen.llm_player.Generator): model, "
            "base_url, share, prices, ...; JSON on a command line; none: templates."
        },
    )
    budget: float | None = field(default=None, metadata={"help": "US dollars that all answers may cost; none: any."})
    max_attempts: int = field(default=3, metadata={"help": "How often a chat is written before it is given up."})
    duplicate_f1: float = field(
        default=0.8, metadata={"help": "BERTScore F1 to another chat of the demonstration from which one is dropped."}
    )
    references: References = field(
        default="url",
        metadata={
            "help": "Pictures that chats point to: the community's addresses (url), files of `images` named by image "
            "id (folder), downloads into `images/` (download), drawn from `weights` into `images/` (render), or none."
        },
    )
    images: str | None = field(default=None, metadata={"help": "Folder of the pictures for `references: folder`."})
    weights: str | None = field(default=None, metadata={"help": "Folder of the models for `references: render`."})
    native_side: int | None = field(
        default=None, metadata={"help": "For small models: pixels drawn for the side an architecture was trained at."}
    )

    # Test split
    max_words: int = field(default=60, metadata={"help": "Words of a message in the test split."})
    max_turns: int = field(default=5, metadata={"help": "Messages of the user in a chat of the test split."})
    spacy_pipeline: str | None = field(
        default="en_core_web_sm", metadata={"help": "spaCy pipeline of the colloquialism check; none: no check."}
    )
    judge: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Language model that judges the test split, given like one of `generators`."}
    )
    judge_min: int = field(default=3, metadata={"help": "Points (1-5) a chat needs for every statement of the rubric."})
    decisions: str | None = field(
        default=None, metadata={"help": "Decisions of reviewers: the database of align.bench.chatgen.review."}
    )
    reviews: int = field(default=1, metadata={"help": "Reviewers who must have seen a chat for it to be decided."})
    unreviewed: Literal["keep", "drop"] = field(
        default="keep", metadata={"help": "What becomes of chats in the test split that are not decided."}
    )
    seed: int = field(default=0, metadata={"help": "Of roles, input types and words."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, _BOUNDS)
        self.shares = from_json("shares", self.shares or dict(SHARES), dict)
        self.generators = from_json("generators", self.generators or [], list)
        self.judge = None if self.judge is None else from_json("judge", self.judge, dict)
        self.input_shares()
        self.parsed_generators()
        self.parsed_judge()
        if (self.references == "folder") != (self.images is not None):
            raise ValueError("`references: folder` and `images` must be given together.")
        if (self.references == "render") != (self.weights is not None):
            raise ValueError("`references: render` and `weights` must be given together.")

    def input_shares(self) -> dict[InputType, float]:
        """Shares of the input types, checked."""
        given = from_json("shares", self.shares, dict)
        if unknown := sorted(set(given) - set(INPUT_TYPES)):
            raise ValueError(f"`shares` may hold {', '.join(INPUT_TYPES)}, but has {', '.join(map(str, unknown))}.")
        shares = {kind: given.get(kind, 0) for kind in INPUT_TYPES}
        numbers = all(isinstance(share, int | float) and 0 <= share < math.inf for share in shares.values())
        if not numbers or not any(shares.values()):
            raise ValueError(f"`shares` must be 0 or more and not all 0, but are {self.shares}.")
        return shares

    def parsed_generators(self) -> list[Generator]:
        """The language models, checked."""
        return [_generator(f"generators[{i}]", g) for i, g in enumerate(from_json("generators", self.generators, list))]

    def parsed_judge(self) -> Generator | None:
        """The judge, checked."""
        return None if self.judge is None else _generator("judge", from_json("judge", self.judge, dict))


def _generator(name: str, given: Any) -> Generator:
    if not isinstance(given, dict):
        raise ValueError(f"`{name}` must be a mapping, but is {given!r}.")
    known = [entry.name for entry in fields(Generator)]
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"`{name}` has {', '.join(unknown)}; known are {', '.join(known)}.")
    if missing := [key for key in ("model", "base_url") if not isinstance(given.get(key), str)]:
        raise ValueError(f"`{name}` needs {' and '.join(missing)}.")
    for key, value in given.items():
        default = getattr(Generator, key, "")
        wanted = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(value, wanted) or isinstance(value, bool) != isinstance(default, bool):
            raise ValueError(f"`{name}.{key}` must be of type {type(default).__name__}, but is {value!r}.")
    return Generator(**given)

"""Options of `ModelTokenTrainer`."""

from dataclasses import dataclass, field

OPTIMIZERS = ("adamw", "lbfgs")
SCHEDULES = ("linear", "constant")
INITS = ("names", "descriptions", "class_means", "normal", "zeros")
CACHE_DTYPES = ("auto", "float32", "bfloat16", "float16")
MASTER_DTYPES = ("float32", "float64")


class ModelTokenError(ValueError):
    """Data, a model or a file that model tokens can't be trained on or read from; the message says what to change."""


@dataclass
class ModelTokenConfig:
    """Training of model tokens, ChatGen Eq. 3: rows W_M of the output layer, everything else frozen.

    The paper trains with AdamW, `learning_rate` 4e-5, `weight_decay` 1.0 and `num_epochs` 5 on 8 A100. It gives no
    batch size and no initial rows, and shares those values with its full fine-tuning. On small data they leave rows
    where they began: of 504 examples of 70 models on SmolLM2-135M, 40 epochs at 4e-5 from `init: names` find 4% of
    held-out models; at 1e-2 they find 83%, as does L-BFGS within a second, and `init: class_means` finds 79% before the
    first step. Epochs over cached hidden states cost next to nothing, so the defaults are many of them, which end when
    the validation loss no longer falls.
    """

    output_dir: str = field(metadata={"help": "Folder of the rows, metrics.jsonl, the checkpoint and the cache."})
    cache_dir: str | None = field(default=None, metadata={"help": "Folder of hidden states; none: `output_dir`/cache."})
    cache_dtype: str = field(
        default="auto",
        metadata={"help": "Hidden states on disk: float32, bfloat16, float16; auto: as the model computes them."},
    )
    replace_stale_cache: bool = field(
        default=False, metadata={"help": "Replace a cache of other weights or data; otherwise it is an error."}
    )
    tokens_per_batch: int = field(
        default=2048, metadata={"help": "Padded tokens of a forward pass of the backbone; a longer prefix goes alone."}
    )
    part_rows: int = field(
        default=256, metadata={"help": "Prefixes in a file of the cache: what a kill loses at most."}
    )
    memory_mb: int = field(
        default=2048, metadata={"help": "Hidden states up to this size are held in (device) memory while training."}
    )
    optimizer: str = field(
        default="adamw", metadata={"help": "adamw, or lbfgs: full batches, for data that fits; no learning rate."}
    )
    learning_rate: float = field(
        default=3e-3, metadata={"help": "AdamW's: a step moves a logit by up to this times |h|_1. The paper's is 4e-5."}
    )
    lr_schedule: str = field(default="linear", metadata={"help": "linear (down to 0 at `num_epochs`) or constant."})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW's, decoupled; the paper's is 1.0."})
    l2: float | None = field(
        default=None,
        metadata={"help": "Adds l2/2 * |W_M - initial W_M|^2 to the loss; none: 0 for adamw, 1e-3 for lbfgs."},
    )
    num_epochs: int = field(
        default=100,
        metadata={"help": "Passes over the cache; of lbfgs, runs of up to 20 iterations. The paper's is 5."},
    )
    batch_size: int = field(default=64, metadata={"help": "Examples of an AdamW step."})
    init: str = field(
        default="class_means",
        metadata={"help": "Rows to begin with: class_means, names or descriptions (of models), normal or zeros."},
    )
    init_std: float = field(default=0.02, metadata={"help": "Standard deviation of `init: normal`."})
    validation_fraction: float = field(
        default=0.1, metadata={"help": "Share of the examples kept for validation, if no others are given; 0: none."}
    )
    patience: int | None = field(
        default=5, metadata={"help": "Stop after this many epochs without a better validation loss; none: never."}
    )
    block_rows: int = field(
        default=16384, metadata={"help": "Models whose logits are in memory at once; the softmax is exact anyway."}
    )
    dtype: str = field(default="float32", metadata={"help": "Of W_M while training: float32 or float64."})
    device: str | None = field(default=None, metadata={"help": "Where W_M is trained; none: where the model is."})
    seed: int = field(default=0, metadata={"help": "Of batches, the validation part and `init: normal`."})
    resume: bool = field(default=True, metadata={"help": "Go on from the checkpoint in `output_dir`, if there is one."})

    def __post_init__(self) -> None:
        for name, known in (
            ("optimizer", OPTIMIZERS),
            ("lr_schedule", SCHEDULES),
            ("init", INITS),
            ("cache_dtype", CACHE_DTYPES),
            ("dtype", MASTER_DTYPES),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(known)}, but is {getattr(self, name)!r}.")
        for name in ("tokens_per_batch", "part_rows", "num_epochs", "batch_size", "block_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, but is {getattr(self, name)}.")
        for name in ("weight_decay", "l2", "init_std", "memory_mb"):
            if (value := getattr(self, name)) is not None and not value >= 0:
                raise ValueError(f"`{name}` must be 0 or more, but is {value}.")
        if not self.learning_rate > 0:
            raise ValueError(f"`learning_rate` must be more than 0, but is {self.learning_rate}.")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"`validation_fraction` must be in [0, 1), but is {self.validation_fraction}.")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"`patience` must be at least 1, or none, but is {self.patience}.")
        if self.l2 is None:
            self.l2 = 1e-3 if self.optimizer == "lbfgs" else 0.0

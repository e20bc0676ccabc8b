"""Options of `RRHFTrainer`."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

LOSS_TYPES = ("rrhf", "bradley_terry", "simpo", "dpo")
_PAIRWISE = {"bradley_terry": (1.0, 0.0), "simpo": (2.0, 1.0), "dpo": (0.1, 0.0)}
"""Default beta and margin. SimPO's are its paper's customary start (beta 2, gamma / beta 0.5)."""


@dataclass
class RRHFConfig(TrainingArguments):
    """Training on ranked candidates; the defaults are DiffAgent Eq. 7-10. Beside transformers' `TrainingArguments`."""

    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate, RRHF's."})
    logging_steps: float = field(default=10, metadata={"help": "Optimizer steps between two logs."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay false: candidates are columns that no model has arguments for."}
    )
    max_length: int | None = field(
        default=1024, metadata={"help": "Tokens of a prompt with a response; longer candidates are left out."}
    )
    packing: bool = field(
        default=True,
        metadata={"help": "Compute what candidates share once (tree attention), where that is exact for the model."},
    )
    loss_type: str = field(
        default="rrhf",
        metadata={"help": "rrhf, or on the same ranked lists for comparison: bradley_terry, simpo, dpo."},
    )
    rank_weight: float = field(default=1.0, metadata={"help": "Weight of the part that orders candidates (Eq. 8)."})
    ce_weight: float | None = field(
        default=None,
        metadata={"help": "Weight of the best candidate's cross-entropy (Eq. 9); none: 1 for rrhf, 0 for the others."},
    )
    ce_per_token: bool = field(default=False, metadata={"help": "Divide that cross-entropy by the response's length."})
    length_exponent: float = field(
        default=1.0, metadata={"help": "p is divided by the response's length to this power (Eq. 7: 1). Not for dpo."}
    )
    margin: float | None = field(
        default=None,
        metadata={"help": "rrhf: nats per token by which the better candidate must lead; others: the target margin."},
    )
    beta: float | None = field(default=None, metadata={"help": "Scale of the loss types other than rrhf."})
    pair_reduction: str | None = field(
        default=None, metadata={"help": "sum or mean over a prompt's pairs; none: sum for rrhf, mean for the others."}
    )
    tie_standard_errors: float = field(
        default=0.0,
        metadata={"help": "Rewards closer than so many standard errors of their difference over the renders tie."},
    )
    kl_weight: float = field(
        default=0.0, metadata={"help": "Weight of an estimate of KL(policy || initial policy) on candidates' tokens."}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Train without dropout, as preference losses do."})

    def __post_init__(self) -> None:
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"`loss_type` must be one of {', '.join(LOSS_TYPES)}, but is {self.loss_type!r}.")
        if self.remove_unused_columns:
            raise ValueError("`remove_unused_columns` must be false: it would remove the candidates.")
        if self.loss_type == "rrhf" and self.beta is not None:
            raise ValueError(
                f"`beta` ({self.beta}) has no meaning for rrhf; leave it out or choose another `loss_type`."
            )
        if self.beta is not None and not self.beta > 0:
            raise ValueError(f"`beta` must be more than 0, but is {self.beta}.")
        if self.pair_reduction not in (None, "sum", "mean"):
            raise ValueError(f"`pair_reduction` must be sum or mean, but is {self.pair_reduction!r}.")
        for name in ("rank_weight", "ce_weight", "margin", "tie_standard_errors", "kl_weight", "length_exponent"):
            if (value := getattr(self, name)) is not None and not value >= 0:
                raise ValueError(f"`{name}` must be 0 or more, but is {value}.")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"`max_length` must be at least 2 (a prompt and a response), but is {self.max_length}.")
        plain = self.loss_type == "rrhf"
        beta, margin = _PAIRWISE.get(self.loss_type, (None, 0.0))
        self.beta = beta if self.beta is None else self.beta
        self.margin = margin if self.margin is None else self.margin
        self.ce_weight = float(plain) if self.ce_weight is None else self.ce_weight
        self.pair_reduction = ("sum" if plain else "mean") if self.pair_reduction is None else self.pair_reduction
        if self.rank_weight == self.ce_weight == 0:
            raise ValueError("`rank_weight` and `ce_weight` are both 0: there would be nothing to learn.")
        super().__post_init__()

    @property
    def needs_reference(self) -> bool:
        """Whether log-probabilities under the initial policy are needed."""
        return self.loss_type == "dpo" or self.kl_weight > 0

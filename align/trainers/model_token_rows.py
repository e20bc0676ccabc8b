"""ModelTokens: the fitted rows W_M with the models' names, and what is done with them after training."""

import difflib
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from align.trainers.model_token_backbone import Backbone
from align.trainers.model_token_cache import HiddenBatch
from align.trainers.model_token_config import ModelTokenError
from align.trainers.model_token_export import export_model
from align.trainers.model_token_fit import check_names, lbfgs_run
from align.trainers.model_token_loss import PLAIN, LogitTransform
from rewards.files import write_atomically

logger = logging.getLogger(__name__)

_FORMAT = 1
_NAMES_FILE, _ROWS_FILE = "model_tokens.json", "model_tokens.safetensors"


class ModelChoice(NamedTuple):
    """A model, and how probable it is."""

    name: str
    probability: float


@dataclass(frozen=True, eq=False)
class ModelTokens:
    """Output rows of models for one backbone. Operations that change the list return another object.

    Attributes:
        names: Of the models, each once.
        rows: W_M of ChatGen Eq. 4, float32 (float64 if trained so). Shape (M, d).
        transform: What the backbone does with its output layer's values.
        backbone: Digest of the backbone that the hidden states were of (`Backbone.digest`); empty: not known.
    """

    names: tuple[str, ...]
    rows: Tensor
    transform: LogitTransform = PLAIN
    backbone: str = ""

    def __post_init__(self) -> None:
        check_names(self.names)
        if self.rows.dim() != 2 or len(self.rows) != len(self.names):
            raise ModelTokenError(
                f"Need a row for each of {len(self.names)} names, got shape {tuple(self.rows.shape)}."
            )
        if not self.rows.isfinite().all():
            number = int((~self.rows.isfinite().all(1)).nonzero()[0])
            raise ModelTokenError(f"The row of model {self.names[number]!r} is not finite; lower `learning_rate`.")

    def __len__(self) -> int:
        """Models."""
        return len(self.names)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of the models after each prefix. Shape (n, M).

        Args:
            hidden: What the output layer is given (`Backbone`). Shape (n, d).

        Raises:
            ModelTokenError: Another width than the rows'.
        """
        if hidden.dim() != 2 or hidden.shape[1] != self.rows.shape[1]:
            raise ModelTokenError(
                f"`hidden` must be (examples, {self.rows.shape[1]}), but is {tuple(hidden.shape)}; is it of another "
                "backbone?"
            )
        return self.transform(hidden.to(self.rows.dtype) @ self.rows.to(hidden.device).T)

    def probabilities(self, hidden: Tensor, word_logits: Tensor) -> Tensor:
        """ChatGen Eq. 4: the distribution over [words; models] after each prefix. Shape (n, |V| + M).

        Args:
            hidden: Shape (n, d).
            word_logits: The model's own logits at the same places. Shape (n, |V|).
        """
        models = self.logits(hidden)
        return torch.cat([word_logits.to(models.dtype), models], dim=1).softmax(1)

    def choose(self, hidden: Tensor, k: int = 1, *, word_lse: Tensor | None = None) -> list[list[ModelChoice]]:
        """The k most probable models after each prefix, best first; of equal ones those that come first.

        Args:
            hidden: Shape (n, d).
            k: At most as many as there are models.
            word_lse: Log-sum-exp of the word logits, for the probabilities of Eq. 4. None: probabilities among the
                models, given that one of them comes next. Shape (n,).
        """
        if not 1 <= k <= len(self):
            raise ModelTokenError(f"`k` must be from 1 to the number of models, {len(self)}, but is {k}.")
        logits = self.logits(hidden)
        normaliser = logits.logsumexp(1)
        if word_lse is not None:
            normaliser = torch.logaddexp(normaliser, word_lse.to(normaliser))
        # Not topk, which leaves open which of equal values it takes.
        values, numbers = (t[:, :k] for t in logits.sort(dim=1, descending=True, stable=True))
        probabilities = (values - normaliser[:, None]).exp()
        return [
            [ModelChoice(self.names[number], p) for number, p in zip(row, of_row, strict=True)]
            for row, of_row in zip(numbers.tolist(), probabilities.tolist(), strict=True)
        ]

    def add_models(
        self,
        names: Sequence[str],
        hidden: Tensor,
        labels: Tensor,
        word_lse: Tensor,
        *,
        initial: Tensor | None = None,
        l2: float = 1e-4,
        iterations: int = 100,
    ) -> "ModelTokens":
        """Fit rows of new models by L-BFGS; the old rows stay as they are, bit by bit, and so do the words.

        The loss is Eq. 3 over words, old and new models, of which only the new rows are free, plus
        `l2 / 2 * |rows - initial|^2`, which is what keeps a row sensible that is fitted on a handful of examples.

        Args:
            names: Of the new models.
            hidden: Of their examples. Shape (n, d).
            labels: Index into `names`, or -1 for an example of an old model (or of a word). Without any of these the
                new rows answer for everything, which is warned of: of 10 models added to 60 on SmolLM2-135M by five
                examples each, old ones are then found in 4% of their examples, where it was 79%. With one example of
                every old model it is 77%, and 78% with three; new ones are found in over 90%. Shape (n,).
            word_lse: Log-sum-exp of the word logits (nats). Shape (n,).
            initial: Rows to begin with and to stay near, such as `mean_rows` of the names; None: the mean of the old
                rows. Shape (models, d).
            l2: Strength of that pull.
            iterations: Of L-BFGS, at most.

        Raises:
            ModelTokenError: Names that are there already, a new model without examples, labels out of range, or values
                that are not finite.
        """
        check_names([*self.names, *names])
        _check_new(names, hidden, labels, word_lse)
        if not bool((labels == -1).any()):
            logger.warning(
                "add_models has no examples of old models (label -1), so the new rows will answer for everything; give "
                "at least one of each old model."
            )
        old = self.logits(hidden).logsumexp(1)
        frozen = torch.logaddexp(word_lse.to(old), old)
        anchor = self.rows.mean(0, keepdim=True).expand(len(names), -1) if initial is None else initial
        anchor = anchor.to(old).contiguous()
        if anchor.shape != (len(names), self.rows.shape[1]) or not anchor.isfinite().all():
            raise ModelTokenError(
                f"`initial` must be finite and ({len(names)}, {self.rows.shape[1]}), but is {tuple(anchor.shape)}."
            )
        batch = HiddenBatch(hidden.to(old), labels.to(old.device), frozen, frozen)
        rows = anchor.clone()
        everything = torch.arange(len(labels))
        source = lambda index: batch.select(index.to(old.device))  # noqa: E731
        lbfgs_run(rows, source, everything, transform=self.transform, l2=l2, anchor=anchor, iterations=iterations)
        together = torch.cat([self.rows, rows.detach().to(self.rows)])
        return ModelTokens((*self.names, *names), together, self.transform, self.backbone)

    def remove_models(self, names: Sequence[str]) -> "ModelTokens":
        """Without some models; the other rows stay as they are.

        Raises:
            ModelTokenError: A name that is not there (with the nearest one), or none would be left.
        """
        for name in names:
            if name not in self.names:
                near = difflib.get_close_matches(name, self.names, n=1)
                raise ModelTokenError(f"There is no model {name!r}." + (f" Did you mean {near[0]!r}?" if near else ""))
        gone = set(names)
        kept = [number for number, name in enumerate(self.names) if name not in gone]
        if not kept:
            raise ModelTokenError("At least one model must be left.")
        return ModelTokens(tuple(self.names[i] for i in kept), self.rows[kept], self.transform, self.backbone)

    def save(self, folder: str | Path, **extra: Any) -> None:
        """Write model_tokens.safetensors and model_tokens.json, the latter last, each atomically.

        Args:
            folder: Made if it isn't there.
            extra: Further keys of the JSON object.
        """
        folder = Path(folder)
        rows = {"rows": self.rows.detach().cpu().contiguous()}
        data = safetensors.torch.save(rows, metadata={"names": _digest(self.names)})
        content = {
            "format": _FORMAT,
            "names": list(self.names),
            "scale": self.transform.scale,
            "cap": self.transform.cap,
            "backbone": self.backbone,
        }
        write_atomically(folder / _ROWS_FILE, data)
        write_atomically(folder / _NAMES_FILE, json.dumps(content | extra, ensure_ascii=False, indent=1).encode())

    @classmethod
    def load(cls, folder: str | Path) -> "ModelTokens":
        """What `save` or `export` has written.

        Raises:
            ModelTokenError: A file is missing or damaged, or the two are not of the same run.
        """
        names_file, rows_file = Path(folder) / _NAMES_FILE, Path(folder) / _ROWS_FILE
        try:
            content = json.loads(names_file.read_text(encoding="utf-8"))
            names, transform = tuple(content["names"]), LogitTransform(content["scale"], content["cap"])
            backbone, version = content["backbone"], content["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelTokenError(f"{names_file} can't be used ({error!r}); give a folder of model tokens.") from error
        if version != _FORMAT:
            raise ModelTokenError(f"{names_file} has format {version}, but this version reads {_FORMAT}.")
        try:
            with safetensors.safe_open(rows_file, framework="pt") as file:
                rows, digest = file.get_tensor("rows"), (file.metadata() or {}).get("names")
        except (OSError, safetensors.SafetensorError) as error:
            raise ModelTokenError(f"{rows_file} can't be used ({error}); save the model tokens again.") from error
        if digest != _digest(names):
            raise ModelTokenError(f"{rows_file} and {names_file} are not of the same run; save the tokens again.")
        return cls(names, rows, transform, backbone)

    def export(self, model: Any, tokenizer: Any, folder: str | Path, *, untie: bool = False) -> dict[str, str]:
        """Save an ordinary model with these rows in its output layer, and a tokenizer with a token for each model.

        `AutoModelForCausalLM.from_pretrained(folder)` then predicts Eq. 4; a token's id is |V| + the number of its
        model. Neither `model` nor `tokenizer` is changed. See `export_model`.

        Args:
            model: The backbone.
            tokenizer: Its tokenizer, or the processor of a model that sees pictures.
            folder: Where to; model_tokens.json is written last.
            untie: Give a model whose output layer is its input embedding one of each. Otherwise a row is both, and the
                input embedding of a model token is its row of W_M.

        Returns:
            Token of each model.

        Raises:
            ModelTokenError: The rows are of another backbone's width or transform, or the tokenizer doesn't fit.
        """
        if self.backbone and (found := Backbone(model).digest()) != self.backbone:
            logger.warning(
                "the model tokens are of a backbone with digest %s, but are exported with %s: other weights, or "
                "another type of the same",
                self.backbone,
                found,
            )
        (Path(folder) / _NAMES_FILE).unlink(missing_ok=True)
        tokens, first_id = export_model(self.names, self.rows, self.transform, model, tokenizer, folder, untie=untie)
        self.save(folder, tokens=tokens, first_id=first_id)
        return dict(zip(self.names, tokens, strict=True))


def exported_models(folder: str | Path) -> dict[int, str]:
    """Which model each token id of an exported model means.

    Raises:
        ModelTokenError: The folder has no model_tokens.json that `ModelTokens.export` has written.
    """
    path = Path(folder) / _NAMES_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return dict(enumerate(content["names"], start=content["first_id"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelTokenError(f"{path} is of no exported model ({error!r}); call `ModelTokens.export`.") from error


def _check_new(names: Sequence[str], hidden: Tensor, labels: Tensor, word_lse: Tensor) -> None:
    if not names:
        raise ModelTokenError("`names` is empty; give the models to add.")
    if labels.shape != hidden.shape[:1] or word_lse.shape != labels.shape:
        raise ModelTokenError(
            f"`hidden`, `labels` and `word_lse` must be of as many examples, but are {tuple(hidden.shape)}, "
            f"{tuple(labels.shape)} and {tuple(word_lse.shape)}."
        )
    if not hidden.isfinite().all() or not word_lse.isfinite().all():
        raise ModelTokenError("`hidden` and `word_lse` must be finite.")
    if len(labels) and not -1 <= int(labels.min()) <= int(labels.max()) < len(names):
        raise ModelTokenError(
            f"`labels` must be from -1 to {len(names) - 1}, but are from {int(labels.min())} to {int(labels.max())}."
        )
    for number, name in enumerate(names):
        if not bool((labels == number).any()):
            raise ModelTokenError(f"Model {name!r} has no example; give at least one.")


def _digest(names: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()[:16]

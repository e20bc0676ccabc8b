"""The agent people call: a prompt in, a T2I API call out that always can be made.

    agent = DiffAgent.from_pretrained("runs/rrhf", catalog="data/dabench/catalog.jsonl")
    agent.call(["a cute corgi, pixel art"])[0].to_json()
    agent.answer(["a cute corgi, pixel art"], top_k=5)[0].alternatives

Answers are decoded under a grammar of the catalogue's calls (`rollouts.call_grammar`), so the name exists, type, base
model and description follow from it, and parameters are within the architecture's bounds. What a request's filter
forbids can't be written either.
"""

import math
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from align.agents.calibration import Calibration
from align.agents.filters import CallFilter
from align.agents.inventory import Inventory
from align.agents.scoring import NameScorer, likeliest_names
from rollouts.api import ARCHITECTURES, APICall
from rollouts.catalog import Catalog, CatalogError
from rollouts.constrained_generation import generate_calls
from rollouts.costs import CostModel
from rollouts.dialogue import Dialogue, DialogueFormat
from rollouts.policy import load_policy, load_tokenizer
from rollouts.token_bytes import TokenBytes

RETRIEVED = 16
"""Models that retrieval adds to those the policy thinks of."""

Instruction = Mapping[str, str] | str


@dataclass(frozen=True)
class Alternative:
    """A model that could have been called.

    Attributes:
        model: Its name.
        logp: Log-probability of naming it, of the policy, in nats.
        similarity: Of the prompt and what is known of the model, 0 to 1; `None` without retrieval.
        score: What it was ranked by.
    """

    model: str
    logp: float
    similarity: float | None
    score: float


@dataclass
class Answer:
    """What an agent says to a prompt.

    Attributes:
        call: The call to make.
        confidence: Probability with which the policy chose this model among those that were allowed.
        abstained: Whether the policy was less sure than its threshold, and `call` is the default call instead.
        preferred: The policy's own call, if it abstained.
        alternatives: The likeliest models, best first, if they were asked for.
        seconds: Wall time of its batch divided by the batch's size.
        num_passes: Forward passes over this prompt and its call.
        num_prompt_tokens: Tokens of the prompt.
        num_tokens: Tokens of the policy's call.
        note: For people, if there is something to know.
        catalog: What the call can be made with; another one may be in use by now.
    """

    call: APICall
    confidence: float
    abstained: bool = False
    preferred: APICall | None = None
    alternatives: list[Alternative] = field(default_factory=list)
    seconds: float = 0.0
    num_passes: int = 0
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    note: str = ""
    catalog: Catalog | None = field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "call": self.call.to_dict(),
            "confidence": self.confidence,
            "abstained": self.abstained,
            "preferred": None if self.preferred is None else self.preferred.to_dict(),
            "alternatives": [vars(alternative) for alternative in self.alternatives],
            "seconds": self.seconds,
            "num_passes": self.num_passes,
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_tokens": self.num_tokens,
            "note": self.note,
        }


class DiffAgent:
    """A policy, a catalogue, and how to decode one under the other. Can be called from several threads, one at a time.

    Args:
        policy: A causal language model, on its device.
        dialogue: Its format and tokenizer.
        catalog: What can be called.
        architecture: Of the models, unless a request's filter says another.
        calibration: When to abstain, and how much retrieval counts; `None`: never, and not at all.
        examples: Prompts and the names of models they were used with, for retrieval.
        costs: What drawing costs, for `max_seconds`.
        default_model: Model of the default call; `None`: the most downloaded checkpoint.
        max_prompt_tokens: Longer prompts are cut.

    Raises:
        CatalogError: The catalogue has no model of this architecture.
        TokenizerError: See `rollouts.token_bytes`.
    """

    def __init__(
        self,
        policy: Any,
        dialogue: Dialogue,
        catalog: Catalog,
        *,
        architecture: str = "SD 1.5",
        calibration: Calibration | None = None,
        examples: Sequence[tuple[str, str]] = (),
        costs: CostModel | None = None,
        default_model: str | None = None,
        max_prompt_tokens: int | None = 512,
    ) -> None:
        if architecture not in ARCHITECTURES:
            raise CatalogError(f"`architecture` must be one of {list(ARCHITECTURES)}, but is {architecture!r}.")
        self.policy = policy.eval()
        self.dialogue = dialogue
        self.architecture = architecture
        self.calibration = calibration or Calibration()
        self.costs = costs
        self.max_prompt_tokens = max_prompt_tokens
        self._default_model = default_model
        self._examples = list(examples)
        self._tokens = TokenBytes(dialogue.tokenizer)
        self._scorer = NameScorer(self.policy)
        self._lock = threading.Lock()
        self.reload(catalog)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        catalog: str | Path | Catalog,
        *,
        device: str | None = None,
        dtype: str = "auto",
        **options: Any,
    ) -> "DiffAgent":
        """An agent from the folder of a policy, with its `calibration.json` if it has one.

        Args:
            folder: Of `align/sft.py` or `align/rrhf.py`, or any causal language model.
            catalog: A catalogue or its file.
            device: cuda, cpu, ...; `None`: cuda if there is one.
            dtype: float32, bfloat16, float16, or auto: as saved.
            options: Of the constructor.

        Raises:
            OSError, ValueError: See `rollouts.policy.load_policy` and `Catalog.load`.
        """
        loaded = catalog if isinstance(catalog, Catalog) else Catalog.load(catalog)
        tokenizer = load_tokenizer(str(folder))
        policy: Any = load_policy(str(folder), dtype=dtype)
        policy = policy.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        options.setdefault("calibration", Calibration.load(folder))
        return cls(policy, Dialogue(tokenizer, DialogueFormat.load(folder)), loaded, **options)

    def reload(self, catalog: Catalog, examples: Iterable[tuple[str, str]] | None = None) -> None:
        """Take another catalogue: models may have come or gone. Requests that are being answered keep the old one.

        Args:
            catalog: What can be called from now on.
            examples: Prompts of models, if they are others as well.

        Raises:
            CatalogError: No checkpoint of the agent's architecture; the old catalogue stays.
        """
        default = catalog.default_call(self.architecture, self._default_model)
        if examples is not None:
            self._examples = list(examples)
        self._inventory = Inventory(catalog, default, self.dialogue, self._tokens, self.costs, self._examples)

    @property
    def catalog(self) -> Catalog:
        """What can be called."""
        return self._inventory.catalog

    def call(self, prompts: Sequence[Instruction], filter: CallFilter | None = None) -> list[APICall]:
        """One call for each prompt. See `answer`."""
        return [answer.call for answer in self.answer(prompts, filter)]

    def answer(
        self, prompts: Sequence[Instruction], filter: CallFilter | None = None, *, top_k: int = 0
    ) -> list[Answer]:
        """Answer prompts, all in one batch.

        Args:
            prompts: Texts, or DABench's instruction objects.
            filter: What may be called; `None`: every model of the agent's architecture.
            top_k: How many alternatives to give.

        Raises:
            FilterError: The filter can't be used, or leaves nothing to call.
            DialogueError: A prompt that can't be written.
        """
        if not prompts:
            return []
        with self._lock:
            started, inventory = time.perf_counter(), self._inventory
            chosen = filter or CallFilter()
            if chosen.base_model is None:
                chosen = replace(chosen, base_model=self.architecture)
            ids = [self.dialogue.encode_prompt(prompt, self.max_prompt_tokens) for prompt in prompts]
            answers = self._answer([self.dialogue.user_text(p) for p in prompts], ids, chosen, inventory, top_k)
            for answer in answers:
                self._abstain(answer, chosen, inventory)
                answer.seconds = (time.perf_counter() - started) / len(prompts)
        return answers

    def find_models(self, words: str, limit: int) -> list[dict[str, Any]]:
        """The models that retrieval finds for some words, best first: name, type, base model, description, similarity.

        Raises:
            ImportError: Without scikit-learn, naming the extra to install.
        """
        inventory = self._inventory
        similarities = inventory.retriever.similarities([words])[0]
        found = []
        for column in np.argsort(-similarities, kind="stable")[:limit].tolist():
            entry = inventory.catalog[inventory.retriever.names[column]]
            facts = {"model": entry.name, "type": entry.type, "base Model": entry.base_model}
            found.append(facts | {"description": entry.description, "similarity": float(similarities[column])})
        return found

    def _answer(
        self, texts: list[str], ids: list[list[int]], filter: CallFilter, inventory: Inventory, top_k: int
    ) -> list[Answer]:
        answers = self._written(ids, filter, inventory)
        weight = self.calibration.retrieval_weight
        if not weight and not top_k:
            return answers
        ranked = self._candidates(
            texts, ids, filter, inventory, [answer.call.model for answer in answers], weight, top_k
        )
        changed = []
        for number, (answer, alternatives) in enumerate(zip(answers, ranked, strict=True)):
            answer.alternatives = alternatives[:top_k]
            answer.num_passes += 1
            if weight:
                answer.confidence = confidence(alternatives, self.calibration.temperature)
                if alternatives[0].model != answer.call.model:
                    changed.append((number, alternatives[0].model))
        # The others keep the parameters that the policy has chosen for its model.
        constraints = [inventory.constraint(replace(filter, allow=frozenset({model}))) for _, model in changed]
        again = generate_calls(self.policy, [ids[number] for number, _ in changed], constraints)
        for (number, _), item in zip(changed, again, strict=True):
            answers[number].call = item.call
            answers[number].num_passes += item.num_passes
        return answers

    def candidates(
        self, prompts: Sequence[Instruction], *, retrieval_weight: float
    ) -> list[tuple[Answer, list[Alternative]]]:
        """For each prompt the policy's own answer, and the models that come into question together with retrieval, best
        first. What calibration looks at.

        Args:
            prompts: Texts, or DABench's instruction objects.
            retrieval_weight: See `Calibration`; above 0.
        """
        with self._lock:
            inventory, filter = self._inventory, CallFilter(base_model=self.architecture)
            ids = [self.dialogue.encode_prompt(prompt, self.max_prompt_tokens) for prompt in prompts]
            own = self._written(ids, filter, inventory)
            texts = [self.dialogue.user_text(prompt) for prompt in prompts]
            names = [answer.call.model for answer in own]
            found = self._candidates(texts, ids, filter, inventory, names, retrieval_weight, 0)
        return list(zip(own, found, strict=True))

    def _written(self, ids: list[list[int]], filter: CallFilter, inventory: Inventory) -> list[Answer]:
        """The policy's own answers."""
        return [
            Answer(
                item.call, math.exp(item.model_logp), num_passes=item.num_passes, num_prompt_tokens=len(prompt),
                num_tokens=len(item.token_ids), catalog=inventory.catalog,
            )
            for prompt, item in zip(ids, generate_calls(self.policy, ids, inventory.constraint(filter)), strict=True)
        ]  # fmt: skip

    def _candidates(
        self,
        texts: list[str],
        ids: list[list[int]],
        filter: CallFilter,
        inventory: Inventory,
        own: list[str],
        weight: float,
        beams: int,
    ) -> list[list[Alternative]]:
        """Of each prompt: the policy's choice, as many of its likeliest, what retrieval finds; ranked."""
        allowed = inventory.entries(filter)
        names: list[dict[str, None]] = [{name: None} for name in own]  # dicts keep the order
        if beams > 1:
            likeliest = likeliest_names(self.policy, ids, inventory.constraint(filter), beams)
            for found, more in zip(names, likeliest, strict=True):
                found.update(dict.fromkeys(more))
        similarities = None
        if weight:
            similarities = inventory.retriever.similarities(texts)
            columns = np.array([inventory.column(entry.name) for entry in allowed])
            for found, row in zip(names, similarities[:, columns], strict=True):
                found.update((allowed[i].name, None) for i in np.argsort(-row, kind="stable")[:RETRIEVED])
        scored = self._scorer(ids, [[inventory.name_tokens(name) for name in found] for found in names])
        ranked = []
        for number, (found, logps) in enumerate(zip(names, scored, strict=True)):
            alternatives = []
            for name, logp in zip(found, logps.tolist(), strict=True):
                similarity = None if similarities is None else float(similarities[number, inventory.column(name)])
                alternatives.append(Alternative(name, logp, similarity, logp + weight * (similarity or 0.0)))
            ranked.append(sorted(alternatives, key=lambda alternative: -alternative.score))
        return ranked

    def _abstain(self, answer: Answer, filter: CallFilter, inventory: Inventory) -> None:
        if answer.confidence >= self.calibration.threshold:
            return
        if not inventory.allows(inventory.default, filter):
            answer.note = "Unsure of the model, but the default call is not allowed here."
            return
        answer.preferred, answer.call, answer.abstained = answer.call, inventory.default, True
        answer.note = (
            f"Unsure of the model ({answer.confidence:.0%} for {answer.preferred.model!r}, less than the "
            f"{self.calibration.threshold:.0%} from which it is called): this is the default call."
        )


def confidence(alternatives: Sequence[Alternative], temperature: float) -> float:
    """Probability of the first of some ranked models; their scores over a temperature are log-probabilities."""
    scores = torch.tensor([alternative.score for alternative in alternatives], dtype=torch.float64)
    return (scores / temperature).softmax(0)[0].item()

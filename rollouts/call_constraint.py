"""Which tokens keep a response a call: a grammar of calls in the tokens of a policy.

    constraint = CallConstraint.of_models(dialogue, catalog.of_architecture("SD 1.5"))
    policy.generate(**inputs, logits_processor=[CallProcessor(constraint, prompt_length, eos_token_id)])

Every way of writing a call in tokens is allowed, not only the tokenizer's own, so that an answer that is valid anyway
comes out as it would have without. Nothing here has a state that generation could lose: beams may be reordered freely.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from rollouts.call_grammar import CallGrammar, CallLimits, State
from rollouts.catalog import CatalogEntry
from rollouts.dialogue import Dialogue
from rollouts.token_bytes import TokenBytes, TokenizerError

_KEPT_STATES = 4096


class CallConstraint:
    """A grammar of calls in tokens.

    Args:
        grammar: What may be written.
        tokens: In which tokens.
    """

    def __init__(self, grammar: CallGrammar, tokens: TokenBytes) -> None:
        self.grammar = grammar
        self.tokens = tokens
        self._allowed: dict[State, np.ndarray] = {}

    @classmethod
    def of_models(
        cls,
        dialogue: Dialogue,
        entries: Iterable[CatalogEntry],
        *,
        limits: CallLimits | None = None,
        tokens: TokenBytes | None = None,
    ) -> "CallConstraint":
        """The constraint of a policy's dialogue.

        Args:
            dialogue: Of the policy.
            entries: Models that may be called.
            limits: Of the parameters.
            tokens: Of the dialogue's tokenizer, if they are known already.

        Raises:
            GrammarError: See `CallGrammar`.
            TokenizerError: See `TokenBytes`.
            DialogueError: The tokenizer's template does not suit.
        """
        tokens = tokens or TokenBytes(dialogue.tokenizer)
        written = tokens.join(dialogue.response_ids(["{"])[0]).decode()
        return cls(CallGrammar(entries, limits, lead=written.removesuffix("{")), tokens)

    def allowed(self, state: State) -> np.ndarray:
        """Ids of the tokens that may come next, sorted; none at the end of a call.

        Raises:
            TokenizerError: The tokenizer has no token with which the text could go on.
        """
        found = self._allowed.get(state)
        if found is None:
            if len(self._allowed) >= _KEPT_STATES:
                self._allowed.clear()
            ids: list[int] = []
            self._collect(state, 0, len(self.tokens.texts), b"", ids)
            found = self._allowed[state] = np.array(sorted(ids), dtype=np.int64)
            if not len(found) and not self.grammar.is_finished(state):
                raise TokenizerError(f"No token of the vocabulary goes on with {self.grammar.forced(state)[0][:40]!r}.")
        return found

    def advance(self, state: State, token: int) -> State | None:
        """The state after a token, or `None` if it may not come next."""
        data = self.tokens.of_id[token] if token < len(self.tokens.of_id) else None
        return self.grammar.advance(state, data) if data else None

    def forced(self, state: State, written: bytes) -> tuple[list[int], State]:
        """Tokens that can be appended without asking the policy, and the state after them.

        They are the tokenizer's own for the text that has to follow, as far as what comes after it can't change them.
        None if the text so far ends within a token of the tokenizer's own.

        Args:
            state: Where the text has come to.
            written: That text.
        """
        text, after = self.grammar.forced(state)
        if not text:
            return [], state
        kept = len(text) if self.grammar.is_finished(after) else self._first_open_end(text, after)
        if not kept:
            return [], state
        ids = self._own_tokens(written, written + text, len(written) + kept)
        return (ids, self._after(state, ids)) if ids else (ids, state)

    def _after(self, state: State, ids: Sequence[int]) -> State:
        after = self.grammar.advance(state, self.tokens.join(ids))
        assert after is not None, "forced text leaves the grammar"
        return after

    def _own_tokens(self, written: bytes, text: bytes, end: int) -> list[int]:
        """The tokenizer's tokens of `text` from the end of `written` on, that end at `end` or before."""
        text = _whole_characters(text)
        ids = self.tokens.encode(text.decode())
        joined = self.tokens.join(ids)
        surplus = len(joined) - len(text)  # a space that pieces put first
        if surplus < 0 or joined[surplus:] != text:
            return []
        position, found = -surplus, []
        for id in ids:
            if position == len(written) or found:
                if position + len(self.tokens.of_id[id] or b"") > end:
                    break
                found.append(id)
            elif position > len(written):
                break
            position += len(self.tokens.of_id[id] or b"")
        return found

    def _first_open_end(self, text: bytes, after: State) -> int:
        """The first place of a text from which a token could reach beyond its end."""
        for start in range(max(0, len(text) - self.tokens.longest), len(text)):
            reaching: list[int] = []
            for byte, branch in self.grammar.branches(after):
                longer = text[start:] + bytes([byte])
                self._collect(branch, *self.tokens.range_of(longer), longer, reaching)
                if reaching:
                    return start
        return len(text)

    def _collect(self, state: State, low: int, high: int, read: bytes, found: list[int]) -> None:
        """Ids of the tokens in a range, all of which begin with `read`, by which the state is reached."""
        if low == high:
            return
        text, after = self.grammar.forced(state)
        for i in range(len(text) + 1):
            while low < high and self.tokens.texts[low] == read:
                found.append(self.tokens.ids[low])
                low += 1
            if low == high:
                return
            if i < len(text):
                read += text[i : i + 1]
                low, high = self.tokens.range_of(read, low, high)
        for byte, branch in self.grammar.branches(after):
            longer = read + bytes([byte])
            self._collect(branch, *self.tokens.range_of(longer, low, high), longer, found)


def _whole_characters(text: bytes) -> bytes:
    """UTF-8 without the beginning of a character at its end."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return text[: error.start]
    return text


class CallProcessor:
    """A logits processor for `generate` and `diverse_beam_search`: greedy, sampling, beams, any batch.

    Args:
        constraint: What may be written.
        prompt_length: Columns of the (padded) prompts.
        eos_token_id: The only token after a call.
        model_only: End an answer as soon as it has decided on a model.
    """

    def __init__(
        self, constraint: CallConstraint, prompt_length: int, eos_token_id: int, *, model_only: bool = False
    ) -> None:
        self._model_only = model_only
        self._constraint = constraint
        self._prompt_length = prompt_length
        self._eos = eos_token_id
        self._known: dict[tuple[int, ...], State | None] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores with -inf for what may not come next. Shapes (rows, tokens), (rows, vocabulary)."""
        constrained = torch.full_like(scores, -torch.inf)
        known = {}
        for row, ids in enumerate(input_ids[:, self._prompt_length :].tolist()):
            written = tuple(ids)
            if written not in known:
                known[written] = self._state(written)
            state = known[written]
            allowed = self._eos_only if state is None else self._allowed(state)
            columns = torch.as_tensor(allowed, device=scores.device)
            constrained[row, columns] = scores[row, columns]
        self._known = known
        return constrained

    @property
    def _eos_only(self) -> list[int]:
        return [self._eos]

    def _allowed(self, state: State) -> Sequence[int] | np.ndarray:
        grammar = self._constraint.grammar
        if grammar.is_finished(state) or (self._model_only and grammar.chosen_model(state) is not None):
            return self._eos_only
        return self._constraint.allowed(state)

    def _state(self, written: tuple[int, ...]) -> State | None:
        """Of a row; `None` after its end, and for rows that a search has given up."""
        if not written:
            return self._constraint.grammar.start
        before = self._known.get(written[:-1], ...)
        if before is ...:  # not a continuation of the last call
            state = self._constraint.grammar.start
            for token in written:
                advanced = self._constraint.advance(state, token)
                if advanced is None:
                    return None
                state = advanced
            return state
        return None if before is None else self._constraint.advance(before, written[-1])

"""What the methods of DiffAgent Table 2 call for a prompt: the agents, the baseline, and combinations of both."""

from collections.abc import Mapping
from typing import NamedTuple

from rollouts.api import DEFAULT_CFG, DEFAULT_SAMPLER, DEFAULT_STEPS, APICall
from rollouts.catalog import Catalog

BASELINE, OUR_PARAMETERS, OUR_MODEL = "Baseline", "Baseline*", "DiffAgent#"
"""Methods of DiffAgent Table 2 beside the agents."""


class Choice(NamedTuple):
    """What a method calls for a prompt.

    Attributes:
        call: In the common shape; None if the answer can't be called.
        answer: What an agent wrote.
        reason: Why it can't be called.
        not_drawn: Why the call is not to be drawn although it can be.
        sampled: Share of the agent's sampled answers that can't be called, if there are any.
    """

    call: APICall | None
    answer: str | None = None
    reason: str | None = None
    not_drawn: str | None = None
    sampled: float | None = None


def judged_choice(text: str, catalog: Catalog, default: APICall) -> Choice:
    """What an agent's answer comes to.

    Args:
        text: The answer.
        catalog: What can be called.
        default: The architecture's default call, which has the common shape.
    """
    call, reason = catalog.judge(text)
    if call is None or reason is not None:
        return Choice(None, text, reason)
    other = None if call.base_model == default.base_model else "other_architecture"
    return Choice(in_shape(catalog, call, default), text, not_drawn=other)


def hallucinated_shares(samples: list[list[str]], catalog: Catalog) -> list[float]:
    """Of each prompt, the share of its sampled answers that can't be called; empty without samples."""
    wrong = [[catalog.judge(text).reason is not None for text in of_sample] for of_sample in samples]
    return [sum(of_prompt) / len(of_prompt) for of_prompt in zip(*wrong, strict=True)]


def with_baseline(
    chosen: Mapping[str, list[Choice]], ours: str, catalog: Catalog, default: APICall
) -> dict[str, list[Choice]]:
    """All methods in the order of the table: with the baseline, and its combinations with our agent's parts."""
    parameters, models = [], []
    defaults = {
        "sampling method": DEFAULT_SAMPLER, "sampling steps": DEFAULT_STEPS, "cfg scale": DEFAULT_CFG
    }  # fmt: skip
    for choice in chosen[ours]:
        if choice.call is None:
            parameters.append(choice)
            models.append(choice)
            continue
        with_ours = catalog.reconstruct(default.model, choice.call.to_dict())
        parameters.append(Choice(in_shape(catalog, with_ours, default)))
        our_model = catalog.reconstruct(choice.call.model, defaults)
        models.append(Choice(in_shape(catalog, our_model, default), not_drawn=choice.not_drawn))
    return {
        BASELINE: [Choice(default)] * len(parameters),
        OUR_PARAMETERS: [choice._replace(answer=None, sampled=None) for choice in parameters],
        OUR_MODEL: [choice._replace(answer=None, sampled=None) for choice in models],
        **chosen,
    }


def in_shape(catalog: Catalog, call: APICall, default: APICall) -> APICall:
    """The call with the canonical model information and the width and height of the default call."""
    return catalog.reconstruct(call.model, call.to_dict() | {"width": default.width, "height": default.height})

"""What diffusers has to do to draw as an A1111 sampler: a scheduler class, its configuration, and how far off it is.

    python -m rollouts.schedulers > docs/samplers.md

Rows were compared with the samplers' source (k-diffusion, which A1111 runs) on a problem with a known answer, fed with
the same random numbers: tests/rollouts/test_schedulers.py.
"""

import difflib
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cache
from types import MappingProxyType
from typing import Any

from rollouts.samplers import KNOWN_SAMPLERS, SAMPLERS, SCHEDULES, normalize_sampler

NUM_TRAIN_TIMESTEPS = 1000


class Deviation(StrEnum):
    """How a picture drawn by diffusers relates to one drawn by A1111 from the same initial noise: see DEVIATIONS."""

    EXACT = "exact"
    DISTRIBUTION = "distribution"
    SUBSTITUTE = "substitute"
    NONE = "none"


DEVIATIONS = {
    Deviation.EXACT: "the same algorithm on the same noise levels, to within one of 1,000 training steps",
    Deviation.DISTRIBUTION: "the same algorithm with other random numbers: another picture, equally likely",
    Deviation.SUBSTITUTE: "another algorithm, or other noise levels",
    Deviation.NONE: "nothing comes near; a call with it can't be rendered",
}


class SamplerError(ValueError):
    """A sampler that is unknown or can't be rendered; the message says why and what is nearest."""


@dataclass(frozen=True)
class SchedulerSpec:
    """One row of the table.

    Attributes:
        sampler: Canonical A1111 name.
        scheduler: Class in diffusers; None: there is none.
        config: What it gets beside the checkpoint's own noise schedule.
        time_steps: Name of explicit time steps (`time_steps`), or None: the class spaces them by `config`.
        deviation: See `Deviation`.
        reason: Why, for people.
        calls_per_step: Evaluations of the model per step, for estimates of time.
        seeded: Whether its noise needs one seed per image (`noise_sampler_seed`) instead of generators.
    """

    sampler: str
    scheduler: str | None
    config: MappingProxyType[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    time_steps: str | None = None
    deviation: Deviation = Deviation.EXACT
    reason: str = ""
    calls_per_step: int = 1
    seeded: bool = False


@dataclass(frozen=True)
class _Family:
    """A sampler before its schedule is chosen."""

    scheduler: str | None
    config: dict[str, Any] = field(default_factory=dict)
    deviation: Deviation = Deviation.EXACT
    reason: str = ""
    calls_per_step: int = 1
    sigmas: bool = True  # the class has use_karras_sigmas and its like
    explicit: bool = False  # the class takes explicit time steps, and spaces them otherwise than A1111
    seeded: bool = False


_OTHER_NOISE = "The same steps; the noise they add comes from other random numbers."
_SKIPPED_LEVEL = "The same solver, but A1111 leaves out the last noise level but one."
_MULTISTEP = {"solver_order": 2, "final_sigmas_type": "zero", "lower_order_final": True, "euler_at_final": False}
_SDE = _MULTISTEP | {"algorithm_type": "sde-dpmsolver++"}
_MISSING = "diffusers has no such sampler."

_FAMILIES = {
    "Euler a": _Family(
        "EulerAncestralDiscreteScheduler", deviation=Deviation.DISTRIBUTION, reason=_OTHER_NOISE, sigmas=False
    ),
    "Euler": _Family("EulerDiscreteScheduler"),
    "LMS": _Family("LMSDiscreteScheduler"),
    "Heun": _Family("HeunDiscreteScheduler", calls_per_step=2),
    "DPM2": _Family(
        "KDPM2DiscreteScheduler", deviation=Deviation.SUBSTITUTE, reason=_SKIPPED_LEVEL, calls_per_step=2
    ),
    "DPM2 a": _Family(
        "KDPM2AncestralDiscreteScheduler", deviation=Deviation.SUBSTITUTE, reason=_SKIPPED_LEVEL, calls_per_step=2
    ),
    "DPM++ 2S a": _Family(
        "KDPM2AncestralDiscreteScheduler", deviation=Deviation.SUBSTITUTE, calls_per_step=2,
        reason="diffusers has no DPM++ 2S a; DPM2 a is as well ancestral, of second order, with two calls a step.",
    ),
    "DPM++ 2M": _Family("DPMSolverMultistepScheduler", _MULTISTEP | {"algorithm_type": "dpmsolver++"}, explicit=True),
    "DPM++ SDE": _Family(
        "DPMSolverSDEScheduler", deviation=Deviation.DISTRIBUTION, reason=_OTHER_NOISE, calls_per_step=2, seeded=True
    ),
    "DPM++ 2M SDE": _Family(
        "DPMSolverMultistepScheduler", _SDE | {"solver_type": "midpoint"}, Deviation.DISTRIBUTION, _OTHER_NOISE,
        explicit=True,
    ),
    "DPM++ 2M SDE Heun": _Family(
        "DPMSolverMultistepScheduler", _SDE | {"solver_type": "heun"}, Deviation.DISTRIBUTION, _OTHER_NOISE,
        explicit=True,
    ),
    "DPM++ 3M SDE": _Family(
        "DPMSolverMultistepScheduler", _SDE | {"solver_order": 3}, Deviation.SUBSTITUTE,
        "Third order too, by another formula; A1111 leaves out the last noise level but one.", explicit=True,
    ),
    "DPM fast": _Family(None, deviation=Deviation.NONE, reason=_MISSING),
    "DPM adaptive": _Family(None, deviation=Deviation.NONE, reason=_MISSING),
    "Restart": _Family(None, deviation=Deviation.NONE, reason=_MISSING),
    "DDIM": _Family(
        "DDIMScheduler",
        {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "leading"},
        reason="If the number of steps divides 1,000; otherwise A1111 takes one step more.",
    ),
    "DDIM CFG++": _Family(None, deviation=Deviation.NONE, reason=_MISSING),
    "PLMS": _Family(
        "PNDMScheduler",
        {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "leading"},
        reason="If the number of steps divides 1,000; otherwise A1111 takes one step more.",
    ),
    "UniPC": _Family(
        "UniPCMultistepScheduler",
        # down to zero, bh1 divides by nothing in the last step: NaN
        {"solver_order": 3, "solver_type": "bh1", "timestep_spacing": "linspace", "final_sigmas_type": "sigma_min"},
        Deviation.SUBSTITUTE, "The same solver (bh1, order 3) on slightly other time steps.",
    ),
    "LCM": _Family(
        "LCMScheduler", {"timestep_spacing": "leading", "original_inference_steps": 50}, Deviation.SUBSTITUTE,
        "The same consistency steps on the time steps of the distillation, with other random numbers.", sigmas=False,
    ),
}  # fmt: skip
_SIGMAS = {
    "Karras": "use_karras_sigmas",
    "Exponential": "use_exponential_sigmas",
    "Polyexponential": "use_exponential_sigmas",  # A1111's exponent is 1, which makes them the same
    "Beta": "use_beta_sigmas",
}
_SPACING = {
    "Uniform": ("linspace", "uniform"),
    "Normal": ("linspace", "uniform"),
    "SGM Uniform": ("trailing", "sgm_uniform"),
    "Simple": ("trailing", "simple"),
}


def scheduler_spec(name: str) -> SchedulerSpec:
    """How to draw with a sampler.

    Args:
        name: In either of A1111's spellings; the canonical one is in the answer.

    Raises:
        SamplerError: Unknown (with the nearest name), or nothing in diffusers comes near.
    """
    known = normalize_sampler(name)
    if known is None:
        near = difflib.get_close_matches(name, KNOWN_SAMPLERS, n=1, cutoff=0.0)
        raise SamplerError(f"There is no sampler {name!r:.80}; did you mean {near[0]!r}?")
    spec = scheduler_table()[known]
    if spec.scheduler is None:
        raise SamplerError(f"The sampler {known!r} can't be rendered: {spec.reason}")
    return spec


@cache
def scheduler_table() -> dict[str, SchedulerSpec]:
    """Every known sampler's row, plain samplers first."""
    rows = [_row(sampler, "Uniform") for sampler in SAMPLERS]
    rows += [_row(s, schedule) for s in SAMPLERS for schedule in SCHEDULES if f"{s} {schedule}" in KNOWN_SAMPLERS]
    return {row.sampler: row for row in rows}


def time_steps(name: str, num_steps: int) -> list[int]:
    """Explicit time steps as A1111 spaces them, descending, rounded to the steps the model was trained on.

    Args:
        name: `uniform`, `sgm_uniform` or `simple`.
        num_steps: At least 1.

    Raises:
        ValueError: More steps than there are different time steps.
    """
    if not 1 <= num_steps <= NUM_TRAIN_TIMESTEPS:
        raise ValueError(f"`num_steps` must be from 1 to {NUM_TRAIN_TIMESTEPS}, but got {num_steps}.")
    last = NUM_TRAIN_TIMESTEPS - 1
    if name == "simple":
        return [last - int(i * NUM_TRAIN_TIMESTEPS / num_steps) for i in range(num_steps)]
    intervals = num_steps if name == "sgm_uniform" else max(num_steps - 1, 1)
    return [round(last * (1 - i / intervals)) for i in range(num_steps)]


def _row(sampler: str, schedule: str) -> SchedulerSpec:
    family = _FAMILIES[sampler]
    name = sampler if schedule == "Uniform" else f"{sampler} {schedule}"
    row = SchedulerSpec(
        name, family.scheduler, deviation=family.deviation, reason=family.reason,
        calls_per_step=family.calls_per_step, seeded=family.seeded,
    )  # fmt: skip
    if family.scheduler is None:
        return row
    config = dict(family.config)
    if "timestep_spacing" in config:  # its time steps are its own
        return replace(row, config=MappingProxyType(config), **_ignored(schedule, family))
    if schedule in _SIGMAS and family.sigmas:
        config |= {"timestep_spacing": "linspace", _SIGMAS[schedule]: True}
        return replace(row, config=MappingProxyType(config))
    if schedule in _SPACING:
        config["timestep_spacing"], explicit = _SPACING[schedule]
        return replace(row, config=MappingProxyType(config), time_steps=explicit if family.explicit else None)
    config["timestep_spacing"] = "linspace"
    return replace(row, config=MappingProxyType(config), **_ignored(schedule, family))


def _ignored(schedule: str, family: _Family) -> dict[str, Any]:
    """What a row says whose schedule the class does not have: the uniform one stands in for it."""
    if schedule == "Uniform":
        return {}
    reason = f"The schedule {schedule} is not in diffusers' class; uniform instead. {family.reason}".strip()
    return {"deviation": Deviation.SUBSTITUTE, "reason": reason}


def render_table() -> str:
    """The table as a Markdown page."""
    lines = [
        "# Samplers", "",
        "A1111's samplers and what diffusers does for them, by `python -m rollouts.schedulers`.", "",
        *(f"- **{kind}**: {text}" for kind, text in DEVIATIONS.items()), "",
        "| sampler | diffusers | configuration | deviation | why |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for row in scheduler_table().values():
        config = ", ".join(f"{key}={value}" for key, value in row.config.items())
        config += f"{', ' if config else ''}time steps: {row.time_steps}" if row.time_steps else ""
        lines.append(f"| {row.sampler} | {row.scheduler or ''} | {config} | {row.deviation} | {row.reason} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(render_table(), end="")

"""Sampler names as the community writes them (A1111 / Civitai), and one canonical spelling for each.

A canonical name is the A1111 sampler, followed by its noise schedule unless that is the uniform one: `Euler a`,
`DPM++ 2M Karras`, `DPM++ 2M SDE Exponential`. Before A1111 1.9 a name was written like that in one piece; since then
(PR A1111#15333) sampler and schedule are separate fields, and `DPM++ 2M` with schedule `Automatic` *means* Karras.
"""

import re

SAMPLERS = (
    "Euler a",
    "Euler",
    "LMS",
    "Heun",
    "DPM2",
    "DPM2 a",
    "DPM++ 2S a",
    "DPM++ 2M",
    "DPM++ SDE",
    "DPM++ 2M SDE",
    "DPM++ 2M SDE Heun",
    "DPM++ 3M SDE",
    "DPM fast",
    "DPM adaptive",
    "Restart",
    "DDIM",
    "DDIM CFG++",
    "PLMS",
    "UniPC",
    "LCM",
)
# Names of A1111's "Schedule type"; "Uniform" is the plain sampler and "Automatic" depends on the sampler.
SCHEDULES = ("Karras", "Exponential", "Polyexponential", "SGM Uniform", "KL Optimal", "Simple", "Normal", "Beta")
# A1111's `default_scheduler` of each sampler that has one: what "Automatic" stands for.
AUTOMATIC_SCHEDULE = {
    "DPM2": "Karras",
    "DPM2 a": "Karras",
    "DPM++ 2S a": "Karras",
    "DPM++ 2M": "Karras",
    "DPM++ SDE": "Karras",
    "DPM++ 2M SDE": "Exponential",
    "DPM++ 2M SDE Heun": "Exponential",
    "DPM++ 3M SDE": "Exponential",
}
# These take their time steps from elsewhere, so a schedule after their name would mean nothing.
_WITHOUT_SCHEDULE = frozenset({"DPM fast", "DPM adaptive", "Restart", "DDIM", "DDIM CFG++", "PLMS", "UniPC"})

KNOWN_SAMPLERS: frozenset[str] = frozenset(SAMPLERS) | {
    f"{sampler} {schedule}" for sampler in SAMPLERS if sampler not in _WITHOUT_SCHEDULE for schedule in SCHEDULES
}
_BY_LOWER_CASE = {name.lower(): name for name in KNOWN_SAMPLERS}
_SCHEDULE_BY_LOWER_CASE = {name.lower(): name for name in (*SCHEDULES, "Uniform", "Automatic")}
_A1111_VERSION = re.compile(r"(\d+)\.(\d+)(?:\.\d+)*")


def normalize_sampler(name: str, schedule: str | None = None, version: str | None = None) -> str | None:
    """Canonical name of an A1111 sampler, or `None` if it is not one (a sampler of an extension, a typing error).

    Args:
        name: The field `Sampler`, in either convention: "DPM++ 2M Karras" or "DPM++ 2M".
        schedule: The field `Schedule type` (A1111 >= 1.9), if there is one.
        version: The field `Version`. Without a schedule, it tells "DPM++ 2M" of A1111 1.6 (uniform sigmas) from that of
            1.9 (automatic, hence Karras). Unknown versions are read as the older convention.
    """
    known = _BY_LOWER_CASE.get(" ".join(name.split()).lower())
    if known is None or known not in SAMPLERS:  # unknown, or the schedule is part of the name already
        return known
    if schedule is None:
        schedule = "Automatic" if _splits_schedule(version) else "Uniform"
    wanted = _SCHEDULE_BY_LOWER_CASE.get(" ".join(schedule.split()).lower())
    if wanted == "Automatic":
        wanted = AUTOMATIC_SCHEDULE.get(known, "Uniform")
    if wanted is None:
        return None
    if wanted == "Uniform" or known in _WITHOUT_SCHEDULE:
        return known
    return f"{known} {wanted}"


def _splits_schedule(version: str | None) -> bool:
    """Whether this `Version` writes sampler and schedule apart. Forge writes "f2.0.1v1.10.1-...": the last counts."""
    numbers = _A1111_VERSION.findall(version or "")
    return bool(numbers) and tuple(map(int, numbers[-1])) >= (1, 9)

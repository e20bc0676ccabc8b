"""The T2I API call: what a policy has to write, and every way of writing it wrong (DiffAgent Sec. 3.1).

    call = APICall.from_json('{"model": "Pixel Wave - v10", "type": "Checkpoint", "base Model": "SD 1.5", ...}')

A call is one JSON object with the nine fields of DABench, in this order: `model`, `type`, `base Model`, `width`,
`height`, `sampling method`, `sampling steps`, `cfg scale`, `model description`. Whether the named model exists is the
catalogue's question (`rollouts.catalog`); everything else is checked here.
"""

import json
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rollouts.samplers import KNOWN_SAMPLERS

Reason = Literal[
    "not_json",  # the response is not one JSON value (cut off, prose around it, NaN, ...)
    "not_an_object",  # JSON, but a list, a string, ...
    "duplicate_field",
    "missing_field",
    "unknown_field",
    "wrong_type",  # a value of the wrong JSON type, e.g. "20" for 20
    "unknown_model_type",  # neither Checkpoint nor LoRA
    "unknown_base_model",
    "unknown_sampler",
    "out_of_range",  # a number or a text length outside sane bounds
    "unknown_model",  # not in the catalogue
    "model_type_mismatch",  # the catalogue has this model as another type
    "base_model_mismatch",  # the catalogue has this model for another architecture
]
REASONS: tuple[str, ...] = get_args(Reason)

MODEL_INFORMATION = ("model", "type", "base Model", "model description")
PARAMETER_INFORMATION = ("width", "height", "sampling method", "sampling steps", "cfg scale")

MAX_STEPS = 150  # A1111's slider ends here
MIN_CFG, MAX_CFG = 1.0, 30.0  # likewise
SIZE_MULTIPLE = 8  # pixels per latent cell of every SD autoencoder


class APICallError(ValueError):
    """A response or record that is not a valid call.

    Attributes:
        reason: One of `REASONS`, stable, meant for counting.
        field: The DABench field at fault, or `None` if it is the whole.
    """

    def __init__(self, reason: Reason, message: str, field: str | None = None) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason: Reason = reason
        self.field = field


@dataclass(frozen=True)
class Architecture:
    """What holds for every model of one base architecture.

    Sizes are pixels. Outside the bounds the architecture gives no usable picture, so such a call is invalid.
    """

    name: str
    slug: str  # for folder names
    min_side: int
    max_side: int
    max_pixels: int
    default_side: int  # the size the architecture was trained at


ARCHITECTURES: dict[str, Architecture] = {
    a.name: a
    for a in (
        Architecture("SD 1.5", "sd15", min_side=256, max_side=1536, max_pixels=1024 * 1536, default_side=512),
        Architecture("SDXL 1.0", "sdxl", min_side=512, max_side=2048, max_pixels=1536 * 2048, default_side=1024),
    )
}
# DiffAgent Sec. 4.1, "the most commonly used parameter choices"; the size is the architecture's own.
DEFAULT_SAMPLER, DEFAULT_STEPS, DEFAULT_CFG = "Euler a", 20, 7.0


def size_problem(base_model: str, width: int, height: int) -> str | None:
    """What is wrong with this picture size for this architecture, or `None` if nothing is."""
    bounds = ARCHITECTURES[base_model]
    for side, pixels in (("width", width), ("height", height)):
        if not bounds.min_side <= pixels <= bounds.max_side:
            return (
                f"`{side}` must be {bounds.min_side} to {bounds.max_side} pixels for {base_model}, "
                f"but is {_show(pixels)}"
            )
        if pixels % SIZE_MULTIPLE:
            return f"`{side}` must be a multiple of {SIZE_MULTIPLE} pixels, but is {pixels}"
    if width * height > bounds.max_pixels:
        return f"{width}x{height} is more than the {bounds.max_pixels} pixels {base_model} can take"
    return None


class APICall(BaseModel):
    """One T2I API call (DiffAgent Sec. 3.1, "Dataset composition"). Immutable; the aliases are DABench's field names.

    Raises:
        APICallError: From `from_json` and `from_dict`, with the reason. The constructor raises pydantic's own error.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, validate_by_alias=True, validate_by_name=True, protected_namespaces=()
    )

    model: str = Field(min_length=1, max_length=300)
    type: Literal["Checkpoint", "LoRA"]
    base_model: Literal["SD 1.5", "SDXL 1.0"] = Field(alias="base Model")
    width: int
    height: int
    sampling_method: str = Field(alias="sampling method")
    sampling_steps: int = Field(alias="sampling steps", ge=1, le=MAX_STEPS)
    cfg_scale: float = Field(alias="cfg scale", ge=MIN_CFG, le=MAX_CFG, allow_inf_nan=False)
    model_description: str = Field(alias="model description", max_length=4000)

    @model_validator(mode="after")
    def _check_sampler_and_size(self) -> "APICall":
        if self.sampling_method not in KNOWN_SAMPLERS:
            raise APICallError(
                "unknown_sampler", f"`sampling method` {self.sampling_method!r} is not a sampler", "sampling method"
            )
        if problem := size_problem(self.base_model, self.width, self.height):
            raise APICallError("out_of_range", problem, "width" if "`width`" in problem else "height")
        return self

    @classmethod
    def from_json(cls, text: str) -> "APICall":
        """Parse a response. White space around the object is fine, anything else around it is not.

        Raises:
            APICallError: With `.reason` and, where one field is at fault, `.field`.
        """
        try:
            value = json.loads(text, parse_constant=_reject_constant, object_pairs_hook=_object_without_duplicates)
        # ValueError: also integers of thousands of digits; RecursionError: "[[[[...", both from a derailed policy.
        except (ValueError, RecursionError) as error:
            if isinstance(error, APICallError):
                raise
            raise APICallError("not_json", f"{_shorten(text)!r} is not JSON ({error})") from error
        return cls.from_dict(value)

    @classmethod
    def from_dict(cls, value: Any) -> "APICall":
        """Validate a parsed JSON value. Raises `APICallError` as `from_json` does."""
        if not isinstance(value, dict):
            raise APICallError("not_an_object", f"expected a JSON object, but got {type(value).__name__}")
        try:
            return cls.model_validate(value, by_name=False)
        except ValidationError as error:
            raise _as_api_call_error(error) from error

    def to_dict(self) -> dict[str, Any]:
        """The call as a dict with DABench's field names, in DABench's order; a whole `cfg scale` is an int (7)."""
        value = self.model_dump(by_alias=True)
        if self.cfg_scale == int(self.cfg_scale):
            value["cfg scale"] = int(self.cfg_scale)
        return value

    def to_json(self) -> str:
        """The one canonical text of this call: what a policy is trained to write."""
        return json.dumps(self.to_dict(), ensure_ascii=False)


_REASON_OF_PYDANTIC_ERROR: dict[str, Reason] = {
    "missing": "missing_field",
    "extra_forbidden": "unknown_field",
    "greater_than_equal": "out_of_range",
    "less_than_equal": "out_of_range",
    "finite_number": "out_of_range",
    "string_too_short": "out_of_range",
    "string_too_long": "out_of_range",
}
_REASON_OF_UNKNOWN_LITERAL: dict[str, Reason] = {"type": "unknown_model_type", "base Model": "unknown_base_model"}


def _as_api_call_error(error: ValidationError) -> APICallError:
    """The first problem of a pydantic error, as ours."""
    first = error.errors(include_url=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, APICallError):
        return cause
    field = str(first["loc"][0]) if first["loc"] else None
    reason = _REASON_OF_PYDANTIC_ERROR.get(first["type"], "wrong_type")
    if first["type"] == "literal_error" and field and isinstance(first["input"], str):
        reason = _REASON_OF_UNKNOWN_LITERAL[field]
    elif first["type"] == "float_type" and type(first["input"]) is int:  # 400 digits: a number, but no float
        reason = "out_of_range"
    got = "" if reason == "missing_field" else f" (got {_show(first['input'])})"
    where = f"`{_shorten(field)}`: " if field is not None else ""
    return APICallError(reason, f"{where}{first['msg']}{got}", field)


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, item in pairs:
        if key in value:
            raise APICallError("duplicate_field", f"`{_shorten(key)}` stands more than once", key)
        value[key] = item
    return value


def _show(value: Any) -> str:
    try:
        return _shorten(repr(value))
    except (ValueError, RecursionError):  # thousands of digits or of brackets: Python refuses to write them
        return f"an enormous {type(value).__name__}"


def _shorten(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"

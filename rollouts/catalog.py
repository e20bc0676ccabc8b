"""The catalogue: every model version that can be called, and how (DESIGN "Data that flows").

catalog = Catalog.load("data/dabench/catalog.jsonl")
catalog["Pixel Wave - v10"].default_parameters
catalog.validate(APICall.from_json(response))  # [] or the reasons why it can't be called
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator, model_validator

from rewards.files import write_atomically
from rollouts.api import (
    ARCHITECTURES,
    DEFAULT_CFG,
    DEFAULT_SAMPLER,
    DEFAULT_STEPS,
    PARAMETER_INFORMATION,
    APICall,
    APICallError,
    Reason,
)
from rollouts.names import name_problem
from rollouts.numbered_rows import read_rows


class CatalogError(ValueError):
    """A catalogue file or entry that can't be used; the message names the file, the line and the field."""


class Judged(NamedTuple):
    """A response, judged.

    Attributes:
        call: The call it is, if it is well-formed; it can still name a model that does not exist.
        reason: Why it can't be called (one of `rollouts.api.REASONS`; of several the first), or `None` if it can.
    """

    call: APICall | None
    reason: Reason | None


class CatalogFile(BaseModel):
    """One file of weights: `uri` is where to fetch it from or where it lies, `sha256` upper-case hex, `size` bytes."""

    model_config = ConfigDict(extra="forbid")

    uri: str
    format: str
    sha256: str = Field(pattern=r"^[0-9A-F]{64}$")
    size: int | None = Field(default=None, ge=0)


class Parameters(BaseModel):
    """The parameter information of a call, under DABench's field names."""

    model_config = ConfigDict(extra="forbid", validate_by_name=True)

    width: int
    height: int
    sampling_method: str = Field(alias="sampling method")
    sampling_steps: int = Field(alias="sampling steps")
    cfg_scale: float = Field(alias="cfg scale")


class CatalogEntry(BaseModel):
    """One callable model version. `name` is the string a policy has to write, and unique."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    name: str
    version_id: int
    model_id: int
    type: Literal["Checkpoint", "LoRA"]
    base_model: Literal["SD 1.5", "SDXL 1.0"]
    base_checkpoint: str | None = None  # LoRA only: the catalogue name it is used with
    files: list[CatalogFile] = []
    trigger_words: list[str] = []
    lora_weight: FiniteFloat | None = None  # LoRA only
    description: str = ""
    description_source: str = ""  # who wrote it: "extractive", "llm:<model>", or unknown
    default_parameters: Parameters
    stats: dict[str, FiniteFloat] = {}
    license: dict[str, str] = {}
    nsfw: bool = False

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if problem := name_problem(name):
            raise ValueError(f"`name` {name!r} {problem}")
        return name

    @model_validator(mode="after")
    def _check_base_and_parameters(self) -> "CatalogEntry":
        if (self.type == "LoRA") != (self.base_checkpoint is not None):
            raise ValueError("`base_checkpoint` must be given for a LoRA, and only for a LoRA")
        try:
            self.default_call()
        except APICallError as error:
            raise ValueError(f"`default_parameters` make no valid call: {error}") from error
        return self

    def default_call(self) -> APICall:
        """The call of this model with its own default parameters."""
        return APICall.from_dict(self._model_information() | self.default_parameters.model_dump(by_alias=True))

    def _model_information(self) -> dict[str, str]:
        return {
            "model": self.name,
            "type": self.type,
            "base Model": self.base_model,
            "model description": self.description,
        }


class Catalog(Mapping[str, CatalogEntry]):
    """Callable models by name; iterates over names in file order, like a dict.

    Args:
        entries: Unique by `name` and by `version_id`; a LoRA's `base_checkpoint` must be among them.

    Raises:
        CatalogError: If they are not, or if there are none.
    """

    def __init__(self, entries: Iterable[CatalogEntry]) -> None:
        self._by_name: dict[str, CatalogEntry] = {}
        self._by_version: dict[int, CatalogEntry] = {}
        for entry in entries:
            if entry.name in self._by_name:
                raise CatalogError(f"`name` must be unique, but {entry.name!r} stands more than once.")
            if entry.version_id in self._by_version:
                raise CatalogError(f"`version_id` must be unique, but {entry.version_id} stands more than once.")
            self._by_name[entry.name] = self._by_version[entry.version_id] = entry
        if not self._by_name:
            raise CatalogError("The catalogue is empty: nothing could ever be called.")
        self._check_base_checkpoints()

    def _check_base_checkpoints(self) -> None:
        for entry in self._by_name.values():
            if entry.base_checkpoint is None:
                continue
            base = self._by_name.get(entry.base_checkpoint)
            if base is None or base.type != "Checkpoint" or base.base_model != entry.base_model:
                raise CatalogError(
                    f"`base_checkpoint` of {entry.name!r} must name a {entry.base_model} checkpoint of this catalogue, "
                    f"but is {entry.base_checkpoint!r}."
                )

    def __getitem__(self, name: str) -> CatalogEntry:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def by_version(self, version_id: int) -> CatalogEntry | None:
        """The entry of a Civitai model version, if it is callable."""
        return self._by_version.get(version_id)

    def of_architecture(self, base_model: str) -> list[CatalogEntry]:
        """The entries of one architecture (`SD 1.5`, `SDXL 1.0`), in file order."""
        return [entry for entry in self._by_name.values() if entry.base_model == base_model]

    def validate(self, call: APICall) -> list[Reason]:
        """Why this (well-formed) call can't be made: any of the last three of `REASONS`; empty if it can."""
        entry = self._by_name.get(call.model)
        if entry is None:
            return ["unknown_model"]
        reasons: list[Reason] = []
        if call.type != entry.type:
            reasons.append("model_type_mismatch")
        if call.base_model != entry.base_model:
            reasons.append("base_model_mismatch")
        return reasons

    def judge(self, text: str) -> Judged:
        """Whether a response is a call that can be made (what DiffAgent Sec. 4.2.1 calls hallucination, otherwise)."""
        try:
            call = APICall.from_json(text)
        except APICallError as error:
            return Judged(None, error.reason)
        return Judged(call, next(iter(self.validate(call)), None))

    def reconstruct(self, model_info: Mapping[str, Any] | str, parameters: Mapping[str, Any] | None = None) -> APICall:
        """The complete call for a model (DiffAgent Sec. 3.2.2, "Response reconstruction").

        Model information is the catalogue's own; each parameter is taken from `parameters` where it is valid on its
        own, else from the model's defaults. Sizes are taken or left as a pair.

        Args:
            model_info: The model's name, or a mapping whose `model` is; its other fields are not trusted.
            parameters: Any of the five parameter fields, DABench's names. Other keys are ignored.

        Raises:
            APICallError: Reason `missing_field` or `unknown_model`.
        """
        name = model_info if isinstance(model_info, str) else model_info.get("model")
        if name is None:
            raise APICallError("missing_field", "`model` is needed to reconstruct a call", "model")
        entry = self._by_name.get(name) if isinstance(name, str) else None
        if entry is None:
            raise APICallError("unknown_model", f"`model` {name!r} is not in the catalogue", "model")
        call = entry.default_call()
        given = {key: value for key, value in (parameters or {}).items() if key in PARAMETER_INFORMATION}
        size = {key: given.pop(key) for key in ("width", "height") if key in given}
        for part in (size if len(size) == 2 else {}, *({key: value} for key, value in given.items())):
            try:
                call = APICall.from_dict(call.to_dict() | part)
            except APICallError:
                continue  # this parameter keeps the model's default
        return call

    def default_call(self, base_model: str, name: str | None = None) -> APICall:
        """The architecture's default call: DiffAgent's baseline model with its Sec. 4.1 parameters.

        Args:
            base_model: The architecture, e.g. `SD 1.5`.
            name: The baseline model; by default the most downloaded checkpoint of the architecture.

        Raises:
            CatalogError: If there is no such checkpoint.
        """
        checkpoints = [e for e in self.of_architecture(base_model) if e.type == "Checkpoint" and name in (None, e.name)]
        entry = max(checkpoints, key=lambda e: e.stats.get("downloads", 0), default=None)
        if entry is None:
            raise CatalogError(f"The catalogue has no {base_model} checkpoint{f' {name!r}' if name else ''}.")
        side = ARCHITECTURES[base_model].default_side
        return self.reconstruct(
            entry.name,
            {
                "width": side,
                "height": side,
                "sampling method": DEFAULT_SAMPLER,
                "sampling steps": DEFAULT_STEPS,
                "cfg scale": DEFAULT_CFG,
            },
        )

    @classmethod
    def load(cls, path: str | Path) -> "Catalog":
        """Read a `.jsonl` or `.parquet` catalogue.

        Raises:
            CatalogError: Naming the file, the line and the field, if anything in it can't be used.
        """
        path = Path(path)
        if not path.is_file():
            raise CatalogError(f"There is no catalogue file at {path}.")
        entries = []
        for number, row in read_rows(path, CatalogError):
            try:
                entries.append(CatalogEntry.model_validate(_parse_nested(f"{path}, row {number}", row)))
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                field = ".".join(map(str, first["loc"])) or "entry"
                raise CatalogError(f"{path}, row {number}, `{field}`: {first['msg']}") from error
        try:
            return cls(entries)
        except CatalogError as error:
            raise CatalogError(f"{path}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write all entries, atomically, as `.jsonl` or `.parquet` by the file name's ending."""
        path = Path(path)
        rows = [entry.model_dump(by_alias=True) for entry in self._by_name.values()]
        if path.suffix == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            # Nested dicts of free keys (stats, license) become JSON text: Parquet wants one schema for all rows.
            for row in rows:
                row |= {key: json.dumps(row[key], ensure_ascii=False) for key in ("stats", "license")}
            sink = pa.BufferOutputStream()
            pq.write_table(pa.Table.from_pylist(rows), sink)
            write_atomically(path, sink.getvalue().to_pybytes())
        elif path.suffix == ".jsonl":
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_atomically(path, text.encode())
        else:
            raise CatalogError(f"A catalogue is saved as .jsonl or .parquet, but got {path}.")


def _parse_nested(where: str, row: Any) -> Any:
    """A row whose `stats` and `license` are JSON text, as in Parquet, with their values."""
    for key in ("stats", "license"):
        if isinstance(row, dict) and isinstance(row.get(key), str):
            try:
                row[key] = json.loads(row[key])
            except ValueError as error:
                raise CatalogError(f"{where}, `{key}`: not JSON ({error})") from error
    return row

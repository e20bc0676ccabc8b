"""The catalogue: reading, checking, look-up, reconstruction of calls (DiffAgent Sec. 3.2.2)."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rollouts.api import APICall, APICallError
from rollouts.catalog import Catalog, CatalogEntry, CatalogError

DEFAULTS = {"width": 512, "height": 768, "sampling method": "DPM++ 2M Karras", "sampling steps": 30, "cfg scale": 7.5}
SHA256 = "0123456789ABCDEF" * 4


def row(name="Pixel Wave - v10", version_id=1, **changes):
    """A catalogue row, an SD 1.5 checkpoint unless changed."""
    plain = {"name": name, "version_id": version_id, "model_id": 100 + version_id, "type": "Checkpoint"}
    return plain | {"base_model": "SD 1.5", "default_parameters": DEFAULTS} | changes


def lora(name="Ink Lines - v2", version_id=2, base="Pixel Wave - v10", **changes):
    return row(name, version_id, type="LoRA", base_checkpoint=base, lora_weight=0.8, **changes)


XL = {"base_model": "SDXL 1.0", "default_parameters": DEFAULTS | {"width": 1024, "height": 1024}}
ROWS = [
    row(
        description='Soft "light" | 水彩',
        stats={"downloads": 10, "rating": 4.5},
        trigger_words=["pxl", "wäve"],
        files=[{"uri": "https://example.org/a.safetensors", "format": "safetensors", "sha256": SHA256}],
        license={"commercial use": "Image"},
    ),
    lora(stats={"downloads": 500}),
    row("水彩画 - v1", 3, stats={"downloads": 30}),
    row("Big Picture - v1", 4, **XL),
]


def write(path, rows):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


@pytest.fixture
def catalog(tmp_path):
    return Catalog.load(write(tmp_path / "catalog.jsonl", ROWS))


def call(**changes):
    fields = {"model": "Pixel Wave - v10", "type": "Checkpoint", "base Model": "SD 1.5", **DEFAULTS}
    return APICall.from_dict(fields | {"model description": ""} | changes)


def test_look_up(catalog):
    assert list(catalog) == ["Pixel Wave - v10", "Ink Lines - v2", "水彩画 - v1", "Big Picture - v1"]
    assert len(catalog) == 4 and "水彩画 - v1" in catalog and "水彩画" not in catalog
    entry = catalog["Ink Lines - v2"]
    assert (entry.type, entry.base_checkpoint, entry.lora_weight) == ("LoRA", "Pixel Wave - v10", 0.8)
    assert catalog.by_version(3) is catalog["水彩画 - v1"] and catalog.by_version(99) is None
    assert [e.version_id for e in catalog.of_architecture("SDXL 1.0")] == [4]
    assert catalog.of_architecture("SD 3") == []
    with pytest.raises(KeyError):
        catalog["pixel wave - v10"]  # names are exact


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_what_is_saved_is_loaded(catalog, tmp_path, ending):
    path = tmp_path / "deep" / f"again{ending}"
    catalog.save(path)
    again = Catalog.load(path)
    assert dict(again) == dict(catalog) and list(again) == list(catalog)
    first = path.read_bytes()
    again.save(path)
    assert path.read_bytes() == first
    entry = again["Pixel Wave - v10"]
    assert entry.stats == {"downloads": 10, "rating": 4.5} and entry.files[0].sha256 == SHA256
    assert entry.default_call() == call(**{"model description": 'Soft "light" | 水彩'})


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_a_catalogue_without_optional_fields(tmp_path, ending):
    """All-empty columns have no type of their own in Parquet."""
    plain = Catalog.load(write(tmp_path / "plain.jsonl", [row()]))
    plain.save(tmp_path / f"saved{ending}")
    assert dict(Catalog.load(tmp_path / f"saved{ending}")) == dict(plain)


BAD_ROWS = [
    ({"default_parameters": ...}, "default_parameters"),
    ({"version_id": "one"}, "version_id"),
    ({"version_id": None}, "version_id"),
    ({"type": "LORA"}, "type"),
    ({"base_model": "SD 2.1"}, "base_model"),
    ({"colour": "blue"}, "colour"),
    ({"files": [{"uri": "x", "format": "safetensors", "sha256": SHA256.lower()}]}, "files.0.sha256"),
    ({"files": [{"uri": "x", "format": "safetensors"}]}, "files.0.sha256"),
    ({"stats": {"downloads": float("nan")}}, "stats.downloads"),
    ({"stats": {"downloads": "many"}}, "stats.downloads"),
    ({"lora_weight": float("inf")}, "lora_weight"),
    ({"default_parameters": DEFAULTS | {"width": 510}}, "`width` must be a multiple of 8"),
    ({"default_parameters": DEFAULTS | {"sampling method": "magic"}}, "'magic' is not a sampler"),
    ({"default_parameters": DEFAULTS | {"cfg scale": float("nan")}}, "`cfg scale`"),
    ({"default_parameters": {"width": 512}}, "default_parameters"),
    ({"description": "d" * 4001}, "`model description`"),
    ({"name": ""}, "`name` '' must be non-empty"),
    ({"name": "m" * 301}, "at most 300"),
    ({"name": "../../etc/passwd"}, "must not look like a path"),
    ({"name": "/abs"}, "must not look like a path"),
    ({"name": "C:\\model"}, "must not look like a path"),
    ({"name": "<img src=x onerror=alert(1)>"}, "without markup"),
    ({"name": "two\nlines"}, "control characters"),
    ({"base_checkpoint": "Pixel Wave - v10"}, "`base_checkpoint` must be given for a LoRA, and only for a LoRA"),
    ({"type": "LoRA"}, "`base_checkpoint` must be given for a LoRA, and only for a LoRA"),
]


@pytest.mark.parametrize(("changes", "named"), BAD_ROWS, ids=[f"{i}-{c[1][:20]}" for i, c in enumerate(BAD_ROWS)])
def test_a_bad_row_is_named(tmp_path, changes, named):
    bad = {key: value for key, value in row("Bad - v1", 9).items() if changes.get(key) is not ...}
    bad |= {key: value for key, value in changes.items() if value is not ...}
    with pytest.raises(CatalogError) as caught:
        Catalog.load(write(tmp_path / "catalog.jsonl", [ROWS[0], bad]))
    assert f"{tmp_path / 'catalog.jsonl'}, row 2, " in str(caught.value)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"name": "cut o', "row 2: not JSON"),
        (b"", "row 2: not JSON"),
        (b'{"name": "\xff\xfe"}', "row 2: not JSON .*utf-8"),
        (b'"just text"', "row 2, `entry`"),
        (b"null", "row 2, `entry`"),
        (b"[" * 100_000, "row 2: not JSON"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path, line, message):
    path = tmp_path / "catalog.jsonl"
    path.write_bytes(json.dumps(ROWS[0]).encode() + b"\n" + line + b"\n")
    with pytest.raises(CatalogError, match=message) as caught:
        Catalog.load(path)
    assert str(path) in str(caught.value)


def test_bad_files_are_named(tmp_path, catalog):
    with pytest.raises(CatalogError, match=r"no catalogue file at .*nowhere\.jsonl"):
        Catalog.load(tmp_path / "nowhere.jsonl")
    with pytest.raises(CatalogError, match="no catalogue file at"):
        Catalog.load(tmp_path)
    parquet = tmp_path / "catalog.parquet"
    parquet.write_bytes(b"")
    with pytest.raises(CatalogError, match=r"catalog\.parquet: not a Parquet file"):
        Catalog.load(parquet)
    catalog.save(parquet)
    parquet.write_bytes(parquet.read_bytes()[:-100])
    with pytest.raises(CatalogError, match=r"catalog\.parquet: not a Parquet file"):
        Catalog.load(parquet)
    pq.write_table(pa.Table.from_pylist([ROWS[0] | {"stats": "{", "license": "{}"}]), parquet)
    with pytest.raises(CatalogError, match=r"catalog\.parquet, row 1, `stats`: not JSON"):
        Catalog.load(parquet)
    pq.write_table(pa.table({"title": ["x"]}), parquet)
    with pytest.raises(CatalogError, match=r"catalog\.parquet, row 1, `name`: Field required"):
        Catalog.load(parquet)
    with pytest.raises(CatalogError, match=r"saved as \.jsonl or \.parquet, but got .*catalog\.csv"):
        catalog.save(tmp_path / "catalog.csv")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "empty"),
        ([row(), row("Pixel Wave - v10", 2)], "`name` must be unique, but 'Pixel Wave - v10'"),
        ([row(), row("Other - v1", 1)], "`version_id` must be unique, but 1"),
        ([lora(base="Gone - v1")], "'Ink Lines - v2' must name a SD 1.5 checkpoint .* but is 'Gone - v1'"),
        ([row(), lora(), lora("On a LoRA", 3, base="Ink Lines - v2")], "'On a LoRA' must name"),
        ([row("Big", 1, **XL), lora(base="Big")], "'Ink Lines - v2' must name a SD 1.5 checkpoint"),
        ([lora(base="Ink Lines - v2")], "'Ink Lines - v2' must name"),
    ],
)
def test_catalogues_that_contradict_themselves(tmp_path, rows, message):
    with pytest.raises(CatalogError, match=f"catalog.jsonl: .*{message}"):
        Catalog.load(write(tmp_path / "catalog.jsonl", rows))


def test_validate(catalog):
    assert catalog.validate(call()) == []
    assert catalog.validate(call(**{"model description": "made up"})) == []
    assert catalog.validate(call(model="Pixel Wave - v11")) == ["unknown_model"]
    assert catalog.validate(call(type="LoRA")) == ["model_type_mismatch"]
    xl = {"base Model": "SDXL 1.0", "width": 1024, "height": 1024}
    assert catalog.validate(call(**xl)) == ["base_model_mismatch"]
    assert catalog.validate(call(model="Ink Lines - v2", **xl)) == ["model_type_mismatch", "base_model_mismatch"]


def test_reconstruct_takes_valid_parameters_and_the_catalogues_model_information(catalog):
    given = {"width": 640, "height": 640, "sampling method": "Euler a", "sampling steps": 12, "cfg scale": 5}
    info = {"model": "Pixel Wave - v10", "type": "LoRA", "base Model": "SDXL 1.0", "model description": "lies"}
    made = catalog.reconstruct(info, given | {"seed": 3, "type": "LoRA"})
    assert made == call(**given, **{"model description": 'Soft "light" | 水彩'})
    assert catalog.reconstruct("Pixel Wave - v10") == catalog["Pixel Wave - v10"].default_call()
    assert catalog.validate(made) == []


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"sampling method": "magic", "sampling steps": 12}, {"sampling steps": 12}),
        ({"sampling steps": 0, "cfg scale": 5.5}, {"cfg scale": 5.5}),
        ({"sampling steps": "12", "cfg scale": True}, {}),
        ({"cfg scale": float("nan"), "sampling method": "Euler"}, {"sampling method": "Euler"}),
        ({"width": 640}, {}),  # half a size says nothing about the shape that was meant
        ({"width": 640, "height": 641, "sampling steps": 12}, {"sampling steps": 12}),
        ({"width": 1536, "height": 1536}, {}),  # each fits, both do not
        ({"width": None, "height": [], "sampling steps": {}, "cfg scale": 10**5000}, {}),
        ({}, {}),
    ],
)
def test_invalid_parameters_fall_back_one_by_one(catalog, given, kept):
    made = catalog.reconstruct("水彩画 - v1", given)
    assert made == call(model="水彩画 - v1", **kept)


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        ("Pixel Wave", "unknown_model"),
        ({"model": "Pixel Wave"}, "unknown_model"),
        ({"model": 5}, "unknown_model"),
        ({"model": ["Pixel Wave - v10"]}, "unknown_model"),
        ({}, "missing_field"),
        ({"model": None}, "missing_field"),
    ],
)
def test_reconstruct_of_an_unknown_model(catalog, info, reason):
    with pytest.raises(APICallError) as caught:
        catalog.reconstruct(info, DEFAULTS)
    assert (caught.value.reason, caught.value.field) == (reason, "model")


def test_default_call_is_the_papers_on_the_most_downloaded_checkpoint(catalog):
    """DiffAgent Sec. 4.1: Euler a, 20 steps, cfg 7. The LoRA has more downloads but is no checkpoint."""
    papers = {"width": 512, "height": 512, "sampling method": "Euler a", "sampling steps": 20, "cfg scale": 7}
    assert catalog.default_call("SD 1.5") == call(model="水彩画 - v1", **papers)
    assert catalog.default_call("SD 1.5", "Pixel Wave - v10").model == "Pixel Wave - v10"
    xl = catalog.default_call("SDXL 1.0")
    assert (xl.model, xl.width, xl.height) == ("Big Picture - v1", 1024, 1024)
    for base_model, name in (
        ("SD 3", None),
        ("SD 1.5", "Ink Lines - v2"),
        ("SD 1.5", "Big Picture - v1"),
        ("SD 1.5", "x"),
    ):
        with pytest.raises(CatalogError, match=f"no {base_model} checkpoint"):
            catalog.default_call(base_model, name)


def api(name="Pixel Wave - v10", **changes):
    fields = {"model": name, "type": "Checkpoint", "base Model": "SD 1.5", **DEFAULTS, "model description": ""}
    return json.dumps(fields | changes)


@pytest.mark.parametrize(
    ("text", "reason", "parsed"),
    [
        (api(), None, True),
        (api(**{"sampling steps": 99, "model description": "not the catalogue's"}), None, True),
        ("I would take Pixel Wave - v10.", "not_json", False),
        (api() + "\n" + api(), "not_json", False),
        (api(**{"sampling method": "magic"}), "unknown_sampler", False),
        (api("Gone - v1"), "unknown_model", True),
        (api(type="LoRA"), "model_type_mismatch", True),
        (api("Big Picture - v1"), "base_model_mismatch", True),
        (api("Big Picture - v1", type="LoRA"), "model_type_mismatch", True),  # both: the first counts
        (api("Gone - v1", width=1), "out_of_range", False),  # the call's own faults come first
    ],
)
def test_judge(text, reason, parsed):
    judged = Catalog([CatalogEntry.model_validate(entry) for entry in ROWS]).judge(text)
    assert judged.reason == reason
    assert (judged.call is not None) == parsed

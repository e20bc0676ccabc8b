"""The builder end to end: invented communities, hostile records, a live API, kills."""

import contextlib
import gzip
import hashlib
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
import warnings
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import zstandard
from datasets import load_from_disk

from align.bench.config import DABenchConfig
from align.bench.dabench import build
from pocket.community import expected_noise, generate_models, write_dump
from rollouts.api import APICall
from rollouts.catalog import Catalog

COMMUNITY = {"num_models": 40, "images_per_version": 12, "seed": 0}
RECORDS = list(generate_models(**COMMUNITY))


def make(source, output, **options):
    return build(DABenchConfig(source=str(source), output=str(output), **({"plots": False} | options)))


def rows_of(output):
    """All rows of a built folder, by id."""
    rows = {}
    for name in ("sd15", "sdxl"):
        if (output / name).is_dir():
            for part in load_from_disk(str(output / name)).values():
                rows |= {row["id"]: row for row in part}
    return rows


def digest(output):
    """SHA-256 of the rows and the catalogue."""
    text = json.dumps(sorted(rows_of(output).items()), sort_keys=True) + (output / "catalog.jsonl").read_text()
    return hashlib.sha256(text.encode()).hexdigest()


def funnel_of(output):
    return json.loads((output / "funnel.json").read_text())["funnel"]


@contextlib.contextmanager
def serving(server):
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    with server:
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    path = tmp_path_factory.mktemp("dump") / "models.jsonl.gz"
    write_dump(path, **COMMUNITY)
    return path


@pytest.fixture(scope="module")
def built(dump):
    make(dump, dump.parent / "dabench")
    return dump.parent / "dabench"


# What comes out


def test_the_funnel_counts_the_noise_that_was_put_in(built):
    funnel, planned = funnel_of(built), expected_noise(**COMMUNITY)
    models, versions = funnel["models"], funnel["versions"]
    assert models["in"] == planned["models"]
    assert models["removed"] == {
        "model_nsfw": planned["models/nsfw_stub"],
        "type_out_of_scope": planned["models/textual_inversion"] + planned["models/controlnet"],
        "name_unusable": planned["models/path_name"],
    }
    # Noise models have one version each.
    for rule, noise in {
        "base_model_out_of_scope": planned["models/base_sd21"] + planned["models/base_other"],
        "file_not_safetensors": planned["models/pickle_only"],
        "file_without_hash": planned["models/missing_hashes"],
        "file_scan_failed": planned["models/failed_scan"],
    }.items():
        assert versions["removed"][rule] == noise, rule
    entering = [r for r in RECORDS if not r["nsfw"] and r["type"] in ("Checkpoint", "LORA") and ".." not in r["name"]]
    assert versions["in"] == sum(len(record["modelVersions"]) for record in entering)


def test_nothing_is_lost_between_the_stages(built):
    funnel, rows = funnel_of(built), rows_of(built)
    for stage in funnel.values():
        assert stage["in"] - sum(stage["removed"].values()) == stage["out"]
        assert all(count > 0 for count in stage["removed"].values())
        assert stage["removed"].keys() == stage["examples"].keys()
    assert list(funnel) == ["models", "versions", "images"]
    assert funnel["images"]["out"] == len(rows) > 100
    assert funnel["versions"]["out"] >= len({row["source"]["version_id"] for row in rows.values()})


def test_what_is_written(built):
    summary = json.loads((built / "funnel.json").read_text())["summary"]
    catalog = Catalog.load(built / "catalog.jsonl")
    assert summary["catalog"] == len(catalog) and summary["descriptions"] == {"extractive": len(catalog)}
    for slug, base_model in (("sd15", "SD 1.5"), ("sdxl", "SDXL 1.0")):
        data = load_from_disk(str(built / slug))
        counts = {name: len(data[name]) for name in ("sft", "rrhf", "eval")}
        assert list(data) == ["sft", "rrhf", "eval"]
        assert summary["architectures"][base_model]["splits"] == counts
        for name, part in data.items():
            assert part.column_names == ["id", "instruction", "api", "base_model", "split", "source"]
            assert set(part["split"]) == {name} and set(part["base_model"]) == {base_model}
    card = (built / "README.md").read_text()
    assert card.startswith("---\npretty_name: DABench\n")
    assert f"| SD 1.5 | {summary['architectures']['SD 1.5']['rows']:,} |" in card
    assert "figures/" not in card and "min_downloads: 100" in (built / "config.yaml").read_text()
    assert not list((built / ".work").glob("parts-*"))


def test_every_row_can_be_called_and_was_made_so(built):
    catalog = Catalog.load(built / "catalog.jsonl")
    versions = {v["id"]: v for record in RECORDS for v in record["modelVersions"]}
    metas = {str(i["id"]): i["meta"] for v in versions.values() for i in v["images"]}
    for row in rows_of(built).values():
        call = APICall.from_dict(row["api"])
        assert catalog.validate(call) == []
        source, meta = row["source"], metas[row["source"]["image_id"]]
        used = source["base_version_id"] if call.type == "LoRA" else source["version_id"]
        hashes = {value for file in versions[used]["files"] for value in file["hashes"].values()}
        assert meta["Model hash"].upper() in hashes
        assert (call.sampling_steps, call.cfg_scale) == (int(meta["steps"]), float(meta["cfgScale"]))
        assert f"{call.width}x{call.height}" == meta["Size"]
        assert not re.search("[<>]|lora:|BREAK", row["instruction"]["prompt"] + row["instruction"]["negative prompt"])


def test_the_unit_of_work_changes_nothing(dump, built, tmp_path):
    make(dump, tmp_path / "dabench", records_per_part=3)
    assert digest(tmp_path / "dabench") == digest(built)
    assert funnel_of(tmp_path / "dabench") == funnel_of(built)


@pytest.mark.parametrize("kind", ["jsonl", "zst", "folder"])
def test_every_kind_of_dump_gives_the_same(built, tmp_path, kind):
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
    source = tmp_path / f"models.{'jsonl' if kind == 'jsonl' else 'jsonl.zst'}"
    if kind == "folder":
        source = tmp_path / "models"
        source.mkdir()
        (source / "page-1.json").write_text(json.dumps({"items": RECORDS[:15], "metadata": {"nextCursor": "x"}}))
        (source / "page-2.json").write_text(json.dumps(RECORDS[15:39]))
        (source / "page-3.json").write_text(json.dumps(RECORDS[39]))
    else:
        source.write_bytes(lines if kind == "jsonl" else zstandard.compress(lines))
    make(source, tmp_path / "dabench")
    assert digest(tmp_path / "dabench") == digest(built)


def test_options_change_what_comes_out(dump, built, tmp_path):
    make(dump, tmp_path / "a", types=["Checkpoint"], base_models=["SD 1.5"], seed=5, near_duplicate=1.0)
    rows, all_rows = rows_of(tmp_path / "a"), rows_of(built)
    assert {row["api"]["type"] for row in rows.values()} == {"Checkpoint"}
    assert set(rows) == {
        key for key, row in all_rows.items() if (row["api"]["type"], row["base_model"]) == ("Checkpoint", "SD 1.5")
    }
    assert any(row["split"] != all_rows[key]["split"] for key, row in rows.items())


def test_an_architecture_that_is_out_of_scope_now_is_gone(dump, tmp_path):
    make(dump, tmp_path / "dabench")
    assert (tmp_path / "dabench" / "sdxl").is_dir()
    summary = make(dump, tmp_path / "dabench", base_models=["SD 1.5"])
    assert list(summary["architectures"]) == ["SD 1.5"]
    assert not (tmp_path / "dabench" / "sdxl").exists()


def test_the_figure_is_drawn_whatever_the_labels_are(tmp_path, recwarn):
    record = json.loads(json.dumps(RECORDS[0]))
    labels = ("$\\frac{1}{0}$", "$", "狐", "", "a\nb", "_x", "<b>", "\ud800", "x" * 10_000, r"\$")
    odd = [record | {"id": 10**6 + n, "type": label} for n, label in enumerate(labels)]
    source = tmp_path / "models.jsonl"
    source.write_text("".join(json.dumps(r) + "\n" for r in [*RECORDS, *odd]))
    make(source, tmp_path / "dabench", plots=True)
    picture = tmp_path / "dabench" / "figures" / "distributions.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "figures/distributions.png" in (tmp_path / "dabench" / "README.md").read_text()


# Bad input: each bad record is one counted skip, and changes nothing else

VERSION = ("modelVersions", 0)
IMAGE = (*VERSION, "images", 0)
META = (*IMAGE, "meta")
FILE = (*VERSION, "files", 0)
LINES = [
    ("models", "invalid_json", "{"),
    ("models", "invalid_json", '{"id": 1} {"id": 2}'),
    ("models", "invalid_json", "[" * 100_000),
    ("models", "invalid_json", "9" * 5000),
    ("models", "malformed_record", '"a text"'),
    ("models", "malformed_record", "null"),
    ("models", "malformed_record", "[[]]"),
    ("models", "malformed_record", '{"message": "Too many requests"}'),
]
CHANGES = [
    ("models", "invalid_json", ("allowCommercialUse",), json.loads("[" * 800 + "]" * 800)),
    ("models", "invalid_json", (*META, "comfy"), json.loads('{"a":' * 200 + "1" + "}" * 200)),
    ("models", "malformed_record", ("id",), "seven"),
    ("models", "malformed_record", ("id",), 10**30),
    ("models", "malformed_record", ("id",), None),
    ("models", "malformed_record", ("name",), None),
    ("models", "malformed_record", ("modelVersions",), {"id": 1}),
    ("models", "malformed_record", ("description",), ["<p>"]),
    ("models", "malformed_record", ("stats",), 5),
    ("models", "type_out_of_scope", ("type",), "<script>"),
    ("models", "name_unusable", ("name",), "/etc/passwd"),
    ("models", "name_unusable", ("name",), "..\\..\\windows"),
    ("models", "name_unusable", ("name",), "<script></script>"),
    ("versions", "malformed_version", VERSION, "v1"),
    ("versions", "malformed_version", VERSION, None),
    ("versions", "malformed_version", (*VERSION, "id"), [1]),
    ("versions", "malformed_version", (*VERSION, "id"), 2**64),
    ("versions", "malformed_version", (*FILE, "hashes"), {"SHA256": 5}),
    ("versions", "malformed_version", (*FILE, "hashes"), ["AB"]),
    ("versions", "malformed_version", (*VERSION, "trainedWords"), [None]),
    ("versions", "file_missing", (*VERSION, "files"), None),
    ("versions", "file_without_hash", (*FILE, "hashes", "SHA256"), "no hash " * 8),
    ("versions", "version_name_unusable", (*VERSION, "name"), "../../v1"),
    ("images", "malformed_image", IMAGE, "https://example.org/1.jpeg"),
    ("images", "image_nsfw", (*IMAGE, "nsfw"), ["X"]),
    ("images", "meta_missing", META, []),
    ("images", "meta_missing", META, [{"prompt": "a fox"}]),
    ("images", "prompt_missing", META, "Steps: 20, Sampler: Euler a"),
    ("images", "prompt_missing", (*META, "prompt"), {"text": "a fox"}),
    ("images", "prompt_missing", (*META, "prompt"), 5),
    ("images", "prompt_too_long", (*META, "prompt"), "fox " * 1_000_000),
    ("images", "steps_invalid", (*META, "steps"), float("nan")),
    ("images", "steps_invalid", (*META, "steps"), 10**300),
    ("images", "cfg_invalid", (*META, "cfgScale"), float("-inf")),
    ("images", "size_missing", (*META, "Size"), "9999999x9999999"),
    ("images", "size_out_of_range", (*META, "Size"), "8x99992"),
    ("images", "sampler_missing", (*META, "sampler"), 5),
    ("images", "checkpoint_hash_missing", (*META, "Model hash"), ["abcdef0123"]),
    ("images", "other_network", (*META, "prompt"), "a fox <hypernet:x:1>"),
]
SOUND = [
    ((*META, "resources"), [{"type": []}, {"type": {}, "name": {}}, 5, None]),
    ((*META, "civitaiResources"), [{"type": ["lora"], "modelVersionId": {}}]),
    ((*META, "hashes"), "none"),
    ((*META, "negativePrompt"), ["blurry"]),
    ((*META, "prompt"), "a fox \ud800 \0 狐"),
    (("name",), "Half \udfff <b onclick='x()'>fox</b> <script>alert(1)</script>"),
    (("name",), "x" * 1_000_000),
    ((*VERSION, "name"), "y" * 1_000_000),
    (("description",), "<script>alert(2)</script><p onclick='x()'>A style of foxes.</p>" + "<b" * 1_000_000),
    (("description",), "<p>" + "A style of foxes in the snow. " * 700_000),  # 20 MB
    ((*VERSION, "trainedWords"), ["<img src=x onerror=alert(3)>", "w" * 1_000_000, "\ud800"]),
    (("tags",), ["<script>alert(4)</script>", 5, {"name": "fox"}, {"name": None}]),
    (("allowCommercialUse",), {"<script>": ["z" * 1_000_000]}),
    (("stats",), {"favoriteCount": float("inf")}),
    ((*VERSION, "id"), "987654321"),
    ((*IMAGE, "id"), "987654321"),
    ((*FILE, "name"), "../../../etc/passwd"),
]


def changed(record, number, path, value):
    """A copy of a record with ids of its own and the value at this path replaced."""
    record = json.loads(json.dumps(record))
    record["id"] = 10**6 + number
    record["modelVersions"][0]["id"] = 10**6 + number
    place = record
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(record)


@pytest.fixture(scope="module")
def lone(built):
    """A LoRA of one version and one image, which becomes a row; its base is in the community."""
    row = next(row for row in rows_of(built).values() if row["source"]["lora_weight"] is not None)
    source = row["source"]
    [record] = [record for record in RECORDS if record["id"] == source["model_id"]]
    record = json.loads(json.dumps(record)) | {"description": "<p>Foxes.</p>"}
    [version] = [v for v in record["modelVersions"] if v["id"] == source["version_id"]]
    version["images"] = [image for image in version["images"] if str(image["id"]) == source["image_id"]]
    assert len(version["images"]) == 1
    version["images"][0]["meta"] |= {"resources": [], "hashes": {}}
    return record | {"modelVersions": [version]}


def write_lines(path, lines):
    path.write_text("".join(line + "\n" for line in [*map(json.dumps, RECORDS), *lines]))
    return path


def removals(funnel):
    return Counter({(stage, rule): n for stage, counts in funnel.items() for rule, n in counts["removed"].items()})


def test_bad_records_are_counted_skips_and_change_nothing_else(built, lone, tmp_path):
    bad = [line for _, _, line in LINES] + [changed(lone, n, *case[2:]) for n, case in enumerate(CHANGES)]
    make(write_lines(tmp_path / "models.jsonl", bad), tmp_path / "dabench")
    assert digest(tmp_path / "dabench") == digest(built)
    funnel, before = funnel_of(tmp_path / "dabench"), funnel_of(built)
    assert funnel["models"]["in"] == before["models"]["in"] + len(bad)
    expected = Counter(case[:2] for case in [*LINES, *CHANGES])
    assert removals(funnel) - removals(before) == expected
    assert removals(before) - removals(funnel) == Counter()
    for stage in funnel.values():
        assert stage["in"] - sum(stage["removed"].values()) == stage["out"]
        assert all(len(example) <= 120 for examples in stage["examples"].values() for example in examples)
    assert (tmp_path / "dabench" / "funnel.json").stat().st_size < 100_000


def test_strange_values_that_do_not_matter_cost_nothing(built, lone, tmp_path):
    odd = [changed(lone, n, *case) for n, case in enumerate(SOUND)]
    output = tmp_path / "dabench"
    make(write_lines(tmp_path / "models.jsonl", odd), output)
    rows, before = rows_of(output), rows_of(built)
    new = [row for key, row in rows.items() if key not in before]
    assert len(new) == len(odd) and before.keys() < rows.keys()
    catalog = Catalog.load(output / "catalog.jsonl")
    assert all(catalog.validate(APICall.from_dict(row["api"])) == [] for row in new)
    shown = [text for e in catalog.values() for text in (e.name, e.description, *e.trigger_words)]
    assert not [text for text in shown if re.search(r"[<>\0\ud800-\udfff]|onclick|onerror", text)]
    assert not [e.description for e in catalog.values() if "alert" in e.description]
    assert not re.search("<script|onclick|alert", (output / "README.md").read_text())
    assert (output / "catalog.jsonl").stat().st_size < 200_000
    for line in (output / "catalog.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_duplicate_names_become_unique(lone, tmp_path):
    twins = [changed(lone, n, ("name",), name) for n, name in enumerate(["Twin", "TWIN", " Twin\n", "Twin"])]
    make(write_lines(tmp_path / "models.jsonl", twins), tmp_path / "dabench")
    names = [name for name in Catalog.load(tmp_path / "dabench" / "catalog.jsonl") if name.lower().startswith("twin")]
    version = lone["modelVersions"][0]["name"]
    assert names == [
        f"Twin - {version}",
        f"TWIN - {version} (1000001)",
        f"Twin - {version} (1000002)",
        f"Twin - {version} (1000003)",
    ]


def test_a_record_that_stands_twice_counts_twice_but_gives_its_rows_once(built, tmp_path):
    make(write_lines(tmp_path / "models.jsonl", map(json.dumps, RECORDS)), tmp_path / "dabench")
    assert digest(tmp_path / "dabench") == digest(built)
    twice, once = funnel_of(tmp_path / "dabench"), funnel_of(built)
    assert twice["images"]["in"] == 2 * once["images"]["in"] and twice["images"]["out"] == once["images"]["out"]


# Errors of a whole run: one line, exit code 2


def command(*args, cwd=None):
    """Run the builder as its users do; returns its exit code and its last words."""
    run = subprocess.run(
        [sys.executable, "-m", "align.bench.dabench", *map(str, args)], capture_output=True, text=True, cwd=cwd,
        env=os.environ | {"NO_PROXY": "127.0.0.1"},
    )  # fmt: skip
    return run.returncode, run.stderr


def packed(pack, share=1.0):
    data = pack("".join(json.dumps(record) + "\n" for record in RECORDS).encode())
    return data[: int(share * len(data))]


SOURCES = [
    ("cut.jsonl.gz", packed(gzip.compress, 0.5), r"cut\.jsonl\.gz breaks off after line \d+ .*Get it again, or unpack"),
    ("cut.jsonl.zst", packed(zstandard.compress, 0.5), r"cut\.jsonl\.zst breaks off after line \d+ .*Get it again"),
    ("no.jsonl.gz", b"not packed", r"no\.jsonl\.gz breaks off after line 0"),
    ("empty.jsonl", b"", r"`source` .*empty\.jsonl holds no records"),
    ("empty.jsonl.gz", b"", r"`source` .*empty\.jsonl\.gz holds no records"),
    ("blank.jsonl", b"\n\n", r"`source` .*blank\.jsonl holds no records"),
    ("bad.jsonl", b"{\n{\n", r"of 2 models all were removed, most by `invalid_json` \(2\), e\.g\. bad\.jsonl:1: not"),
    ("other.jsonl", b'{"text": "hello"}\n' * 5,
     r"of 5 models all were removed, most by `malformed_record` \(5\), e\.g\. other\.jsonl:1: `id`: Field required"),
    ("utf16.jsonl", '{"id": 1}\n'.encode("utf-16"), r"most by `invalid_json`"),
    ("bare.jsonl", b'{"id": 1, "name": "Fox", "type": "LORA"}\n', r"its models have no versions"),
    ("nsfw.jsonl", b'{"id": 1, "name": "Fox", "type": "LORA", "nsfw": true}\n', r"most by `model_nsfw` \(1\)"),
    ("models.csv", b"id,name\n", r"models\.csv must end in \.jsonl, \.jsonl\.gz or \.jsonl\.zst"),
    ("missing.jsonl", None, r"`source` .*missing\.jsonl is neither a file, nor a folder, nor a URL"),
    (".", None, r"is a folder without a single \.json file"),
]  # fmt: skip


def run_in_process(monkeypatch, capsys, *args):
    """`python -m align.bench.dabench` without the time to start Python."""
    monkeypatch.setattr(sys, "argv", ["dabench", *map(str, args)])
    with warnings.catch_warnings(), pytest.raises(SystemExit) as caught:
        warnings.simplefilter("ignore", RuntimeWarning)  # the module is imported already
        runpy.run_module("align.bench.dabench", run_name="__main__")
    return caught.value.code, capsys.readouterr().err


@pytest.mark.parametrize(("name", "data", "message"), SOURCES, ids=[case[0] for case in SOURCES])
def test_sources_that_give_nothing(tmp_path, monkeypatch, capsys, name, data, message):
    source = tmp_path / "source" / name
    (tmp_path / "source").mkdir()
    if data is not None:
        source.write_bytes(data)
    code, said = run_in_process(monkeypatch, capsys, "--source", source, "--output", tmp_path / "out")
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and re.search(message, errors[0]), said
    assert "Traceback" not in said
    assert not (tmp_path / "out" / "catalog.jsonl").exists()


OPTIONS = [
    ("min_download: 5\n", [], r"dabench\.yaml: unknown key `min_download`\. Did you mean `min_downloads`\?"),
    ("sft_share: 1.5\n", [], r"`sft_share` must be between 0 and 1, but got 1\.5"),
    ("sft_share: .nan\n", [], r"`sft_share` must be between 0 and 1, but got nan"),
    ("sft_share: [1]\n", [], r"dabench\.yaml: `sft_share` is \[1\]"),
    ("sft_share: 0.9\nrrhf_share: 0.2\n", [], r"`sft_share` \+ `rrhf_share` must be at most 1"),
    ("types: 5\n", [], r"`types` is 5"),
    ("types: [LORA]\n", [], r"`types` must be a non-empty list out of \['Checkpoint', 'LoRA'\], but got \['LORA'\]"),
    ("base_models: []\n", [], r"`base_models` must be a non-empty list"),
    ("near_duplicate: 0.1\n", [], r"`near_duplicate` must be between 0\.5 and 1"),
    ("records_per_part: 0\n", [], r"`records_per_part` must be at least 1"),
    ("description_max_chars: 5\n", [], r"`description_max_chars` must be between 20 and 4000, but got 5"),
    ("llm_model: tiny\n", [], r"`llm_base_url` and `llm_model` must be given together"),
    ("llm_model: tiny\nllm_base_url: localhost\n", [], r"`llm_base_url` must start with http"),
    ("- a list\n", [], r"dabench\.yaml must hold a YAML mapping"),
    (None, ["--wibble", "5"], r"--wibble"),
    (None, ["--records_per_part", "-1"], r"`records_per_part` must be at least 1, but got -1"),
    (None, ["--config", "nowhere.yaml"], r"Can't read the config file nowhere\.yaml: No such file"),
]


@pytest.mark.parametrize(("text", "flags", "message"), OPTIONS, ids=[str(n) for n in range(len(OPTIONS))])
def test_options_that_cannot_be_used(dump, tmp_path, monkeypatch, capsys, text, flags, message):
    if text is not None:
        (tmp_path / "dabench.yaml").write_text(text)
        flags = ["--config", tmp_path / "dabench.yaml"]
    code, said = run_in_process(monkeypatch, capsys, "--source", dump, "--output", tmp_path / "out", *flags)
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1
    assert re.search(message, said), said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("place", "message"),
    [("file", r"`output` .*file is a file; name a folder"), ("file/below", r"`output` .*below can't be written: ")],
)
def test_an_output_that_cannot_be_written(dump, tmp_path, monkeypatch, capsys, place, message):
    (tmp_path / "file").write_text("")
    code, said = run_in_process(monkeypatch, capsys, "--source", dump, "--output", tmp_path / place)
    assert code == 2 and said.count("\n") == 1 and re.search(message, said), said


def test_the_command_itself(dump, built, tmp_path):
    code, said = command("--source", dump, "--output", tmp_path / "a", "--plots", "false")
    assert code == 0 and re.search(r"SD 1\.5: \d+ rows .*\n.*SDXL 1\.0: .*\n.*callable versions; see ", said)
    assert digest(tmp_path / "a") == digest(built)
    code, said = command("--source", tmp_path / "none.jsonl", "--output", tmp_path / "b")
    assert code == 2 and re.fullmatch(r"error: `source` .* is neither a file, nor a folder, nor a URL\.\n", said)


# The live API


def gallery_shape(image):
    """An image of `/models` as `/images` serves it."""
    shape = {name: image[name] for name in ("id", "url", "hash", "width", "height")}
    shape |= {"nsfw": False, "nsfwLevel": "None", "browsingLevel": 1, "username": "someone", "baseModel": "SD 1.5"}
    return shape | {"meta": image["meta"] and {"id": image["id"], "meta": image["meta"]}}


class CivitaiHandler(BaseHTTPRequestHandler):
    """Pages of the invented community: what is withheld is not listed, `meta` only on `/images`, opaque cursors."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        server, parts = self.server, urllib.parse.urlsplit(self.path)
        query = urllib.parse.parse_qs(parts.query)
        server.log.append(self.path)
        failure = server.failures.pop(len(server.log), None)
        if failure:
            return self.reply(*failure)
        if query["nsfw"] != ["false"] or query["withMeta"] != ["true"]:
            return self.reply(400, {}, {"error": "this server shows everything to everybody"})
        if parts.path == "/api/v1/models":
            items, size = server.models(query), 7
        elif parts.path == "/api/v1/images":
            items, size = server.galleries[int(query["modelVersionId"][0])], min(5, int(query["limit"][0]))
        else:
            return self.reply(404, {}, {"error": "not found"})
        start = int(query.get("cursor", ["0|x"])[0].split("|")[0])
        metadata = {"nextCursor": f"{start + size}|x"} if start + size < len(items) else {}
        self.reply(200, {}, {"items": items[start : start + size], "metadata": metadata})

    def reply(self, status, headers, body):
        payload = json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(payload))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *args):
        pass


class CivitaiServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, failures=None):
        super().__init__(("127.0.0.1", 0), CivitaiHandler)
        self.log, self.failures = [], failures or {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}/api/v1"
        self.records = json.loads(json.dumps(RECORDS))
        self.galleries = {}
        for record in self.records:
            for version in record["modelVersions"]:
                safe = [image for image in version["images"] if image["nsfw"] == "None"]
                self.galleries[version["id"]] = [gallery_shape(image) for image in safe]
                version["images"] = [image | {"meta": None} for image in safe]

    def models(self, query):
        """Models that a query asks for, as the site filters them."""
        return [
            record
            for record in self.records
            if not record["nsfw"]
            and record["type"] in query["types"]
            and any(version["baseModel"] in query["baseModels"] for version in record["modelVersions"])
        ]


@pytest.fixture
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("CIVITAI_API_TOKEN", raising=False)


def test_the_live_api_gives_the_rows_of_the_dump(built, tmp_path, no_proxy):
    failures = {3: (429, {"Retry-After": "1"}, {}), 6: (503, {"Retry-After": "1"}, {"error": "busy"})}
    with serving(CivitaiServer(failures)) as server:
        make(server.url, tmp_path / "dabench", api_images_per_version=100)
        asked = len(server.log)
        assert server.failures == {} and server.log[2] == server.log[3] and server.log[5] == server.log[6]
        assert digest(tmp_path / "dabench") == digest(built)
        # The API withholds what the dump flags, and does not list bases out of scope.
        live, dumped = funnel_of(tmp_path / "dabench"), funnel_of(built)
        assert live["images"]["out"] == dumped["images"]["out"]
        assert "model_nsfw" not in live["models"]["removed"] and "image_nsfw" not in live["images"]["removed"]
        # Again: everything is answered from disk.
        make(server.url, tmp_path / "dabench", api_images_per_version=100)
        assert len(server.log) == asked and digest(tmp_path / "dabench") == digest(built)


def test_an_api_that_fails_for_good_is_one_line_and_goes_on_later(built, tmp_path, no_proxy):
    with serving(CivitaiServer({9: (403, {}, {"error": "region"})})) as server:
        flags = ["--api_images_per_version", 100, "--plots", "false"]
        code, said = command("--source", server.url, "--output", tmp_path / "dabench", *flags)
        assert code == 2 and "Traceback" not in said
        [error] = [line for line in said.splitlines() if line.startswith("error: ")]
        assert "HTTP status 403" in error and server.url in error
        make(server.url, tmp_path / "dabench", api_images_per_version=100)
        assert len(server.log) == len(set(server.log)) + 1  # only the refused request was made twice
        assert digest(tmp_path / "dabench") == digest(built)


@pytest.mark.parametrize(
    ("url", "token", "message"),
    [
        (
            "http://127.0.0.1:9/api/v1?x=1",
            "",
            r"`source` or `lookup_url` http://127\.0\.0\.1:9/api/v1\?x=1 .*without user, password or",
        ),
        ("http://127.0.0.1:9/api/v1", "secret word", r"the token in CIVITAI_API_TOKEN: .*not a bearer token"),
    ],
)
def test_an_api_that_cannot_be_asked(tmp_path, monkeypatch, capsys, url, token, message):
    monkeypatch.setenv("CIVITAI_API_TOKEN", token)
    code, said = run_in_process(monkeypatch, capsys, "--source", url, "--output", tmp_path / "out")
    assert code == 2 and re.search(message, said), said
    assert "secret" not in said and "Traceback" not in said


def test_api_max_models_is_a_limit(tmp_path, no_proxy):
    with serving(CivitaiServer()) as server:
        make(server.url, tmp_path / "dabench", api_images_per_version=100, api_max_models=20)
    assert funnel_of(tmp_path / "dabench")["models"]["in"] == 20


# Descriptions by an LLM


class ChatHandler(BaseHTTPRequestHandler):
    """An OpenAI-compatible endpoint that takes its time."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = re.search(r"^Name: (.*)$", body["messages"][-1]["content"], re.MULTILINE)[1]
        self.server.names.append(name)
        time.sleep(self.server.delay)
        if self.server.status != 200:
            content = {"error": {"message": "no"}}
        else:
            message = {"role": "assistant", "content": f"Pictures in the style of {name}."}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            content = {"id": "c", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        payload = json.dumps(content).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        with contextlib.suppress(OSError):  # the builder was killed
            self.wfile.write(payload)

    def log_message(self, *args):
        pass


class ChatServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, delay=0.0, status=200):
        super().__init__(("127.0.0.1", 0), ChatHandler)
        self.names, self.delay, self.status = [], delay, status

    def handle_error(self, request, client_address):
        """A builder that was killed, or that gave up, has hung up."""

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


def test_an_llm_describes_every_model_once(dump, built, tmp_path, no_proxy):
    with serving(ChatServer()) as server:
        summary = make(dump, tmp_path / "dabench", llm_base_url=server.url, llm_model="tiny", llm_concurrency=2)
    catalog = Catalog.load(tmp_path / "dabench" / "catalog.jsonl")
    assert summary["descriptions"] == {"llm:tiny": len(catalog)}
    assert len(server.names) == len(catalog)
    assert all(entry.description == f"Pictures in the style of {entry.name}." for entry in catalog.values())
    rows, extractive = rows_of(tmp_path / "dabench"), rows_of(built)
    for key, row in rows.items():
        assert row["source"].pop("description") == "llm:tiny"
        assert extractive[key]["source"].pop("description") == "extractive"
        api = row["api"] | {"model description": extractive[key]["api"]["model description"]}
        assert row | {"api": api} == extractive[key]


def test_a_model_the_endpoint_does_not_know_is_one_line(dump, tmp_path, monkeypatch, capsys, no_proxy):
    with serving(ChatServer(status=404)) as server:
        flags = ["--llm_base_url", server.url, "--llm_model", "tiny"]
        code, said = run_in_process(monkeypatch, capsys, "--source", dump, "--output", tmp_path / "out", *flags)
    [error] = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2 and f"{server.url} cannot be asked for model 'tiny'" in error and "Traceback" not in said


def test_an_answer_file_that_is_none_is_one_line(dump, tmp_path, monkeypatch, capsys):
    (tmp_path / "out" / ".work").mkdir(parents=True)
    (tmp_path / "out" / ".work" / "descriptions.sqlite").write_text("notes, not a database " * 100)
    flags = ["--llm_base_url", "http://127.0.0.1:9/v1", "--llm_model", "tiny"]
    code, said = run_in_process(monkeypatch, capsys, "--source", dump, "--output", tmp_path / "out", *flags)
    assert code == 2 and "descriptions.sqlite cannot be used as an SQLite file" in said and "Traceback" not in said


# Kills


def test_a_build_that_failed_late_goes_on_with_other_options(dump, tmp_path):
    output = tmp_path / "dabench"
    output.mkdir()
    (output / "figures").write_text("in the way")
    with pytest.raises(FileExistsError):
        make(dump, output, plots=True)
    assert list(output.glob(".work/parts-*/part-*.json"))
    (output / "figures").unlink()
    # The parts are used again, the rows must not be.
    make(dump, output, min_downloads=3000)
    make(dump, tmp_path / "fresh", min_downloads=3000)
    assert digest(output) == digest(tmp_path / "fresh")


def start(dump, output, *flags):
    """Start the builder in a process of its own."""
    arguments = ["--source", str(dump), "--output", str(output), "--plots", "false", *map(str, flags)]
    return subprocess.Popen(
        [sys.executable, "-m", "align.bench.dabench", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | {"NO_PROXY": "127.0.0.1"},
    )  # fmt: skip


def wait_for(process, condition, seconds=60):
    """Wait until a condition holds while the process runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the builder ended before the condition held"
        assert time.monotonic() < end, "the condition never held"
        time.sleep(0.002)


def stamps(output):
    """Inode and time of every finished part."""
    found = {}
    with contextlib.suppress(FileNotFoundError):  # the builder removes them when it is done
        for path in output.glob(".work/parts-*/part-*.json"):
            status = path.stat()
            found[path.name] = (status.st_ino, status.st_mtime_ns)
    return found


def kill(process):
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.fixture(scope="module")
def large_dump(tmp_path_factory):
    path = tmp_path_factory.mktemp("large") / "models.jsonl"
    write_dump(path, num_models=120, images_per_version=60, seed=3)
    return path


@pytest.fixture(scope="module")
def large_built(large_dump):
    make(large_dump, large_dump.parent / "dabench", records_per_part=2)
    return large_dump.parent / "dabench"


@pytest.mark.slow
def test_a_kill_between_parts_loses_no_finished_part(large_dump, large_built, tmp_path):
    output = tmp_path / "dabench"
    process = start(large_dump, output, "--records_per_part", 2)
    wait_for(process, lambda: len(stamps(output)) >= 10)
    kill(process)
    kept = stamps(output)
    assert 10 <= len(kept) < 60 and not (output / "catalog.jsonl").exists()

    process = start(large_dump, output, "--records_per_part", 2)
    seen = {}
    while process.poll() is None:
        for name, stamp in stamps(output).items():
            assert seen.setdefault(name, stamp) == stamp
        time.sleep(0.001)
    assert process.returncode == 0
    assert len(seen) > len(kept) and {name: seen[name] for name in kept} == kept
    assert digest(output) == digest(large_built)
    assert funnel_of(output) == funnel_of(large_built)


@pytest.mark.slow
@pytest.mark.parametrize("file", [".work/parts-*/done", ".work/parts-*/rows.jsonl", "catalog.jsonl", "sd15"])
def test_a_kill_in_a_later_stage_changes_nothing(large_dump, large_built, tmp_path, file):
    output = tmp_path / "dabench"
    process = start(large_dump, output, "--records_per_part", 2)
    wait_for(process, lambda: any(output.glob(file)))
    kill(process)
    kept = stamps(output)
    assert len(kept) == 60
    process = start(large_dump, output, "--records_per_part", 2)
    while process.poll() is None:
        assert stamps(output).items() <= kept.items()
    assert process.returncode == 0
    assert digest(output) == digest(large_built) and funnel_of(output) == funnel_of(large_built)


@pytest.mark.slow
def test_a_kill_while_an_llm_describes_asks_only_for_the_rest(dump, tmp_path):
    with serving(ChatServer(delay=0.05)) as server:
        flags = ["--llm_base_url", server.url, "--llm_model", "tiny", "--llm_concurrency", 2]
        process = start(dump, tmp_path / "dabench", *flags)
        wait_for(process, lambda: len(server.names) >= 8)
        kill(process)
        time.sleep(0.3)  # the server finishes what it has begun
        before = list(server.names)
        process = start(dump, tmp_path / "dabench", *flags)
        assert process.wait(timeout=60) == 0
    after = server.names[len(before) :]
    names = set(Catalog.load(tmp_path / "dabench" / "catalog.jsonl"))
    assert 8 <= len(before) < len(names)
    assert len(set(before) & set(after)) <= 2  # those under way
    assert set(before) | set(after) == names and len(after) == len(set(after))
    summary = json.loads((tmp_path / "dabench" / "funnel.json").read_text())["summary"]
    assert summary["descriptions"] == {"llm:tiny": len(names)}


@pytest.mark.slow
def test_a_kill_while_the_api_is_read_asks_only_for_the_rest(built, tmp_path):
    with serving(CivitaiServer()) as server:
        flags = ["--api_images_per_version", 100, "--records_per_part", 3]
        process = start(server.url, tmp_path / "dabench", *flags)
        wait_for(process, lambda: len(server.log) >= 20)
        kill(process)
        before = len(server.log)
        process = start(server.url, tmp_path / "dabench", *flags)
        assert process.wait(timeout=60) == 0
        assert len(set(server.log[:before]) & set(server.log[before:])) <= 1
        assert len(server.log) > before
    assert digest(tmp_path / "dabench") == digest(built)

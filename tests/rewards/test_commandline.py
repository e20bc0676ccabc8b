"""Command lines: a YAML file, flags that override it, and errors that say what to change."""

import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import yaml
from transformers import TrainingArguments

from align.scratch import ScratchConfig
from align.sft import SFTArguments
from rewards.commandline import ConfigError, from_json, parse_config, run_command, save_config


@dataclass
class Options:
    """Options of a command like ours."""

    dataset: str = field(metadata={"help": "100% needed."})
    steps: int = field(default=10, metadata={"help": "Steps."})
    rate: float = field(default=0.5, metadata={"help": "Rate."})
    limit: int | None = field(default=None, metadata={"help": "Limit; none: none."})
    plots: bool = field(default=True, metadata={"help": "Draw."})
    names: list[str] = field(default_factory=lambda: ["a"], metadata={"help": "Names."})
    hub_token: str | None = field(default=None, metadata={"help": "A secret."})

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"`steps` must be at least 1, but got {self.steps}.")


def write(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_a_file_and_flags_that_override_it(tmp_path):
    path = write(tmp_path, "dataset: data/füchse\nsteps: 20\nrate: 1\nnames: [x, y]\nplots: false\n")
    found = parse_config(Options, args=["--config", path])
    assert found == Options("data/füchse", 20, 1, None, False, ["x", "y"])
    found = parse_config(Options, args=["--steps", "30", "--config", path, "--limit", "5", "--plots", "true"])
    assert (found.dataset, found.steps, found.limit, found.plots) == ("data/füchse", 30, 5, True)
    assert parse_config(Options, args=["--dataset", "d", "--names", "p", "q"]) == Options("d", names=["p", "q"])


def test_config_with_an_equals_sign(tmp_path):
    path = write(tmp_path, "dataset: d\nsteps: 20\n")
    args = [f"--config={path}", "--rate=2.5"]
    assert parse_config(Options, args=args) == Options("d", 20, 2.5)
    assert args == [f"--config={path}", "--rate=2.5"]  # the caller's list is left alone


def test_keys_may_belong_to_any_of_several_classes(tmp_path):
    path = write(tmp_path, "dataset: d\nhidden_size: 64\nnum_attention_heads: 2\n")
    options, scratch = parse_config(Options, ScratchConfig, args=["--config", path, "--num_key_value_heads", "2"])
    assert options == Options("d")
    assert (scratch.hidden_size, scratch.num_attention_heads, scratch.num_key_value_heads) == (64, 2, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dataset: d\nstepps: 3\n", r"config\.yaml: unknown key `stepps`. Did you mean `steps`\?"),
        ("dataset: d\nzzz: 3\n", r"unknown key `zzz`. See --help"),
        ("dataset: d\n7: 3\n", "unknown key `7`"),
        ("dataset: d\nsteps: 5\nsteps: 6\n", "is not YAML: the key `steps` stands more than once"),
        ("dataset: d\nsteps: 2.0\n", r"config\.yaml: `steps` is 2.0: .*integer"),
        ("dataset: d\nsteps: true\n", "`steps` is True: .*integer"),
        ("dataset: d\nsteps: [1]\n", r"`steps` is \[1\]"),
        ("dataset: d\nsteps:\n", "`steps` is None"),
        ("dataset: 5\n", "`dataset` is 5: .*string"),
        ("dataset: d\nplots: 1\n", "`plots` is 1: .*boolean"),
        ("dataset: d\nlimit: 1.5\n", "`limit` is 1.5"),
        ("dataset: d\nrate: [fast]\n", r"`rate` is \['fast'\]"),
        ("dataset: d\nnames: [1, 2]\n", r"`names` is \[1, 2\]"),
        ("dataset: d\nnames: x\n", r"`names` is 'x'"),
        ("dataset: d\nsteps: 0\n", r"config\.yaml: `steps` must be at least 1, but got 0"),
        ("- dataset\n- d\n", "must hold a YAML mapping of options, but holds list"),
        ("just text\n", "must hold a YAML mapping of options, but holds str"),
        ("", "must hold a YAML mapping"),
        ("dataset: [unclosed\n", r"config\.yaml is not YAML"),
        ("dataset: d\n\tsteps: 3\n", "is not YAML"),
        ("dataset: !!python/object/apply:os.system [ls]\n", "is not YAML"),
        (b"dataset: \xff\xfe\n", "is not YAML"),
        ("env: text\ndataset: d\n", "`env` field should be a dict"),
    ],
)
def test_files_that_are_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_config(Options, args=["--config", write(tmp_path, text)])
    assert "config.yaml" in str(caught.value)


def test_text_in_yaml_is_read_as_on_the_command_line(tmp_path):
    """YAML 1.1 reads `3e-4` as text."""
    found = parse_config(
        Options, args=["--config", write(tmp_path, "dataset: d\nrate: 3e-4\nsteps: '7'\nplots: 'no'\n")]
    )
    assert (found.rate, found.steps, found.plots) == (3e-4, 7, False)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"Can't read the config file .*gone\.yaml: No such file"):
        parse_config(Options, args=["--config", str(tmp_path / "gone.yaml")])
    with pytest.raises(ConfigError, match="Can't read the config file .*: Is a directory"):
        parse_config(Options, args=["--config", str(tmp_path)])
    with pytest.raises(ConfigError, match="`--config` needs the path of a YAML file"):
        parse_config(Options, args=["--dataset", "d", "--config"])


def test_flags_that_are_refused():
    with pytest.raises(ConfigError, match="command line: .*--stepps"):
        parse_config(Options, args=["--dataset", "d", "--stepps", "3"])
    with pytest.raises(ConfigError, match="command line: `steps` must be at least 1"):
        parse_config(Options, args=["--dataset", "d", "--steps", "0"])
    for args, message in ((["--dataset", "d", "--steps", "x"], "invalid int value: 'x'"), ([], "required: --dataset")):
        with pytest.raises(ConfigError, match=f"command line: .*{message}.*--help"):
            parse_config(Options, args=args)


def test_help_of_real_commands(capsys):
    from align.bench.chatgen.config import ChatGenBenchConfig
    from align.bench.chatgen.review import ReviewConfig
    from align.bench.chatgen.tables import TablesConfig
    from align.evaluation.chatgen import ChatGenEvaluationConfig
    from align.evaluation.hallucination import HallucinationConfig
    from align.model_tokens import ModelTokenArguments
    from align.trainers import ModelTokenConfig

    commands = {
        SFTArguments: "--from_scratch", HallucinationConfig: "--num_dabench", ChatGenBenchConfig: "--test_share",
        ReviewConfig: "--queue", TablesConfig: "--columns", ChatGenEvaluationConfig: "--given",
        ModelTokenArguments: "--max_length", ModelTokenConfig: "--init",
    }  # fmt: skip
    for cls, flag in commands.items():
        with pytest.raises(SystemExit) as caught:
            parse_config(cls, args=["--help"], description="What it does.")
        shown = capsys.readouterr().out
        assert caught.value.code == 0 and "What it does." in shown and flag in shown


def test_what_is_saved_can_be_given_again(tmp_path):
    options = Options("data/füchse", 20, 0.25, 3, False, ["x: y", "- z"], hub_token="hf_secret")
    save_config(tmp_path / "new" / "config.yaml", options, ScratchConfig(hidden_size=64))
    text = (tmp_path / "new" / "config.yaml").read_text(encoding="utf-8")
    assert "secret" not in text and "hub_token" not in text and "füchse" in text
    again, scratch = parse_config(Options, ScratchConfig, args=["--config", str(tmp_path / "new" / "config.yaml")])
    options.hub_token = None
    assert (again, scratch) == (options, ScratchConfig(hidden_size=64))


def test_training_arguments_are_saved_without_tokens(tmp_path):
    training = TrainingArguments(
        output_dir=str(tmp_path),
        learning_rate=3e-5,
        hub_token="hf_secret",
        push_to_hub=False,
        report_to="none",
        use_cpu=True,
    )
    save_config(tmp_path / "config.yaml", ScratchConfig(), training)
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert (saved["learning_rate"], saved["hidden_size"], saved["output_dir"]) == (3e-5, 256, str(tmp_path))
    assert not any(key.endswith("_token") for key in saved)
    again = parse_config(TrainingArguments, ScratchConfig, args=["--config", str(tmp_path / "config.yaml")])[0]
    assert again.learning_rate == 3e-5 and again.hub_token is None


def test_run_command(tmp_path, monkeypatch, capsys):
    seen = []

    def main(options):
        seen.append(options)
        if options.steps == 99:
            raise FileNotFoundError("several\n  lines of\nexplanation")
        if options.steps == 98:
            raise KeyError("a bug")

    def run(*args, errors=(FileNotFoundError,)):
        monkeypatch.setattr(sys, "argv", ["command", "--dataset", "d", *args])
        run_command(main, Options, errors=errors)

    run("--steps", "3")
    assert seen == [Options("d", 3)]
    with pytest.raises(SystemExit) as caught:
        run("--steps", "99")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: several lines of explanation\n"
    with pytest.raises(KeyError):  # not the user's to mend: keeps its traceback
        run("--steps", "98")
    monkeypatch.setenv("T2I_ALIGN_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        run("--steps", "99")


@pytest.mark.parametrize("text", ["dataset: d\nbatch_sise: 4\n", "dataset: [unclosed\n"])
def test_an_error_of_a_real_command_is_one_line(tmp_path, text):
    path = write(tmp_path, text)
    command = [sys.executable, "-m", "align.evaluation.hallucination", "--config", path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {path}") and done.stderr.count("\n") == 1
    if "sise" in text:
        assert done.stderr.endswith("unknown key `batch_sise`. Did you mean `batch_size`?\n")


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [('{"a": 1}', dict, {"a": 1}), ({"a": 1}, dict, {"a": 1}), ("[1]", list, [1]), ([], list, [])],
)
def test_mappings_and_lists_are_json_on_a_command_line(value, kind, expected):
    assert from_json("x", value, kind) == expected


@pytest.mark.parametrize(("value", "kind"), [("{", dict), ("[1]", dict), ("{}", list), (7, dict)])
def test_what_is_neither_is_named(value, kind):
    with pytest.raises(ValueError, match="`x` must be a (mapping|list)"):
        from_json("x", value, kind)

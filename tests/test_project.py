"""What holds for the project as a whole: imports, layers, names, configuration files."""

import ast
import importlib.metadata
import pkgutil
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("rewards", "rollouts", "align", "pocket")  # ground floor first
PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def modules():
    return sorted(
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
        for package in PACKAGES
        for path in (REPOSITORY / package).rglob("*.py")
    )


def needed(distributions):
    """These distributions and all that they need, by normalised name."""
    todo, found = list(distributions), set()
    while todo:
        name = canonicalize_name(todo.pop())
        if name in found:
            continue
        found.add(name)
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        requirements = map(Requirement, lines)
        todo += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def test_every_module_imports_with_core_dependencies_only():
    core = needed(Requirement(line).name for line in PYPROJECT["dependencies"])
    extras = {Requirement(line).name for lines in PYPROJECT["optional-dependencies"].values() for line in lines}
    optional = {canonicalize_name(name) for name in extras} - core - {"t2i-align"}
    assert {"openai", "matplotlib", "gguf", "deepspeed"} <= optional
    modules_of = importlib.metadata.packages_distributions().items()
    hidden = {m for m, names in modules_of if {canonicalize_name(name) for name in names} & optional}
    script = f"""
import importlib, sys
hidden = {hidden!r}
class Without:  # as if they were not installed
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in hidden else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
for name in {modules()!r}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        # What draws is imported by rollouts.workers alone, which says what to install.
        draws = name in {{"rollouts.loras", "rollouts.pipelines", "rollouts.rendering"}}
        draws = draws or name in {{"pocket.gallery", "pocket.untrained"}} or name.startswith("pocket.train.")
        assert "t2i-align[" in str(error) or (draws and error.name == "diffusers"), (name, error)
assert not hidden & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr[-2000:]


def test_import_rewards_is_light():
    script = "import sys, rewards; print([m for m in ('torch', 'transformers', 'pandas') if m in sys.modules])"
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_down_only(package):
    above = set(PACKAGES[PACKAGES.index(package) + 1 :]) | {"tests", "benchmarks"}
    for path in (REPOSITORY / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & above, path


def test_nothing_in_align_shadows_an_installed_package():
    # `accelerate launch align/sft.py` puts align/ first on sys.path.
    ours = {module.name for module in pkgutil.iter_modules([str(REPOSITORY / "align")])}
    assert "sft" in ours
    assert not ours & (set(importlib.metadata.packages_distributions()) | set(sys.stdlib_module_names))


def config_classes(path):
    """The dataclasses that a configuration file's command reads, from the command in its head."""
    from trl import ModelConfig, SFTConfig

    from align.agents.serve import ServeConfig
    from align.bench.chatgen.config import ChatGenBenchConfig
    from align.bench.config import DABenchConfig
    from align.evaluation.chatgen import ChatGenEvaluationConfig
    from align.evaluation.chatgen_draw import ChatGenDrawConfig, DrawingConfig
    from align.evaluation.diffagent import DiffAgentTablesConfig
    from align.evaluation.hallucination import HallucinationConfig
    from align.model_tokens import ModelTokenArguments
    from align.rrhf import RRHFArguments
    from align.scratch import ScratchConfig
    from align.sft import SFTArguments
    from align.trainers import ModelTokenConfig, RRHFConfig
    from rewards.score import ScoreConfig
    from rewards.serve import RewardServiceConfig
    from rollouts.candidates import CandidatesConfig
    from rollouts.plan import PlanConfig
    from rollouts.run import RunConfig

    commands = {
        "align.agents.serve": (ServeConfig,),
        "align/rrhf.py": (RRHFArguments, RRHFConfig, ModelConfig),
        "rewards.score": (ScoreConfig,),
        "rewards.serve": (RewardServiceConfig,),
        "rollouts.candidates": (CandidatesConfig,),
        "rollouts.run": (RunConfig,),
        "rollouts.plan": (PlanConfig,),
        "align/model_tokens.py": (ModelTokenArguments, ModelTokenConfig),
        "align/sft.py": (SFTArguments, SFTConfig, ModelConfig, ScratchConfig),
        "align.bench.dabench": (DABenchConfig,),
        "align.bench.chatgen": (ChatGenBenchConfig,),
        "align.evaluation.chatgen ": (ChatGenEvaluationConfig, DrawingConfig),
        "align.evaluation.chatgen_draw": (ChatGenDrawConfig, DrawingConfig),
        "align.evaluation.diffagent": (DiffAgentTablesConfig,),
        "align.evaluation.hallucination": (HallucinationConfig,),
    }
    head = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    return next(classes for command, classes in commands.items() if command in head)


@pytest.mark.parametrize(
    "path",
    sorted([*REPOSITORY.glob("configs/[dpr]*/*.yaml"), *REPOSITORY.glob("configs/chatgen/[bdet]*.yaml")]),
    ids=lambda p: f"{p.parent.name}/{p.name}",
)
def test_config_file_is_read_by_its_command(path, tmp_path, monkeypatch):
    from rewards.commandline import parse_config

    monkeypatch.chdir(tmp_path)
    # bf16 is refused where there is neither a GPU nor `use_cpu`; the key itself is what is tested here.
    rollout = ["--calls", "c", "--catalog", "c", "--weights", "w", "--output", "o"]
    required = {"dabench.yaml": ["--source", "s", "--output", "o"], "score.yaml": ["--source", "s", "--output", "o"]}
    required["bench.yaml"] = required["dabench.yaml"]
    required["tables.yaml"] = ["--dataset", "d", "--output_dir", "o", "--weights", "w"]
    required["chatgen_tables.yaml"] = required["tables.yaml"]
    required["drawing.yaml"] = ["--output_dir", "o", "--catalog", "c", "--weights", "w"]
    required["candidates.yaml"] = ["--model_name_or_path", "m", "--catalog", "c", "--dataset", "d", "--output", "o"]
    required["evo_tokens.yaml"] = ["--model_name_or_path", "m", "--dataset", "d", "--output_dir", "o"]
    required["chatgen_tokens.yaml"] = required["evo_tokens.yaml"]
    required["agent.yaml"] = ["--model_name_or_path", "m", "--dataset", "d"]
    required |= {"run.yaml": rollout, "ray.yaml": rollout, "rollout.yaml": rollout}
    flags = required.get(
        path.name, [] if path.name in ("serve.yaml", "plan.yaml") else ["--dataset", "d", "--output_dir", "o"]
    )
    mapping = yaml.safe_load(path.read_text())
    flags += ["--bf16", "false"] if mapping.get("bf16") and not mapping.get("use_cpu") else []
    classes = config_classes(path)
    parsed = parse_config(*classes, args=["--config", str(path), *flags])
    values = {}
    for config in parsed if isinstance(parsed, tuple) else (parsed,):
        values |= vars(config)
    # TRL turns names into lists and enumerations; what was written is still in them.
    for key in mapping.keys() - {"bf16", "report_to", "scorers"}:
        assert values[key] == mapping[key] or str(mapping[key]).lower() in str(values[key]).lower(), key


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("configs/accelerate/*.yaml")), ids=lambda p: p.name)
def test_accelerate_file_is_read(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == (2 if path.name.startswith("cpu_") else 1 if "single" in path.name else 8)
    assert path.read_text().startswith("# ")


def test_every_config_file_says_what_it_is():
    for path in REPOSITORY.glob("configs/d*/*.yaml"):
        head = path.read_text().split("\n\n")[0]
        assert "Hardware:" in path.read_text() and head.startswith("# "), path


def test_gradients_are_accumulated_as_the_launcher_says():
    """DeepSpeed refuses to start where the two files differ."""
    checked = 0
    for path in REPOSITORY.glob("configs/*/*.yaml"):
        launcher = re.search(r"configs/accelerate/zero\d\.yaml", path.read_text())
        if launcher and path.parent.name != "accelerate":
            said = yaml.safe_load((REPOSITORY / launcher[0]).read_text())["deepspeed_config"]
            mine = yaml.safe_load(path.read_text())
            assert mine.get("gradient_accumulation_steps", 1) == said["gradient_accumulation_steps"], path
            checked += 1
    assert checked > 5

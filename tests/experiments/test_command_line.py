"""The console script: every command as a user calls it, and what it says when they err."""

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml

from ensembles import __version__
from ensembles.experiments.command_line import COMMANDS, main
from ensembles.experiments.commands.parsing import values_of
from ensembles.experiments.data.cifar10 import CLASSES
from ensembles.experiments.data.sources import load_images
from ensembles.experiments.evaluation.loading import CombinedNetwork, load_named
from ensembles.experiments.evaluation.results import read_result
from ensembles.experiments.training.networks import NetworkOptions, SingleNetwork
from ensembles.experiments.training.options import Execution, TrainingOptions
from ensembles.experiments.training.trainer import train
from ensembles.models.resnet import resnet18

COMMAND_FILES = Path(__file__).parents[2] / "ensembles" / "experiments" / "commands"

QUICK = (
    "--data digits --network.base_channels 1 --training.epochs 1 --training.batch_size 450 "
    "--execution.progress false --execution.tensorboard false --execution.accelerator cpu"
)


def ensembles(line):
    return main(shlex.split(line))


def only_line(captured):
    """The one line that an error is told in."""
    assert captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.err
    return captured.err.rstrip("\n")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs: an ensemble of two, a network alone, and one of CIFAR-10's classes."""
    folder = tmp_path_factory.mktemp("runs")
    two = f"train {folder}/two {QUICK} --network.kind ensemble --network.members 2 --seed 3"
    assert ensembles(two) == 0
    assert ensembles(f"train {folder}/one {QUICK} --training.validation 100") == 0
    airplanes = load_images("digits", "train").select(range(450))
    train(
        NetworkOptions(base_channels=1),
        TrainingOptions(epochs=1, batch_size=400),
        replace(airplanes, name="cifar10", classes=CLASSES),
        folder / "cifar",
        execution=Execution(accelerator="cpu", progress=False, tensorboard=False),
    )
    return folder


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """A module of the user's, in the current folder."""
    (tmp_path / "zoo_of_commands.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "from ensembles import Subject\n"
        "def apart():\n    return [nn.Linear(4, 2) for _ in range(3)]\n"
        "def repeated():\n    return [nn.Linear(4, 2)] * 3\n"
        "def unlucky():\n    raise RuntimeError('no weights here')\n"
        "def silent():\n    return Subject(make=apart, name='silent')\n"
        "def not_a_number():\n"
        "    members = apart()\n"
        "    nn.init.constant_(members[0].weight, torch.nan)\n"
        "    return members\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    yield "zoo_of_commands"
    sys.modules.pop("zoo_of_commands", None)


# --- the script ---------------------------------------------------------------------------------


def test_the_overview_names_every_command_with_the_first_line_of_its_help(capsys):
    assert ensembles("--help") == 0
    shown = capsys.readouterr().out
    files = {p.stem for p in COMMAND_FILES.glob("*.py")} - {"__init__", "parsing"}
    assert set(COMMANDS) == files
    for name, summary in COMMANDS.items():
        tree = ast.parse((COMMAND_FILES / f"{name}.py").read_text())
        (run,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "run")
        assert ast.get_docstring(run).splitlines()[0] == summary
        assert f"  {name}" in shown
        assert summary in shown


def test_without_a_command_the_overview_is_shown_and_it_is_an_error(capsys):
    assert ensembles("") == 2
    assert "commands:\n  train" in capsys.readouterr().out


def test_the_version_is_told(capsys):
    assert ensembles("--version") == 0
    assert capsys.readouterr().out == f"pytest-ensembles {__version__}\n"


def test_an_unknown_command_is_told(capsys):
    assert ensembles("tarin") == 2
    assert "invalid choice: 'tarin' (choose from" in capsys.readouterr().err


def test_the_script_starts_without_torch_and_without_what_the_commands_need():
    """`ensembles --help` on a machine that is slow to import, or lacks the extra."""
    heavy = "torch lightning matplotlib scipy numpy jsonargparse pydantic torchvision".split()  # noqa: SIM905
    script = (
        "import sys\n"
        "from ensembles.experiments.command_line import main\n"
        "status = main(['--help'])\n"
        f"print(status, sorted(set({heavy}) & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "0 []"


def test_a_missing_extra_is_told_with_the_command_that_installs_it(capsys, monkeypatch):
    for name in [n for n in sys.modules if n.startswith("ensembles.experiments.commands")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert ensembles("check zoo:apart") == 2
    assert only_line(capsys.readouterr()) == (
        "ensembles check: error: jsonargparse is not installed: "
        'pip install "pytest-ensembles[experiments]"'
    )


def test_the_process_exits_with_the_status(tmp_path):
    command = [sys.executable, "-m", "ensembles.experiments.command_line", "check"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("ensembles check: error: the following arguments are required")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_tells_defaults_meanings_and_an_example(command, capsys):
    assert ensembles(f"{command} --help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"usage: ensembles {command}" in shown
    assert f"example: ensembles {command} " in shown
    assert "--config CONFIG" in shown
    assert "default:" in shown


def test_the_help_of_train_has_every_option_with_its_default(capsys):
    assert ensembles("train --help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, options in (
        ("network", NetworkOptions()),
        ("training", TrainingOptions()),
        ("execution", Execution()),
    ):
        for field in options.__dataclass_fields__:
            if field not in ("objective", "seed", "deterministic", "schedule"):
                assert f"--{name}.{field} " in shown
    assert "The base rate, which the schedule multiplies. (type: float, default: 0.1)" in shown
    assert "--training.schedule.warmup_epochs" in shown


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("evaluate --data digits", "the following arguments are required: model"),
        ("evaluate --model resnet20 --data digits --n 3", "unrecognized arguments: --n 3"),
        ("evaluate --model resnet20 --data digits --batch_size many", 'Parser key "batch_size"'),
        ("train a --data digits --trainin.lr 1", "--trainin.lr 1; did you mean --training.lr? ("),
        ("evaluate --modle=a --data digits", "did you mean --model? ("),
        ("plot pie results", 'Parser key "kind"'),
        ("check", "the following arguments are required: subject"),
    ],
)
def test_a_wrong_option_is_told_in_one_line_with_the_way_to_the_help(line, told, capsys):
    assert ensembles(line) == 2
    shown = only_line(capsys.readouterr())
    assert shown.startswith(f"ensembles {line.split()[0]}: error: ")
    assert told in shown
    assert shown.endswith(f"(ensembles {line.split()[0]} --help shows all options)")


def lines_of_the_readme():
    """The commands in the README's code, lines that are continued joined."""
    text = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("ensembles ")]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_calls_no_value_by_its_python_name(command, capsys):
    assert ensembles(f"{command} --help") == 0
    assert "None" not in capsys.readouterr().out


@pytest.mark.parametrize("option", ["training.augment", "training.compile", "lam", "root"])
def test_null_is_asked_for_where_none_is_given(option, tmp_path, capsys):
    """As text, None is the backend or the folder of that name."""
    train = f"train {tmp_path}/run --data digits"
    told = f"ensembles train: error: write --{option} null in place of --{option} None ("
    for line in (f"--{option} None", f"--{option}=None"):
        assert ensembles(f"{train} {line}") == 2
        assert only_line(capsys.readouterr()).startswith(told)
    values = {}
    inner = values
    *outer, last = option.split(".")
    for name in outer:
        inner = inner.setdefault(name, {})
    inner[last] = "None"
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
    assert ensembles(f"{train} --config {tmp_path}/a.yaml") == 2
    assert f"a.yaml: {option}: write null in place of None (" in only_line(capsys.readouterr())
    assert not (tmp_path / "run").exists()


def test_a_folder_may_be_called_none(capsys):
    assert ensembles("convert None member.pt") == 2
    assert only_line(capsys.readouterr()) == "ensembles convert: error: there is no checkpoint None"


def test_the_readme_shows_every_command():
    assert {line.split()[1] for line in lines_of_the_readme()} == set(COMMANDS)


@pytest.mark.parametrize("line", lines_of_the_readme())
def test_the_commands_of_the_readme_are_understood(line):
    _, command, *arguments = shlex.split(line)
    module = import_module(f"ensembles.experiments.commands.{command}")
    values_of(module.parser(), arguments)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_of_the_helps_are_understood(command):
    module = import_module(f"ensembles.experiments.commands.{command}")
    for line in module.EXAMPLE.replace("\\\n", " ").splitlines():
        _, named, *arguments = shlex.split(line)
        assert named == command
        values_of(module.parser(), arguments)


# --- train --------------------------------------------------------------------------------------


def test_train_writes_a_run_that_says_how_it_was_trained(runs):
    options = json.loads((runs / "two" / "options.json").read_text())
    assert options["network"]["kind"] == "ensemble"
    assert options["network"]["members"] == 2
    assert options["training"]["seed"] == 3
    assert options["training"]["objective"] == {"name": "sum"}
    assert options["training"]["validation"] == 0.1
    assert json.loads((runs / "one" / "options.json").read_text())["training"]["validation"] == 100
    assert (runs / "two" / "epochs.csv").is_file()


def test_train_goes_on_with_its_own_run_and_leaves_others_alone(runs, capsys):
    before = (runs / "one" / "epochs.csv").read_bytes()
    assert ensembles(f"train {runs}/one {QUICK} --training.validation 100") == 0
    told = "this run was already finished, so nothing was trained: 2 steps, accuracies of the last"
    assert capsys.readouterr().out.startswith(told)
    assert ensembles(f"train {runs}/one {QUICK} --training.validation 100 --seed 1") == 2
    told = capsys.readouterr().err
    assert "belongs to another run, which differs in\n  training.seed: 0 there, 1 here\n" in told
    assert (runs / "one" / "epochs.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--deterministic", "training.deterministic: false there, true here"),
        ("--objective mean", 'training.objective.name: "sum" there, "mean" here'),
        ("--training.order own", 'training.order: "shared" there, "own" here'),
        ("--training.augment own", 'training.augment: "shared" there, "own" here'),
        ("--training.augment null", 'training.augment: "shared" there, null here'),
        ("--training.schedule.warmup_epochs 0.5", "schedule.warmup_epochs: 0.0 there, 0.5 here"),
    ],
)
def test_an_option_reaches_the_run_that_it_describes(option, told, runs, capsys):
    assert ensembles(f"train {runs}/one {QUICK} --training.validation 100 {option}") == 2
    assert f"  {told}\n" in capsys.readouterr().err.replace("  training.sch", "  sch")


def test_train_tells_of_a_small_last_batch_and_calls_no_new_run_finished(tmp_path, capsys):
    few = "--training.batch_size 448 --training.drop_last false"
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message="the last batch")
        assert ensembles(f"train {tmp_path}/run {QUICK} {few}") == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("3 steps, accuracies of the last epoch:\n")
    told = "ensembles train: warning: the last batch of every epoch has 4 of 900 images, the others"
    assert only_line(shown).startswith(told)


def test_of_several_processes_one_tells(runs, capsys, monkeypatch):
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert ensembles(f"train {runs}/one {QUICK} --training.validation 100") == 0
    assert capsys.readouterr().out == ""


def test_a_config_file_sets_the_options_of_the_command_line(tmp_path, runs, capsys):
    values = {
        "data": "digits",
        "seed": 3,
        "network": {"kind": "ensemble", "members": 2, "base_channels": 1},
        "training": {"epochs": 1, "batch_size": 450},
        "execution": {"progress": False, "tensorboard": False, "accelerator": "cpu"},
    }
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(values))
    # The folder is that run's, so that other options would be refused.
    assert ensembles(f"train {runs}/two --config {tmp_path}/two.yaml") == 0
    assert ensembles(f"train {runs}/two --config {tmp_path}/two.yaml --seed 4") == 2
    assert "training.seed: 3 there, 4 here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            b"network: {kind: ensemble, memebrs: 3}",
            ": there is no option network.memebrs; did",
        ),
        (
            b"training: {schedule: {nome: step}}",
            ": there is no option training.schedule.nome; did",
        ),
        (b"trainning: {epochs: 3}", ": there is no option trainning; did you mean training? ("),
        (b"xylophone: 1", ": there is no option xylophone ("),
        (b"data: [digits", " is not YAML: while parsing a flow sequence"),
        (bytes(range(128, 256)), " is not YAML: 'utf-8' codec can't decode byte 0x80"),
        (b"", " holds no options: write a value for each name, such as seed: 1 ("),
        (b"- digits", " holds no options: write a value"),
    ],
)
@pytest.mark.parametrize("joint", ["=", " "])
def test_a_wrong_config_file_is_named(content, told, joint, tmp_path, capsys):
    (tmp_path / "a.yaml").write_bytes(content)
    assert ensembles(f"train {tmp_path}/run --data digits --config{joint}{tmp_path}/a.yaml") == 2
    assert f"ensembles train: error: {tmp_path}/a.yaml{told}" in only_line(capsys.readouterr())
    assert not (tmp_path / "run").exists()


def test_a_config_file_that_is_missing_is_named(tmp_path, capsys):
    assert ensembles(f"evaluate --config {tmp_path}/none.yaml") == 2
    assert f"File does not exist: '{tmp_path}/none.yaml'" in only_line(capsys.readouterr())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--objective interpolated", "the objective interpolated needs --lam, a number from 0"),
        ("--objective interpolated --lam 1.5", "lam must be"),
        (
            "--objective stochastic --p .5",
            "a network of kind 'single' has none: set kind='subnets'",
        ),
        ("--objective sum --lam 0.5", "--lam has no meaning for the objective sum: leave it out"),
        ("--objective stochastic --p 0.5 --beta 0.1", "--beta has no meaning for the objective st"),
        ("--training.lr -1", "lr must be a finite number above 0, got -1.0"),
        ("--network.kind subnets", "width=1 leaves no subnets beside the parent"),
        ("--network.classes 7", "the network has 7 classes, and digits has 10"),
        ("--data nothing", "there is no set of images 'nothing'"),
    ],
)
def test_train_refuses_what_makes_no_sense(options, told, tmp_path, capsys):
    assert ensembles(f"train {tmp_path}/run {QUICK} {options}") == 2
    assert told in only_line(capsys.readouterr())
    assert not (tmp_path / "run" / "checkpoints").exists()


# --- evaluate -----------------------------------------------------------------------------------


def test_evaluate_writes_a_result_with_the_command_and_all_digests(runs, tmp_path, capsys):
    line = (
        f"evaluate --model {runs}/two --data digits --shifted rotation:3,noise:5 "
        f"--out {tmp_path} --seed 7 --device cpu"
    )
    assert ensembles(line) == 0
    shown = capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    assert shown.splitlines()[-1] == str(path)
    assert path.name.startswith("two-digits_to_digits_rotation_3_to_digits_noise_5-")
    result = read_result(path)
    assert result.command == ["ensembles", *shlex.split(line)]
    assert result.seed == 7
    assert result.model.name == "two"
    assert result.model.options["network"]["members"] == 2
    assert result.model.options["training"]["seed"] == 3
    assert [weights.file for weights in result.model.weights] == ["step_00000002.ckpt"]
    assert [e.data.name for e in result.evaluations] == [
        "digits",
        "digits_rotation_3",
        "digits_noise_5",
    ]
    assert "seed 7" in result.evaluations[1].data.version
    first = result.evaluations[0]
    assert list(first.members) == ["member_0", "member_1"]
    assert first.reduced == ["member_0", "member_1"]
    for name, score in first.members.items():
        row = next(line for line in shown.splitlines() if line.startswith(name))
        assert f"{100 * score.correct / 797:.2f} (" in row


def test_networks_that_were_trained_apart_are_evaluated_as_one_ensemble(runs, tmp_path):
    line = f"evaluate --model {runs}/one,{runs}/two/ --data digits --out {tmp_path}/r.json"
    assert ensembles(line) == 0
    result = read_result(tmp_path / "r.json")
    assert result.model.name == "one+two"
    assert list(result.evaluations[0].members) == ["one", "two.member_0", "two.member_1"]
    assert len(result.model.weights) == 2
    alone = tmp_path / "alone.json"
    assert ensembles(f"evaluate --model {runs}/one --data digits --out {alone}") == 0
    single = read_result(alone).evaluations[0]
    assert single.members["single"] == result.evaluations[0].members["one"]
    assert single.reductions == {}


def test_members_that_are_one_network_are_told(runs, tmp_path, capsys):
    shutil.copytree(runs / "one", tmp_path / "copy")
    evaluate = f"evaluate --data digits --out {tmp_path}/results --model"
    assert ensembles(f"{evaluate} {runs}/one,{runs}/two,{tmp_path}/copy") == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "one network" in line]
    assert told == [
        "one and copy give the same probabilities for every image: they are one network, and one "
        "network is no ensemble. Train them with different seeds."
    ]
    assert ensembles(f"{evaluate} {runs}/one,{runs}/two") == 0
    assert "one network" not in capsys.readouterr().err


def test_evaluate_overwrites_nothing_and_looks_before_it_computes(runs, tmp_path, capsys):
    path = tmp_path / "kept.json"
    path.write_text("precious")
    assert ensembles(f"evaluate --model nothing --data digits --out {path}") == 2
    assert "kept.json exists, and is not overwritten" in only_line(capsys.readouterr())
    assert path.read_text() == "precious"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--model resnet21", "there is no model 'resnet21': name a pretrained network (resnet20,"),
        (
            "--model cifar",
            "the network classifies airplane, automobile, bird and 7 more, and digits",
        ),
        ("--model cifar,one", "cifar, one classify different things: they are no ensemble"),
        ("--model one --data moons", "there is no set of images 'moons'"),
        ("--model one --shifted moons", "there is no set of images 'moons'"),
        ("--model one --shifted rotation", "shifted=rotation needs a level from 1 to 5, such"),
        ("--model one --shifted rotation:x", "shifted=rotation:x: a level is a whole number"),
        ("--model one --shifted rotation:6", "level=6: levels are the whole numbers from 1"),
        ("--model one --shifted fog:3", "there is no corruption 'fog'"),
        ("--model one --shifted digits", "digits is given 2 times: give it once"),
        ("--model one --shifted blur:1,blur:1", "digits_blur_1 is given 2 times: give it once"),
        ("--model one,one", "one is there 2 times: one network is no ensemble"),
        ("--model ''", "name at least one model"),
        ("--model one --device warp", "device 'warp' is not available"),
        ("--model one --batch_size 0", "batch_size must be at least 1, got 0"),
        ("--model . ", "has no checkpoint: it is no folder of `ensembles train`"),
        ("--model one/options.json", "is no whole checkpoint: File is not a zip file"),
    ],
)
def test_evaluate_says_what_is_wrong(options, told, runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(runs)
    data = "" if "--data" in options else "--data digits"
    assert ensembles(f"evaluate {options} {data} --out {tmp_path}") == 2
    captured = capsys.readouterr()
    assert told in captured.err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_set_of_other_classes_is_no_shifted_set(monkeypatch):
    from ensembles.experiments.commands.evaluate import _sets

    digits = load_images("digits", "test")
    others = replace(digits, name="letters", classes=tuple("abcdefghij"))
    sets = {"digits": digits, "cifar10_jpeg": others}
    monkeypatch.setattr(
        "ensembles.experiments.data.sources.load_images", lambda name, *_, **__: sets[name]
    )
    told = r"cifar10_jpeg has other classes \(a, b, .*\) than digits \(0, 1, .*\): it is not a"
    with pytest.raises(ValueError, match=told):
        _sets("digits", ["cifar10_jpeg"], "test", root=None, download=False, seed=0, paired=False)


def test_the_same_images_are_found_by_their_index():
    from ensembles.experiments.commands.evaluate import _same

    whole = load_images("digits", "test")
    inside, outside = whole.select([5, 2, 9]), whole.select(list(range(20, -1, -1)))
    found = _same(inside, outside)
    assert found.indices.tolist() == inside.indices.tolist()
    assert torch.equal(found.pixels, inside.pixels)
    with pytest.raises(ValueError, match="lacks 1 of the 3 images of digits, the first is image"):
        _same(inside, whole.select([5, 2]))


def test_networks_are_combined_under_names_of_their_own():
    one, other = SingleNetwork(torch.nn.Linear(4, 2)), SingleNetwork(torch.nn.Linear(4, 2))
    combined = CombinedNetwork({"a": one, "b": other})
    x = torch.randn(3, 4)
    assert torch.equal(combined(x)["b"], other(x)["single"])
    assert list(combined(x, ["b"])) == ["b"]
    one.normalisation = ((0.0,) * 3, (1.0,) * 3)
    with pytest.raises(ValueError, match="a, b take images that are normalised differently"):
        CombinedNetwork({"a": one, "b": other})


def test_runs_of_one_name_are_told_apart_by_their_folders(runs, tmp_path, monkeypatch):
    (tmp_path / "seed_1").mkdir()
    (tmp_path / "seed_1" / "one").symlink_to(runs / "one")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "seed_0").symlink_to(runs)
    assert load_named(["seed_0/one", "seed_1/one"]).network.member_names == (
        "seed_0/one",
        "seed_1/one",
    )


# --- convert ------------------------------------------------------------------------------------


def test_convert_writes_a_plain_state_dict_of_a_member(runs, tmp_path, capsys):
    out = tmp_path / "member.pt"
    assert ensembles(f"convert {runs}/two {out} --member member_1") == 0
    assert "member_1 of" in capsys.readouterr().out
    network = resnet18(num_classes=10, stem="cifar", base_channels=1)
    network.load_state_dict(torch.load(out, weights_only=True))
    member = load_named([str(runs / "two")]).network.members[1]
    assert all(
        torch.equal(value, member.state_dict()[name])
        for name, value in network.state_dict().items()
    )
    assert ensembles(f"convert {runs}/two {out}") == 2
    assert "member.pt exists, and is not overwritten" in only_line(capsys.readouterr())
    assert ensembles(f"convert {runs}/two {tmp_path}/x.pt --member member_7") == 2
    assert "member_7" in only_line(capsys.readouterr())
    assert not (tmp_path / "x.pt").exists()
    assert ensembles(f"convert nowhere.ckpt {tmp_path}/x.pt") == 2
    error = "ensembles convert: error: there is no checkpoint nowhere.ckpt"
    assert only_line(capsys.readouterr()) == error


# --- plot ---------------------------------------------------------------------------------------


def test_plot_draws_curves_of_runs_and_overwrites_nothing(runs, tmp_path, capsys):
    out = tmp_path / "curves.png"
    assert ensembles(f"plot curves {runs} --out {out}") == 0
    assert capsys.readouterr().out == f"{out}\n"
    before = out.read_bytes()
    assert before.startswith(b"\x89PNG")
    assert ensembles(f"plot curves {runs}/one --out {out}") == 2
    assert "curves.png exists, and is not overwritten" in only_line(capsys.readouterr())
    assert out.read_bytes() == before
    assert (
        ensembles(f"plot curves both={runs}/one,{runs}/two {runs}/two --out {tmp_path}/b.svg") == 0
    )
    assert "both" in (tmp_path / "b.svg").read_text()
    assert ensembles(f"plot curves {runs} {runs}/two --out {tmp_path}/c.svg") == 2
    assert "two runs are called 'two'" in capsys.readouterr().err


def test_plot_draws_one_picture_for_each_shifted_set(runs, tmp_path, capsys):
    evaluate = f"evaluate --model {runs}/two --data digits --shifted blur:1,contrast:2"
    assert ensembles(f"{evaluate} --out {tmp_path}/results") == 0
    assert ensembles(f"plot robustness {tmp_path}/results --out {tmp_path}/plots") == 0
    drawn = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert drawn == ["digits_to_digits_blur_1.png", "digits_to_digits_contrast_2.png"]
    capsys.readouterr()
    assert ensembles(f"plot robustness {tmp_path}/results --out {tmp_path}/one.png") == 2
    assert "there are 2 pictures, one for each shifted set" in only_line(capsys.readouterr())


def test_plot_leaves_out_results_without_a_shifted_set_and_says_so(runs, tmp_path, capsys):
    evaluate = f"evaluate --model {runs}/one --data digits --out {tmp_path}/results"
    assert ensembles(evaluate) == 0
    plot = f"plot robustness {tmp_path}/results --out {tmp_path}/a.png"
    assert ensembles(plot) == 2
    *left_out, error = capsys.readouterr().err.splitlines()
    (path,) = (tmp_path / "results").iterdir()
    assert left_out[-1] == f"{path.stem}: left out, because it is on digits only"
    assert error.startswith("ensembles plot: error: no result has a shifted set: `ensembles eval")
    assert ensembles(f"{evaluate} --shifted blur:1") == 0
    capsys.readouterr()
    assert ensembles(plot) == 0
    shown = capsys.readouterr()
    assert shown.err == f"{path.stem}: left out, because it is on digits only\n"
    assert shown.out == f"{tmp_path}/a.png\n"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("robustness empty", "empty has no results: there is no .json file in it. `ensembles eval"),
        ("robustness nowhere.json", "there is no result nowhere.json: `ensembles evaluate` writes"),
        ("robustness bad.json", "bad.json is no result: it is no JSON text"),
        ("robustness empty --title x", "are options of `ensembles plot curves`"),
        ("curves empty", "empty holds no runs"),
        ("curves nowhere", "nowhere"),
        (
            "curves =empty",
            "'=empty' is not of the form NAME=RUN,RUN: give a name and folders of runs",
        ),
        ("curves mean=", "'mean=' is not of the form NAME=RUN,RUN"),
    ],
)
def test_plot_says_what_is_wrong(line, told, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    assert ensembles(f"plot {line}") == 2
    assert told in only_line(capsys.readouterr())
    assert not (tmp_path / "plots").exists()


# --- check --------------------------------------------------------------------------------------


def test_check_passes_members_that_are_apart(zoo, capsys):
    assert ensembles(f"check {zoo}:apart --require sharing,ownership") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "apart"
    assert lines[1].startswith("  sharing     held   3 members, 6 parameters and buffers")
    assert lines[-1].endswith("claims hold")


def test_check_tells_what_is_broken_and_how_to_replay_it(zoo, capsys):
    assert ensembles(f"check {zoo}:repeated --seed 5") == 1
    shown = capsys.readouterr().out
    assert "\nsharing: members 0, 1, 2 are claimed independent, but share parameters\n" in shown
    assert shown.endswith(f"\nreplay: ensembles check {zoo}:repeated --seed 5\n")


def test_check_tells_when_it_could_not_look(zoo, capsys):
    assert ensembles(f"check {zoo}:not_a_number") == 3
    shown = capsys.readouterr().out
    assert "parameter 0.weight holds NaN" in shown
    assert "0 broken," in shown


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("zoo_of_commands", "'zoo_of_commands' names no factory: write package.module:factory"),
        ("nowhere:build", "cannot import 'nowhere'"),
        ("zoo_of_commands:nothing", "'zoo_of_commands' has no 'nothing'"),
        ("zoo_of_commands:unlucky", "the factory 'unlucky' raised RuntimeError: no weights here"),
        ("zoo_of_commands:silent", "silent claims nothing: give Subject(claims={check: claim})"),
        ("zoo_of_commands:apart --require cost", "apart does not claim cost: add it to Subject("),
        ("zoo_of_commands:apart --require x", "require names 'x', but there is no such check"),
    ],
)
def test_check_says_what_is_wrong_with_the_subject(arguments, told, zoo, capsys):
    assert ensembles(f"check {arguments}") == 2
    assert told in only_line(capsys.readouterr())


def test_warnings_of_ours_are_told_in_a_line_and_those_of_others_with_their_place(
    monkeypatch, capsys
):
    from ensembles.experiments.commands import convert

    def warned(arguments):
        file = convert.__file__
        warnings.warn_explicit("the file is damaged", UserWarning, file, 1)
        warnings.warn_explicit("this is old", UserWarning, "/elsewhere/torch.py", 7)
        return 0

    monkeypatch.setattr(convert, "main", warned)
    shows = []

    def called():
        shows.append(warnings.showwarning)
        assert ensembles("convert a b") == 0
        shows.append(warnings.showwarning)

    with pytest.warns(UserWarning, match="this is old") as others:
        called()
    assert shows[0] is shows[1]
    shown = only_line(capsys.readouterr())
    assert shown == "ensembles convert: warning: the file is damaged"
    assert [(str(w.message), w.filename, w.lineno) for w in others] == [
        ("this is old", "/elsewhere/torch.py", 7)
    ]


def test_errors_that_are_ours_alone_keep_their_frames(monkeypatch):
    """A fault of this package is no error of the user's: its frames are needed to mend it."""
    from ensembles.experiments.commands import convert

    def fault(arguments):
        return {}["missing"]

    monkeypatch.setattr(convert, "main", fault)
    with pytest.raises(KeyError, match="missing"):
        ensembles("convert a b")


@pytest.mark.parametrize("told", ["", "interrupted; given again, the same goes on from a.ckpt"])
def test_an_interrupted_command_ends_as_shells_expect(told, monkeypatch, capsys):
    from ensembles.experiments.commands import convert

    def interrupted(arguments):
        raise KeyboardInterrupt(*filter(None, [told]))

    monkeypatch.setattr(convert, "main", interrupted)
    assert ensembles("convert a b") == 130
    shown = only_line(capsys.readouterr())
    assert shown == f"ensembles convert: error: {told or 'interrupted'}"

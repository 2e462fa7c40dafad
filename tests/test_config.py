"""The command line: flags from dataclass fields, files, recipes, and errors of one line."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from pathlib import Path

import pytest

import emrrg.config
from emrrg.config import (
    ModelConfig,
    TrainConfig,
    check_writable,
    from_dict,
    parse_config,
    to_dict,
)
from emrrg.errors import InputError
from emrrg.recipes import RECIPES, suggest


def parse(*argv: str) -> TrainConfig:
    return parse_config(TrainConfig, argv, "emrrg.train", suggest)[0]


def test_no_arguments_is_the_phantom_recipe():
    config = parse()
    assert (config.recipe, config.dataset, config.regime) == ("phantoms", "phantoms", "peft")
    assert (config.preset, config.lora_targets, config.lora_rank) == ("tiny", ("X",), 16)


def test_flags_beat_file_beats_recipe(tmp_path):
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"lr": 3e-4, "batch_size": 5}))
    data = ["--annotation", "a.json", "--images", "d"]
    config = parse("--recipe", "iu_xray", *data, "--config", str(file), "--batch-size", "7")
    assert config.epochs == RECIPES["iu_xray"]["epochs"] == 21  # the recipe
    assert config.lr == 3e-4  # the file over the recipe's 1e-4
    assert config.batch_size == 7  # the flag over both
    assert (config.num_beams, config.min_new_tokens, config.max_new_tokens) == (5, 40, 100)
    assert config.schedule == "epoch-cosine" and config.decay_all


def test_round_trip_through_json():
    config = parse("--hybrid-layers", "0,2", "--lora-targets", "X,dt_in", "--source-lr", "1e-3")
    values = json.loads(json.dumps(to_dict(config)))
    assert from_dict(TrainConfig, values, "x.json") == config
    assert config.hybrid_layers == (0, 2) and config.lora_targets == ("X", "dt_in")


def test_an_earlier_name_is_still_read(tmp_path):
    """`beams` became `num_beams`: runs and command lines of before go on working."""
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"beams": 7}))
    assert parse("--config", str(file)).num_beams == 7
    assert parse("--beams", "2").num_beams == parse("--num-beams", "2").num_beams == 2
    assert parse("--config", str(file), "--num-beams", "4").num_beams == 4
    values = {**to_dict(parse()), "beams": 6}
    del values["num_beams"]
    assert from_dict(TrainConfig, values, "config.json").num_beams == 6


@pytest.mark.parametrize("command", ["train", "evaluate", "generate", "score", "ablate", "data"])
def test_only_paths_are_called_paths(command, capsys):
    main = importlib.import_module(f"emrrg.{command}" + (".__main__" * (command == "data"))).main
    with pytest.raises(SystemExit):
        main([*(["prepare"] if command == "data" else []), "--help"])
    text = capsys.readouterr().out
    called = dict(re.findall(r"--([\w-]+) (PATH|NAME|DEVICE|FLAGS)\b", text))
    others = {"device": "DEVICE", "train-flags": "FLAGS", "split": "NAME"}
    for name, metavar in called.items():
        expected = "NAME" if name.endswith("-column") else others.get(name, "PATH")
        assert metavar == expected, name
    assert "--beams" not in text  # the old name is read, not told


def test_the_list_of_commands_is_whole(capsys):
    from emrrg.__main__ import COMMANDS, main

    package = Path(emrrg.config.__file__).parent
    modules = {p.stem for p in package.glob("*.py") if "run_command(main)" in p.read_text()}
    listed = {name.split()[0] for name in COMMANDS}
    assert listed == modules - {"__main__"} | {"data", "data.phantoms"}
    assert main([]) == main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"python -m emrrg.{name} " in text for name in COMMANDS)
    assert max(map(len, text.splitlines())) <= 100
    with pytest.raises(InputError, match=r"train: say python -m emrrg\.train"):
        main(["train", "--help"])
    with pytest.raises(InputError, match="trian: no such command"):
        main(["trian"])


def test_what_cannot_be_written_is_said_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "under.png", tmp_path):
        with pytest.raises(InputError, match=r"--heatmap: .* cannot be written \("):
            check_writable(path, "--heatmap")
    check_writable(tmp_path / "new" / "map.png", "--heatmap")
    assert not list((tmp_path / "new").iterdir())
    (tmp_path / "file").write_text("kept")
    check_writable(tmp_path / "file", "--heatmap")
    assert (tmp_path / "file").read_text() == "kept"


def test_regime_follows_the_weights():
    data = ["--dataset", "custom", "--annotation", "a.json", "--images", "d"]
    assert parse(*data).regime == "full"
    assert parse(*data, "--init", "runs/x").regime == "peft"
    assert parse(*data, "--vision-checkpoint", "v.pth").regime == "full"
    assert parse(*data, "--vision-checkpoint", "v.pth", "--llm", "l").regime == "peft"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--preset", "giant"], "--preset: invalid choice: 'giant'"),
        (["--epochs", "many"], "--epochs: invalid int value: 'many'"),
        (["--epochs", "0"], "--epochs: 0 is not at least 1"),
        (["--lr", "0"], "--lr: 0.0 is not above 0"),
        (["--lora-targets", "X,Y"], "--lora-targets: 'Y' is not one of"),
        (["--lora-dropout", "1"], "--lora-dropout: 1.0 is not in"),
        (["--image-size", "100"], "--image-size: 100 is not a multiple of 16"),
        (["--hybrid-layers", "a"], "--hybrid-layers: invalid"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--dataset", "iu_xray"], "--annotation: needed with --dataset iu_xray"),
        (["--annotation", "a.json"], "say --dataset"),
        (["--min-new-tokens", "500"], "--min-new-tokens: 500 is above --max-new-tokens"),
        (["--hybrid-every", "2", "--hybrid-layers", "0"], "--hybrid-every and --hybrid-layers"),
        (["--config", "missing.json"], "missing.json: cannot be read"),
    ],
)
def test_errors_name_the_flag_in_one_line(argv, says):
    with pytest.raises(InputError) as error:
        parse(*argv)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"epochz": 3}', "unknown key 'epochz'"),
        ('{"epochs": "3"}', "epochs: '3' is not int"),
        ('{"epochs": true}', "epochs: True is not int"),
        ('{"blind": 1}', "blind: 1 is not bool"),
        ("[1]", "holds a list"),
        ("{", "is not valid JSON"),
    ],
)
def test_a_wrong_config_file_is_named(tmp_path, text, says):
    file = tmp_path / "c.json"
    file.write_text(text)
    with pytest.raises(InputError) as error:
        parse("--config", str(file))
    assert says in str(error.value) and str(file) in str(error.value)


def test_every_flag_has_help(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in text
    import docstring_parser

    for cls in (TrainConfig, ModelConfig):
        documented = {p.arg_name for p in docstring_parser.parse_from_object(cls).params}
        assert documented == {f.name for f in dataclasses.fields(cls)}

"""The commands, from flags to text."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from flax import nnx

from experiments import generate as generate_command
from experiments import train as train_command
from experiments.command import load_run, parse_train
from experiments.presets import BYTES, PRESETS
from seqmodels import params
from seqmodels.data import VOCAB_SIZE
from seqmodels.train.metrics import read_rows

TEXT = "".join(f"{number} plus {number} is {2 * number}.\n" for number in range(300))
SMALL = "--model.width 16 --model.layers.0.0.2.window 8 --train.batch-size 2 --train.length 32 --log-every 1"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A tiny run of the demo preset on a text of its own."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text").mkdir()
    for part in range(3):
        (folder / "text" / f"{part}.txt").write_text(TEXT)
    flags = f"{SMALL} --data.source {folder / 'text'} --steps 4 --checkpoint-every 2 --workdir {folder / 'out'}"
    train_command.main(["demo", *flags.split()])
    return folder / "out"


def test_a_run_leaves_its_records(run_dir):
    result = json.loads((run_dir / "result.json").read_text())
    assert set(result["bits_per_byte"]) == {"model", "unigram", "bigram", "xz"}
    assert all(math.isfinite(value) for value in result["bits_per_byte"].values())
    assert [row["step"] for row in read_rows(run_dir / "metrics.jsonl")] == [1, 2, 3, 4]
    config = json.loads((run_dir / "config.json").read_text())
    assert config["settings"]["model"]["layers"][0][0][2]["window"] == 8
    assert {"curve.png", "curve.csv", "environment.json", "checkpoints"} <= {path.name for path in run_dir.iterdir()}


def test_the_same_command_has_nothing_left_to_do(run_dir, capsys):
    flags = json.loads((run_dir / "config.json").read_text())["overrides"]
    train_command.main(["demo", *flags, "--workdir", str(run_dir)])
    assert "going on from the checkpoint of step 4" in capsys.readouterr().out


def test_a_run_is_built_again_from_its_folder(run_dir):
    run = load_run(run_dir)
    assert (run.experiment.model.width, run.experiment.train.steps) == (16, 4)
    changed = json.loads((run_dir / "config.json").read_text())
    changed["settings"]["model"]["width"] = 32
    other = run_dir.parent / "changed"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=r"model.width: 32 -> 16"):
        load_run(other)


def test_text_is_generated_from_a_run(run_dir, capsys):
    texts = []
    for seed in (0, 0, 1):
        generate_command.main([str(run_dir), "--prompt", "1 plus", "--steps", "8", "--seed", str(seed)])
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("1 plus")
    assert len(texts[0]) > len("1 plus\n")
    assert texts[0] == texts[1] != texts[2]


def test_a_folder_without_a_run_or_checkpoint_says_so(run_dir, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        generate_command.main([str(tmp_path)])
    (tmp_path / "config.json").write_text((run_dir / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match="no checkpoint yet"):
        generate_command.main([str(tmp_path)])


def test_flags_reach_every_field():
    flags = "--steps 7 --seed 3 --train.learning-rate 0.5 --model.width 32 --model.layers.0.0.0.blocks 2"
    flags += " --model.channel.expansion 1 --model.layers.0.1 2 --workdir elsewhere --data.source text"
    flags += " --model.dropout 0.1"
    run, workdir = parse_train(["demo", *flags.split()])
    model, train, data = run.experiment.model, run.experiment.train, run.experiment.data
    assert (train.steps, train.seed, train.learning_rate, data.source) == (7, 3, 0.5, "text")
    assert (model.width, model.layers[0][0][0].blocks, model.layers[0][1], model.channel.expansion) == (32, 2, 2, 1)
    assert model.dropout == 0.1
    assert workdir == Path("elsewhere")
    assert "elsewhere" not in run.overrides
    assert parse_train(["demo"])[1] == Path("runs/demo")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("dmeo", "did you mean demo"),
        ("demo --stpes 3", "--steps"),
        ("demo --train.lerning-rate 3", "--train.learning-rate"),
        ("demo --train.steps 0", "train.steps is 0"),
        ("--steps 3", "the preset comes first"),
    ],
)
def test_mistakes_get_a_suggestion(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_train(arguments.split())
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_help_imports_nothing_slow():
    check = (
        "import sys, experiments.train, experiments.generate\n"
        "sys.exit(', '.join({'orbax.checkpoint', 'grain', 'matplotlib'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_an_error_is_one_line():
    command = [sys.executable, "-m", "experiments.train", "demo", "--data.source", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert re.fullmatch(r"error: no text source 'nowhere'.*\n", done.stderr)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_its_command_and_size(name):
    experiment = PRESETS[name]()
    model = nnx.eval_shape(lambda: train_command.build_model(experiment))
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params.split(model)[1]))
    said = PRESETS[name].__doc__
    assert f"Command: python -m experiments.train {name}" in said
    assert f"Size: {size / 1e6:.2f} M parameters" in said
    assert "Expect:" in said
    assert experiment.model.vocab_size == BYTES == VOCAB_SIZE
    assert dataclasses.is_dataclass(experiment)

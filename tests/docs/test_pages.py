"""README.md and docs/architecture.md: their code runs, and their tables and links say what is so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx

from experiments.presets import PRESETS
from seqmodels import ModelConfig
from seqmodels.hf import ARCHITECTURES, save_pretrained
from seqmodels.layers import NormConfig
from seqmodels.layers.stack import configs_of
from seqmodels.mixers import Mamba2Config, examples
from seqmodels.scan import scan
from seqmodels.scan.auto import RULES
from tools import mixers

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README, ARCHITECTURE = PAGES[0].read_text(), (ROOT / "docs" / "architecture.md").read_text()
FIRST_SCREEN = 45  # lines
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]*)(?:#([^)\s]*))?\)")


def table_after(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table after a line, without its head."""
    lines = page[page.index(heading) :].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target, anchor in LINK.findall(text):
        if target.startswith("https://"):
            continue
        path = (page.parent / target) if target else page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.slow
def test_the_code_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path)
    published = ModelConfig(11, 16, (((Mamba2Config(head_size=8, state_size=4),), 2),), norm=NormConfig(eps=1e-5))
    save_pretrained(published.make(rngs=nnx.Rngs(0)), "mamba2-130m-hf")
    blocks = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    peak, expected = -np.inf, []
    for fall, level in zip(np.asarray(names["fall"]), np.asarray(names["level"]), strict=True):
        peak = max(peak - fall, level)
        expected.append(peak)
    for method in ("sequential", "associative", "chunked"):
        np.testing.assert_allclose(scan(names["meter"], (names["fall"], names["level"]), method=method)[0], expected)
    last = max(expected[-1] - names["fall"][0], names["level"][0])
    np.testing.assert_allclose(names["peak"], last, rtol=1e-6)
    assert (tmp_path / "mine" / "model.safetensors").exists()
    assert names["logits"].shape == (2, 1, 257)
    assert names["result"].tokens.shape == (2, 20)


def test_the_first_screen_of_the_readme_has_the_idea_the_code_and_the_commands() -> None:
    screen = "\n".join(README.splitlines()[:FIRST_SCREEN])
    assert screen.index("Write an associative operator once") < screen.index("```python") < screen.index("make demo")
    assert "make test" in screen
    assert "in words of 180: **reproduced**" in screen[screen.index("python -m experiments.word_problems") :], (
        "a finding, and its command"
    )
    for target in re.findall(r"^make ([\w-]+)", README, flags=re.MULTILINE):
        assert f"\n{target}:" in (ROOT / "Makefile").read_text()


def test_the_readme_has_a_row_for_every_mixer() -> None:
    """As `python tools/mixers.py` writes it: files, executors, errors, bytes and presets are what they are."""
    assert {system.preset for system in mixers.SYSTEMS} == {name for name, _ in examples()}
    assert table_after(README, mixers.HEADING) == list(mixers.rows())
    assert all(row[-1] for row in mixers.rows()), "a mixer without a preset"


def test_the_preset_of_a_mixer_trains_that_mixer() -> None:
    for system in mixers.SYSTEMS:
        kinds = {type(config) for config in configs_of(PRESETS[system.preset]().model.layers)}
        assert type(system.config) in kinds


def test_the_readme_has_a_row_for_every_model() -> None:
    rows = list(mixers.model_rows())
    assert table_after(README, mixers.MODELS_HEADING) == rows
    published = {name for model in mixers.MODELS for name in model.published.split()}
    listed = {name for system in mixers.SYSTEMS for name in system.published.split()}
    assert published | listed == set(ARCHITECTURES)
    assert all(row[3] and row[5] for row in rows), "a model without evidence or a preset"


def test_the_preset_of_a_model_trains_its_layers() -> None:
    for model in mixers.MODELS:
        for name in model.presets.split():
            config = PRESETS[name]().model
            kinds = {type(layer) for layer in (*configs_of(config.layers), config.channel)}
            assert {type(layer) for layer in configs_of(model.layers)} <= kinds


def test_the_readme_names_every_preset() -> None:
    assert f"Presets: {', '.join(f'`{name}`' for name in PRESETS)} (" in " ".join(README.split())


def test_the_readme_and_the_preset_expect_the_same_of_the_demo() -> None:
    expected = re.findall(r"\d\.\d\d(?= bits|[,)])", (PRESETS["demo"].__doc__ or "").split("Expect:")[1])
    (row,) = table_after(README, "The demo ends with")
    assert sorted(row[1:]) == sorted(expected)


def test_the_architecture_shows_the_rules_of_auto() -> None:
    rows = table_after(ARCHITECTURE, "*How `auto` chooses.*")
    assert [row[1].strip("`") for row in rows] == [rule.method for rule in RULES]
    for (condition, _), rule in zip(rows, RULES, strict=True):
        assert ("CPU" in condition) == (rule.platform == "cpu")
        assert (rule.family or "") in condition
        assert ("`fold` and `emit`" in condition) == bool(rule.matmul_form)
        assert (rule.max_length is not None) == ("at most" in condition)
        assert rule.max_length is None or f"at most {rule.max_length} steps" in condition


def test_the_architecture_names_folders_that_are_there() -> None:
    for row in table_after(ARCHITECTURE, "## What stands where"):
        folder, *files = re.findall(r"`([\w/.]+)`", row[0])
        assert (ROOT / folder).is_dir(), folder
        for name in files:
            near = [(ROOT / folder).parent / name, ROOT / "seqmodels" / name]
            assert any(path.exists() for path in near), name

"""Writes the tables of mixers and models into README.md: `python tools/mixers.py`, part of `make evidence`.

Their rows stand in systems.py. What can be told is: the file from the config's class, executors from the methods that
it takes, bytes from its state, errors from docs/evidence.json, which the oracle and parity tests write.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from decimal import ROUND_UP, Context
from pathlib import Path
from typing import Any

import jax
from flax import nnx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from experiments.presets import PRESETS  # noqa: E402
from seqmodels import ModelConfig  # noqa: E402
from seqmodels.layers.stack import LayerGroups, configs_of  # noqa: E402
from seqmodels.mixers import AttentionConfig  # noqa: E402
from seqmodels.typing import ChannelConfig, MixerConfig  # noqa: E402
from tools.systems import MODELS, SYSTEMS, WIDTH  # noqa: E402

README, EVIDENCE = ROOT / "README.md", ROOT / "docs" / "evidence.json"
HEADING, MODELS_HEADING = "### Mixers", "### Models and channel layers"
CAPACITY = 4096
SCANS = ("sequential", "associative", "chunked")
METHODS = (*SCANS, "convolution", "newton")


def executors(config: MixerConfig) -> str:
    """What `method` may name; `scan` stands for sequential, associative and chunked."""
    if "method" not in {field.name for field in dataclasses.fields(config)}:
        return "sequential"
    taken = [method for method in METHODS if _takes(config, method)]
    if set(SCANS) <= set(taken):
        taken = ["scan", *taken[len(SCANS) :]]
    return ", ".join(taken)


def _takes(config: Any, method: str) -> bool:
    try:
        dataclasses.replace(config, method=method)
    except ValueError:
        return False
    return True


def state_bytes(layers: LayerGroups) -> int:
    """Of one sequence in layers of `WIDTH`, with room for `CAPACITY` tokens."""
    config = ModelConfig(2, WIDTH, layers)
    state = jax.eval_shape(lambda: config.make(rngs=nnx.Rngs(0)).init_state(1, CAPACITY).layers)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def rows() -> Iterator[list[str]]:
    """The cells of every mixer."""
    evidence = _evidence()
    for system in SYSTEMS:
        file = Path(inspect.getfile(type(system.config))).relative_to(ROOT)
        yield [
            _named(system.name, str(file), system.note),
            _papers(system.papers),
            system.runs or executors(system.config),
            ", ".join(_errors(evidence, [type(system.config).__name__], system.published)),
            f"{state_bytes((((system.config,), 1),)):,}",
            _presets(system.preset),
        ]


def model_rows() -> Iterator[list[str]]:
    """The cells of every model and channel layer; errors are those of its layers, and its own where there is one."""
    evidence = _evidence()
    for model in MODELS:
        configs = list(configs_of(model.layers))
        own = [name for name in dict.fromkeys(type(config).__name__ for config in configs) if name in evidence]
        yield [
            _named(model.name, f"seqmodels/{model.file}", model.note),
            _papers(model.papers),
            "; ".join(dict.fromkeys(map(_runs, configs))),
            ", ".join(_errors(evidence, own, model.published)),
            f"{state_bytes(model.layers):,}",
            _presets(model.presets),
        ]


def _runs(config: MixerConfig | ChannelConfig) -> str:
    if isinstance(config, AttentionConfig):
        (like,) = (
            s for s in SYSTEMS if type(s.config) is AttentionConfig and bool(s.config.window) == bool(config.window)
        )
        return like.runs
    if isinstance(config, MixerConfig):
        return executors(config)
    return "each token with its predecessor" if "RWKV" in type(config).__name__ else "each token alone"


def _evidence() -> dict[str, dict[str, float]]:
    return json.loads(EVIDENCE.read_text())


def _errors(evidence: dict[str, dict[str, float]], own: list[str], published: str) -> Iterator[str]:
    files: dict[str, float] = {}
    for name in own:
        for path, error in evidence[name].items():
            files[path] = max(error, files.get(path, 0.0))
    for path, error in files.items():
        yield f"[{Path(path).stem}]({path}) {_above(error)}"
    for model in published.split():
        for package, error in evidence[model].items():
            yield f"{package.split()[0]}' {model} {_above(error)}"


def _above(error: float) -> str:
    """One digit, rounded up: no error seen was larger."""
    return f"{float(Context(prec=1, rounding=ROUND_UP).create_decimal(error)):.0e}"


def _named(name: str, file: str, note: str) -> str:
    return f"[{name}]({file})" + (f": {note}" if note else "")


def _papers(papers: str) -> str:
    if papers[4] != ".":
        return papers
    return ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in papers.split())


def _presets(names: str) -> str:
    return ", ".join(f"`{name}`" for name in names.split() if name in PRESETS)


def table(first: str, cells: Callable[[], Iterator[list[str]]]) -> str:
    head = [first, "paper", "time runs as", "oracle, largest error", "bytes of state", "preset"]
    lines = [head, ["---", "---", "---", "---", "---:", "---"], *cells()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    page = README.read_text()
    for heading, first, cells in ((HEADING, "mixer", rows), (MODELS_HEADING, "model", model_rows)):
        begin = page.index("| ", page.index(heading))
        end = page.index("\n\n", begin)
        page = page[:begin] + table(first, cells) + page[end:]
    README.write_text(page)


if __name__ == "__main__":
    main()

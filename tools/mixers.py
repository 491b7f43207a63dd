"""Writes the table of mixers into README.md: `python tools/mixers.py`, after `make evidence` where oracles changed.

What can be told is: the file from the config's class, executors from the methods that it takes, bytes from its state,
errors from docs/evidence.json, which the oracle and parity tests write.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from experiments.presets import PRESETS  # noqa: E402
from seqmodels.mixers import (  # noqa: E402
    AttentionConfig,
    DeltaNetConfig,
    DeltaProductConfig,
    GatedDeltaNetConfig,
    GatedRFAConfig,
    GatedRNNConfig,
    GLAConfig,
    GRUConfig,
    HGRN2Config,
    KDAConfig,
    LinearAttentionConfig,
    LogLinearMamba2Config,
    LRUConfig,
    LSTMConfig,
    Mamba1Config,
    Mamba2Config,
    Mamba3Config,
    MinGRUConfig,
    MinLSTMConfig,
    MLSTMConfig,
    PrefixScan,
    RetNetConfig,
    RGLRUConfig,
    RWKV4Config,
    RWKV6Config,
    RWKV7Config,
    S4Config,
    S4DConfig,
    S5Config,
    SLSTMConfig,
)
from seqmodels.typing import MixerConfig  # noqa: E402

README, EVIDENCE = ROOT / "README.md", ROOT / "docs" / "evidence.json"
HEADING = "### Mixers"
WIDTH, CAPACITY = 256, 4096
SCANS = ("sequential", "associative", "chunked")
METHODS = (*SCANS, "convolution", "newton")


class System(NamedTuple):
    """A row. `preset` is the name in `examples()` too; `published`: architectures of `seqmodels.hf` that have it."""

    preset: str
    name: str
    note: str
    papers: str
    config: MixerConfig
    published: str = ""
    runs: str = ""  # how time runs, where the config leaves no choice


_HEADS = AttentionConfig(heads=4)
_PAIR = (((_HEADS,), 1),)

SYSTEMS = (
    System("lstm", "LSTM", "", "1997: Hochreiter, Schmidhuber", LSTMConfig()),
    System("gru", "GRU", "", "1406.1078", GRUConfig()),
    System("slstm", "sLSTM", "memory mixing", "2405.04517", SLSTMConfig()),
    System("mingru", "minGRU", "", "2410.01201", MinGRUConfig()),
    System("minlstm", "minLSTM", "", "2410.01201", MinLSTMConfig()),
    System("gated_rnn", "gated RNN", "element by element, as QRNN", "1611.01576", GatedRNNConfig()),
    System("s4", "S4", "diagonal plus low rank", "2111.00396", S4Config()),
    System("s4d", "S4D", "starts Lin, Inv, LegS", "2206.11893", S4DConfig()),
    System("s5", "S5", "gaps between samples", "2208.04933", S5Config()),
    System("lru", "LRU", "online gradients", "2303.06349", LRUConfig()),
    System("rg_lru", "RG-LRU", "Griffin's recurrent block", "2402.19427", RGLRUConfig(), "recurrent_gemma"),
    System("mamba1", "Mamba-1", "", "2312.00752", Mamba1Config(), "mamba falcon_mamba"),
    System("mamba2", "Mamba-2", "with groups", "2405.21060", Mamba2Config(), "mamba2"),
    System("mamba3", "Mamba-3", "SISO and MIMO", "2603.15569", Mamba3Config()),
    System("log_linear", "log-linear Mamba-2", "", "2506.04761", LogLinearMamba2Config()),
    System("linear_attention", "linear attention", "", "2006.16236", LinearAttentionConfig()),
    System("retnet", "RetNet", "", "2307.08621", RetNetConfig()),
    System("gated_rfa", "gated RFA", "", "2103.02143", GatedRFAConfig()),
    System("gla", "GLA", "", "2312.06635", GLAConfig()),
    System("hgrn2", "HGRN2", "bounds over depth", "2404.07904", HGRN2Config()),
    System("rwkv4", "RWKV-4", "", "2305.13048", RWKV4Config(), "rwkv"),
    System("rwkv6", "RWKV-6", "", "2404.05892", RWKV6Config()),
    System("rwkv7", "RWKV-7", "", "2503.14456", RWKV7Config()),
    System("deltanet", "DeltaNet", "eigenvalues down to -1", "2406.06484 2411.12537", DeltaNetConfig()),
    System(
        "gated_deltanet",
        "gated DeltaNet",
        "eigenvalues down to -1",
        "2412.06464 2411.12537",
        GatedDeltaNetConfig(),
        "qwen3_next",
    ),
    System("deltaproduct", "DeltaProduct", "", "2502.10297", DeltaProductConfig()),
    System("kda", "Kimi Delta Attention", "", "2510.26692", KDAConfig()),
    System("mlstm", "mLSTM", "xLSTM-7B's block or the first one", "2405.04517 2503.13427", MLSTMConfig(), "xlstm"),
    System(
        "psm",
        "Transformer-PSM",
        "any aggregator",
        "2506.10918",
        PrefixScan(aggregator=_PAIR, inference=_PAIR, chunk=16),
        runs="static tree; counter token by token",
    ),
    System(
        "attention",
        "attention",
        "GQA, gates, RoPE, NoPE, ALiBi",
        "1706.03762",
        _HEADS,
        "qwen3_next",
        "blocks of queries; a ring over devices",
    ),
    System(
        "sliding_attention",
        "sliding attention",
        "a ring buffer",
        "2004.05150",
        AttentionConfig(heads=4, window=256),
        "recurrent_gemma",
        "blocks of queries and keys; a ring as far as the window",
    ),
)


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


def state_bytes(config: MixerConfig) -> int:
    """Of one sequence in one layer of `WIDTH`, with room for `CAPACITY` tokens."""

    def state() -> Any:
        return config.make(WIDTH, layer=0, depth=1, rngs=nnx.Rngs(0)).init_state(1, CAPACITY)

    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(state)))


def rows() -> Iterator[list[str]]:
    """The cells of every system."""
    evidence = json.loads(EVIDENCE.read_text())
    for system in SYSTEMS:
        file = Path(inspect.getfile(type(system.config))).relative_to(ROOT)
        own = evidence[type(system.config).__name__]
        found = [f"[{Path(path).stem}]({path}) {error:.0e}" for path, error in own.items()]
        for model in system.published.split():
            found += [f"{package.split()[0]}' {model} {error:.0e}" for package, error in evidence[model].items()]
        yield [
            f"[{system.name}]({file})" + (f": {system.note}" if system.note else ""),
            ", ".join(_paper(paper) for paper in system.papers.split()) if system.papers[4] == "." else system.papers,
            system.runs or executors(system.config),
            ", ".join(found),
            f"{state_bytes(system.config):,}",
            f"`{system.preset}`" if system.preset in PRESETS else "",
        ]


def _paper(number: str) -> str:
    return f"[{number}](https://arxiv.org/abs/{number})"


def table() -> str:
    head = ["mixer", "paper", "time runs as", "oracle, largest error", "bytes of state", "preset"]
    lines = [head, ["---", "---", "---", "---", "---:", "---"], *rows()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    page = README.read_text()
    begin = page.index("| ", page.index(HEADING))
    end = page.index("\n\n", begin)
    README.write_text(page[:begin] + table() + page[end:])


if __name__ == "__main__":
    main()

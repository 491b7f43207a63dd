"""Synthetic tasks with their published settings: seeded, resumable, each with its metric.

    task = TASKS["parity"]
    batches = make_task_loader(task, batch_size=256, seed=0)
    figures = evaluate(task.evaluation(), predict, seed=0, size=8192, batch_size=256)

`TASKS` holds the published training settings by name; any other setting is `dataclasses.replace(task, ...)`.
"""

from seqmodels.data.tasks.base import Row, Source, Task, make_stages_loader, make_task_loader
from seqmodels.data.tasks.copying import Copying, SelectiveCopying
from seqmodels.data.tasks.formal import ModularArithmetic, ModularArithmeticBrackets, Parity
from seqmodels.data.tasks.groups import Group, WordProblem, group
from seqmodels.data.tasks.metrics import (
    evaluate,
    prefix_accuracy,
    scaled_accuracy,
    sequence_accuracy,
    token_accuracy,
)
from seqmodels.data.tasks.passkey import Passkey
from seqmodels.data.tasks.recall import MQAR, InductionHeads

TASKS: dict[str, Task] = {
    # 2405.04517 and 2411.12537: training lengths 3 to 40, test lengths 40 to 256
    "parity": Parity(),
    "modular_arithmetic": ModularArithmetic(),
    "modular_arithmetic_brackets": ModularArithmeticBrackets(),
    # 2411.12537, section 5.2: words of 32 elements (64 tokens where an element takes four), tested to about 500
    "s5": WordProblem("S5", 32, test_length=512),
    "s5_swaps": WordProblem("S5", 32, moved=2, test_length=512),
    "s5_three_cycles": WordProblem("S5", 32, moved=3, test_length=512),
    "s5_four_tokens": WordProblem("S5", 16, tokens_per_element=4, test_length=128),
    # 2506.10918: lengths 4 to 18, tested at 18, 26, .., 162
    "s5_short": WordProblem("S5", 18, min_length=4, test_length=162),
    # 2404.08819 (Illusion of State): lengths 5, 10, 15, 20, here the longest
    "a5": WordProblem("A5", 20, first_token=True, pairs=True, test_share=0.2),
    "a4xz5": WordProblem("A4xZ5", 20, first_token=True, pairs=True, test_share=0.2),
    "z60": WordProblem("Z60", 20, first_token=True, pairs=True, test_share=0.2),
    # 2312.04927 (Zoology), Figure 2
    "mqar_64": MQAR(64, 4),
    "mqar_128": MQAR(128, 8),
    "mqar_256": MQAR(256, 16),
    "mqar_512": MQAR(512, 64),
    # 2506.10918: 8 pairs, other tokens random; "uniform" is power_a 1
    "mqar_512_random": MQAR(512, 8, random_non_queries=True),
    "mqar_512_uniform": MQAR(512, 8, power_a=1.0, random_non_queries=True),
    # 2402.01032 (Repeat After Me): strings of up to 50 letters; keys of n letters with strings of up to 30
    "copying": Copying(test_length=1000),
    "prefix_ngram": Copying("prefix_ngram", max_length=30, ngram=3, test_length=100),
    "suffix_ngram": Copying("suffix_ngram", max_length=30, ngram=3, test_length=100),
    # 2312.00752 (Mamba)
    "selective_copying": SelectiveCopying(),
    "induction_heads": InductionHeads(),
    # 2507.02782: keys of five digits, trained at 2,048 tokens, asked at up to 256k and depths 0.1, 0.5, 0.9
    "passkey": Passkey(),
}

__all__ = [
    "MQAR",
    "TASKS",
    "Copying",
    "Group",
    "InductionHeads",
    "ModularArithmetic",
    "ModularArithmeticBrackets",
    "Parity",
    "Passkey",
    "Row",
    "SelectiveCopying",
    "Source",
    "Task",
    "WordProblem",
    "evaluate",
    "group",
    "make_stages_loader",
    "make_task_loader",
    "prefix_accuracy",
    "scaled_accuracy",
    "sequence_accuracy",
    "token_accuracy",
]

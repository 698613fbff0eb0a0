"""The test that each claim is put to, in words, and the notebook that tells of it (`claims.py` has the code).

Differences and ratios come with 95 % intervals. Losses are each model's own, from its dense scores on the same items.
"""

from __future__ import annotations

from typing import NamedTuple


class Criterion(NamedTuple):
    """What is compared and which outcome counts as what; notebook: the name of its file without ending."""

    test: str
    notebook: str


_INTERVALS = "Reproduced: every 95 % interval lies on the claim's side. Close: some do, none lies on the other."
_SHARE = ", each model without the share of its layers that it lacks there in the paper, as near as can be"
_SPEED = (
    "Reproduced: each 95 % interval lies above 1 and reaches the speedup that the claim states ({}, to its rounding of "
    "±0.05). Close: each lies above 1, and each gain (speedup less 1) is at least half of that in the paper's row."
)

CRITERIA = {
    "C1": Criterion(
        f"In each row of table 1{_SHARE}: what Mamba-2 and Zamba2 lose less what Mamba-1 loses, in average accuracy "
        f"and in the logarithm of LAMBADA perplexity, is above 0. {_INTERVALS}",
        "01_mamba_block_pruning",
    ),
    "C2": Criterion(
        f"In each row of table 2{_SHARE}: what Mamba-1 loses less what Mamba-2 and Zamba2 lose, in average accuracy "
        f"and in the logarithm of LAMBADA perplexity, is above 0. {_INTERVALS}",
        "02_ssm_pruning",
    ),
    "C3": Criterion(
        f"With the share of 12 of 54 SSMs gone, the average accuracy is at most 1 point below dense. {_INTERVALS}",
        "02_ssm_pruning",
    ),
    "C4": Criterion(
        "At each ratio of table 3: average accuracy with parts removed less that with blocks removed, and with parts "
        "and channels less that with parts alone, is above 0. Pairs whose ratios differ by more than 2 points are left "
        f"out. {_INTERVALS}",
        "03_multi_granularity",
    ),
    "C5": Criterion(
        "At the lower ratio of table 3: LAMBADA perplexity before the SSM stage over that after it is above 1. "
        f"{_INTERVALS}",
        "03_multi_granularity",
    ),
    "C6": Criterion(
        "From each row of table 4 to the next, the average accuracy of its five tasks falls, and steadily: what a "
        "block costs there is not clearly less than a third nor more than three times its mean cost in the whole table "
        f"(in the paper's: 0.6 to 2.9 times). {_INTERVALS} Neither, where it is not steady.",
        "04_hymba_block_pruning",
    ),
    "C7": Criterion(
        "At each count of table 5: LAMBADA perplexity without blocks over that without SSMs is above 1, and average "
        f"accuracy without blocks less that without SSMs is above 0. {_INTERVALS}",
        "05_falcon_mamba",
    ),
    "C8": Criterion(f"The last row of table 6, prefill and decode. {_SPEED.format(1.3)}", "06_inference_speedup"),
    "C9": Criterion(f"The last row of table 7, prefill and decode. {_SPEED.format(1.2)}", "06_inference_speedup"),
    "C10": Criterion(f"The last row of table 8, decode. {_SPEED.format(1.4)}", "06_inference_speedup"),
    "C11": Criterion(
        "In tables 10 to 12, and where the profile tunes what the paper does not (a row of ours, of Mamba-2 less Mamba "
        "blocks): wherever pruning clearly cost something, tuning wins back at least half of it, in average accuracy "
        f"and in LAMBADA perplexity. {_INTERVALS}",
        "07_recovery_tuning",
    ),
    "C12": Criterion(
        "From 2 removals on, calibration perplexity relative to dense: Mamba-1's is the lower one without blocks, "
        "Mamba-2's without SSMs; one number each, without sampling error and so without interval. Reproduced: at every "
        "count of both. Close: at more than half of the counts of each.",
        "08_mamba1_vs_mamba2",
    ),
}

"""Claims about one model in several states: less this, or less that (C3 to C7)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ..records import Metric
from .counterparts import paper_values, target_of
from .evidence import Z95, Advantage, Verdict, exp, failed, logarithm, untrained, weak, weigh
from .runs import Runs, error_of_sum

ZAMBA2, HYMBA, FALCON = "zamba2-2.7b", "hymba-1.5b", "falcon-mamba-7b"
BLOCKS, PARTS = "mamba_block & transformer_block", "mamba_block & mlp & mha"
CHANNELS = f"{PARTS} + mlp_channels"
ALMOST_NOTHING = 1.0
"""Points of average accuracy: C3's "almost nothing". The paper's own loss is 0.2."""
SAME_RATIO = 2.0
"""Points of the share of the parameters removed by which two states may differ, for C4 to compare them."""
STEADY = 3.0
"""For C6: by what factor a block's cost may differ from the mean of its table. In the paper's: 0.6 to 2.9 times."""


@dataclass(frozen=True)
class State:
    """A model after n removals of a study, with the paper's values beside it.

    ratio: the share of the parameters removed in percent, where it was evaluated.
    """

    table: int
    model: str
    target: str
    n_removed: int
    stands_for: float
    ratio: float | None
    scores: dict[str, Metric]
    paper: dict[str, float | None]


def _states(runs: Runs, table: int, model: str) -> list[State]:
    """All states of the profile's model for one of the paper's, in a table."""
    found = []
    for name in runs.studies(table):
        study = runs.profile.studies[name]
        for own, rows in study.rows.items():
            if runs.profile.models[own].paper == model:
                for n, stands_for in rows.items():
                    target = target_of(study, n)
                    values = paper_values(table, model, stands_for, target)
                    record = runs.evaluated(name, own, n)
                    ratio = 100 * record.model.ratio if record else None
                    found.append(State(table, own, target, n, stands_for, ratio, runs.scores(name, own, n), values))
    return found


def almost_nothing(runs: Runs, name: str, text: str) -> Verdict:
    """C3: with 12 of 54 SSMs removed, Zamba2's average is within a point of the dense model's."""
    states = _states(runs, 2, ZAMBA2)
    dense = [state for state in states if not state.n_removed]
    pairs = [(state, dense[0]) for state in states if dense and state.stands_for == 12]
    measure = f"average accuracy in points, above the dense model's minus {ALMOST_NOTHING:g}"
    return _judge(runs, name, text, [("average", measure, ALMOST_NOTHING, pairs)])


def finer_is_better(runs: Runs, name: str, text: str) -> Verdict:
    """C4: at the same ratio, blocks < Mamba blocks, MLPs and attention apart < the same, then MLP channels."""
    states = sorted(_states(runs, 3, ZAMBA2), key=lambda state: state.stands_for)
    steps = [(("parts", PARTS), ("blocks", BLOCKS)), (("parts and channels", CHANNELS), ("parts", PARTS))]
    tests: list[Test] = []
    left_out = []
    for (finer, ours), (coarser, theirs) in steps:
        of_both = ([state for state in states if state.target == target] for target in (ours, theirs))
        pairs = list(zip(*of_both, strict=False))
        kept = [pair for pair in pairs if _same_ratio(*pair)]
        left_out += [f"{finer} at {a.ratio:.1f} % against {coarser} at {b.ratio:.1f} %"
                     for a, b in pairs if not _same_ratio(a, b)]  # fmt: skip
        tests.append(("average", f"average accuracy in points, {finer} above {coarser}", 0.0, kept))
    if left_out and not all(pairs for *_, pairs in tests):
        unfit = untrained(runs.profile, {state.model for state in states})
        unlike = f"The ratios are not the same: {'; '.join(left_out)}."
        return Verdict(name, text, "not shown at this scale" if unfit else "not run", unfit or unlike)
    verdict = _judge(runs, name, text, tests)
    why = f"{verdict.why} Left out, as the ratios are not the same: {'; '.join(left_out)}." if left_out else verdict.why
    return replace(verdict, why=why)


def _same_ratio(ahead: State, behind: State) -> bool:
    """Whether two states have the same share of the parameters removed, as near as matters, or may have it."""
    return ahead.ratio is None or behind.ratio is None or abs(ahead.ratio - behind.ratio) <= SAME_RATIO


def cheap_at_last(runs: Runs, name: str, text: str) -> Verdict:
    """C5: at the lower ratio, SSMs removed after the channels leave perplexity lower."""
    states = sorted(_states(runs, 3, ZAMBA2), key=lambda state: state.stands_for)
    before, after = ([s for s in states if s.target == target][:1] for target in (CHANNELS, f"{CHANNELS} + ssm"))
    measure = "LAMBADA perplexity, with the SSMs over without them"
    return _judge(runs, name, text, [("ppl", measure, 0.0, list(zip(after, before, strict=False)))])


def steadily_down(runs: Runs, name: str, text: str) -> Verdict:
    """C6: each further Hymba block costs average accuracy, none of them clearly much more or less than others."""
    states = sorted(_states(runs, 4, HYMBA), key=lambda state: state.n_removed)
    pairs = list(pairwise(states))
    tests: list[Test] = [("average", "average accuracy in points, above the next row's", 0.0, pairs)]
    verdict = _judge(runs, name, text, tests)
    if verdict.verdict not in ("reproduced", "close"):
        return verdict
    blocks = [later.n_removed - earlier.n_removed for earlier, later in pairs]
    mean = sum(number.value for number in verdict.numbers) / sum(blocks)
    costs = ", ".join(f"{one.value / n:.2f}" for one, n in zip(verdict.numbers, blocks, strict=True))
    why = f"{verdict.why} A block costs {mean:.2f} points on average; from row to row: {costs}."
    if all(_steady(one, n * mean) for one, n in zip(verdict.numbers, blocks, strict=True)):
        return replace(verdict, why=why)
    return replace(verdict, verdict=failed(runs.profile), why=f"{why} That is not steady.")


def _steady(loss: Advantage, mean: float) -> bool:
    """Whether what a step loses may be within the factor `STEADY` of what as many blocks lose on average."""
    return loss.high >= mean / STEADY and loss.low <= mean * STEADY


def blocks_or_ssms(runs: Runs, name: str, text: str) -> Verdict:
    """C7: at the same count, SSM removal keeps Falcon-Mamba's perplexity lower, block removal its accuracy higher."""
    states = {(s.target, s.n_removed): s for s in _states(runs, 5, FALCON)}
    counts = [n for target, n in states if target == "mamba_block" and ("ssm", n) in states]
    pairs = [(states["mamba_block", n], states["ssm", n]) for n in counts]
    perplexity = "LAMBADA perplexity, without blocks over without SSMs"
    tests = [
        ("ppl", perplexity, 0.0, [(ssms, blocks) for blocks, ssms in pairs]),
        ("average", "average accuracy in points, without blocks above without SSMs", 0.0, pairs),
    ]
    return _judge(runs, name, text, tests)


Test = tuple[str, str, float, Sequence[tuple[State, State]]]
"""A column, what is measured in it, a head start in points, and pairs of states: ahead and behind."""
CHECKS: dict[str, Callable[[Runs, str, str], Verdict]] = {
    "C3": almost_nothing, "C4": finer_is_better, "C5": cheap_at_last, "C6": steadily_down, "C7": blocks_or_ssms
}  # fmt: skip


def _judge(runs: Runs, name: str, text: str, tests: Sequence[Test]) -> Verdict:
    states = [state for *_, pairs in tests for pair in pairs for state in pair]
    if not states or not all(pairs for *_, pairs in tests):
        return Verdict(name, text, "not run", "The profile has no model or no study for it.")
    compared = {"average", *(column for column, *_ in tests)}
    missing = [state for state in states if not compared <= state.scores.keys()]
    numbers = tuple(number for test in tests for number in _advantages(*test))
    if missing:
        what = f"{missing[0].model} with {missing[0].n_removed} removed ({missing[0].target})"
        return Verdict(name, text, "not run", f"There is no whole evaluation of {what}.", numbers)
    model = states[0].model
    dense = {model: runs.dense(model)}
    unfit = untrained(runs.profile, [model]) or weak(runs.profile, dense)
    if unfit:
        return Verdict(name, text, "not shown at this scale", unfit, numbers)
    return weigh(runs.profile, name, text, numbers, [])


def _advantages(column: str, measure: str, start: float, pairs: Sequence[tuple[State, State]]) -> Iterator[Advantage]:
    for ahead, behind in pairs:
        if column not in ahead.scores or column not in behind.scores:
            continue
        ours, theirs = ahead.scores[column], behind.scores[column]
        counts = (ahead.n_removed, behind.n_removed) if behind.n_removed else ()
        reported = [state.paper.get(column) for state in (ahead, behind)]
        known = [Metric(value=value) for value in reported if value is not None]
        if column == "ppl":
            value, error = _difference(logarithm(ours), logarithm(theirs))
            low, high = exp(value - Z95 * error), exp(value + Z95 * error)
            paper = exp(_difference(*map(logarithm, known))[0]) if len(known) == 2 else None
            yield Advantage(measure, ahead.n_removed, exp(value), low, high, 1, paper, counts[::-1])
        else:
            value, error = _difference(ours, theirs)
            paper = start + known[0].value - known[1].value if len(known) == 2 else None
            low, high = start + value - Z95 * error, start + value + Z95 * error
            yield Advantage(measure, ahead.n_removed, start + value, low, high, 0, paper, counts)


def _difference(ours: Metric, theirs: Metric) -> tuple[float, float]:
    return ours.value - theirs.value, error_of_sum((1, -1), (ours, theirs))

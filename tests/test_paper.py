"""The paper's numbers: complete, in range, and consistent with themselves but for the known errata."""

import pytest

from shedder_utils import paper
from shedder_utils.errors import DataError

AVERAGED = [(table, row) for table in (1, 2, 3, 4, 5) for row in paper.rows(table)]
ROUNDING = 0.05 + 0.05 + 1e-9  # of the average, and of each of the accuracies in it


def test_known_cells():
    assert paper.reported(1, "mamba-2.8b", 14)["average"] == 53.8
    assert paper.reported(2, "mamba2-2.7b", 20)["ppl"] == 5.89
    assert paper.reported(3, target="mamba_block & mlp & mha", ratio=10.33)["arc_easy"] == 75.3
    assert paper.reported(4, pruned=7)["hellaswag"] == 49.9
    assert paper.reported(5, kind="ssm", pruned=20)["openbookqa"] == 37.8
    assert paper.reported(5, pruned=0) == paper.reported(5, kind="ssm", pruned=0)
    assert paper.reported(6, "mamba-2.8b", 14) == {"prefill": 1.31, "decode": 1.29}
    assert paper.reported(8, state="15.48% + 18 ssm")["decode"] == 1.39
    assert paper.reported(11, state="tuned", ratio=10.27) == {"ppl": 4.58, "average": 67.0}
    assert paper.reported(12, state="tuned") == {"ppl": None, "average": 63.7}


@pytest.mark.parametrize(("table", "row"), AVERAGED, ids=lambda value: str(getattr(value, "labels", value)))
def test_average_is_the_mean_of_the_accuracies(table, row):
    accuracies = [value for column, value in row.values.items() if column not in ("ppl", "average")]
    assert all(0 < value < 100 for value in accuracies if value is not None)
    assert row.values.get("ppl", 3.0) > 1
    if None not in accuracies:
        assert abs(sum(accuracies) / len(accuracies) - row.values["average"]) <= ROUNDING


@pytest.mark.parametrize("model", ["mamba-2.8b", "mamba2-2.7b", "zamba2-2.7b"])
def test_dense_row_is_the_same_in_both_tables(model):
    assert paper.reported(1, model, 0) == paper.reported(2, model, 0)


def test_every_table_has_rows_of_known_models():
    for table in range(1, 13):
        assert {row.labels["model"] for row in paper.rows(table)} <= paper.models().keys()
        assert len(paper.rows(table)) >= 2


@pytest.mark.parametrize(
    ("table", "labels", "message"),
    [
        (1, {"model": "mamba-2.8b", "pruned": 8}, "no row with model mamba-2.8b, pruned 8"),
        (1, {"pruned": 7}, "3 rows with pruned 7"),
        (13, {}, "1 to 12"),
    ],
)
def test_missing_or_ambiguous_row_is_refused(table, labels, message):
    with pytest.raises(DataError, match=message):
        paper.reported(table, **labels)


def test_claims_errata_and_hyperparameters():
    assert [claim.id for claim in paper.claims()] == [f"C{number}" for number in range(1, 13)]
    assert all(claim.where and claim.text for claim in paper.claims())
    assert len(paper.errata()) == 8
    assert paper.hyperparameters()["calibration_samples"] == 256


def test_what_is_handed_out_can_be_changed_without_harm():
    paper.reported(1, "mamba-2.8b", 0)["ppl"] = 0.0
    paper.hyperparameters().clear()
    paper.models().clear()
    assert paper.reported(1, "mamba-2.8b", 0)["ppl"] == 4.23
    assert paper.hyperparameters()
    assert paper.models()

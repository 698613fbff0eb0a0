"""Profiles: what ships is consistent with the paper, and mistakes are refused by name."""

from pathlib import Path

import pytest
import yaml

from shedder_utils import paper, profiles
from shedder_utils.errors import ProfileError
from shedder_utils.pocket.training import CONFIGS
from shedder_utils.report.tables import paper_values, target_of

RELEASED = {"order": "mamba-2.8b", "model": "smoke-mamba", "table": 1, "rows": {7: 7}}


@pytest.fixture
def content() -> dict:
    return yaml.safe_load((profiles.FOLDER / "smoke.yaml").read_text())


@pytest.mark.parametrize("name", profiles.names())
def test_shipped_profile_fits_the_paper(name):
    profile = profiles.load(name)
    assert profile.name == name
    assert [column.column for column in profile.evaluation.tasks] == paper.columns()[:-1]
    metrics = {column.column: column.metric for column in profile.evaluation.tasks}
    theirs = yaml.safe_load(paper.FILE.read_text(encoding="utf-8"))["tasks"]["metric_seven"]
    assert metrics == {"ppl": "perplexity", **theirs}
    for model, settings in profile.models.items():
        seven = list(theirs)
        five = [column for column in seven if column not in ("lambada_openai", "openbookqa")]
        assert profile.accuracies_of(model) == (five if settings.paper == "hymba-1.5b" else seven)
    for settings in profile.studies.values():
        for model, rows in settings.rows.items():
            for n_removed, stands_for in rows.items():
                target = target_of(settings, n_removed)
                row = paper_values(settings.table, profile.models[model].paper, stands_for, target)
                assert row["average"] > 40, (model, n_removed)


def test_pocket_removes_the_papers_shares():
    profile = profiles.load("pocket")
    for study in profile.studies.values():
        for model, rows in study.rows.items() if study.table != 3 else []:  # table 3's rows are ratios
            blocks, layers = paper.models()[profile.models[model].paper]["blocks"], CONFIGS[model].num_hidden_layers
            for ours, theirs in rows.items():
                assert abs(ours / layers - theirs / blocks) <= 0.5 / layers


def test_paper_calibrates_and_reads_each_model_as_the_paper_does():
    profile, batch = profiles.load("paper"), paper.hyperparameters()["calibration_batch"]
    for name in profile.models:
        own = profile.calibration_of(name)
        for setting in ("sequence_length", "batch_size"):
            assert getattr(own, setting) == batch[setting].get(name, batch[setting]["default"]), name
    perplexity, _, hellaswag = profile.evaluation.tasks[:3]
    assert profile.metric_of("hymba-1.5b", hellaswag) == "acc"
    assert profile.metric_of("zamba2-2.7b", hellaswag) == "acc_norm"
    assert profile.metric_of("hymba-1.5b", perplexity) == "perplexity"


def test_paper_recovers_as_the_paper_does():
    theirs = paper.hyperparameters()["recovery"]
    for table in profiles.load("paper").recovery.tables.values():
        recipe, wanted = table.recipe, theirs[table.model]
        assert (recipe.method, recipe.epochs) == (wanted["method"], wanted["epochs"])
        assert (recipe.learning_rate, recipe.rank, recipe.alpha) == (
            wanted["learning_rate"], wanted.get("r"), wanted.get("alpha")
        )  # fmt: skip
        rows = wanted["batch_size"] * wanted.get("gradient_accumulation", 1)
        assert recipe.batch_size * recipe.accumulation == rows
        assert (recipe.max_length, recipe.held_out) == (theirs["max_length"], theirs["held_out"])
        assert recipe.loss_on == ("all" if table.model == "mamba2-2.7b" else "response")  # see prompt_tokens_in_loss


def test_smoke_needs_no_weights_on_disk():
    assert all(model.random and not model.ref for model in profiles.load("smoke").models.values())


def test_tasks_are_listed_once():
    assert profiles.load("pocket").evaluation.task_names[:2] == ["pocket_lambada", "pocket_hellaswag"]
    assert len(profiles.load("pocket").evaluation.task_names) == 7


def test_profile_is_read_from_a_path(tmp_path: Path, content: dict):
    content["name"] = "mine"
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(content))
    assert profiles.load(file).name == "mine"


def edited(content: dict, place: str, value: object) -> dict:
    *parents, key = place.split(".")
    target = content
    for parent in parents:
        target = target[parent]
    target[key] = value
    return content


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("calibration.sampels", 4, "calibration: unknown key 'sampels', expected one of source, samples"),
        ("title_", "x", "unknown key 'title_'"),
        ("models.smoke-mamba.random.width", 4, "models.smoke-mamba.random: unknown key 'width'"),
        ("models.smoke-mamba.ref", "x", "expected one of 'ref' and 'random'"),
        ("models.smoke-mamba.paper", "mamba-3b", "no model 'mamba-3b'"),
        ("calibration.samples", 0, "calibration.samples"),
        ("studies.ssm_pruning.rows.smoke-mamba", {0: 0, 3: 16}, "up to 2 steps"),
        ("studies.ssm_pruning.rows.smoke-mamba", {1: 16, 0: 0}, "rising"),
        ("studies.ssm_pruning.rows.smoke-mambo", {0: 0}, "no model 'smoke-mambo'"),
        ("studies.ssm_pruning.stages", [{"kinds": ["ssms"], "steps": 2}], "kind 'ssms' is unknown"),
        ("studies.ssm_pruning.stages", [{"kinds": ["ssm"], "steps": 2, "group": 4}], "group"),
        ("studies.ssm_pruning.stages", [{"kinds": ["mlp_channels"], "steps": 2}], "group"),
        ("released", [RELEASED | {"order": "mamba-3b"}], "order 'mamba-3b' is unknown, expected one of mamba-2.8b"),
        ("released", [RELEASED | {"rows": {7: 7, 15: 14}}], "rows of mamba-2.8b, [7, 15]: it has 14 removals"),
        ("released", [RELEASED | {"model": "smoke-mamba2"}], "order mamba-2.8b is not one of a model 'smoke-mamba2'"),
        ("released", [RELEASED | {"model": "smoke-mambo"}], "order mamba-2.8b is not one of a model 'smoke-mambo'"),
    ],
)
def test_mistake_is_named_in_one_line(tmp_path: Path, content: dict, place: str, value: object, message: str):
    file = tmp_path / "wrong.yaml"
    file.write_text(yaml.safe_dump(sort_keys=False, data=edited(content, place, value)))
    with pytest.raises(ProfileError) as error:
        profiles.load(file)
    assert message in str(error.value)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_profile_names_the_known_ones():
    with pytest.raises(ProfileError, match="pocket, smoke"):
        profiles.load("packet")


def test_text_that_is_not_yaml_is_refused(tmp_path: Path):
    file = tmp_path / "wrong.yaml"
    file.write_text("models: [")
    with pytest.raises(ProfileError, match="is not YAML"):
        profiles.load(file)

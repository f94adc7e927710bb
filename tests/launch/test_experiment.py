"""An experiment from one file: what it refuses, and that a broken one goes on to the same tables."""

import csv
import json
import re
from pathlib import Path

import pytest
import yaml

from calsegx import calibrators, configs, experiment
from calsegx.evaluation import methods, pooled, tables
from calsegx.interfaces import DataError, UsageError
from launch import evaluate, grid_search, train, trained_runs
from launch import experiment as launcher
from tests.launch.test_bad_input import run

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))
PAGE = ROOT / "docs" / "experiments.md"


@pytest.fixture
def plan(config, tmp_path):
    """Writes a plan of a few steps on the small phantoms, with other keys where given."""

    def write(source="A", **keys):
        settings = {
            "steps": 2,
            "batch_size": 2,
            "validate_every": 2,
            "save_every": 1,
            "optimizer": {"learning_rate": "1e-4"},
            "data": {"root": config.data.root, "channels": "T1c,T2,FLAIR", "classes": "whole_tumour=1+2+3"},
            "model": {"weights": config.model.weights},
        }
        settings["data"] |= {"source": source} if source else {}
        path = tmp_path / "plan.yaml"
        path.write_text(yaml.safe_dump({"methods": ["sam_ft"], "seeds": [1], "config": settings, **keys}))
        return path

    return write


def test_the_page_names_every_method_and_its_file_is_a_plan(tmp_path):
    page = PAGE.read_text()
    suffixes = [f"+{suffix}" for suffix in experiment.CALIBRATORS]
    named = [*experiment.METHODS, *suffixes, *(path.name for path in SHIPPED)]
    assert [name for name in named if f"`{name}`" not in page] == []
    (tmp_path / "plan.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    found = experiment.read(tmp_path / "plan.yaml", "DATASET")
    assert (found.protocol, found.few_shot, found.corruptions) == ("domain", (2, 4, 8), ("motion", "gaussian_noise"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_plans_are_whole(path):
    found = experiment.read(path, "DATASET")
    assert experiment.BASELINE in found.methods and len(found.seeds) == 3
    assert all(set(experiment.METHODS[name]) <= set(configs.to_dict(found.config)) for name in found.methods)


def test_a_plan_is_read(plan):
    found = experiment.read(
        plan(
            methods=["prompt_only", "sam_ft", "calsam+lts", "calsam+dirichlet", "mbls"], grid=GRID | {"margin": [3, 5]}
        )
    )
    assert found.methods == ("sam_ft", "calsam", "mbls")
    assert found.calibrators == ("temperature", "local_temperature", "dirichlet")
    assert found.config.optimizer.learning_rate == 1e-4
    assert [found.candidates(name) for name in ("sam_ft", "mbls")] == [[{}], [{"margin": 3.0}, {"margin": 5.0}]]
    assert len(found.candidates("calsam")) == 4
    tried = found.settings("calsam", {"lambda1": 0.3, "lambda2": 0.7})
    assert (tried.method, tried.fisher.weight, tried.cmp.weight) == ("calsam", 0.3, 0.7)
    assert found.settings("mbls", {"margin": 3.0}).loss == "mbls(margin=3)"
    assert found.settings("early_stopping", {"steps": 7}).steps == 7
    recipe, whole = found.settings("medsam", {}), found.settings("medsam_whole", {})
    assert (recipe.optimizer.weight_decay, recipe.optimizer.learning_rate) == (0.01, 1e-4)
    assert (recipe.model.backbone, whole.model) == ("sam", configs.replace(recipe.model, {"backbone": "sam_whole"}))


RULE = {"lowest": "ECE", "region": "p>0.01", "within_dsc_points": 1}
GRID = {"lambda1": [0.1, 0.3], "lambda2": [0.5, 1], "rule": RULE}


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"method": ["sam_ft"]}, "'method' is not one of methods, seeds, .* Did you mean 'methods'"),
        ({"methods": ["calsan"]}, "'calsan' is not one of .* Did you mean 'calsam'"),
        ({"methods": ["calsam+dirichlett"]}, "'dirichlett' is not one of .* Did you mean 'dirichlet'"),
        ({"methods": ["vanilla_sam"]}, "methods has nothing to train"),
        ({"methods": ["vanilla_sam+ts"]}, "'vanilla_sam' is not one of"),
        ({"methods": []}, "methods must be a list with at least one entry"),
        ({"seeds": [1, 1]}, "seeds repeats an entry"),
        ({"seeds": [-1]}, "seeds must be numbers of at least 0"),
        ({"seeds": ["one"]}, "seeds must be a whole number, got 'one'"),
        ({"few_shot": [0]}, "few_shot must be numbers of at least 1"),
        ({"config": {"step": 3}}, "'step' is not one of .* Did you mean 'steps'"),
        ({"config": {"data": {"view": 3}}}, "config.data: 'view' is not one of .* Did you mean 'views'"),
        ({"config": {"steps": "many"}}, "config.steps must be a whole number, got 'many'"),
        ({"config": {"steps": 0, "data": {"root": "x"}}}, "--config.steps=0 must be a number of at least 1"),
        ({"config": {"steps": 3}}, "names no dataset"),
        ({"config": {"loss": "ce", "data": {"root": "x"}}}, "config.loss is what the experiment varies"),
        ({"folds": {"protocol": "kfolds"}}, "config.data.source is set by the folds"),
        ({"corruptions": {"name": ["all"]}}, "'name' is not one of names, levels. Did you mean 'names'"),
        ({"grid": {"lambda1": [1]}}, "grid has no rule"),
        ({"grid": GRID, "methods": ["calsam"]}, "compares with sam_ft; add it to methods"),
        (
            {"grid": {**GRID, "rule": {"lowest": "DSC"}}, "methods": ["sam_ft", "calsam"]},
            "'DSC' is not one of ECE, Brier, NLL",
        ),
        ({"grid": {"steps": [5], "rule": RULE}}, "steps belongs to none of the methods"),
        ({"seeds": [2**40]}, "seeds must be numbers of at least 0"),
        (
            {"methods": ["medsam"], "config": {"optimizer": {"weight_decay": 0.5}, "data": {"root": "x"}}},
            "config.optimizer.weight_decay=0.5 and medsam, which has 0.01, cannot both be",
        ),
        (
            {"methods": ["sam_ft", "mbls"], "grid": {"margin": [5.0000001, 5.0000002], "rule": RULE}},
            "values of mbls that are the same to six digits",
        ),
        ({"prompts": ["gt_point"]}, "'gt_point' is not one of .* Did you mean 'gt_points'"),
        ({"prompts": ["gt_points"], "methods": ["medsam"]}, "medsam has its own prompts"),
        ({"external": ["predictions"]}, "external must be names and folders"),
        ({"external": {"nnU-Net": "x"}, "few_shot": [2]}, "evaluate them in a plan without few_shot"),
        ({"external": {"nnU-Net": "x"}, "corruptions": {"names": ["all"]}}, "in a plan without corruptions"),
        ({"prompts": ["gt_box"], "config": {"protocol": "gt_box", "data": {"root": "x"}}}, "both say how prompts"),
    ],
)
def test_what_cannot_be_used_is_refused(plan, keys, sentence):
    with pytest.raises(UsageError, match=sentence):
        experiment.read(plan(**keys))


def test_a_key_that_stands_twice_is_refused(tmp_path):
    (tmp_path / "plan.yaml").write_text("methods: [sam_ft]\nseeds: [1]\nseeds: [2]\n")
    with pytest.raises(UsageError, match="'seeds' stands there twice"):
        experiment.read(tmp_path / "plan.yaml", "x")


def test_the_protocol_of_folds_is_checked(plan):
    with pytest.raises(UsageError, match="folds.protocol: 'kfolds' is not one of .* Did you mean 'kfold'"):
        experiment.read(plan(source="", folds={"protocol": "kfolds"}))


def test_the_command_says_what_is_wrong_and_writes_nothing(plan, tmp_path):
    code, stderr = run("experiment", f"--config={plan(methods=['calsan'])}", f"--workdir={tmp_path / 'out'}")
    assert code == 2 and "Did you mean 'calsam'?" in stderr and len(stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def tables_of(folder):
    return [
        (folder / name).read_bytes() for name in ("cases.csv", "table.md", "table.tex", "summary.json", "report.html")
    ]


@pytest.mark.slow
def test_a_broken_experiment_goes_on_to_the_same_tables(plan, tmp_path, monkeypatch, dataset):
    before = sorted(path for path in dataset.rglob("*"))
    path = plan(methods=["sam_ft", "medsam", "focal+dirichlet"])
    whole = launcher.experiment(path, tmp_path / "whole").parent
    original, trained = train.train, []

    def train_one(config, workdir, *rest):
        if trained:
            raise KeyboardInterrupt
        trained.append(workdir.name)
        return original(config, workdir, *rest)

    monkeypatch.setattr(train, "train", train_one)
    with pytest.raises(KeyboardInterrupt):
        launcher.experiment(path, tmp_path / "broken")
    assert trained == ["sam_ft_seed1"] and not (tmp_path / "broken" / "table.md").exists()
    monkeypatch.setattr(train, "train", lambda *given: [trained.append(given[1].name), original(*given)])
    broken = launcher.experiment(path, tmp_path / "broken").parent
    assert trained == ["sam_ft_seed1", "medsam_seed1", "focal_seed1"]
    assert tables_of(broken) == tables_of(whole)

    # Once more: nothing is trained or evaluated again.
    monkeypatch.setattr(evaluate, "evaluate", None)
    launcher.experiment(path, tmp_path / "broken")
    assert len(trained) == 3 and tables_of(broken) == tables_of(whole)
    assert sorted(path for path in dataset.rglob("*")) == before

    with (whole / "cases.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    of_points = {row["method"] for row in rows if row["protocol"] == "gt_points"}
    assert {"sam_ft", "sam_ft+ts", "sam_ft+dirichlet", "focal+dirichlet", "vanilla_sam"} <= of_points
    assert {row["method"] for row in rows if row["protocol"] == "gt_box"} >= {"medsam", "vanilla_sam"}
    assert "Focal + Dirichlet" in (whole / "table.md").read_text()
    assert len(list(whole.glob("features*"))) == 1  # encoded once for all cells

    # Other settings in the same folder are refused before anything is trained.
    text = path.read_text().replace("steps: 2", "steps: 3")
    path.write_text(text)
    with pytest.raises(UsageError, match="was trained with steps=2, and the experiment now asks for 3"):
        launcher.experiment(path, tmp_path / "broken")


def test_folds_are_made_once_and_kept(plan, tmp_path):
    path = plan(source="", folds={"protocol": "kfold", "folds": 2})
    page = launcher.experiment(path, tmp_path / "out")
    assert "all 2 folds pooled" in page.with_name("table.md").read_text()
    links = re.findall(r'href="([^"]+)"', page.read_text())
    assert len(links) == 2 and all((page.parent / link).is_file() for link in links)
    assert {"table.tex", "summary.json", "tables"} <= {path.name for path in page.parent.iterdir()}
    with (tmp_path / "out" / "cases.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    tested = {fold: {row["case_id"] for row in rows if row["fold"] == fold} for fold in ("1 of 2", "2 of 2")}
    assert len(tested["1 of 2"] | tested["2 of 2"]) == 8 and not tested["1 of 2"] & tested["2 of 2"]
    with pytest.raises(UsageError, match="splits.json was made with folds=2, and the experiment now asks for 3"):
        launcher.experiment(plan(source="", folds={"protocol": "kfold", "folds": 3}), tmp_path / "out")


def test_more_subjects_than_there_are_is_refused(plan, tmp_path):
    with pytest.raises(UsageError, match="asks for 4 training subjects, but the split of .* has 3"):
        launcher.experiment(plan(few_shot=[4]), tmp_path / "refused")
    assert not (tmp_path / "refused" / "runs").exists()


@pytest.mark.slow
def test_few_shot_sizes_are_nested_and_counted(plan, tmp_path):
    launcher.experiment(plan(few_shot=[1, 2], seeds=[1, 2]), tmp_path / "out")
    seen = {}
    for size in (1, 2):
        for seed in (1, 2):
            folder = tmp_path / "out" / "runs" / "fold0" / f"subjects{size}" / f"sam_ft_seed{seed}"
            record = json.loads((folder / "model" / "model.json").read_text())
            seen[size, seed] = {entry["subject_id"] for entry in record["seen"]["train"]}
            assert len(seen[size, seed]) == size
    assert seen[1, 1] < seen[2, 1] and seen[1, 2] < seen[2, 2]
    with (tmp_path / "out" / "cases.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["training_subjects"], row["seed"]) for row in rows} == {("1", "1"), ("1", "2"), ("2", "1"), ("2", "2")}


@pytest.mark.slow
def test_a_method_with_a_backbone_of_its_own_stands_in_the_same_tables(plan, tmp_path, dataset):
    path = plan(methods=["medsam", "medsam_whole"], external={"Readers": str(dataset / "labelsTs")})
    table = launcher.experiment(path, tmp_path / "out").with_name("table.md").read_text()
    assert table.count("| MedSAM recipe |") == table.count("| MedSAM recipe, whole model |") >= 1
    evaluations = tmp_path / "out" / "evaluation" / "fold0"
    assert {path.name for path in evaluations.iterdir()} == {"gt_box", "gt_box_sam_whole"}
    assert "AdamW (weight decay 0.01)" in (evaluations / "gt_box_sam_whole" / "report.html").read_text()
    with (tmp_path / "out" / "cases.csv").open(newline="") as file:
        keys = [
            tuple(row[name] for name in ("method", "seed", "case_id", "metric", "region", "class"))
            for row in csv.DictReader(file)
        ]
    # Guesses, zero-shot SAM and the other tool stand there once.
    assert len(set(keys)) == len(keys) and "Readers" in {key[0] for key in keys}
    assert sorted(path.name for path in (tmp_path / "out").glob("features*")) == ["features", "features_sam_whole"]


@pytest.mark.slow
def test_corrupted_test_cases(plan, tmp_path):
    path = plan(corruptions={"names": ["gaussian_noise"], "levels": [1, 5]})
    table = launcher.experiment(path, tmp_path / "out").with_name("table.md").read_text()
    assert "corrupted; Source: clean" in table and "Gap: clean to gaussian_noise-5" in table
    with (tmp_path / "out" / "cases.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["images"] == pooled.CORRUPTED]
    assert {row["domain"] for row in rows} == {"clean", "gaussian_noise-1", "gaussian_noise-5"}


@pytest.mark.slow
def test_a_grid_is_searched_on_validation_cases(plan, tmp_path, monkeypatch):
    trained, original = [], train.train
    monkeypatch.setattr(train, "train", lambda *given: [trained.append(given[1].name), original(*given)])
    path = plan(methods=["sam_ft", "sam_cmp"], seeds=[1, 2], grid={"lambda2": [0.1, 1], "rule": RULE})
    launcher.experiment(path, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "selection" / "fold0.json").read_text())
    assert found["rule"] == RULE and found["split"] == "val" and found["seed"] == 1
    chosen = found["methods"]["sam_cmp"]["chosen"]["lambda2"]
    assert trained == [
        *("sam_ft_seed1", "sam_cmp_lambda2=0.1_seed1", "sam_cmp_lambda2=1_seed1", "sam_ft_seed2"),
        f"sam_cmp_lambda2={chosen:g}_seed2",
    ]
    with (tmp_path / "out" / "cases.csv").open(newline="") as file:
        assert {row["method"] for row in csv.DictReader(file)} >= {"sam_cmp", "sam_cmp+ts"}


@pytest.mark.slow
def test_grid_folds_sizes_and_prompts_together(plan, tmp_path, monkeypatch):
    trained, original = [], train.train
    monkeypatch.setattr(train, "train", lambda *given: [trained.append(given[1]), original(*given)])
    path = plan(
        source="",
        methods=["sam_ft", "early_stopping", "sam_fip"],
        folds={"protocol": "kfold", "folds": 2},
        prompts=["gt_points", "random_points"],
        few_shot=[1, 2],
        grid={"lambda1": [0.1, 0.3], "steps": [1, 2], "rule": RULE},
    )
    table = launcher.experiment(path, tmp_path / "out").with_name("table.md").read_text()
    assert len(trained) == len(set(trained)) == 2 * 2 * 2 * (1 + 2 + 2)  # folds, sizes, protocols, candidates
    steps = {run.name: json.loads((run / "model" / "model.json").read_text())["config"]["steps"] for run in trained}
    assert (steps["early_stopping_steps=1_seed1"], steps["sam_ft_seed1"]) == (1, 2)
    assert len(list((tmp_path / "out" / "selection").glob("*.json"))) == 8
    with (tmp_path / "out" / "cases.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    settings = {(row["fold"], row["training_subjects"], row["protocol"]) for row in rows}
    assert len(settings) == 8 and {"early_stopping", "sam_fip+ts"} <= {row["method"] for row in rows}
    assert (
        "2 training subjects; " in table.replace("prompts random_points, 2", "2") and "SAM-FT, stopped early" in table
    )


def test_the_rule_of_a_grid():
    def candidate(weight, dsc, ece):
        return grid_search.Candidate({"lambda1": weight}, dsc, ece)

    rule = experiment.Rule()
    good, low, better = candidate(1, 0.80, 0.10), candidate(2, 0.70, 0.01), candidate(3, 0.795, 0.05)
    assert grid_search.choose([good, low, better], 0.80, rule) is better  # the lowest within a point of DSC
    assert grid_search.choose([good, low, better], 0.95, rule) is good  # none within: the highest DSC
    assert grid_search.choose([candidate(1, 0.9, float("nan")), better], 0.80, rule) is better


def test_names_of_calibrated_methods():
    assert methods.order(["calsam+dirichlet", "sam_ft+lts", "sam_ft", "sam_ft+ts"]) == [
        *("sam_ft", "sam_ft+ts", "sam_ft+lts", "calsam+dirichlet")
    ]
    assert methods.display("mbls+lts") == "MbLS + LTS" and methods.base("mbls+dirichlet") == "mbls"
    trained_runs.check_calibrators(calibrators.names())  # each has a name in tables
    with pytest.raises(
        UsageError, match="--calibrators=vector,vector: give some of dirichlet, image_temp.*, each once"
    ):
        trained_runs.check_calibrators(["vector", "vector"])


def test_a_damaged_table_is_refused(tmp_path):
    (tmp_path / "cases.csv").write_text("method,seed\nsam_ft,1\n")
    with pytest.raises(DataError, match="its columns are method, seed"):
        tables.read_cases(tmp_path / "cases.csv")

"""The training configuration: the overrides that users and other tools rely on, and what wrong ones say."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gru4recf_dist import config as configuration
from gru4recf_dist import trained_run, typed_yaml
from gru4recf_dist.config import Config
from gru4recf_dist.errors import UserError
from gru4recf_dist.run_folder import check_run_folder
from gru4recf_dist.train import is_finished

REQUIRED = ["data=data/x", "run_dir=runs/x"]


def _load(*overrides: str) -> Config:
    return configuration.load(None, [*REQUIRED, *overrides])


def _error(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        _load(*overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("override", "path", "expected"),
    [
        ("data=s3://bucket/set", "data", "s3://bucket/set"),
        ("data=/tmp/a=b,c", "data", "/tmp/a=b,c"),
        ("run_dir=runs/ml 100k", "run_dir", "runs/ml 100k"),
        ("seed=7", "seed", 7),
        ("max_epochs=3", "max_epochs", 3),
        ("max_steps=100", "max_steps", 100),
        ("max_steps=null", "max_steps", None),
        ("engine.name=deepspeed", "engine.name", "deepspeed"),
        ("model.fusion=item_only", "model.fusion", "item_only"),
        ("model.fusion=concat_output", "model.fusion", "concat_output"),
        ("model.dropout=0.5", "model.dropout", 0.5),
        ("model.dropout=0", "model.dropout", 0.0),
        ("model.features=[category,price]", "model.features", ["category", "price"]),
        ("model.features=[]", "model.features", []),
        ("loader.workers=3", "loader.workers", 3),
        ("table.lr=1e-4", "table.lr", 1e-4),
        ("evaluation.ks=[1,10]", "evaluation.ks", [1, 10]),
    ],
)
def test_override_sets_its_key_and_nothing_else(override, path, expected):
    changed = _load(override).model_dump()
    default = _load().model_dump()
    *sections, leaf = path.split(".")
    here, there = changed, default
    for section in sections:
        here, there = here[section], there[section]
    assert here.pop(leaf) == expected
    there.pop(leaf)
    assert changed == default


def test_max_steps_alone_is_enough():
    loaded = _load("max_epochs=null", "max_steps=5")
    assert (loaded.max_epochs, loaded.max_steps) == (None, 5)


@pytest.mark.parametrize(
    ("overrides", "path", "expected"),
    [
        (["engine.deepspeed.zero_optimization.stage=2"], ["zero_optimization", "stage"], 2),
        (["engine.deepspeed.wall_clock_breakdown=true"], ["wall_clock_breakdown"], True),
        (["engine.deepspeed.bf16.enabled=true", "engine.deepspeed.a.b.c=x"], ["a", "b", "c"], "x"),
    ],
)
def test_any_key_goes_into_the_deepspeed_configuration(overrides, path, expected):
    value = _load("engine.name=deepspeed", *overrides).engine.deepspeed
    for part in path:
        value = value[part]
    assert value == expected


def test_one_deepspeed_key_leaves_the_others_at_their_defaults():
    assert _load("engine.deepspeed.wall_clock_breakdown=true").engine.deepspeed == {
        "zero_optimization": {"stage": 1},
        "wall_clock_breakdown": True,
    }


def test_dropout_zero_switches_off_every_dropout():
    given = [f"model.{name}=0.2" for name in type(_load().model).model_fields if name.startswith("dropout_")]
    assert len(given) == 4
    loaded = _load("model.dropout=0", *given).model
    dropouts = [loaded.input_dropout, loaded.dropout_feature, loaded.dropout_hidden, loaded.dropout_output]
    assert dropouts == [0.0] * 4


def test_a_dropout_behind_the_rnns_needs_none_on_the_items():
    loaded = _load("model.dropout=0.2", "model.dropout_embedding=0", "model.dropout_hidden=0.3").model
    assert (loaded.input_dropout, loaded.dropout_hidden) == (0.0, 0.3)
    assert _load("model.dropout=0.2").model.input_dropout == 0.2


@pytest.mark.parametrize("written", ["off", "'off'", "false"])
def test_logq_can_be_off_on_the_command_line_and_in_a_file(tmp_path, written):
    assert _load(f"loss.logq={written}").loss.logq == "off"
    path = tmp_path / "recipe.yaml"
    path.write_text(f"data: d\nrun_dir: r\nloss:\n  logq: {written}\n")
    loaded = configuration.load(str(path), [])
    assert loaded.loss.logq == "off"
    path.write_text(typed_yaml.dump(loaded))
    assert configuration.load(str(path), []) == loaded
    assert "loss.logq" in _error("loss.logq=on")


@pytest.mark.parametrize(
    ("override", "losses", "says"),
    [
        ("elu=0.5", ("sampled_softmax", "full_softmax"), "elu is not for {}"),
        ("regularization=0.5", ("sampled_softmax", "full_softmax", "bpr", "top1", "top1_max"), "bpr_max alone"),
        ("logq=off", ("full_softmax", "bpr", "bpr_max", "top1", "top1_max"), "logq is not for {}"),
        ("logq=classic", ("bpr",), "logq is not for {}"),
    ],
)
def test_settings_that_a_loss_would_ignore_are_refused(override, losses, says):
    every = type(_load().loss).model_fields["name"].annotation.__args__
    for loss in every:
        given = [f"loss.name={loss}", f"loss.{override}"]
        if loss not in losses:
            if override != "logq=classic":
                _load(*given)
            continue
        text = _error(*given)
        assert text.startswith("loss: ") and says.format(loss) in text


@pytest.mark.parametrize(
    ("loss", "ignored"),
    [
        ("full_softmax", {"logq": "off", "elu": 0.5, "regularization": 0.0}),
        ("full_softmax", {"logq": False}),
        ("top1", {"regularization": 0.5, "logq": "classic"}),
        ("bpr_max", {"logq": "off"}),
        (None, {"elu": 1.0}),
    ],
)
def test_what_the_loss_of_an_earlier_run_ignored_is_left_out(tmp_path, loss, ignored):
    corrected = _load(*([f"loss.name={loss}"] if loss else []), "loss.negatives=7", "seed=3")
    stored = yaml.safe_load(typed_yaml.dump(corrected))
    if loss is None:
        del stored["loss"]["name"]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**stored, "loss": {**stored["loss"], **ignored}}))
    with pytest.raises(UserError, match="is not for"):
        configuration.load(str(path), [])
    assert configuration.load_stored(str(path), []) == corrected
    assert configuration.load_stored(str(path), ["seed=4"]) == corrected.model_copy(update={"seed": 4})
    # What is newly given is refused; what has a meaning stays.
    key = next(iter(ignored))
    with pytest.raises(UserError, match=f"loss: {key} is not for"):
        configuration.load_stored(str(path), [f"loss.{key}={ignored[key]}"])
    path.write_text(typed_yaml.dump(_load("loss.name=bpr_max", "loss.regularization=0.5", "loss.elu=0.2")))
    assert configuration.load_stored(str(path), []).loss == configuration.load(str(path), []).loss


def test_the_folder_of_an_earlier_run_is_taken(tmp_path):
    corrected = _load("loss.name=full_softmax", f"run_dir={tmp_path}", "evaluation.baselines=false")
    stored = yaml.safe_load(typed_yaml.dump(corrected))
    stored["loss"]["logq"] = "off"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(stored))
    check_run_folder(corrected, has_checkpoint=True)
    # For evaluation and the others, and for `init_from`.
    assert trained_run.read_config(str(tmp_path), []) == corrected
    assert not is_finished(corrected)
    (tmp_path / "result.json").write_text("{}")
    assert is_finished(corrected)
    with pytest.raises(UserError, match="seed: 1, but the checkpoints"):
        check_run_folder(corrected.model_copy(update={"seed": 1}), has_checkpoint=True)


def test_other_dropouts_stay_when_dropout_is_positive():
    loaded = _load("model.dropout=0.1", "model.dropout_feature=0.2", "model.dropout_hidden=0.4")
    assert (loaded.model.dropout, loaded.model.dropout_feature, loaded.model.dropout_hidden) == (0.1, 0.2, 0.4)


@pytest.mark.parametrize(
    ("override", "unknown", "meant"),
    [
        ("model.droput=0", "model.droput", "model.dropout"),
        ("batchsize=8", "batchsize", "batch_size"),
        ("dropout=0", "dropout", "model.dropout"),
        ("engine.nme=ddp", "engine.nme", "engine.name"),
        ("loader.worker=1", "loader.worker", "loader.workers"),
        ("early_stopping.patiense=1", "early_stopping.patiense", "early_stopping.patience"),
    ],
)
def test_unknown_key_names_the_closest(override, unknown, meant):
    assert _error(override) == f"unknown key '{unknown}'; did you mean '{meant}'?"


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("seed=abc", "seed", "abc"),
        ("seed=-1", "seed", "-1"),
        ("seed=1.5", "seed", "1.5"),
        ("max_epochs=0", "max_epochs", "0"),
        ("batch_size=0", "batch_size", "0"),
        ("model.dropout=1.0", "model.dropout", "1.0"),
        ("model.dropout=nan", "model.dropout", "nan"),
        ("model.fusion=cross", "model.fusion", "cross"),
        ("engine.name=horovod", "engine.name", "horovod"),
        ("table.lr=0", "table.lr", "0"),
        ("data=[a,b]", "data", "['a', 'b']"),
        ("model=5", "model", "5"),
        ("evaluation.ks=[10,x]", "evaluation.ks", "x"),
        ("evaluation.ks=[]", "evaluation.ks", "[]"),
        ("model.features=one", "model.features", "one"),
        ("early_stopping.metric=ndcg@7", "early_stopping.metric", "ndcg@7"),
        ("early_stopping.metric=accuracy@10", "early_stopping.metric", "accuracy@10"),
        ("loader.context=50", "context", "50"),
    ],
)
def test_wrong_value_names_key_and_value(override, key, value):
    text = _error(override)
    assert key in text
    assert value in text


def test_negatives_may_be_those_of_the_batch_alone():
    for loss in ("loss.name=bpr_max", "loss.logq=off", "loss.name=full_softmax"):
        assert _load(loss, "loss.negatives=0", "loss.in_batch=all").loss.negatives == 0
    assert "negatives is 0, and so is in_batch" in _error("loss.name=bpr", "loss.negatives=0")
    for logq in ("exact", "classic"):
        text = _error("loss.negatives=0", "loss.in_batch=all", f"loss.logq={logq}")
        assert text.startswith("loss: negatives is 0") and f"set logq ({logq}) to off" in text


@pytest.mark.parametrize("override", ["table.lr=.inf", "model.temperature=.inf"])
def test_infinite_rates_are_refused(override):
    assert override.partition("=")[0] in _error(override)


def test_required_keys_are_named():
    with pytest.raises(UserError) as caught:
        configuration.load(None, [])
    assert "data must be given" in str(caught.value)
    assert "run_dir must be given" in str(caught.value)


def test_run_without_an_end_is_refused():
    text = _error("max_epochs=null")
    assert "max_epochs" in text
    assert "max_steps" in text


def test_file_is_read_and_overridden(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("data: d\nrun_dir: r\nmodel:\n  dropout: 0.2\n  hidden_size: 32\n")
    loaded = configuration.load(str(path), ["model.dropout=0.4"])
    assert (loaded.data, loaded.model.dropout, loaded.model.hidden_size) == ("d", 0.4, 32)
    assert configuration.load(f"file://{path}", []).model.dropout == 0.2


def test_shipped_recipes_are_valid(request):
    recipes = sorted((request.config.rootpath / "configs").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        configuration.load(str(recipe), [])


def test_dumped_configuration_loads_to_the_same(tmp_path):
    config = _load(
        "seed=3",
        "model.features=[category]",
        "table.clip=0.25",
        "table.eps=1e-12",
        "max_epochs=null",
        "max_steps=7",
        "engine.deepspeed.zero_optimization.stage=2",
        "early_stopping.patience=null",
        "run_dir=memory://run/ä",
    )
    path = tmp_path / "config.yaml"
    path.write_text(typed_yaml.dump(config), encoding="utf-8")
    assert configuration.load(str(path), []) == config


@settings(max_examples=20, deadline=None)
@given(
    name=st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"], exclude_characters="$"), max_size=12),
    rate=st.floats(1e-30, 1e30),
    seed=st.integers(0, 2**63),
)
def test_dumped_values_of_any_look_load_to_the_same(tmp_path_factory, name, rate, seed):
    config = Config(data=name, run_dir="r", seed=seed, table={"lr": rate})
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    path.write_text(typed_yaml.dump(config), encoding="utf-8")
    assert configuration.load(str(path), []) == config


def test_folder_named_like_a_number_survives_the_dump(tmp_path):
    path = tmp_path / "config.yaml"
    # A commit's short hash may look like a float.
    path.write_text(typed_yaml.dump(Config(data="d", run_dir="12e4567")))
    assert configuration.load(str(path), []).run_dir == "12e4567"

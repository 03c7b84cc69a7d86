"""Recipe < file < section.key=value, and one sentence for each mistake."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from fieldmark.config import RunConfig, load_toml, override
from fieldmark.config.load import from_json
from fieldmark.cookbook import RECIPES, find_recipe, load_recipe
from fieldmark.errors import ConfigError, UnknownName

BASE = find_recipe("cifar10-resnet18")


def test_values_are_read_as_toml_and_text_is_text() -> None:
    found = override(
        BASE,
        [
            "train.epochs=2",
            "optim.nesterov=true",
            "model.args.widths=[8, 8, 16]",
            "data.source=hf:../data",
            "eval.crop_frac=0.5",
        ],
    )
    assert found.train.epochs == 2
    assert found.optim.nesterov is True
    assert found.model.args == {"widths": [8, 8, 16]}
    assert found.data.source == "hf:../data"
    assert BASE.train.epochs == 200


def test_a_table_keeps_its_other_keys() -> None:
    both = override(override(BASE, ["model.args.a=1"]), ["model.args.b=2"])
    assert both.model.args == {"a": 1, "b": 2}


def test_another_network_or_optimizer_loses_the_arguments_of_the_one_before() -> None:
    smoke = find_recipe("cifar10-smoke")
    assert smoke.model.args
    assert override(smoke, ["model.arch=resnet18"]).model.args == {}
    assert override(smoke, ["model.arch=airnet"]).model.args == smoke.model.args
    both = override(smoke, ["model.args.widths=[8]", "model.arch=resnet18"])
    assert both.model.args["widths"] == [8]
    assert override(smoke, ["model.args={}"]).model.args == {}


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("train.epochs=soon", r"^train\.epochs: Input .* number.*, or 'auto'\. Got 'soon'\.$"),
        ("train.batch_size=big", r"^train\.batch_size: Input .*, or 'auto'\. Got 'big'\.$"),
        ("train.max_minutes=-1", r"^train\.max_minutes: .* greater than or equal to 0\. Got -1\.$"),
    ],
)
def test_a_key_of_two_kinds_is_refused_in_one_sentence(setting: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        override(find_recipe("cifar10-smoke"), [setting])


def test_two_lengths_are_named() -> None:
    with pytest.raises(ConfigError, match="Got epochs and max_minutes. Set one of them"):
        override(find_recipe("cifar10-smoke"), ["train.epochs=2", "train.max_minutes=3"])


def test_a_part_of_a_table_that_is_replaced_stands_alone() -> None:
    for settings in (
        ["model.arch=test_vit", "model.args.patch_size=8"],
        ["model.args.patch_size=8", "model.arch=test_vit"],
    ):
        assert override(find_recipe("cifar10-smoke"), settings).model.args == {"patch_size": 8}


def test_setting_one_unit_clears_the_others() -> None:
    steps = override(BASE, ["train.steps=10", "schedule.warmup_frac=0.1"])
    assert (steps.train.steps, steps.train.epochs) == (10, 0)
    epochs = override(steps, ["schedule.warmup_epochs=0.5"])
    assert (epochs.schedule.warmup_epochs, epochs.schedule.warmup_frac) == (0.5, 0)


def test_who_says_how_long_is_not_overruled_by_a_least_length() -> None:
    base = override(find_recipe("finetune"), ["train.min_steps=100"])
    for setting in ("train.epochs=2", "train.steps=3", "train.examples=99"):
        assert override(base, [setting]).train.min_steps == 0
    both = override(base, ["train.epochs=2", "train.min_steps=50"]).train
    assert (both.epochs, both.min_steps) == (2, 50)
    with pytest.raises(ConfigError, match=r"min_steps belongs to train\.epochs"):
        override(base, ["train.steps=3", "train.min_steps=5"])


def test_another_schedule_loses_what_belongs_to_the_one_before() -> None:
    steps = find_recipe("imagenet-resnet50")
    assert override(steps, ["schedule.name=cosine"]).schedule.step_epochs == 0
    linear = override(BASE, ["schedule.name=linear", "schedule.end_factor=0.1"])
    assert override(linear, ["schedule.name=constant"]).schedule.end_factor == 0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optim.lrr=1", "config key 'optim.lrr' does not exist. Did you mean 'optim.lr'?"),
        ("optm.lr=1", "config section 'optm' does not exist. Did you mean 'optim'?"),
        ("optim.lr=-1", "optim.lr: Input should be greater than 0. Got -1."),
        ("train.epochs", "a setting must be section.key=value. Got 'train.epochs'."),
        ("train.precision=fp8", "train.precision: Input should be 'float32'"),
        ("train.accumulation_steps=3", "multiple of train.accumulation_steps"),
        ("data.val_frac=0.9", "data.val_frac: Input should be less than or equal to 0.5"),
        ("train.epochs=nan", "train.epochs"),
        ("optim=3", "a setting must be section.key=value"),
    ],
)
def test_a_mistake_is_one_sentence(setting: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        override(BASE, [setting])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        ["train.steps=1", "train.epochs=1"],
        ["schedule.warmup_steps=1", "schedule.warmup_epochs=1"],
        ["train.early_stop_epochs=2", "data.val_frac=0"],
        ["data.storage=resident", "augment.resized_crop=true"],
        ["model.arch=", "model.pretrained="],
    ],
)
def test_combinations_that_cannot_be_are_refused(settings: list[str]) -> None:
    with pytest.raises(ConfigError):
        override(BASE, settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["loss.focal_gamma=3"], "loss.focal_gamma belongs to loss.name=focal. Got 3"),
        (["loss.adjust_tau=2"], "loss.adjust_tau belongs to loss.name=logit-adjusted"),
        (["loss.bce_threshold=0.2"], "loss.bce_threshold belongs to loss.name=bce"),
        (["loss.effective_beta=0.9"], "belongs to loss.class_weights=effective"),
        (["loss.class_weights=inverze"], "must be none, inverse, effective, or a list"),
        (["loss.class_weights=['a']"], "must be none, inverse, effective, or a list"),
        (["loss.class_weights=[1, -1]"], "must not be below 0"),
        (["loss.class_weights=[0, 0]"], "must not be below 0, and at least one"),
        (["loss.class_weights=[]"], "must not be below 0, and at least one"),
        (["loss.class_weights=[1, inf]"], "finite number"),
        (["loss.focal_gamma=inf", "loss.name=focal"], "finite number"),
        (["loss.name=logit-adjusted", "loss.class_weights=inverse"], "keep one of them"),
        (["loss.name=logit-adjusted", "data.sampler=sqrt"], "keep one of them"),
        (["loss.class_weights=effective", "data.sampler=balanced"], "keep one of them"),
        (
            ["loss.name=bce", "loss.bce_threshold=0.2", "loss.label_smoothing=0.1"],
            "undoes loss.label_smoothing",
        ),
    ],
)
def test_settings_of_the_loss_that_cannot_be(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        override(BASE, settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_loss_loses_the_arguments_of_the_one_before() -> None:
    focal = override(BASE, ["loss.name=focal", "loss.focal_gamma=3", "loss.class_weights=[1, 2]"])
    assert (focal.loss.focal_gamma, focal.loss.class_weights) == (3, (1, 2))
    assert RunConfig.model_validate_json(focal.model_dump_json()) == focal
    assert override(focal, ["loss.name=bce"]).loss.focal_gamma == 2
    effective = override(BASE, ["loss.class_weights=effective", "loss.effective_beta=0.9"])
    assert override(effective, ["loss.class_weights=none"]).loss.effective_beta == 0.999
    # Weights that someone chose are not a rule, and may say what an error costs.
    override(BASE, ["loss.class_weights=[1, 2]", "data.sampler=balanced"])
    override(BASE, ["loss.class_weights=[1, 2]", "loss.name=logit-adjusted"])


@pytest.mark.parametrize(
    ("setting", "owner"),
    [
        ("train.ema_steps=4", "train.ema_decay"),
        ("train.ema_warmup=true", "train.ema_decay"),
        ("optim.lookahead_decay=0.9", "optim.lookahead_steps"),
        ("optim.filter_momentum=0.5", "optim.name=muon"),
        ("schedule.step_factor=0.5", "schedule.step_epochs"),
        ("augment.ops_magnitude=5", "augment.ops=randaugment"),
        ("augment.erase_mode=constant", "augment.erase_prob"),
        ("augment.mix_prob=0.5", "augment.mixup_alpha or augment.cutmix_alpha"),
        ("augment.resized_crop_min_area_frac=0.5", "augment.resized_crop"),
    ],
)
def test_a_key_that_would_do_nothing_is_refused(setting: str, owner: str) -> None:
    with pytest.raises(ConfigError, match=f"means nothing without {owner}.* Got "):
        load_recipe("cifar10-resnet18", [setting])


def test_what_is_switched_off_takes_its_keys_along() -> None:
    a2 = "imagenet-resnet50-a2"
    plain = load_recipe(a2, ["augment.ops=none", "augment.mixup_alpha=0", "augment.cutmix_alpha=0"])
    assert (plain.augment.ops_magnitude, plain.augment.mix_prob) == (9, 1)
    assert load_recipe(a2, ["schedule.warmup_epochs=0"]).schedule.warmup_start_factor == 0.01
    steps = load_recipe("imagenet-resnet50-tv2", ["train.ema_decay=0"]).train.ema_steps
    assert steps == 1
    chosen = load_recipe("cifar10-resnet18", ["augment.policy=strong", "augment.ops_magnitude=5"])
    assert chosen.augment.ops_magnitude == 5  # whether it means something is seen at the images


def test_a_run_that_was_stored_before_such_keys_were_refused_still_opens() -> None:
    stored = json.loads(find_recipe("imagenet-resnet50-tv2").model_dump_json())
    stored["train"]["ema_decay"] = 0.0
    stored["schedule"]["warmup_epochs"] = 0.0
    found = from_json(stored)
    assert (found.train.ema_steps, found.schedule.warmup_start_factor) == (1, 0.01)
    assert load_recipe(
        "cifar10-fast94", ["optim.name=Muon", "optim.filter_lr=0.1", "optim.filter_momentum=0.7"]
    )


def test_a_config_is_frozen_and_its_json_reloads_equal() -> None:
    with pytest.raises(ValidationError):
        BASE.train.epochs = 1  # type: ignore[misc]
    assert RunConfig.model_validate_json(BASE.model_dump_json()) == BASE


def test_a_file_stands_between_recipe_and_settings(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('recipe = "cifar10-resnet18"\n[train]\nepochs = 3\nseed = 5\n')
    found = load_recipe(str(file), ["train.seed=7"])
    assert (found.train.epochs, found.train.seed, found.optim.lr) == (3, 7, 0.1)
    assert found.name == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train", "must be a readable TOML file"),
        ("[trian]\nepochs=1", "config section 'trian' does not exist. Did you mean 'train'?"),
        ("train = 3", "config section 'train' must be a table. Got 3."),
        ("[data]\nsource='x'", "must be set"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match="."):
        load_toml(file)
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(file))
    assert message in str(caught.value)


def test_unknown_recipes_and_files_are_named() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'cifar10-resnet18'"):
        load_recipe("cifar10-resnet-18")
    with pytest.raises(ConfigError, match="It does not exist"):
        load_recipe("nowhere.toml")
    with pytest.raises(ConfigError, match="fieldmark recipes"):
        load_recipe("")


def test_a_name_is_registered_once() -> None:
    from fieldmark.cookbook.registry import recipe

    with pytest.raises(ValueError, match="already defined"):
        recipe("digits")(RECIPES["digits"].build)


def test_a_key_of_augment_that_a_policy_would_not_see_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"resized_crop=false takes nothing .*policy=custom"):
        override(find_recipe("finetune"), ["augment.resized_crop=false"])
    own = override(find_recipe("finetune"), ["augment.policy=custom", "augment.resized_crop=false"])
    assert not own.augment.resized_crop
    seen = override(find_recipe("finetune"), ["augment.flip=none", "augment.cutout_px=3"])
    assert (seen.augment.policy, seen.augment.flip, seen.augment.cutout_px) == ("auto", "none", 3)

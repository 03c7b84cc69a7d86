"""What a sweep may try: every form, and one sentence for each that is none."""

from typing import Any

import pytest

from fieldmark.config import override
from fieldmark.config.space import Space, parse_space, split_settings, to_text
from fieldmark.cookbook import find_recipe
from fieldmark.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "kind", "low", "high", "values"),
    [
        ("1e-4..1e-1", "uniform", 1e-4, 0.1, ()),
        ("0.0..0.3", "uniform", 0, 0.3, ()),
        ("-1..1", "uniform", -1, 1, ()),
        ("0...5", "uniform", 0, 0.5, ()),
        ("log:1e-4..1e-1", "log", 1e-4, 0.1, ()),
        ("int:2..8", "int", 2, 8, ()),
        ("[64,128]", "choice", 0, 0, (64, 128)),
        ("[64, 0.5, true]", "choice", 0, 0, (64, 0.5, True)),
        ('["sgd","adamw"]', "choice", 0, 0, ("sgd", "adamw")),
        ("[sgd, adamw]", "choice", 0, 0, ("sgd", "adamw")),
        ("choice:[[8,16],[16,32]]", "choice", 0, 0, ([8, 16], [16, 32])),
    ],
)
def test_forms(text: str, kind: str, low: float, high: float, values: tuple[Any, ...]) -> None:
    space = parse_space("a.b", text)
    assert space is not None
    assert (space.kind, space.low, space.high, space.values) == (kind, low, high, values)
    assert space.text == text


@pytest.mark.parametrize(
    "text", ["0.1", "adamw", "folder:../photos", "hf:a/b", "../x", "local-dir:a..b", "true", '"a"']
)
def test_single_values(text: str) -> None:
    assert parse_space("a.b", text) is None


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("log:0..1", "begin above 0 with log:"),
        ("log:-1..1", "begin above 0 with log:"),
        ("log:0.1", "be a range of two numbers"),
        ("0.1..", "be a range of two numbers"),
        ("0.1..high", "be a range of two numbers"),
        ("0..inf", "be a range of two numbers"),
        ("int:2", "be a range of two numbers"),
        ("int:1.5..3", "have whole numbers with int:"),
        ("0.3..0.1", "rise from a lower to a higher"),
        ("1..1", "rise from a lower to a higher"),
        ("[64]", "offer at least two values"),
        ("[]", "offer at least two values"),
        ("[64,64]", "list each value once"),
        ("[64,128", "be a list"),
        ("choice:64", "be a list"),
        ("[a b, c]", "be a list"),
        ("[{a=1},{a=2}]", "be a list"),
        ("[1979-05-27,1979-05-28]", "be a list"),
    ],
)
def test_what_is_no_space_is_one_sentence_with_the_forms(text: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule) as caught:
        parse_space("optim.lr", text)
    message = str(caught.value)
    assert message.startswith("the space of optim.lr must ")
    assert f"Got {text!r}." in message
    assert "log:1e-4..1e-1" in message


def test_spaces_and_settings_are_told_apart() -> None:
    fixed, spaces = split_settings(
        find_recipe("digits"),
        [
            "optim.lr=log:0.01..1",
            "train.epochs=int:1..3",
            "train.batch_size=[32,64]",
            "optim.name=[adamw,lamb]",  # not the text "[adamw,lamb]"
            "model.args.widths=[8,8,16]",  # a key that takes a list: a value
            "train.seed=2",
            "train.seed=3",  # the last one counts, as in a training run
            "augment.sizes=choice:[[[0.0,16]],[[0.0,32]]]",
        ],
    )
    assert fixed == ["model.args.widths=[8,8,16]", "train.seed=2", "train.seed=3"]
    assert [space.key for space in spaces] == [
        "optim.lr",
        "train.epochs",
        "train.batch_size",
        "optim.name",
        "augment.sizes",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["optim.lrr=log:0.01..1"], "Did you mean 'optim.lr'"),
        (["model.drop_rate=0.0..1.5"], "model.drop_rate: Input should be less than 1"),
        (["train.batch_size=1..64"], r"takes whole numbers.*Write train.batch_size=int:1..64\."),
        (["train.batch_size=[32,0]"], "train.batch_size"),
        (["schedule.name=[cosine,cosin]"], "schedule.name"),
        (["optim.lr=0.1", "optim.lr=0.1..1.0"], "optim.lr must be given once"),
        (["optim.lr=0.1..1.0", "optim.lr=0.1"], "optim.lr must be given once"),
        (["optim.lr=0.1..1.0", "optim.lr=0.1..2.0"], "optim.lr must be given once"),
        (["lr=0.1..1.0"], "a setting must be section.key=value"),
    ],
)
def test_values_that_a_key_does_not_take_are_refused_at_once(
    settings: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        split_settings(find_recipe("digits"), settings)


def test_a_tried_value_is_short_inside_the_range_and_read_back_equal() -> None:
    log = Space("optim.lr", "", "log", 0.0123456, 1.0)
    assert log.setting(0.123456789) == "optim.lr=0.1235"
    assert log.setting(0.0123456) == "optim.lr=0.01235"
    low = Space("optim.lr", "", "log", 1.2344, 2.00004)
    assert low.setting(1.2344) == "optim.lr=1.2344"  # 1.234 would be below
    assert low.setting(2.00003) == "optim.lr=2.0"
    tiny = Space("optim.lr", "", "log", 1e-9, 1.0).setting(3.00000004e-9)
    assert override(find_recipe("digits"), [tiny]).optim.lr == 3e-9


@pytest.mark.parametrize(
    "value", ["adamw", "true", "1e3", "a b", 'quo"te', 3, 0.25, True, [8, 16], ["a", "b"], "ü"]
)
def test_text_of_a_value_reads_back_equal(value: Any) -> None:
    setting = f"optim.args.x={to_text(value)}"
    assert override(find_recipe("digits"), [setting]).optim.args["x"] == value


def test_a_key_and_the_one_that_it_needs_may_be_tried_together() -> None:
    base = find_recipe("cifar10-resnet18")
    both = ["optim.lookahead_steps=[3,5]", "optim.lookahead_decay=[0.9,0.8]"]
    assert len(split_settings(base, both)[1]) == 2
    assert len(split_settings(base, [both[1], "optim.lookahead_steps=5"])[1]) == 1
    for off in ([both[1]], ["optim.lookahead_steps=[0,5]", both[1]]):
        with pytest.raises(ConfigError, match="means nothing without optim.lookahead_steps"):
            split_settings(base, off)

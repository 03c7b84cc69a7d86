"""Parameter groups and optimizers, against timm's own and against what was asked for."""

from typing import Any

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn

from fieldmark.config import OptimConfig, override
from fieldmark.cookbook import find_recipe
from fieldmark.errors import ConfigError
from fieldmark.model import Architecture, build, head_parameters
from fieldmark.training.optim import make_optimizer, parameter_groups

NETWORKS = ("tf_efficientnet_lite0", "resnet18", "small_resnet18", "test_vit", "test_convnext")


def network(name: str = "test_vit", **args: Any) -> nn.Module:
    with torch.device("meta"):  # shapes and names are all that groups depend on
        return build(Architecture(name, 4, args))


def by_parameter(module: nn.Module, groups: list[dict[str, Any]], key: str) -> dict[str, Any]:
    names = {id(p): name for name, p in module.named_parameters()}
    return {names[id(p)]: group[key] for group in groups for p in group["params"]}


@pytest.mark.parametrize("name", NETWORKS)
def test_layer_wise_rates_equal_timm_s(name: str) -> None:
    module = network(name)
    config = OptimConfig(
        name="adamw", lr=2e-3, weight_decay=0.05, layer_decay=0.75, decay_norm_and_bias=False
    )
    ours = parameter_groups(module, config)
    exempt = getattr(module, "no_weight_decay", set)()
    theirs = param_groups_layer_decay(
        module, weight_decay=0.05, layer_decay=0.75, no_weight_decay_list=exempt
    )
    scale = by_parameter(module, theirs, "lr_scale")
    expected = {parameter: pytest.approx(2e-3 * factor) for parameter, factor in scale.items()}
    assert by_parameter(module, ours, "lr") == expected
    assert by_parameter(module, ours, "weight_decay") == by_parameter(
        module, theirs, "weight_decay"
    )


def test_layer_wise_rates_by_hand() -> None:
    module = network("test_vit")  # a stem, six blocks and the head
    config = OptimConfig(lr=1.0, layer_decay=0.5, head_lr_factor=10)
    groups = {group["name"]: group["lr"] for group in parameter_groups(module, config)}
    assert groups == {
        "layer 0": pytest.approx(2**-7),
        "layer 1": pytest.approx(2**-6),
        "layer 2": pytest.approx(2**-5),
        "layer 3": pytest.approx(2**-4),
        "layer 4": pytest.approx(2**-3),
        "layer 5": pytest.approx(2**-2),
        "layer 6": pytest.approx(2**-1),
        "head": 10.0,
    }


def test_every_trainable_parameter_is_in_one_group() -> None:
    for name in NETWORKS:
        module = network(name)
        frozen = next(module.parameters()).requires_grad_(False)
        config = OptimConfig(lr=1, layer_decay=0.8, bias_lr_factor=3, decay_norm_and_bias=False)
        found = [id(p) for g in parameter_groups(module, config) for p in g["params"]]
        assert len(found) == len(set(found))
        assert set(found) == {id(p) for p in module.parameters()} - {id(frozen)}


def test_norms_and_biases_learn_at_their_own_rate_but_not_the_head_s() -> None:
    module = network("resnet18")
    config = OptimConfig(lr=0.1, bias_lr_factor=64, head_lr_factor=2)
    rates = by_parameter(module, parameter_groups(module, config), "lr")
    head = {id(p) for p in head_parameters(module)}
    for name, parameter in module.named_parameters():
        expected = 0.2 if id(parameter) in head else 6.4 if parameter.ndim <= 1 else 0.1
        assert rates[name] == pytest.approx(expected), name


def test_filters_of_muon_are_groups_of_their_own() -> None:
    module = network("small_resnet18")
    config = OptimConfig(name="muon", lr=0.05, filter_lr=0.24, weight_decay=1e-3)
    groups = {group["name"]: group for group in parameter_groups(module, config)}
    assert set(groups) == {"backbone, filters", "backbone", "head"}
    filters = groups["backbone, filters"]
    assert filters["filters"] is True
    assert (filters["lr"], filters["weight_decay"]) == (0.24, 0.0)
    assert all(p.ndim == 4 for p in filters["params"])
    assert all(p.ndim != 4 for p in groups["backbone"]["params"])
    assert (groups["backbone"]["lr"], groups["backbone"]["weight_decay"]) == (0.05, 1e-3)


def test_further_arguments_are_never_dropped() -> None:
    with pytest.raises(ConfigError, match=r"optim.args is not a setting of muon. Got \{'eps': 1"):
        make_optimizer(network("airnet"), OptimConfig(name="muon", args={"eps": 1}))


def test_a_network_without_layers_is_refused_in_a_sentence() -> None:
    class Layerless(nn.Linear):
        def get_classifier(self) -> nn.Module:
            return self

    module = Layerless(12, 4)
    with pytest.raises(ConfigError, match=r"layer_decay must be 1 for Layerless.*layer_decay=1"):
        parameter_groups(module, OptimConfig(layer_decay=0.9))


def test_airnet_s_layers_learn_ever_faster_towards_the_head() -> None:
    module = build(Architecture("airnet", 4, {"widths": [8, 8, 8]}))
    groups = parameter_groups(module, OptimConfig(lr=1.0, layer_decay=0.5))
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates == {
        "layer 0": 1 / 16,
        "layer 1": 1 / 8,
        "layer 2": 1 / 4,
        "layer 3": 1 / 2,
        "head": 1,
    }


def test_patterns_of_no_weight_decay_are_understood() -> None:
    module = network("test_vit")
    module.no_weight_decay = lambda: {"blocks.*.attn.qkv.weight"}  # type: ignore[assignment]
    config = OptimConfig(lr=1, weight_decay=0.1, decay_norm_and_bias=False)
    decay = by_parameter(module, parameter_groups(module, config), "weight_decay")
    assert decay["blocks.3.attn.qkv.weight"] == 0
    assert decay["blocks.3.mlp.fc1.weight"] == 0.1
    assert decay["pos_embed"] == 0.1


@pytest.mark.parametrize(
    ("name", "momentum", "args"),
    [
        ("lamb", 0.9, {"eps": 1e-8, "betas": (0.8, 0.95)}),
        ("rmsproptf", 0.7, {"eps": 1e-3, "alpha": 0.95}),
        ("rmsproptf", 0.9, {}),
        ("lion", 0.9, {"betas": (0.95, 0.98)}),
        ("nadamw", 0.9, {"eps": 1e-7}),
        ("adan", 0.9, {"betas": (0.9, 0.9, 0.9)}),
        ("madgrad", 0.8, {}),
        ("lars", 0.85, {"trust_coeff": 0.01}),
    ],
)
def test_settings_reach_timm_s_optimizers(name: str, momentum: float, args: Any) -> None:
    module = network()
    config = OptimConfig(name=name, lr=1e-3, momentum=momentum, weight_decay=0.03, args=args)
    ours = make_optimizer(module, config)
    theirs = create_optimizer_v2(
        [{"params": list(module.parameters())}],
        opt=name,
        lr=1e-3,
        momentum=momentum,
        weight_decay=0.03,
        **args,
    )
    assert type(ours) is type(theirs)
    assert {key: ours.defaults[key] for key in args} == args
    of_groups = {"params", "name", "initial_lr"}
    for group in ours.param_groups:
        found = {key: value for key, value in group.items() if key not in of_groups}
        wanted = {k: v for k, v in theirs.param_groups[0].items() if k not in of_groups}
        assert found == wanted
        assert group["initial_lr"] == 1e-3
    if "momentum" in theirs.defaults:
        assert ours.defaults["momentum"] == momentum


def test_settings_reach_torch_s_optimizers() -> None:
    (sgd, *_) = make_optimizer(
        network(), OptimConfig(lr=0.1, momentum=0.8, nesterov=True, args={"dampening": 0})
    ).param_groups
    assert (sgd["momentum"], sgd["nesterov"], sgd["dampening"]) == (0.8, True, 0)
    (adam, *_) = make_optimizer(
        network(), OptimConfig(name="adamw", args={"betas": [0.8, 0.9], "eps": 1e-6})
    ).param_groups
    assert (list(adam["betas"]), adam["eps"]) == ([0.8, 0.9], 1e-6)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"name": "lamb", "momentum": 0.5}, "momentum is not a setting of lamb. Got 0.5"),
        ({"name": "adamw", "momentum": 0.5}, "momentum is not a setting of adamw"),
        ({"name": "lion", "args": {"eps": 1e-3}}, "args must be arguments of lion"),
        ({"name": "lamb", "args": {"layer_decay": 0.5}}, "args must be arguments of lamb"),
        ({"name": "adamw", "args": {"lr": 1}}, "must not hold what has a key of its own. Got 'lr'"),
        ({"args": {"weight_decay": 1}}, "Set optim.weight_decay"),
        ({"args": {"momentum": 0.1}}, "Set optim.momentum"),
        ({"momentum": 0, "nesterov": True}, "Nesterov momentum requires a momentum"),
        ({"name": "adamw", "args": {"betas": [2, 0.9]}}, "Invalid beta"),
        ({"name": "adahessian"}, "must be an optimizer of first derivatives"),
    ],
)
def test_nothing_is_dropped_silently(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make_optimizer(network(), OptimConfig.model_validate({"lr": 0.1, **settings}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for what is missing without a GPU")
def test_an_optimizer_of_another_library_is_a_sentence() -> None:
    with pytest.raises(ConfigError, match="needs a library or a device that is not here"):
        make_optimizer(network(), OptimConfig(name="fusedlamb", lr=0.1))


def test_another_optimizer_forgets_the_momentum_of_the_one_before() -> None:
    digits = find_recipe("digits")
    assert digits.optim.momentum == 0.85
    assert override(digits, ["optim.name=adamw", "optim.lr=1e-3"]).optim.momentum == 0.9
    kept = override(digits, ["optim.name=lars", "optim.momentum=0.7"]).optim
    assert (kept.momentum, kept.nesterov) == (0.7, False)


def test_every_network_of_timm_that_names_layers_has_the_head_last() -> None:
    for name in timm.list_models("test_*"):
        module = network(name)
        if not hasattr(module, "group_matcher"):
            continue
        rates = by_parameter(module, parameter_groups(module, OptimConfig(layer_decay=0.5)), "lr")
        assert min(rates.values()) > 0, name
        assert max(rates.values()) == pytest.approx(0.1), name


def test_finetune_slows_each_layer_below_the_next_and_lets_the_images_choose_what_is_done() -> None:
    config = find_recipe("finetune")
    rates = {
        group["name"].split(",")[0]: group["lr"]
        for group in parameter_groups(
            build(Architecture("airnet", 4, {"widths": [8, 8, 8]})), config.optim
        )
    }
    layers = [rates[f"layer {n}"] for n in range(4)]
    assert layers == pytest.approx([3e-4 * 0.95**depth for depth in (4, 3, 2, 1)])
    assert rates["head"] == pytest.approx(3e-3)
    assert config.augment.policy == "auto"

"""Optimiser, schedules and losses against torch's own; the command line flag by flag."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.optim import lr_scheduler

from cityseg_hf import build_model
from cityseg_hf.cli import parse_train_args, train_parser
from cityseg_hf.config import Config, DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from cityseg_hf.errors import UserError
from cityseg_hf.labels import IGNORE
from cityseg_hf.losses import count_valid, cross_entropy_sum, label_mass
from cityseg_hf.optim import Plan, make_optimizer, parameter_groups, rate_factor
from cityseg_hf.recipes import RECIPES

STEPS, EPOCHS = 7, 5
PLAN = Plan(steps_per_epoch=STEPS, total_steps=STEPS * EPOCHS, validate_every=STEPS)


def parse(*words: str) -> Config:
    """The command line of ``scripts/train.py`` where Cityscapes is there, so that no recipe is chosen."""
    return parse_train_args(words, lambda root: None)


def rates(config: OptimConfig, plan: Plan = PLAN) -> list[float]:
    """The learning rate of every step, as the training loop gets it."""
    optimizer = make_optimizer(nn.Linear(2, 2), config)
    scheduler = lr_scheduler.LambdaLR(optimizer, rate_factor(config, plan))
    return run_scheduler(optimizer, scheduler, plan.total_steps)


def run_scheduler(optimizer: torch.optim.Optimizer, scheduler: lr_scheduler.LRScheduler, steps: int) -> list[float]:
    """The first group's rate, step by step."""
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


def torch_rates(make: Callable[..., lr_scheduler.LRScheduler], steps: int, rate: float = 0.1, **options: Any) -> list:
    """The oracle: the same from a scheduler of torch's."""
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=rate)
    return run_scheduler(optimizer, make(optimizer, **options), steps)


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    """The message, which must be a line that says something."""
    message = str(error.value)
    assert message.strip() == message != "" and "\n" not in message
    return message


# --- schedules


def test_exponential_decays_once_an_epoch() -> None:
    """The original stepped once a batch, which is gamma ** 35 here."""
    by_epoch = torch_rates(lr_scheduler.ExponentialLR, EPOCHS, gamma=0.9)
    found = rates(OptimConfig(learning_rate=0.1, gamma=0.9))
    assert found == pytest.approx([rate for rate in by_epoch for _ in range(STEPS)], rel=1e-12)
    assert found[-1] == pytest.approx(0.1 * 0.9**4)


@pytest.mark.parametrize("power", [1.0, 0.9, 2.0])
def test_poly_is_torchs(power: float) -> None:
    expected = torch_rates(lr_scheduler.PolynomialLR, PLAN.total_steps, total_iters=PLAN.total_steps, power=power)
    config = OptimConfig(learning_rate=0.1, schedule="poly", poly_power=power)
    assert rates(config) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_cosine_is_torchs(floor: float) -> None:
    oracle = lr_scheduler.CosineAnnealingLR
    expected = torch_rates(oracle, PLAN.total_steps, T_max=PLAN.total_steps, eta_min=0.1 * floor)
    config = OptimConfig(learning_rate=0.1, schedule="cosine", min_lr_ratio=floor)
    assert rates(config) == pytest.approx(expected, rel=1e-9)


def test_constant_is_torchs() -> None:
    expected = torch_rates(lr_scheduler.ConstantLR, PLAN.total_steps, factor=1.0)
    assert rates(OptimConfig(learning_rate=0.1, schedule="constant")) == expected


def test_warm_up_by_hand() -> None:
    """Four steps from a fifth of the rate; poly then falls over the other four, to a tenth of the rate."""
    config = OptimConfig(
        learning_rate=1.0, schedule="poly", warmup_steps=4, warmup_ratio=0.2, min_lr_ratio=0.1, poly_power=2.0
    )
    factor = rate_factor(config, Plan(4, 8, 4))
    falling = [0.1 + 0.9 * share**2 for share in (1.0, 0.75, 0.5, 0.25, 0.0)]
    assert [factor(step) for step in range(9)] == pytest.approx([0.2, 0.4, 0.6, 0.8, *falling])
    assert factor(100) == pytest.approx(0.1)


def test_warm_up_is_torchs() -> None:
    config = OptimConfig(learning_rate=0.1, schedule="constant", warmup_steps=10, warmup_ratio=0.01)
    expected = torch_rates(lr_scheduler.LinearLR, PLAN.total_steps, start_factor=0.01, total_iters=10)
    assert rates(config) == pytest.approx(expected, rel=1e-9)


def test_exponential_counts_epochs_from_the_start_whatever_the_warm_up() -> None:
    config = OptimConfig(learning_rate=1.0, gamma=0.5, warmup_steps=3, warmup_ratio=0.0)
    factor = rate_factor(config, Plan(4, 12, 4))
    assert [factor(step) for step in range(9)] == pytest.approx([0, 1 / 3, 2 / 3, 1, 0.5, 0.5, 0.5, 0.5, 0.25])


def test_plan_turns_epochs_into_steps() -> None:
    plan = Plan.of(TrainConfig(num_epochs=3, val_freq=2), steps_per_epoch=10)
    assert plan == (10, 30, 20, None, None, None)
    # Every second epoch, and at the end.
    assert [step for step in range(1, 31) if plan.validates_at(step)] == [20, 30]
    assert Plan.of(TrainConfig(num_epochs=3, max_steps=7), steps_per_epoch=10).total_steps == 7
    paused = Plan.of(TrainConfig(num_epochs=3), steps_per_epoch=10, stop_after="1.5e")
    assert [step for step in range(31) if paused.pauses_at(step)] == list(range(15, 30))
    assert [step for step in range(1, 31) if paused.saves_at(step)] == [10, 15, 20, 30]


# --- the optimiser


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "unet": lambda: build_model("unet_small", hidden_sizes=[8, 16]),
    "unet_group": lambda: build_model("unet_small", hidden_sizes=[8, 16], norm="group"),
    "fcn": lambda: build_model("resnet_18", auxiliary_head=True),
    "segformer": lambda: build_model(
        "segformer_small", hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], decoder_hidden_size=16
    ),
}
DECAYED = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


def decayed_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The oracle, by type and not by shape: the weights of linear layers and convolutions."""
    for module in model.modules():
        if isinstance(module, DECAYED):
            yield module.weight


@pytest.mark.parametrize("network", NETWORKS)
def test_parameter_groups(network: str) -> None:
    model = NETWORKS[network]()
    groups = parameter_groups(model, OptimConfig(learning_rate=0.01, weight_decay=0.05, head_lr_multiplier=10.0))
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(map(id, model.parameters())), "every parameter once"
    decayed = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    assert decayed == set(map(id, decayed_parameters(model)))
    assert {group["weight_decay"] for group in groups} == {0.0, 0.05}
    heads = [getattr(model, name, None) for name in ("decode_head", "classifier", "aux_classifier")]
    in_head = {id(parameter) for head in heads if head is not None for parameter in head.parameters()}
    assert in_head
    for group in groups:
        assert group["lr"] == pytest.approx(0.1 if id(group["params"][0]) in in_head else 0.01)
        assert len({id(parameter) in in_head for parameter in group["params"]}) == 1


def test_frozen_parameters_are_left_out() -> None:
    model = NETWORKS["unet"]()
    model.encoder.requires_grad_(False)
    grouped = [
        parameter for group in parameter_groups(model, OptimConfig(learning_rate=1.0)) for parameter in group["params"]
    ]
    assert sorted(map(id, grouped)) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_the_schedule_keeps_the_heads_multiple() -> None:
    model = NETWORKS["fcn"]()
    config = OptimConfig(learning_rate=0.1, gamma=0.5, head_lr_multiplier=10.0)
    optimizer = make_optimizer(model, config)
    scheduler = lr_scheduler.LambdaLR(optimizer, rate_factor(config, PLAN))
    for _ in range(STEPS):
        optimizer.step()
        scheduler.step()
    assert sorted({round(rate, 12) for rate in scheduler.get_last_lr()}) == pytest.approx([0.05, 0.5])


@pytest.mark.parametrize(
    ("config", "make"),
    [
        (OptimConfig(learning_rate=0.1, weight_decay=0.2), torch.optim.AdamW),
        (OptimConfig(learning_rate=0.1, weight_decay=0.2, amsgrad=True), torch.optim.AdamW),
        (OptimConfig(learning_rate=0.1, weight_decay=0.2, optimizer="sgd", momentum=0.7), torch.optim.SGD),
    ],
    ids=["adamw", "amsgrad", "sgd"],
)
def test_optimizer_walks_as_torchs_does(config: OptimConfig, make: type[torch.optim.Optimizer]) -> None:
    """Gradients that shrink tell AMSGrad from AdamW; a model without biases needs no groups."""
    options = {"momentum": 0.7} if config.optimizer == "sgd" else {"amsgrad": config.amsgrad}
    ours, theirs, plain = (nn.Linear(3, 2, bias=False) for _ in range(3))
    theirs.load_state_dict(ours.state_dict())
    plain.load_state_dict(ours.state_dict())
    optimizers = [
        make_optimizer(ours, config),
        make(theirs.parameters(), lr=0.1, weight_decay=0.2, **options),
        torch.optim.AdamW(plain.parameters(), lr=0.1, weight_decay=0.2),
    ]
    for step in range(1, 6):
        for model, optimizer in zip((ours, theirs, plain), optimizers, strict=True):
            model.weight.grad = torch.arange(6.0).view(2, 3) / step**4
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-6, atol=1e-6)
    assert torch.allclose(ours.weight, plain.weight, rtol=1e-4) is (config.optimizer == "adamw" and not config.amsgrad)


# --- losses


@pytest.mark.parametrize("size", [(8, 12), (4, 6), (3, 5)])
def test_cross_entropy_is_torchs_over_the_valid_pixels(size: tuple[int, int]) -> None:
    logits = torch.randn(2, 19, *size, requires_grad=True)
    labels = torch.randint(19, (2, 8, 12))
    labels[:, :3] = IGNORE
    full = nn.Upsample((8, 12), mode="bilinear", align_corners=False)(logits)
    # Written out: minus the logarithm of the softmax at the label, pixel by pixel.
    valid = labels != IGNORE
    chosen = full.log_softmax(1).gather(1, labels.clamp(max=18)[:, None])[:, 0]
    expected = -chosen[valid].sum()
    assert count_valid(labels) == valid.sum() == 2 * 5 * 12
    torch.testing.assert_close(cross_entropy_sum(logits, labels), expected)
    mean = nn.functional.cross_entropy(full, labels, ignore_index=IGNORE)
    torch.testing.assert_close(cross_entropy_sum(logits, labels) / count_valid(labels), mean)
    ours, theirs = (
        torch.autograd.grad(loss, logits, retain_graph=True)[0]
        for loss in (cross_entropy_sum(logits, labels), expected)
    )
    torch.testing.assert_close(ours, theirs)


def test_cross_entropy_of_void_is_zero_with_zero_gradient() -> None:
    """The mean would be 0 / 0."""
    logits = torch.randn(1, 19, 4, 4, requires_grad=True)
    labels = torch.full((1, 8, 8), IGNORE)
    loss = cross_entropy_sum(logits, labels)
    loss.backward()
    assert loss.item() == 0 and count_valid(labels) == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_the_loss_is_float32_whatever_the_network_gives() -> None:
    logits = torch.randn(1, 19, 4, 4, dtype=torch.bfloat16)
    labels = torch.randint(19, (1, 4, 4))
    assert cross_entropy_sum(logits, labels).dtype == torch.float32
    torch.testing.assert_close(
        cross_entropy_sum(logits, labels), nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
    )


# --- flags

ORIGINAL_FLAGS = [
    (("-d", "--base_dataset_path"), "some/where", "base_dataset_path", "some/where"),
    (("-s", "--save_model_path"), "out", "save_model_path", "out"),
    (("-e", "--num_epochs"), "3", "num_epochs", 3),
    (("-b", "--batch_size"), "5", "batch_size", 5),
    (("-m", "--model_type", "--model"), "segformer_base", "model_type", "segformer_base"),
    (("-a", "--augmentation"), "standard", "augmentation", "standard"),
    (("-l", "--learning_rate"), "3e-5", "learning_rate", 3e-5),
    (("-w", "--weight_decay"), "1e-3", "weight_decay", 1e-3),
    (("-g", "--gamma"), "0.97", "gamma", 0.97),
    (("-f", "--val_freq"), "2", "val_freq", 2),
    (("-p", "--early_stopping_patience"), "7", "early_stopping_patience", 7),
]


@pytest.mark.parametrize("glue", [" ", "="])
@pytest.mark.parametrize(
    ("flag", "word", "field", "value"),
    [(flag, *rest) for flags, *rest in ORIGINAL_FLAGS for flag in flags],
    ids=lambda value: value if str(value).startswith("-") else "",
)
def test_the_originals_flags(flag: str, word: str, field: str, value: Any, glue: str) -> None:
    """Short and long, with the type the setting has: the original's -f and -p were strings."""
    found = parse(*f"{flag}{glue}{word}".split()).to_dict()[field]
    assert found == value and type(found) is type(value)
    others = {name for name, setting in parse(flag, word).to_dict().items() if setting != parse().to_dict()[name]}
    assert others - {field} == ({"schedule"} if field == "gamma" else set())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "none"),
        (("-a",), "original"),
        (("-a", "-e", "2"), "original"),
        (("--augmentation",), "original"),
        (("-a", "True"), "original"),
        (("-a", "true"), "original"),
        (("-a", "False"), "none"),
        (("-a", "none"), "none"),
        (("-a", "original"), "original"),
        (("-a", "Standard"), "standard"),
    ],
)
def test_augmentation(words: tuple[str, ...], expected: str) -> None:
    assert parse(*words).data.augmentation == expected


def test_the_readmes_example() -> None:
    config = parse("-m", "segformer_small", "-e", "2", "-b", "4", "-f", "1", "-p", "3")
    assert config == Config(
        model=ModelConfig(model_type="segformer_small"),
        train=TrainConfig(num_epochs=2, batch_size=4, val_freq=1, early_stopping_patience=3),
    )


def test_defaults_that_follow_from_other_flags() -> None:
    assert parse().optim.learning_rate == 1e-3
    assert parse("--init_from", "imagenet").optim.learning_rate == 1e-4
    assert parse("-m", "nvidia/mit-b0").optim.learning_rate == 1e-4
    assert (parse().optim.schedule, parse().optim.gamma) == ("poly", None)
    assert (parse("-g", "0.9").optim.schedule, parse("--schedule", "exponential").optim.gamma) == ("exponential", 0.99)


WRONG_FLAGS = [
    (("--learnin_rate", "1"), r"--learnin_rate.*did you mean --learning_rate\?"),
    (("--bachsize=4",), r"--bachsize=4"),
    (("-x",), "-x"),
    (("stray",), "stray"),
    (("-e", "two"), "-e.*'two'"),
    (("-f", "1.5"), "-f.*'1.5'"),
    (("-l", "fast"), "-l.*'fast'"),
    (("-l", "0"), "--learning_rate.*0"),
    (("-l", "nan"), "--learning_rate.*nan"),
    (("-w", "-1"), "--weight_decay.*-1"),
    (("-g", "1.5"), "--gamma.*1.5"),
    (("-g", "0.9", "--schedule", "poly"), "--gamma.*poly"),
    (("-e", "0"), "--num_epochs.*0"),
    (("-b", "0"), "--batch_size.*0"),
    (("-p", "-1"), "--early_stopping_patience"),
    (("--max_steps", "0"), "--max_steps"),
    (("--seed", "-1"), "--seed.*-1"),
    (("-a", "wild"), "--augmentation 'wild'.*none, flip, original, standard"),
    (("--image_size", "512"), r"--image_size.*\[512\]"),
    (("--image_size", "16", "512"), r"--image_size.*\[16, 512\]"),
    (("--crop_size", "1", "2", "3"), r"--crop_size.*\[1, 2, 3\]"),
    (("--image_size", "a", "b"), "--image_size.*'a'"),
    (("--schedule", "linear"), "--schedule.*'linear'.*cosine"),
    (("--amsgrad", "maybe"), "--amsgrad.*maybe"),
    (("-d",), "-d"),
    (("--recipe", "segfomer"), r"--recipe 'segfomer'; did you mean segformer\?"),
    (("--run_name", "a/b"), "--run_name.*'a/b'"),
    (("--run_name", ".."), "--run_name.*'..'"),
]


@pytest.mark.parametrize(
    ("words", "pattern"), WRONG_FLAGS, ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_wrong_flags_are_one_line_each(words: tuple[str, ...], pattern: str) -> None:
    with pytest.raises(UserError, match=pattern) as error:
        parse(*words)
    one_line(error)


def test_help_lists_every_flag() -> None:
    text = train_parser().format_help()
    parts = (DataConfig, ModelConfig, OptimConfig, TrainConfig, RunConfig)
    flags = {f"--{field.name}" for part in parts for field in dataclasses.fields(part)}
    flags |= {flag for names, *_ in ORIGINAL_FLAGS for flag in names} | {
        "--config",
        "--recipe",
        "--list_models",
        "--help",
    }
    assert flags <= set(re.findall(r"(?<![\w-])--?\w+", text))
    assert all(recipe in text for recipe in RECIPES)


# --- YAML


@pytest.fixture
def yaml_file(tmp_path: Path) -> Callable[[Any], str]:
    """Writes settings, or a text as it is, to a file."""

    def write(content: Any) -> str:
        path = tmp_path / "run.yml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
        return str(path)

    return write


def test_flags_override_the_file_and_the_file_the_defaults(yaml_file: Callable[[Any], str]) -> None:
    path = yaml_file(
        # 1e-4 without a point is a string to YAML; `model` is the other name of model_type.
        "model: segformer_small\nnum_epochs: 3\nlearning_rate: 1e-4\naugmentation: True\namsgrad: true\n"
        "image_size: [64, 128]\nmodel_args: [norm=group]\nmax_steps: null\nbase_dataset_path: /data\n"
    )
    config = parse("--config", path, "-e", "4", "-a", "standard")
    assert config == Config(
        data=DataConfig(base_dataset_path="/data", image_size=[64, 128], augmentation="standard"),
        model=ModelConfig(model_type="segformer_small", model_args=["norm=group"]),
        optim=OptimConfig(learning_rate=1e-4, amsgrad=True),
        train=TrainConfig(num_epochs=4),
    )


def test_every_setting_can_stand_in_a_file(yaml_file: Callable[[Any], str]) -> None:
    """What a run writes down as its configuration is a file for the next one."""
    config = parse(
        "-a", "-g", "0.97", "--image_size", "64", "96", "--amsgrad", "--run_name", "x", "--holdout_cities", "ulm"
    )
    assert parse("--config", yaml_file(config.to_dict())) == config


def test_an_empty_file_changes_nothing(yaml_file: Callable[[Any], str]) -> None:
    assert parse("--config", yaml_file("# nothing\n")) == parse()


def test_a_file_can_name_a_recipe_and_override_it(yaml_file: Callable[[Any], str]) -> None:
    config = parse("--config", yaml_file({"recipe": "original", "num_epochs": 5}), "-b", "2")
    assert config == parse("--recipe", "original", "-e", "5", "-b", "2")


@pytest.mark.parametrize(
    ("content", "words"),
    [({"schedule": "cosine"}, ("-g", "0.9")), ({"gamma": 0.9}, ("--schedule", "cosine"))],
    ids=["gamma", "schedule"],
)
def test_a_flag_overrides_the_files_way_of_decay(
    content: dict[str, Any], words: tuple[str, ...], yaml_file: Callable[[Any], str]
) -> None:
    """As it does a recipe's."""
    assert parse("--config", yaml_file(content), *words).optim == parse(*words).optim


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        ({"learnin_rate": 1}, r"run\.yml.*'learnin_rate'; did you mean learning_rate\?"),
        ({"config": "other.yml"}, r"run\.yml.*'config'"),
        ({7: 7}, r"run\.yml.*7"),
        ({"num_epochs": "many"}, r"run\.yml.*--num_epochs.*'many'"),
        ({"num_epochs": 2.5}, r"run\.yml.*--num_epochs.*'2.5'"),
        ({"batch_size": [1, 2]}, r"run\.yml"),
        ({"amsgrad": "maybe"}, r"run\.yml.*--amsgrad.*maybe"),
        ({"schedule": "linear"}, r"run\.yml.*--schedule.*'linear'"),
        ({"augmentation": "wild"}, "--augmentation 'wild'"),
        ({"recipe": "none_such"}, "--recipe 'none_such'"),
        ("- a\n- list\n", r"run\.yml.*flag: value"),
        ("just words", r"run\.yml.*flag: value"),
        ("a: [1, 2\nb: }", r"run\.yml is no YAML"),
        ("a: b: c", r"run\.yml is no YAML"),
    ],
    ids=str,
)
def test_wrong_files_are_one_line_each(content: Any, pattern: str, yaml_file: Callable[[Any], str]) -> None:
    with pytest.raises(UserError, match=pattern) as error:
        parse("--config", yaml_file(content))
    one_line(error)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary.yml").write_bytes(b"\xff\xfe\x00\x81")
    for path, pattern in (("none.yml", "No such file"), ("binary.yml", "no YAML"), (".", "directory")):
        with pytest.raises(UserError, match=pattern) as error:
            parse("--config", str(tmp_path / path))
        assert str(tmp_path) in one_line(error)


# --- recipes


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_defaults_that_flags_override(name: str) -> None:
    config, settings = parse("--recipe", name), RECIPES[name].settings
    assert {key: config.to_dict()[key] for key in settings} == settings
    untouched = {key: value for key, value in config.to_dict().items() if key not in settings}
    assert untouched == {key: parse().to_dict()[key] for key in untouched}
    changed = parse("--recipe", name, "-l", "0.5", "-b", "3", "--image_size", "64", "96")
    assert (changed.optim.learning_rate, changed.train.batch_size, changed.data.image_size) == (0.5, 3, [64, 96])
    assert parse("-l", "0.5", "--recipe", name).optim.learning_rate == 0.5, "wherever the flag stands"


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(
    "words", [("-g", "0.9"), ("-g0.9",), ("-g=0.9",), ("--gamma=0.9",), ("--gamma", "0.9")], ids=" ".join
)
def test_gamma_overrides_a_recipes_schedule(name: str, words: tuple[str, ...]) -> None:
    optim = parse("--recipe", name, *words).optim
    assert (optim.schedule, optim.gamma) == ("exponential", 0.9)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("schedule", ["exponential", "poly", "cosine", "constant"])
def test_schedule_overrides_a_recipes_gamma(name: str, schedule: str) -> None:
    optim = parse("--recipe", name, "--schedule", schedule).optim
    assert (optim.schedule, optim.gamma) == (schedule, 0.99 if schedule == "exponential" else None)


def test_the_fallback_recipe_is_asked_with_the_root_and_only_without_a_recipe(yaml_file: Callable[[Any], str]) -> None:
    asked = []

    def fallback(root: str | None) -> str:
        asked.append(root)
        return "synthetic"

    assert parse_train_args([], fallback) == parse("--recipe", "synthetic")
    assert parse_train_args(["-d", "here"], fallback).data.base_dataset_path == "here"
    parse_train_args(["--config", yaml_file({"base_dataset_path": "there"})], fallback)
    assert asked == [None, "here", "there"]
    assert parse_train_args(["--recipe", "original"], fallback) == parse("--recipe", "original")
    assert len(asked) == 3


# --- the name of the run folder


def test_a_grid_of_576_runs_has_576_folders() -> None:
    """The original's names left out what the grid varied, and runs overwrote each other."""
    models = ("resnet_18", "resnet_50", "unet_small", "unet_base", "segformer_small", "segformer_base")
    powers = (1e-2, 1e-3, 1e-4, 1e-5)
    grid = list(itertools.product(models, ("none", "original"), powers, powers, (0.95, 0.97, 0.99)))
    names = {
        Config(
            data=DataConfig(augmentation=augmentation),
            model=ModelConfig(model_type=model),
            optim=OptimConfig(learning_rate=rate, weight_decay=decay, gamma=gamma),
        ).run_name()
        for model, augmentation, rate, decay, gamma in grid
    }
    assert len(grid) == len(names) == 576
    # They stay apart where upper and lower case do not, and they are plain folder names of a bearable length.
    assert len({name.lower() for name in names}) == 576
    assert all(re.fullmatch(r"[\w.-]{1,120}", name) for name in names)


OTHER_VALUES: dict[str, Any] = {
    "class_weights": "enet",
    "loss": "dice",
    "momentum": 0.5,
    "scale_range": [0.75, 1.5],
    "ema_decay": 0.9,
    "save_every": "2e",
    "stop_after": "2e",
    "min_lr_ratio": 0.5,
    "warmup_ratio": 0.5,
    "base_dataset_path": "elsewhere",
    "image_size": [64, 96],
    "crop_size": [64, 64],
    "augmentation": "standard",
    "holdout_cities": ["ulm"],
    "model_type": "unet_base",
    "init_from": "imagenet",
    "model_args": ["norm=group"],
    "optimizer": "sgd",
    "schedule": "cosine",
    "gamma": 0.9,
    "max_grad_norm": 1.0,
    "max_steps": 9,
    "mixed_precision": "bf16",
    "report_to": "wandb",
    "push_to_hub": "me/it",
    "save_model_path": "other",
    "project_name": "other",
}


def changed(config: Config, name: str) -> Config:
    """The configuration with another value of one setting."""
    for part in dataclasses.fields(config):
        settings = getattr(config, part.name)
        if name in {field.name for field in dataclasses.fields(settings)}:
            old = getattr(settings, name)
            new = OTHER_VALUES[name] if name in OTHER_VALUES else not old if isinstance(old, bool) else (old or 0) + 1
            # -g and --schedule exclude each other: the one makes room for the other.
            room = {"gamma": {"schedule": None}, "schedule": {"gamma": None}}.get(name, {})
            return dataclasses.replace(config, **{part.name: dataclasses.replace(settings, **{name: new}, **room)})
    raise AssertionError(name)


@pytest.mark.parametrize("name", Config().settings())
def test_every_setting_that_counts_changes_the_name(name: str) -> None:
    # A rate is given, since its default depends on --init_from.
    base = parse("-l", "0.5")
    assert changed(base, name).to_dict()[name] != base.to_dict()[name]
    assert changed(base, name).run_name() != base.run_name()


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(RunConfig) if field.name != "run_name"])
def test_where_things_go_does_not_change_the_name(name: str) -> None:
    assert changed(Config(), name) != Config()
    assert changed(Config(), name).run_name() == Config().run_name()


def test_the_name_is_stable_and_follows_the_global_batch_but_not_the_mount() -> None:
    # Pinned: another name would start finished runs anew.
    name = parse("-m", "unet_small", "-d", "/a/cityscapes").run_name()
    assert name == parse("-m", "unet_small", "-d", "/a/cityscapes").run_name()
    assert name == parse("-m", "unet_small", "-d", "/b/cityscapes").run_name()
    assert name.startswith("unet_small_none_e80_b16_lr0.001_wd0.0001_poly_seed0_")
    assert parse("-m", "unet_small", "-d", "/a/cityscapes").run_name(num_processes=2) != name
    # The same global batch is the same run, however it is cut: it may go on with other processes.
    names = {
        parse("-b", str(size), "--gradient_accumulation_steps", str(parts)).run_name(world)
        for size, parts, world in ((8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 2, 2))
    }
    assert len(names) == 1


def test_a_given_name_is_the_name() -> None:
    assert parse("--run_name", "mine").run_name() == "mine"


# --- layers and global batches


@pytest.mark.parametrize("recipe", ["segformer", "fcn", "unet"])
def test_a_flag_replaces_a_recipes_other_way_of_saying_it(recipe: str) -> None:
    """A recipe's steps must not outlive the epochs that the user asked for, nor its global batch a batch size."""
    assert parse("--recipe", recipe).train.max_steps == RECIPES[recipe].settings["max_steps"]
    config = parse("--recipe", recipe, "-e", "5", "-b", "2")
    assert (config.train.num_epochs, config.train.max_steps) == (5, None)
    assert (config.train.batch_size, config.train.global_batch_size) == (2, None)


def test_a_global_batch_is_shared_by_the_processes() -> None:
    train = parse("--recipe", "segformer", "--gradient_accumulation_steps", "2").train
    assert train.global_batch_size == 8
    assert [train.for_processes(n).batch_size for n in (1, 2, 4)] == [4, 2, 1]
    with pytest.raises(UserError, match="global batch of 8 cannot be shared by 3 processes"):
        train.for_processes(3)


def test_weighted_loss_is_torchs_weighted_mean() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 19, 6, 8), torch.randint(0, 19, (2, 6, 8))
    labels[0, :3] = IGNORE
    weights = torch.rand(19) + 0.5
    ours = cross_entropy_sum(logits, labels, weights) / label_mass(labels, weights)
    torch.testing.assert_close(ours, nn.functional.cross_entropy(logits, labels, weight=weights, ignore_index=IGNORE))

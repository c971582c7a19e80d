"""The contract that every network keeps, whatever its family: shapes, loss, gradients, files, and what wraps it."""

import copy
import json
import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torchvision
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, PreTrainedModel
from transformers.modeling_outputs import SemanticSegmenterOutput

from cityseg_hf import PRESETS, UserError, build_model
from cityseg_hf.checkpoint import image_processor, save_model_folder
from cityseg_hf.inference import load_model_folder, segment
from cityseg_hf.labels import CLASS_NAMES, IGNORE, NUM_CLASSES
from cityseg_hf.losses import Criterion
from cityseg_hf.models import freeze_batchnorm
from cityseg_hf.models.keyed_dropout import KeyedDropout, KeyedDropPath, key_dropout


class Case(NamedTuple):
    """A network small enough for a test, and the stride of its logits."""

    preset: str
    config: dict[str, Any]
    stride: int

    def build(self, **config: Any) -> PreTrainedModel:
        """Every call gives the same weights: random, but none of them trivial."""
        torch.manual_seed(1)
        return liven(build_model(self.preset, **self.config, **config)).eval()


TINY_SEGFORMER = {"hidden_sizes": [8, 16, 40, 64], "decoder_hidden_size": 32}
CASES = {
    "unet_batch": Case("unet_small", {"norm": "batch", "hidden_sizes": [8, 16, 32]}, 1),
    "unet_group": Case("unet_small", {"norm": "group", "hidden_sizes": [8, 16, 32]}, 1),
    "unet_none": Case("unet_small", {"norm": "none", "hidden_sizes": [8, 16, 32]}, 1),
    "resnet": Case("resnet_18", {}, 32),
    "resnet_dilated": Case("resnet_18", {"dilation": True, "auxiliary_head": True}, 8),
    "segformer": Case("segformer_small", TINY_SEGFORMER, 4),
}
ONE_OF_EACH = ("unet_batch", "resnet_dilated", "segformer")


@torch.no_grad()
def liven(model: nn.Module) -> nn.Module:
    """Redraws all weights and statistics, for activations and logits of order 1.

    Vectors that start as 0 or 1, running statistics of no data and a head that says nothing hide mistakes.
    """
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif tensor.ndim == 1:
            tensor.add_(torch.randn_like(tensor), alpha=0.1)
        elif tensor.ndim > 1:
            tensor.normal_(std=math.sqrt(1 / tensor[0].numel()))
    return model


def batch_of(size: tuple[int, int], count: int = 2) -> dict[str, Tensor]:
    """Noise, and labels of which a quarter is void."""
    labels = torch.randint(NUM_CLASSES, (count, *size)).masked_fill_(torch.rand(count, *size) < 0.25, IGNORE)
    return {"pixel_values": torch.randn(count, 3, *size), "labels": labels}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Takes the gradients off a model."""
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Root mean square, as a share of the expected values' own."""
    return ((found.float() - expected).norm() / expected.norm()).item()


def without_randomness(model: PreTrainedModel) -> PreTrainedModel:
    """Switches dropout and stochastic depth off."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    return model


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every case as a model folder, by name."""
    root = tmp_path_factory.mktemp("models")
    for name, case in CASES.items():
        save_model_folder(root / name, case.build(), image_processor((64, 128)))
    return {name: root / name for name in CASES}


# Forward and backward


@pytest.mark.parametrize("size", [(32, 32), (33, 65), (47, 101)])
def test_logits_have_the_stride_of_the_family(case: Case, size: tuple[int, int]) -> None:
    with torch.no_grad():
        output = case.build()(pixel_values=torch.randn(2, 3, *size))
    assert isinstance(output, SemanticSegmenterOutput)
    assert output.loss is None
    assert output.logits.dtype == torch.float32
    assert output.logits.shape == (2, NUM_CLASSES, *(math.ceil(length / case.stride) for length in size))
    assert output.logits.isfinite().all()


def mean_over_valid(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss by hand: upsample, throw the void pixels away, and take the mean."""
    scores = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    valid = labels != IGNORE
    return F.cross_entropy(scores.movedim(1, -1)[valid], labels[valid])


@pytest.mark.parametrize("size", [(33, 65), (40, 72)], ids=["own size", "another size"])
def test_loss_is_the_mean_over_valid_pixels_at_the_size_of_the_labels(case: Case, size: tuple[int, int]) -> None:
    labels = batch_of(size)["labels"]
    with torch.no_grad():
        output = case.build()(pixel_values=torch.randn(2, 3, 33, 65), labels=labels)
    torch.testing.assert_close(output.loss, mean_over_valid(output.logits, labels))


def test_auxiliary_head_adds_its_share_to_the_loss_of_training_only() -> None:
    model, batch = CASES["resnet_dilated"].build(), batch_of((64, 64))
    assert model(**batch).auxiliary_logits is None
    output = model.train()(**batch)
    assert output.auxiliary_logits.shape == output.logits.shape
    main, auxiliary = (mean_over_valid(logits, batch["labels"]) for logits in (output.logits, output.auxiliary_logits))
    torch.testing.assert_close(output.loss, main + 0.4 * auxiliary)


def test_tuple_output(case: Case) -> None:
    model, batch = case.build(), batch_of((32, 32))
    with torch.no_grad():
        whole, parts = model(**batch), model(**batch, return_dict=False)
    assert isinstance(parts, tuple)
    assert torch.equal(parts[0], whole.loss)
    assert torch.equal(parts[1], whole.logits)


def test_every_parameter_learns(case: Case) -> None:
    # Stochastic depth may skip a layer of so few samples.
    model = without_randomness(case.build()).train()
    model(**batch_of((64, 64))).loss.backward()
    lost = [name for name, gradient in gradients(model).items() if gradient is None or not gradient.isfinite().all()]
    assert lost == []


def test_training_starts_at_even_odds(case: Case) -> None:
    """A fresh network knows nothing, so its loss is that of guessing: ln(19) = 2.944."""
    model, batch = build_model(case.preset, **case.config).train(), batch_of((64, 64), count=4)
    loss = mean_over_valid(model(batch["pixel_values"]).logits, batch["labels"])
    assert loss.item() == pytest.approx(2.944, abs=0.1)


# Files


def test_round_trip_is_exact(case: Case, tmp_path: Path) -> None:
    model = case.build()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)

    assert type(loaded) is type(model)
    state, again = model.state_dict(), loaded.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(state[name], again[name]) for name in state)
    pixel_values = torch.randn(1, 3, 48, 80)
    with torch.no_grad():
        # A copy, because MKL's rounding depends on where in memory a matrix begins, and that is anywhere in a file.
        assert torch.equal(model(pixel_values).logits, copy.deepcopy(loaded)(pixel_values).logits)

    config = json.loads((tmp_path / "config.json").read_text())
    assert config["id2label"] == {str(k): name for k, name in enumerate(CLASS_NAMES)}
    # Weights, configuration and code: nothing that executes when it is read.
    assert (tmp_path / "model.safetensors").is_file()
    assert {path.suffix for path in tmp_path.iterdir()} <= {".safetensors", ".json", ".py"}


@pytest.mark.parametrize("name", CASES)
def test_model_folder_works_in_the_stock_pipeline(folders: dict[str, Path], name: str) -> None:
    processor = AutoImageProcessor.from_pretrained(folders[name])
    assert dict(processor.size) == {"height": 64, "width": 128}

    # Smooth, as photographs are: two ways to resize noise need not agree.
    noise = np.random.default_rng(0).integers(256, size=(6, 10, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((150, 90), Image.Resampling.BICUBIC)
    found = transformers.pipeline("image-segmentation", model=str(folders[name]), device="cpu")(image)
    assert {segment_["mask"].size for segment_ in found} == {image.size}
    assert {segment_["label"] for segment_ in found} <= set(CLASS_NAMES)

    # Together the masks say of each pixel what this package's own inference says.
    masks = np.stack([np.asarray(segment_["mask"]) > 0 for segment_ in found])
    assert (masks.sum(axis=0) == 1).all()
    train_ids = np.array([CLASS_NAMES.index(segment_["label"]) for segment_ in found])[masks.argmax(axis=0)]
    ours = segment(*load_model_folder(folders[name]), np.asarray(image))
    assert (train_ids == ours).mean() > 0.98


READER_WITHOUT_THE_PACKAGE = """
    import copy, sys

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "cityseg_hf":
                raise ImportError("this reader does not have cityseg_hf")

    sys.meta_path.insert(0, Blocker())
    import torch
    from transformers import AutoModelForSemanticSegmentation

    pixel_values, logits = torch.load("pixel_values.pt"), {}
    for folder in sys.argv[1:]:
        # SegFormer is transformers' own: it must not need foreign code.
        options = {} if "segformer" in folder else {"trust_remote_code": True}
        model = AutoModelForSemanticSegmentation.from_pretrained(folder, **options)
        assert not type(model).__module__.startswith("cityseg_hf"), type(model)
        with torch.no_grad():
            logits[folder] = copy.deepcopy(model)(pixel_values).logits
    torch.save(logits, "logits.pt")
"""


def test_model_folders_load_without_this_package(folders: dict[str, Path], tmp_path: Path) -> None:
    pixel_values = torch.randn(1, 3, 33, 65)
    torch.save(pixel_values, tmp_path / "pixel_values.pt")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment.pop("PYTHONPATH", None)
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(READER_WITHOUT_THE_PACKAGE), *map(str, folders.values())],
        cwd=tmp_path,
        env=environment,
        check=True,
        timeout=300,
    )
    logits = torch.load(tmp_path / "logits.pt")
    for name, folder in folders.items():
        with torch.no_grad():
            expected = CASES[name].build()(pixel_values).logits
        # The stock SegFormer adds up in another order.
        tolerance = 1e-5 if name == "segformer" else 0.0
        torch.testing.assert_close(logits[str(folder)], expected, rtol=0, atol=tolerance, msg=name)


# Precision, recomputation, compilation


def test_bfloat16(case: Case) -> None:
    # Not 32x32: oneDNN's convolution of 8 channels is wrong where its 8x8 kernel is as large as the map (AVX512-BF16).
    model, pixel_values = case.build(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(pixel_values).logits
        found = model.to(torch.bfloat16)(pixel_values.bfloat16()).logits
    assert found.dtype == torch.bfloat16
    assert relative_error(found, expected) < 0.1  # 8 bits of mantissa, a dozen layers and more


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_autocast(name: str) -> None:
    # 64x64 for the reason that test_bfloat16 gives.
    model, batch = without_randomness(CASES[name].build()).train(), batch_of((64, 64))
    model(**batch).loss.backward()
    expected = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**batch)
    output.loss.backward()
    found = gradients(model)
    assert output.loss.isfinite()
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in found.values())
    # The head's bias sums over all pixels, so it is the least noisy of all.
    head = next(name for name in reversed(found) if name.endswith("bias") and "aux" not in name)
    assert relative_error(found[head], expected[head]) < 0.1


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("keyed", [False, True], ids=["stock dropout", "keyed dropout"])
def test_gradient_checkpointing_changes_no_gradient(keyed: bool) -> None:
    """What is dropped in the forward pass is dropped again where the backward pass recomputes it."""
    # In float64, because the gradients of some biases are zero but for rounding.
    model = CASES["segformer"].build(drop_path_rate=0.5, hidden_dropout_prob=0.2).double().train()
    assert model.supports_gradient_checkpointing
    batch = batch_of((64, 64))
    batch["pixel_values"] = batch["pixel_values"].double()
    if keyed:
        criterion = Criterion(model, auxiliary_weight=0.4)

    def step() -> dict[str, Tensor]:
        torch.manual_seed(2)
        loss = criterion(**batch, keys=[(0, 1), (0, 2)])[0] if keyed else model(**batch).loss
        loss.backward()
        return gradients(model)

    expected = step()
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-2
    model.gradient_checkpointing_enable()
    # The loss is taken in float32.
    torch.testing.assert_close(step(), expected, rtol=1e-4, atol=1e-6)


def check_compiled(case: Case, backend: str) -> None:
    model, pixel_values = case.build(), torch.randn(2, 3, 64, 64)
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(model, backend=backend)(pixel_values).logits
        expected = model(pixel_values).logits
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_compiles(name: str) -> None:
    check_compiled(CASES[name], "aot_eager")


@pytest.mark.slow
def test_compiles_with_inductor() -> None:
    check_compiled(CASES["unet_batch"], "inductor")


# transformers.Trainer


def train_with_transformers(model: PreTrainedModel, data: list[dict[str, Tensor]], folder: Path, **options: Any) -> int:
    """Trains by plain SGD; returns how many steps were done."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        optim="sgd",
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        remove_unused_columns=False,
        **options,
    )
    return transformers.Trainer(model, arguments, train_dataset=data).train().global_step


def samples(count: int) -> list[dict[str, Tensor]]:
    """A data set in memory."""
    batch = batch_of((64, 64), count)
    return [{key: value[i] for key, value in batch.items()} for i in range(count)]


def test_transformers_trainer(case: Case, tmp_path: Path) -> None:
    model, data = case.build(), samples(4)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    steps = train_with_transformers(model, data, tmp_path, max_steps=2, per_device_train_batch_size=2)
    assert steps == 2
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert len(moved) > 0.9 * len(before)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_accumulation_of_transformers_trainer_takes_the_mean(name: str, tmp_path: Path) -> None:
    """Three times the same batch is that batch: a loss that is a mean already must still be divided by three."""
    # One image over and over, so that batch normalisation sees the same each time.
    data = samples(1) * 6
    stepped = []
    for accumulation in (1, 3):
        model = without_randomness(CASES[name].build())
        train_with_transformers(
            model,
            data,
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=accumulation,
        )
        stepped.append(dict(model.named_parameters()))
    torch.testing.assert_close(stepped[1], stepped[0], rtol=1e-4, atol=1e-6)


# Keyed dropout

RANDOM_CONFIGS = {
    "resnet_dilated": {"dropout": 0.4},
    "segformer": {"drop_path_rate": 0.5, "hidden_dropout_prob": 0.2, "classifier_dropout_prob": 0.3},
}


@pytest.fixture(params=RANDOM_CONFIGS)
def random_model(request: pytest.FixtureRequest) -> Iterator[PreTrainedModel]:
    """A network in training mode, but for batch normalisation: that would mix the samples."""
    config = {**CASES[request.param].config, **RANDOM_CONFIGS[request.param]}
    model = Case(CASES[request.param].preset, config, 0).build().train()
    freeze_batchnorm(model.modules())
    return model


def test_keyed_dropout_replaces_all_and_renames_nothing(random_model: PreTrainedModel) -> None:
    names, pixel_values = list(random_model.state_dict()), torch.randn(1, 3, 64, 64)
    sources = [
        module
        for module in random_model.modules()
        if (isinstance(module, nn.Dropout) and module.p > 0) or getattr(module, "drop_prob", 0) > 0
    ]
    expected = random_model.eval()(pixel_values).logits
    randomness = key_dropout(random_model)  # must not bring a model out of evaluation mode
    assert len(randomness.layers) == len(sources) > 0
    assert not {id(source) for source in sources} & {id(module) for module in random_model.modules()}
    assert list(random_model.state_dict()) == names
    assert torch.equal(random_model(pixel_values).logits, expected)


def test_masks_belong_to_the_key(random_model: PreTrainedModel) -> None:
    randomness, images = key_dropout(random_model), torch.randn(3, 3, 64, 64)

    @torch.no_grad()
    def logits(*samples: tuple[int, tuple[int, ...]]) -> Tensor:
        """Of pairs of an image and a key."""
        randomness.begin([key for _, key in samples])
        return random_model(images[[index for index, _ in samples]]).logits

    whole = logits((0, (7, 0, 0)), (1, (7, 0, 1)), (2, (7, 0, 2)))
    turned = logits((2, (7, 0, 2)), (0, (7, 0, 0)))
    torch.testing.assert_close(turned, whole[[2, 0]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits((1, (7, 0, 1))), whole[[1]], rtol=1e-5, atol=1e-5)
    # The next epoch draws anew.
    assert relative_error(logits((1, (7, 1, 1))), whole[[1]]) > 0.01


def test_masks_differ_between_layers_and_calls() -> None:
    stack = nn.ModuleList([nn.Dropout(0.5), nn.Dropout(0.5)])
    key_dropout(stack).begin([(1,)])
    ones = torch.ones(1, 256)
    masks = [stack[0](ones), stack[0](ones), stack[1](ones), stack[1](ones)]
    # Independent coins agree half the time: 128 +- 8 of 256.
    agreement = [(masks[i] == masks[j]).sum().item() for i in range(4) for j in range(i)]
    assert all(128 - 5 * 8 < count < 128 + 5 * 8 for count in agreement)


@pytest.mark.parametrize("layer", [KeyedDropout, KeyedDropPath])
def test_dropout_keeps_the_expectation(layer: type[KeyedDropout | KeyedDropPath]) -> None:
    probability, samples = 0.3, 4000
    network = nn.Sequential(nn.Dropout(probability))
    randomness = key_dropout(network)
    randomness.layers.clear()
    network[0] = layer(probability, randomness)
    randomness.begin([(5, index) for index in range(samples)])
    dropped = network(torch.ones(samples, 2))
    # Dropout decides with sixteen bits.
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.7], rel=2**-16)
    if layer is KeyedDropPath:
        assert torch.equal(dropped[:, 0], dropped[:, 1])  # a sample is dropped as a whole
    # Values 0 and 1/q with odds p and q = 1 - p: mean 1, variance p/q.
    error = math.sqrt(probability / (1 - probability) / samples)
    assert dropped[:, 0].mean().item() == pytest.approx(1.0, abs=4 * error)


# build_model


def test_every_preset_builds() -> None:
    with torch.device("meta"):
        models = {name: build_model(name) for name in PRESETS}
    for name, model in models.items():
        assert model.config.id2label == dict(enumerate(CLASS_NAMES)), name
        assert model.config.semantic_loss_ignore_index == IGNORE


BAD_CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown preset": ({"name": "unet_huge"}, "unet_huge"),
    "missing folder": ({"name": "no/such/folder"}, "no/such/folder"),
    "unknown field": ({"name": "unet_small", "widths": [8]}, "widths"),
    "field of another family": ({"name": "resnet_18", "norm": "group"}, "norm"),
    "bad norm": ({"name": "unet_small", "norm": "foo"}, "foo"),
    "bad depth": ({"name": "resnet_18", "depth": 17}, "17"),
    "bad type": ({"name": "unet_small", "hidden_sizes": "small"}, "unet_small"),
    "no width": ({"name": "unet_small", "hidden_sizes": []}, "unet_small"),
    "negative width": ({"name": "unet_small", "hidden_sizes": [8, -16]}, "unet_small"),
    "too few widths": ({"name": "segformer_small", "hidden_sizes": [8, 16]}, "segformer_small"),
    "missing start": ({"name": "unet_small", "init_from": "no/such/start"}, "no/such/start"),
    "imagenet": ({"name": "segformer_b0", "init_from": "imagenet"}, "imagenet"),
    "two starts": ({"name": "{segformer}", "init_from": "imagenet"}, "init_from"),
    "start of another size": ({"name": "segformer_b0", "init_from": "{segformer}"}, "does not fit"),
    "start of another family": ({"name": "unet_small", "init_from": "{segformer}"}, "does not fit"),
}


@pytest.mark.parametrize("what", BAD_CALLS)
def test_mistakes_get_one_line(folders: dict[str, Path], what: str) -> None:
    call, named = BAD_CALLS[what]
    call = {k: v.format(**folders) if isinstance(v, str) else v for k, v in call.items()}
    with pytest.raises(UserError, match=named) as caught:
        build_model(**call)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no tensors in here"], ids=["empty", "garbage"])
def test_broken_weights_get_one_line(folders: dict[str, Path], tmp_path: Path, content: bytes) -> None:
    for file in folders["segformer"].glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=str(tmp_path)) as caught:
        build_model(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_starts_from_a_classifier(tmp_path: Path) -> None:
    """As from nvidia/mit-b0: the encoder comes whole, the head is drawn."""
    config = transformers.SegformerConfig(**TINY_SEGFORMER, num_labels=10)
    classifier = liven(transformers.SegformerForImageClassification(config))
    classifier.save_pretrained(tmp_path)
    trained = {k: v for k, v in classifier.state_dict().items() if k.startswith("segformer.")}

    starts = [build_model("segformer_small", **TINY_SEGFORMER, init_from=str(tmp_path)).state_dict() for _ in range(2)]
    for start in starts:
        assert trained.keys() == {name for name in start if name.startswith("segformer.")}
        assert all(torch.equal(start[name], tensor) for name, tensor in trained.items())
    heads = [start["decode_head.classifier.weight"] for start in starts]
    assert not torch.equal(*heads)
    assert 0 < heads[0].std().item() < 0.05


@pytest.fixture
def imagenet_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torchvision keeps the weights that it has fetched."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder / Path(torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url).name


def test_starts_from_imagenet(imagenet_file: Path) -> None:
    state = liven(torchvision.models.resnet18()).state_dict()
    torch.save(state, imagenet_file)
    body = build_model("resnet_18", init_from="imagenet").backbone.state_dict()
    assert state.keys() - body.keys() == {"fc.weight", "fc.bias"}
    assert all(torch.equal(tensor, state[name]) for name, tensor in body.items())


def test_broken_imagenet_file_gets_one_line(imagenet_file: Path) -> None:
    imagenet_file.write_bytes(b"no tensors in here")
    with pytest.raises(UserError, match=imagenet_file.name) as caught:
        build_model("resnet_18", init_from="imagenet")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_checkpoint_of_other_classes_gets_a_head_for_ours(name: str, tmp_path: Path) -> None:
    config = copy.deepcopy(CASES[name].build().config)
    config.num_labels = 7
    other = liven(type(CASES[name].build())(config))
    other.save_pretrained(tmp_path)

    model = build_model(str(tmp_path))
    assert model.config.id2label == dict(enumerate(CLASS_NAMES))
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 3, 64, 64)).logits.shape[1] == NUM_CLASSES
    state, again = other.state_dict(), model.state_dict()
    assert state.keys() == again.keys()
    fitted = {key for key in state if state[key].shape != again[key].shape}
    assert {again[key].shape[0] for key in fitted} == {NUM_CLASSES}
    assert all(torch.equal(state[key], again[key]) for key in state.keys() - fitted)


def test_attention_is_fused() -> None:
    """Defect 21: attention was written out by hand."""
    assert build_model("segformer_small").config._attn_implementation == "sdpa"


def test_unet_is_normalised_unless_asked_not_to_be() -> None:
    """Defect 22: a UNet without normalisation, at a learning rate of 0.01."""
    norms = {
        name: [type(module) for module in build_model("unet_small", norm=name).modules()] for name in ("batch", "none")
    }
    assert nn.BatchNorm2d in norms["batch"] and nn.BatchNorm2d not in norms["none"]
    assert PRESETS["unet_small"].norm == "batch"

"""What a run says it cost: sums over its parts, and arithmetic worked by hand."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY_UNET, assert_same_run
from torch.utils.flop_counter import FlopCounterMode

from cityseg_hf import build_model
from cityseg_hf.checkpoint import Progress
from cityseg_hf.cost import Stopwatch, forward_flops, peak_memory

SHORT = (*TINY_UNET, "-e", 3, "-b", 4, "--logging_steps", 1)


def test_a_run_writes_its_cost(run_train: Callable[..., Path], streets: Path) -> None:
    cost = json.loads((run_train("-d", streets, *SHORT) / "cost.json").read_text())
    assert cost["images"] == 3 * 12
    assert cost["train_seconds"] > 0 and cost["validation_seconds"] > 0
    assert cost["images_per_second"] == pytest.approx(36 / cost["train_seconds"], rel=1e-2)
    assert cost["peak_memory"] > 50e6, "PyTorch alone holds more"
    assert cost["parameters"] == build_model("unet_small", norm="group", hidden_sizes=[8, 16]).num_parameters()
    assert cost["image_size"] == [64, 128]
    assert cost["forward_flops"] > 0
    assert cost["hardware"]


def test_a_cut_run_adds_up_its_parts_and_is_the_same(
    run_train: Callable[..., Path], streets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each clock tick is a second: the cut run has the ticks of both parts; nothing that is compared knows of them."""
    ticks = iter(range(10**6))
    monkeypatch.setattr("cityseg_hf.cost.time.monotonic", lambda: float(next(ticks)))
    whole = run_train("-d", streets, *SHORT, name="whole")
    cut = run_train("-d", streets, *SHORT, name="cut")
    # As a crash after the second epoch leaves it.
    (cut / "results.json").unlink()
    (cut / "cost.json").unlink()
    shutil.rmtree(cut / "checkpoints" / "step_00000009")
    run_train("-d", streets, *SHORT, name="cut")
    assert_same_run(whole, cut)
    one, other = (json.loads((run / "cost.json").read_text()) for run in (whole, cut))
    assert other["images"] == one["images"]
    assert other["train_seconds"] > 2 / 3 * one["train_seconds"], "the epochs before the cut count as well"
    assert other["validation_seconds"] > 2 / 3 * one["validation_seconds"]


def test_the_stopwatch_adds_to_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 13.0, 14.0, 20.0])
    monkeypatch.setattr("cityseg_hf.cost.time.monotonic", lambda: next(now))
    progress = Progress(train_seconds=100.0)
    watch = Stopwatch(progress, torch.device("cpu"))
    watch.lap("train_seconds")
    watch.lap("validation_seconds")
    watch.lap("train_seconds")
    assert (progress.train_seconds, progress.validation_seconds) == (109.0, 1.0)
    assert progress.peak_memory == peak_memory(torch.device("cpu")) > 0


def test_a_checkpoint_from_before_costs_were_counted_goes_on() -> None:
    progress = Progress()
    progress.load_state_dict({"step": 7})
    assert (progress.step, progress.train_seconds, progress.peak_memory) == (7, 0.0, 0)


def test_flops_are_what_the_arithmetic_says() -> None:
    """By hand, two for each multiply-add: top and head of a UNet of two levels, its bottom, and the way up."""
    model = build_model("unet_small", hidden_sizes=[8, 16]).eval()
    top = 2 * 64 * 96 * (9 * 3 * 8 + 9 * 8 * 8 + 8 * 19)
    bottom = 2 * 32 * 48 * (9 * 8 * 16 + 9 * 16 * 16)
    up = 2 * 32 * 48 * 4 * 16 * 8 + 2 * 64 * 96 * (9 * 16 * 8 + 9 * 8 * 8)
    assert forward_flops(model, (64, 96)) == top + bottom + up


@pytest.mark.parametrize("name", ["segformer_b0", "resnet_18"])
def test_flops_agree_with_a_forward_pass(name: str) -> None:
    """PyTorch's counter around the real computation is the oracle; attention written out, which has a count."""
    model = build_model(name).eval()
    if name == "segformer_b0":
        model.set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(pixel_values=torch.zeros(1, 3, 64, 96))
    assert forward_flops(build_model(name).eval(), (64, 96)) == counter.get_total_flops() > 0


def test_a_network_that_cannot_be_followed_has_no_flops() -> None:
    class Wayward(torch.nn.Module):
        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return pixel_values * (1 if pixel_values.sum().item() > 0 else 2)

    assert forward_flops(Wayward(), (32, 32)) is None

"""What must hold for any input: properties drawn by hypothesis, and PNGs that are broken in 20,000 ways."""

import io
import random
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from cityseg_hf import UserError, load_cityscapes
from cityseg_hf.config import OptimConfig, TrainConfig
from cityseg_hf.data.cityscapes import read_image, read_instances, read_label, read_size
from cityseg_hf.data.loading import EvalBatches, SegmentationDataset, TrainBatches, collate, random_seed
from cityseg_hf.data.sources import file_sources
from cityseg_hf.data.transforms import EvalTransform
from cityseg_hf.labels import ID_TO_TRAIN_ID, IGNORE, ILLEGAL, LABELS, NUM_CLASSES, TRAIN_ID_TO_ID, colorize
from cityseg_hf.metrics import SegmentationCounts
from cityseg_hf.optim import Plan, rate_factor

settings.register_profile("here", deadline=None, max_examples=100, derandomize=True)
settings.load_profile("here")

SIDES = arrays.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=24)


def maps(values: int) -> st.SearchStrategy[np.ndarray]:
    """``uint8[H, W]`` of values 0..values - 1."""
    return arrays.arrays(np.uint8, SIDES, elements=st.integers(0, values - 1))


def png_of(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


# --- labels


@given(label_ids=maps(256))
def test_labels_are_mapped_or_refused(label_ids: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A map with an id that Cityscapes does not have is refused; of any other, each pixel gets its class's train id."""
    path = tmp_path_factory.getbasetemp() / "label.png"
    path.write_bytes(png_of(label_ids))
    known = {label.id: label.train_id for label in LABELS}
    if label_ids.max() >= len(LABELS):
        with pytest.raises(UserError, match="no Cityscapes labelId"):
            read_label(str(path))
        return
    expected = [[known[value] for value in row] for row in label_ids.tolist()]
    assert read_label(str(path)).tolist() == expected


@given(train_ids=maps(NUM_CLASSES))
def test_predictions_survive_the_way_to_the_server_and_back(train_ids: np.ndarray) -> None:
    assert np.array_equal(ID_TO_TRAIN_ID[TRAIN_ID_TO_ID[train_ids]], train_ids)
    assert np.array_equal(np.asarray(colorize(train_ids)), train_ids)


def test_no_value_is_left_out() -> None:
    assert sorted(set(ID_TO_TRAIN_ID.tolist())) == [*range(NUM_CLASSES), ILLEGAL, IGNORE]
    assert set(TRAIN_ID_TO_ID[NUM_CLASSES:].tolist()) == {0}


# --- metrics


@st.composite
def judged(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and labels (with void) of one size, of few classes or of many."""
    shape = draw(SIDES)
    classes = st.integers(0, draw(st.integers(0, NUM_CLASSES - 1)))
    predictions = draw(arrays.arrays(np.uint8, shape, elements=classes))
    labels = draw(arrays.arrays(np.uint8, shape, elements=st.one_of(classes, st.just(IGNORE))))
    return predictions, labels


def counts_of(*pairs: tuple[np.ndarray, np.ndarray]) -> SegmentationCounts:
    counts = SegmentationCounts()
    for predictions, labels in pairs:
        counts.update(torch.from_numpy(predictions), torch.from_numpy(labels))
    return counts


@given(pair=judged())
def test_counts_are_pixels(pair: tuple[np.ndarray, np.ndarray]) -> None:
    """Each labelled pixel counts once, void never; the scores are those of the definition."""
    predictions, labels = pair
    counts = counts_of(pair)
    valid = labels != IGNORE
    expected = Counter(zip(labels[valid].tolist(), predictions[valid].tolist(), strict=True))
    found = counts.confusion
    assert {(row, column): int(found[row, column]) for row, column in found.nonzero().tolist()} == expected
    scores = dict(counts.scores())
    ious = []
    for index, name in enumerate(label.name for label in LABELS if label.train_id != IGNORE):
        truth, guess = labels == index, (predictions == index) & valid
        union = (truth | guess).sum()
        assert scores[f"iou/{name}"] == (pytest.approx((truth & guess).sum() / union) if union else None)
        ious += [scores[f"iou/{name}"]] if union else []
    assert scores["miou"] == (pytest.approx(np.mean(ious)) if ious else None)


@given(pairs=st.lists(judged(), min_size=1, max_size=4), seed=st.integers(0, 2**32 - 1))
def test_counts_add_up_in_any_order(pairs: list, seed: int) -> None:
    mixed = random.Random(seed).sample(pairs, len(pairs))
    parts = [counts_of(pair).confusion for pair in pairs]
    assert torch.equal(counts_of(*pairs).confusion, sum(parts))
    assert torch.equal(counts_of(*mixed).confusion, sum(parts))


@given(pair=judged())
def test_the_truth_is_perfect_and_scores_are_shares(pair: tuple[np.ndarray, np.ndarray]) -> None:
    predictions, labels = pair
    assert all(value is None or 0 <= value <= 1 for value in dict(counts_of(pair).scores()).values())
    right = np.where(labels == IGNORE, predictions, labels)
    perfect = dict(counts_of((right, labels)).scores())
    assert perfect["miou"] in (None, 1.0)
    assert perfect["pixel_accuracy"] in (None, 1.0)


# --- sampler


@st.composite
def samplings(draw: st.DrawFn) -> dict[str, int]:
    world, accumulation = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    return {
        "length": draw(st.integers(world * accumulation, 90)),
        "batch_size": draw(st.integers(1, 6)),
        "accumulation": accumulation,
        "world": world,
        "seed": draw(st.integers(0, 2**32 - 1)),
        "last_step": draw(st.integers(1, 40)),
    }


def images_of_steps(settings: dict[str, int], first_step: int = 0) -> list[list[tuple[int, int]]]:
    """What all processes together get in each optimiser step."""
    ranks = [TrainBatches(rank=rank, first_step=first_step, **settings) for rank in range(settings["world"])]
    batches = [list(rank) for rank in ranks]
    assert [len(mine) for mine in batches] == [len(rank) for rank in ranks]
    assert all(batch for mine in batches for batch in mine), "a process without an image"
    assert all(len(batch) <= settings["batch_size"] for mine in batches for batch in mine)
    size = settings["accumulation"]
    return [
        sorted(key for mine in batches for batch in mine[start : start + size] for key in batch)
        for start in range(0, len(batches[0]), size)
    ]


@given(settings=samplings())
def test_a_step_depends_on_nothing_but_seed_and_global_batch(settings: dict[str, int]) -> None:
    steps = images_of_steps(settings)
    assert len(steps) == settings["last_step"]
    wanted = settings["batch_size"] * settings["accumulation"] * settings["world"]
    assert all(len(step) == min(wanted, settings["length"]) for step in steps)
    alone = {**settings, "batch_size": wanted, "accumulation": 1, "world": 1}
    assert images_of_steps(alone) == steps


@given(settings=samplings())
def test_an_epoch_has_no_image_twice(settings: dict[str, int]) -> None:
    seen = Counter(key for step in images_of_steps(settings) for key in step)
    assert set(seen.values()) == {1}
    assert all(0 <= index < settings["length"] for _, index in seen)


@given(settings=samplings(), share=st.floats(0, 1))
def test_a_run_goes_on_with_the_step_it_was_cut_at(settings: dict[str, int], share: float) -> None:
    first = int(share * settings["last_step"])
    assert images_of_steps(settings, first) == images_of_steps(settings)[first:]


@given(length=st.integers(0, 200), batch_size=st.integers(1, 9), world=st.integers(1, 9))
def test_every_image_is_judged_once(length: int, batch_size: int, world: int) -> None:
    ranks = [EvalBatches(length, batch_size=batch_size, rank=rank, world=world) for rank in range(world)]
    assert all(len(rank) == len(list(rank)) for rank in ranks)
    assert sorted(index for rank in ranks for batch in rank for _, index in batch) == list(range(length))


@given(keys=st.lists(st.tuples(*[st.integers(0, 2**32 - 1)] * 3), unique=True, max_size=50))
def test_keys_have_seeds_of_their_own(keys: list[tuple[int, int, int]]) -> None:
    seeds = [random_seed(*key) for key in keys]
    assert len(set(seeds)) == len(seeds)
    assert seeds == [random_seed(*key) for key in keys]
    assert all(0 <= seed < 2**64 for seed in seeds)


# --- schedule


@st.composite
def schedules(draw: st.DrawFn) -> tuple[OptimConfig, Plan]:
    total = draw(st.integers(1, 400))
    schedule = draw(st.sampled_from(["exponential", "poly", "cosine", "constant"]))
    config = OptimConfig(
        schedule=schedule,
        warmup_steps=draw(st.integers(0, 500)),
        warmup_ratio=draw(st.floats(0, 1)),
        gamma=draw(st.floats(0.01, 1)) if schedule == "exponential" else None,
        poly_power=draw(st.floats(0.1, 4)),
        min_lr_ratio=draw(st.floats(0, 1)),
    )
    return config, Plan(draw(st.integers(1, 50)), total, 1)


@given(drawn=schedules())
def test_rates_rise_to_the_peak_and_never_again(drawn: tuple[OptimConfig, Plan]) -> None:
    config, plan = drawn
    factor = rate_factor(config, plan)
    rates = [factor(step) for step in range(plan.total_steps + 1)]
    warm = min(config.warmup_steps, len(rates))
    assert all(0 <= rate <= 1 for rate in rates)
    assert rates[:warm] == sorted(rates[:warm])
    assert all(later <= earlier for earlier, later in zip(rates[warm:], rates[warm + 1 :], strict=False))
    if config.schedule in ("poly", "cosine") and config.warmup_steps < plan.total_steps:
        assert rates[config.warmup_steps] == 1
        assert rates[-1] == pytest.approx(config.min_lr_ratio, abs=1e-9)


@given(
    epochs=st.integers(1, 30), steps=st.integers(1, 40), every=st.integers(1, 9), saves=st.sampled_from(["7", "2e", ""])
)
def test_a_run_judges_and_saves_what_it_ends_with(epochs: int, steps: int, every: int, saves: str) -> None:
    plan = Plan.of(TrainConfig(num_epochs=epochs, val_freq=every), steps, saves or None)
    assert plan.total_steps == epochs * steps
    assert plan.validates_at(plan.total_steps)
    assert plan.saves_at(plan.total_steps)
    judged = [step for step in range(1, plan.total_steps + 1) if plan.validates_at(step)]
    assert len(judged) == -(-epochs // every)


# --- broken files

CHUNKS = [b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"acTL", b"fcTL", b"fdAT", b"iCCP",
          b"tRNS", b"PLTE", b"IHDR", b"IDAT", b"IEND", b"sBIT", b"bKGD", b"hIST"]  # fmt: skip
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def chunks_of(content: bytes) -> list[tuple[bytes, bytes]]:
    found, place = [], len(SIGNATURE)
    while place < len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        found.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + length]))
        place += 12 + length
    return found


def joined(chunks: list[tuple[bytes, bytes]]) -> bytes:
    """With checksums that are right: what is wrong gets past them, to the decoder."""
    parts = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
             for kind, data in chunks)  # fmt: skip
    return SIGNATURE + b"".join(parts)


def broken(rng: random.Random, content: bytes) -> bytes:
    """A PNG with bytes changed, cut, doubled or left out: in the file, or within a chunk with its checksum renewed."""
    if rng.random() < 0.3:
        file = bytearray(content)
        for _ in range(rng.choice([1, 1, 2, 8])):
            file[rng.randrange(len(file))] = rng.randrange(256)
        return bytes(file[: rng.randrange(len(file) + 1)]) if rng.random() < 0.4 else bytes(file)
    chunks = chunks_of(content)
    for _ in range(rng.randint(1, 2)):
        place = rng.randrange(len(chunks))
        kind, data = chunks[place]
        what = rng.choice(["new", "byte", "cut", "pixels", "twice", "without"])
        if what == "new":
            chunks.insert(place, (rng.choice(CHUNKS), rng.randbytes(rng.choice([0, 1, 2, 3, 4, 5, 8, 13, 26, 30]))))
        elif what == "byte" and data:
            changed = bytearray(data)
            changed[rng.randrange(len(data))] = rng.randrange(256)
            if kind == b"IHDR":  # sides of at most 65,535: the decoder's memory is not what is tried here
                changed[0:2] = changed[4:6] = b"\0\0"
            chunks[place] = kind, bytes(changed)
        elif what == "cut":
            chunks[place] = kind, data[: rng.randrange(len(data) + 1)]
        elif what == "pixels" and kind == b"IDAT":
            chunks[place] = kind, zlib.compress(rng.randbytes(rng.randrange(2000)))
        elif what == "twice":
            chunks.insert(place, chunks[place])
        elif what == "without" and len(chunks) > 1:
            del chunks[place]
    return joined(chunks)


def seeds_of_the_fuzzer() -> Iterator[bytes]:
    """What the readers are made for: an image, a label, an instance map; grey and palette images."""
    rng = np.random.default_rng(0)
    yield png_of(rng.integers(0, 256, (24, 32, 3), np.uint8))
    yield png_of(rng.integers(0, 34, (24, 32), np.uint8))
    yield png_of(rng.integers(0, 34000, (24, 32), np.uint16))
    palette = Image.fromarray(rng.integers(0, 19, (24, 32), np.uint8))
    palette.putpalette(list(range(57)))
    for image, more in (
        (palette, {"transparency": 3}),
        (Image.fromarray(rng.integers(0, 256, (9, 7, 4), np.uint8)), {}),
    ):
        file = io.BytesIO()
        image.save(file, "PNG", **more)
        yield file.getvalue()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_broken_files_are_one_line_or_an_array(tmp_path: Path) -> None:
    """20,000 files, each to every reader: an array of the promised form, or the one line that names the file."""
    rng, path = random.Random(0), tmp_path / "broken.png"
    good, kept = list(seeds_of_the_fuzzer()), Counter()
    readers = ((read_image, np.uint8, 3), (read_label, np.uint8, 2), (read_instances, np.int32, 2))
    warnings.simplefilter("ignore")
    for number in range(20_000):
        path.write_bytes(broken(rng, good[number % len(good)]))
        for read, dtype, dimensions in readers:
            try:
                found = read(str(path))
            except UserError as error:
                assert str(path) in str(error)
                assert "\n" not in str(error)
                kept["refused"] += 1
            else:
                assert found.dtype == dtype
                assert found.ndim == dimensions
                assert found.size
                kept["read"] += 1
        try:
            assert min(read_size(str(path))) > 0
        except UserError as error:
            assert str(path) in str(error)
    # Both ways are tried, not one of them alone.
    assert min(kept["read"], kept["refused"]) > 5_000


def test_the_loader_says_the_same(streets: Path, tmp_path: Path) -> None:
    """Of a broken file comes a sample or the one line that names it, never what a worker wraps in a traceback."""
    rng, path = random.Random(1), tmp_path / "broken.png"
    source = file_sources(load_cityscapes(streets))["val"]
    image, label = source.read(0)
    good = {"image_paths": png_of(image), "label_paths": png_of(TRAIN_ID_TO_ID[label])}
    whole = {kind: getattr(source, kind)[0] for kind in good}
    for number in range(600):
        kind = ("image_paths", "label_paths")[number % 2]
        getattr(source, kind)[0] = str(path)
        path.write_bytes(broken(rng, good[kind]))
        sample = SegmentationDataset(source, EvalTransform((32, 64)))[(0, 0)]
        getattr(source, kind)[0] = whole[kind]
        batch = collate([sample])
        if "error" in batch:
            assert str(path) in batch["error"]
            assert "\n" not in batch["error"]
        else:
            assert batch["pixel_values"].shape == (1, 3, 32, 64)
            assert batch["labels"].shape[0] == 1

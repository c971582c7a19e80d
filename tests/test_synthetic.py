"""The synthetic streets: the same every time, consistent in themselves, and in the layout of Cityscapes."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from cityseg_hf.data.synthetic import Street, make_synthetic, render_street
from cityseg_hf.labels import CLASS_NAMES, ID_TO_TRAIN_ID, ILLEGAL, LABELS, NUM_CLASSES

BY_NAME = {label.name: label for label in LABELS}
NUMBERED = [label.id for label in LABELS if label.has_instances]
SMALL = (64, 128)


def tree_bytes(root: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative path."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def redraw(polygons: list, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Label ids and instance ids, drawn the way ``cityscapesscripts.preparation`` does it."""
    labels, instances = Image.new("L", size[::-1], 0), Image.new("I", size[::-1], 0)
    counts: dict[str, int] = {}
    for name, polygon in polygons:
        label = BY_NAME[name if name in BY_NAME else name.removesuffix("group")]
        value = label.id
        if label.has_instances and name in BY_NAME:
            value = label.id * 1000 + counts.get(name, 0)
            counts[name] = counts.get(name, 0) + 1
        points = [tuple(point) for point in polygon]
        ImageDraw.Draw(labels).polygon(points, fill=label.id)
        ImageDraw.Draw(instances).polygon(points, fill=value)
    return np.array(labels), np.array(instances)


@pytest.fixture(scope="module")
def streets() -> tuple[list[Street], list[Street]]:
    """64 training scenes and 16 validation scenes."""
    train, val = ([render_street((128, 256), (0, split, i)) for i in range(n)] for split, n in ((0, 64), (1, 16)))
    return train, val


def pixels_by_class(streets: list[Street]) -> np.ndarray:
    """``int64[256]``, by train id."""
    return sum(np.bincount(ID_TO_TRAIN_ID[street.label_ids].ravel(), minlength=256) for street in streets)


def test_every_class_appears(streets: tuple[list[Street], list[Street]]) -> None:
    for split in streets:
        count = pixels_by_class(split)
        assert [CLASS_NAMES[k] for k in range(NUM_CLASSES) if count[k] == 0] == []
        assert count[ILLEGAL] == 0


def test_classes_are_as_unbalanced_as_in_real_streets(streets: tuple[list[Street], list[Street]]) -> None:
    count = pixels_by_class(streets[0])[:NUM_CLASSES]
    share = dict(zip(CLASS_NAMES, count / count.sum(), strict=True))
    assert max(share, key=share.__getitem__) == "road"
    assert share["road"] > 0.2
    assert share["building"] > share["vegetation"] > share["car"] > share["person"]
    assert all(share[name] < 0.01 for name in ("truck", "bus", "train", "rider", "motorcycle", "traffic light"))


@pytest.mark.parametrize("size", [SMALL, (97, 131), (64, 64), (180, 101), (330, 500)])
def test_scene_is_consistent(size: tuple[int, int]) -> None:
    street = render_street(size, 5)
    assert street.image.shape == (*size, 3) and street.image.dtype == np.uint8
    assert street.label_ids.shape == size and street.label_ids.dtype == np.uint8
    assert street.instance_ids.shape == size
    labels, instances = redraw(street.polygons, size)
    assert np.array_equal(labels, street.label_ids)
    assert np.array_equal(instances, street.instance_ids)
    for _, polygon in street.polygons:
        points = np.array(polygon)
        assert len(points) >= 3 and points.min() >= 0
        assert points[:, 0].max() < size[1] and points[:, 1].max() < size[0]


def test_instance_ids_belong_to_their_labels(streets: tuple[list[Street], list[Street]]) -> None:
    for street in streets[1]:
        numbered = street.instance_ids >= 1000
        assert np.array_equal(street.instance_ids[numbered] // 1000, street.label_ids[numbered])
        assert np.array_equal(street.instance_ids[~numbered], street.label_ids[~numbered])
        assert np.isin(street.label_ids[numbered], NUMBERED).all()
        assert numbered.any()


def test_same_seed_same_scene_and_another_seed_another() -> None:
    once, again, other = (render_street(SMALL, seed) for seed in ((3, 0, 1), (3, 0, 1), (3, 0, 2)))
    assert all(np.array_equal(a, b) for a, b in zip(once[:3], again[:3], strict=True))
    assert once.polygons == again.polygons
    assert not np.array_equal(once.image, other.image)


def test_scenes_do_not_depend_on_those_before(tmp_path: Path) -> None:
    root = make_synthetic(tmp_path, train=3, val=0, size=SMALL, seed=9)
    with Image.open(root / "leftImg8bit/train/neu-synthen/neu-synthen_000000_000019_leftImg8bit.png") as image:
        assert np.array_equal(np.array(image), render_street(SMALL, (9, 0, 2)).image)


def test_a_bare_number_is_a_seed_too() -> None:
    assert np.array_equal(render_street(SMALL, 7).image, render_street(SMALL, [7]).image)


def test_tree_has_the_layout_of_cityscapes(tmp_path: Path) -> None:
    root = make_synthetic(tmp_path / "tree", train=6, val=2, test=1, size=(66, 130))
    assert root == tmp_path / "tree"
    images = sorted((root / "leftImg8bit").glob("*/*/*_leftImg8bit.png"))
    assert len(images) == 9
    cities: dict[str, set[str]] = {}
    for path in images:
        split, city = path.parts[-3:-1]
        cities.setdefault(split, set()).add(city)
        stem = path.name.removesuffix("_leftImg8bit.png")
        name, sequence, frame = stem.split("_")
        assert name == city and len(sequence) == len(frame) == 6 and (sequence + frame).isdigit()
        base = root / "gtFine" / split / city / f"{stem}_gtFine"
        with Image.open(path) as image:
            assert (image.mode, image.size) == ("RGB", (130, 66))
        with Image.open(f"{base}_labelIds.png") as image:
            assert (image.mode, image.size) == ("L", (130, 66))
            label_ids = np.array(image)
        with Image.open(f"{base}_instanceIds.png") as image:
            assert image.mode.startswith("I") and image.size == (130, 66)
            instance_ids = np.array(image).astype(np.int64)
        annotation = json.loads(Path(f"{base}_polygons.json").read_text(encoding="utf-8"))
        assert (annotation["imgHeight"], annotation["imgWidth"]) == (66, 130)
        redrawn = redraw([(item["label"], item["polygon"]) for item in annotation["objects"]], (66, 130))
        assert np.array_equal(redrawn[0], label_ids) and np.array_equal(redrawn[1], instance_ids)
    assert len(cities["train"]) == 3
    assert len(set.union(*cities.values())) == sum(map(len, cities.values())), "splits share a city"


def test_more_images_leave_the_earlier_ones_alone_and_a_second_run_changes_nothing(tmp_path: Path) -> None:
    few = tree_bytes(make_synthetic(tmp_path / "few", train=2, val=1, size=SMALL, seed=4))
    many = tree_bytes(make_synthetic(tmp_path / "many", train=5, val=1, size=SMALL, seed=4))
    assert few.items() <= many.items() and len(many) == 6 * 4
    assert tree_bytes(make_synthetic(tmp_path / "many", train=5, val=1, size=SMALL, seed=4)) == many


@pytest.mark.slow  # each worker imports the package anew
def test_workers_do_not_change_the_tree(tmp_path: Path) -> None:
    one = make_synthetic(tmp_path / "one", train=3, val=0, size=SMALL)
    two = make_synthetic(tmp_path / "two", train=3, val=0, size=SMALL, workers=2)
    assert tree_bytes(one) == tree_bytes(two)


def test_nothing_wanted_gives_an_empty_folder(tmp_path: Path) -> None:
    assert tree_bytes(make_synthetic(tmp_path / "none", train=0, val=0)) == {}


@pytest.mark.parametrize(
    "wrong",
    [{"size": (63, 128)}, {"size": (128, 32)}, {"train": -1}, {"val": -2}, {"test": -1}, {"seed": -1}, {"workers": 0}],
)
def test_wrong_arguments_are_refused_before_anything_is_written(tmp_path: Path, wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))) as error:
        make_synthetic(tmp_path / "tree", **wrong)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "tree").exists()
    if "size" in wrong:
        with pytest.raises(ValueError, match="at least 64"):
            render_street(wrong["size"], 0)

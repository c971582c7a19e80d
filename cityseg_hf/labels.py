"""The Cityscapes classes: names, ids, train ids, categories and colours. The only place that knows them.

The figures are those of the Cityscapes label definition (Cordts et al., *The Cityscapes Dataset for Semantic Urban
Scene Understanding*, CVPR 2016); a test compares every field with ``cityscapesscripts.helpers.labels``.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image

IGNORE = 255
"""The train id of every pixel that is neither trained on nor judged."""

NUM_CLASSES = 19
"""How many train ids there are: 0..18."""


class Label(NamedTuple):
    """One class of the label table."""

    name: str
    id: int
    """The value in ``*_labelIds.png``, 0..33."""
    train_id: int
    """The value the networks learn, 0..18, or ``IGNORE``."""
    category: str
    has_instances: bool
    color: tuple[int, int, int]
    """RGB, 0..255."""


LABELS: tuple[Label, ...] = (
    Label("unlabeled", 0, IGNORE, "void", False, (0, 0, 0)),
    Label("ego vehicle", 1, IGNORE, "void", False, (0, 0, 0)),
    Label("rectification border", 2, IGNORE, "void", False, (0, 0, 0)),
    Label("out of roi", 3, IGNORE, "void", False, (0, 0, 0)),
    Label("static", 4, IGNORE, "void", False, (0, 0, 0)),
    Label("dynamic", 5, IGNORE, "void", False, (111, 74, 0)),
    Label("ground", 6, IGNORE, "void", False, (81, 0, 81)),
    Label("road", 7, 0, "flat", False, (128, 64, 128)),
    Label("sidewalk", 8, 1, "flat", False, (244, 35, 232)),
    Label("parking", 9, IGNORE, "flat", False, (250, 170, 160)),
    Label("rail track", 10, IGNORE, "flat", False, (230, 150, 140)),
    Label("building", 11, 2, "construction", False, (70, 70, 70)),
    Label("wall", 12, 3, "construction", False, (102, 102, 156)),
    Label("fence", 13, 4, "construction", False, (190, 153, 153)),
    Label("guard rail", 14, IGNORE, "construction", False, (180, 165, 180)),
    Label("bridge", 15, IGNORE, "construction", False, (150, 100, 100)),
    Label("tunnel", 16, IGNORE, "construction", False, (150, 120, 90)),
    Label("pole", 17, 5, "object", False, (153, 153, 153)),
    Label("polegroup", 18, IGNORE, "object", False, (153, 153, 153)),
    Label("traffic light", 19, 6, "object", False, (250, 170, 30)),
    Label("traffic sign", 20, 7, "object", False, (220, 220, 0)),
    Label("vegetation", 21, 8, "nature", False, (107, 142, 35)),
    Label("terrain", 22, 9, "nature", False, (152, 251, 152)),
    Label("sky", 23, 10, "sky", False, (70, 130, 180)),
    Label("person", 24, 11, "human", True, (220, 20, 60)),
    Label("rider", 25, 12, "human", True, (255, 0, 0)),
    Label("car", 26, 13, "vehicle", True, (0, 0, 142)),
    Label("truck", 27, 14, "vehicle", True, (0, 0, 70)),
    Label("bus", 28, 15, "vehicle", True, (0, 60, 100)),
    Label("caravan", 29, IGNORE, "vehicle", True, (0, 0, 90)),
    Label("trailer", 30, IGNORE, "vehicle", True, (0, 0, 110)),
    Label("train", 31, 16, "vehicle", True, (0, 80, 100)),
    Label("motorcycle", 32, 17, "vehicle", True, (0, 0, 230)),
    Label("bicycle", 33, 18, "vehicle", True, (119, 11, 32)),
)
"""All 34 classes, in the order of their ids. (``license plate``, id -1, is drawn as ``vehicle`` in the maps.)"""

TRAIN_LABELS: tuple[Label, ...] = tuple(
    sorted((label for label in LABELS if label.train_id != IGNORE), key=lambda label: label.train_id)
)
"""The 19 classes that count, in the order of their train ids."""

CLASS_NAMES: tuple[str, ...] = tuple(label.name for label in TRAIN_LABELS)
ID2LABEL: dict[int, str] = dict(enumerate(CLASS_NAMES))
LABEL2ID: dict[str, int] = {name: train_id for train_id, name in ID2LABEL.items()}

CATEGORY_NAMES: tuple[str, ...] = tuple(dict.fromkeys(label.category for label in TRAIN_LABELS))
"""The seven categories that are judged: flat, construction, object, nature, sky, human, vehicle."""

ILLEGAL = 254
"""What ``ID_TO_TRAIN_ID`` gives for a value that is no labelId; never a train id and never ``IGNORE``."""

ID_TO_TRAIN_ID: np.ndarray = np.full(256, ILLEGAL, dtype=np.uint8)
"""``uint8[256]``: labelId -> train id, ``IGNORE`` for void classes, ``ILLEGAL`` for values 34..255."""
ID_TO_TRAIN_ID[[label.id for label in LABELS]] = [label.train_id for label in LABELS]

TRAIN_ID_TO_ID: np.ndarray = np.zeros(256, dtype=np.uint8)
"""``uint8[256]``: train id -> labelId, as the benchmark server wants it; everything else becomes 0 (unlabeled)."""
TRAIN_ID_TO_ID[: len(TRAIN_LABELS)] = [label.id for label in TRAIN_LABELS]

PALETTE: np.ndarray = np.zeros((256, 3), dtype=np.uint8)
"""``uint8[256, 3]``: train id -> RGB; ``IGNORE`` and everything else is black."""
PALETTE[: len(TRAIN_LABELS)] = [label.color for label in TRAIN_LABELS]

TRAIN_ID_TO_CATEGORY: np.ndarray = np.array(
    [CATEGORY_NAMES.index(label.category) for label in TRAIN_LABELS], dtype=np.int64
)
"""``int64[19]``: train id -> index into ``CATEGORY_NAMES``."""


def colorize(train_ids: np.ndarray) -> Image.Image:
    """Paints a map of train ids in the Cityscapes colours.

    Args:
        train_ids: ``uint8[H, W]``; ``IGNORE`` is painted black.

    Returns:
        A palette image (mode ``P``), which viewers show in colour and ``np.asarray`` gives back as train ids.
    """
    image = Image.fromarray(np.ascontiguousarray(train_ids, dtype=np.uint8))
    image.putpalette(PALETTE.tobytes())
    return image

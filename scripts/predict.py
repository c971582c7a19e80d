"""Segments images and writes, for each, colours, labelIds and an overlay.

python scripts/predict.py --model saved_models/RUN/best_miou --input IMAGE_OR_FOLDER --output predictions
"""

from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from cityseg_hf import UserError
from cityseg_hf.cli import Parser, exit_with
from cityseg_hf.data.cityscapes import read_image
from cityseg_hf.inference import load_model_folder, segment
from cityseg_hf.labels import PALETTE, TRAIN_ID_TO_ID, colorize

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm"}


def parser() -> Parser:
    flags = Parser(description="Segment images with a trained model.")
    flags.add_argument("--model", required=True, help="model folder, or model of the Hub")
    flags.add_argument("--input", required=True, help="an image, or a folder of images (with its sub-folders)")
    flags.add_argument("--output", required=True, help="folder for *_color.png, *_labelIds.png and *_overlay.png")
    flags.add_argument("--opacity", type=float, default=0.5, help="of the colours in the overlay, 0 to 1")
    return flags


def find_images(source: Path, output: Path) -> list[tuple[Path, Path]]:
    """Pairs of image and its name relative to the output folder; what lies there already is no input."""
    if source.is_file():
        return [(source, Path(source.name))]
    if not source.is_dir():
        raise UserError(f"--input {source}: there is no such file or folder")
    found = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
    found = [path for path in found if not path.resolve().is_relative_to(output.resolve()) or output == source]
    if not found:
        raise UserError(f"--input {source}: no images in it ({', '.join(sorted(SUFFIXES))})")
    return [(path, path.relative_to(source)) for path in found]


def write(target: Path, image: np.ndarray, train_ids: np.ndarray, opacity: float) -> None:
    """Writes the three pictures beside one another; ``target`` has no suffix."""
    target.parent.mkdir(parents=True, exist_ok=True)
    colorize(train_ids).save(f"{target}_color.png")
    Image.fromarray(TRAIN_ID_TO_ID[train_ids]).save(f"{target}_labelIds.png")
    blend = (1 - opacity) * image + opacity * PALETTE[train_ids]
    Image.fromarray(blend.round().astype(np.uint8)).save(f"{target}_overlay.png")


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    if not 0 <= args.opacity <= 1:
        raise UserError(f"--opacity must lie between 0 and 1, got {args.opacity}")
    output = Path(args.output)
    images = find_images(Path(args.input), output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror}") from None
    transformers_logging.disable_progress_bar()
    model, processor = load_model_folder(args.model)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    stems = Counter(name.with_suffix("") for _, name in images)
    broken = []
    for path, name in tqdm(images, desc="predict", unit="image"):
        try:
            image = read_image(str(path))
        except UserError as error:
            broken.append(str(error))
            tqdm.write(f"skipped: {error}")
            continue
        # Photographs of one name in two formats must not overwrite each other.
        target = output / (name if stems[name.with_suffix("")] > 1 else name.with_suffix(""))
        write(target, image, segment(model, processor, image), args.opacity)
    print(f"{len(images) - len(broken)} images segmented into {output}")
    if broken:
        raise UserError(f"{len(broken)} of {len(images)} images could not be read, first: {broken[0]}")


if __name__ == "__main__":
    exit_with(main)

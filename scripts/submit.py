"""Segments a split into an archive for the Cityscapes benchmark server, and checks it. Run it again to go on.

python scripts/submit.py --model saved_models/RUN/best_miou -d cityscapes_data --split test --output results.zip
python scripts/submit.py --check results.zip -d cityscapes_data --split test
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from cityseg_hf import UserError
from cityseg_hf.cli import Parser, check_output_file, exit_with
from cityseg_hf.data.cityscapes import DEFAULT_ROOT, Row, find_rows
from cityseg_hf.inference import load_model_folder
from cityseg_hf.prediction import Predictor, fingerprint
from cityseg_hf.submission import archive_faults, compare_scores, image_sizes, require_official, write_submission
from cityseg_hf.views import DTYPES, add_inference_flags, views_of


def parser() -> Parser:
    flags = Parser(description="Write and check an archive of predictions for the Cityscapes benchmark server.")
    flags.add_argument("--model", help="model folder, or model of the Hub")
    flags.add_argument("--output", metavar="ZIP", help="the archive to write")
    flags.add_argument("--check", metavar="ZIP", help="only check this archive; without -d against the official split")
    flags.add_argument("-d", "--base_dataset_path", help=f"root of leftImg8bit/, or its zips (default: {DEFAULT_ROOT})")
    flags.add_argument(
        "--split", default="test", choices=["val", "test"], help="val is also scored, officially and ours"
    )
    flags.add_argument("--overwrite", action="store_true", help="begin anew, and replace an archive that is there")
    flags.add_argument("--batch_size", "-b", type=int, default=4, help="images or windows at a time")
    flags.add_argument("--num_workers", type=int, default=2, help="threads that read, and threads that write")
    add_inference_flags(flags)
    return flags


def find_images(root: str, split: str) -> list[Row]:
    """The images of a split that has some."""
    rows = find_rows(root)
    if not rows[split]:
        there = ", ".join(split for split, found in rows.items() if found)
        raise UserError(f"{root} has no images in leftImg8bit/{split}; it has {there}")
    return rows[split]


def check(archive: Path, rows: Sequence[Row] | None) -> None:
    """Prints every fault of an archive."""
    if not archive.is_file():
        raise UserError(f"--check {archive}: there is no such file")
    faults = []
    for fault in archive_faults(archive, None if rows is None else image_sizes(rows)):
        tqdm.write(fault)
        faults.append(fault)
    if faults:
        many = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise UserError(f"{archive} has {many}, listed above, first: {faults[0]}")
    print(f"{archive} is fine")


def write(args: argparse.Namespace, rows: Sequence[Row]) -> None:
    """Segments the images into ``args.output``."""
    views = views_of(args)
    transformers_logging.disable_progress_bar()
    model, processor = load_model_folder(args.model)
    settings = {**fingerprint(model, processor, views), "dtype": args.dtype, "split": args.split}
    predictor = Predictor(model.to(PartialState().device, DTYPES[args.dtype]), processor, views)
    archive = Path(args.output)
    write_submission(predictor, rows, archive, settings=settings, threads=args.num_workers, overwrite=args.overwrite)
    print(f"{archive} holds {len(rows)} predictions and is fine")


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    if args.check is None and (args.model is None or args.output is None):
        raise UserError("give --model FOLDER and --output ZIP, or --check ZIP")
    if args.check is not None and (args.model is not None or args.output is not None):
        raise UserError("--check only looks at an archive: leave --model and --output out")
    if args.num_workers < 0:
        raise UserError(f"--num_workers must not be negative, got {args.num_workers}")
    views_of(args)
    check_output_file(args.output)
    if args.output is not None and Path(args.output).exists() and not args.overwrite:
        raise UserError(f"--output {args.output} is there already: --check it, or --overwrite it")
    alone = args.check is not None and args.base_dataset_path is None
    rows = None if alone else find_images(args.base_dataset_path or DEFAULT_ROOT, args.split)
    scored = rows is not None and args.split == "val"
    if scored:
        require_official()
    if args.check is not None:
        check(Path(args.check), rows)
    else:
        write(args, rows)
    if scored:
        scores = compare_scores(Path(args.check or args.output), rows)
        means = ("miou", "iiou", "category_iou", "category_iiou")
        print(", ".join(f"{name} {100 * scores[name]:.2f}" for name in means if scores.get(name) is not None))
        print("cityscapesscripts has the same scores")


if __name__ == "__main__":
    exit_with(main)

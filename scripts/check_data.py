"""Reads a whole data set and lists every fault, one a line, in the words in which a training would stop at it.

python scripts/check_data.py -d cityscapes_data
python scripts/check_data.py -d cityscapes_data --output faults.json
"""

import os
import time
from pathlib import Path

from tqdm import tqdm

from cityseg_hf import UserError
from cityseg_hf.cli import Parser, check_output_file, exit_with
from cityseg_hf.data.checking import check_tree
from cityseg_hf.data.cityscapes import DEFAULT_ROOT
from cityseg_hf.runs import write_json


def parser() -> Parser:
    flags = Parser(description="Read a whole Cityscapes tree and list every fault of it; exits 2 if there is one.")
    flags.add_argument(
        "-d", "--base_dataset_path", default=DEFAULT_ROOT, help="root of leftImg8bit/ and gtFine/, or their zips"
    )
    flags.add_argument("--output", metavar="FILE", help="JSON file for the faults: a list of {file, split, fault}")
    flags.add_argument("--num_workers", type=int, default=os.cpu_count() or 1, help="threads that decode")
    return flags


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    if args.num_workers < 0:
        raise UserError(f"--num_workers must not be negative, got {args.num_workers}")
    check_output_file(args.output)
    root, start = args.base_dataset_path, time.perf_counter()
    # Around the progress bar, which shares the terminal.
    report = check_tree(root, num_workers=args.num_workers, say=tqdm.write)
    if args.output:
        faults = [{"file": fault.file, "split": fault.split, "fault": fault.line} for fault in report.faults]
        write_json(Path(args.output), faults)
    count = len(report.faults)
    if count:
        many = f"{count} faults in {root}: mend them" if count > 1 else f"1 fault in {root}: mend it"
        raise UserError(f"{many} before training")
    splits = ", ".join(f"{split} {images}" for split, images in report.images.items())
    print(
        f"{root} is fine: {sum(report.images.values())} images ({splits}), all read in "
        f"{time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    exit_with(main)

"""Decodes a data set once, into a folder that training reads without decoding. Run it again to go on, or to renew it.

python scripts/prepare_data.py -d cityscapes_data --output prepared --size 512 1024
python scripts/train.py --prepared prepared
"""

import os
import time
from pathlib import Path

from cityseg_hf import UserError
from cityseg_hf.cli import Parser, exit_with
from cityseg_hf.data.cityscapes import DEFAULT_ROOT
from cityseg_hf.data.prepared_writer import prepare, readable, verify
from cityseg_hf.errors import Stopped
from cityseg_hf.launch import StopSignals


def parser() -> Parser:
    flags = Parser(description="Decode a data set once, into memory-mapped shards for scripts/train.py --prepared.")
    flags.add_argument(
        "-d", "--base_dataset_path", default=DEFAULT_ROOT, help="root of leftImg8bit/ and gtFine/, or their zips"
    )
    flags.add_argument("--output", required=True, metavar="DIR", help="folder that gets the shards")
    flags.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="--image_size of the trainings (default: images keep theirs)",
    )
    flags.add_argument("--holdout_cities", nargs="+", help="the --holdout_cities of the trainings")
    flags.add_argument("--num_workers", type=int, default=os.cpu_count() or 1, help="processes that decode")
    flags.add_argument("--verify", action="store_true", help="only compare the shards in --output with their checksums")
    return flags


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    if args.size is not None and min(args.size) < 32:
        raise UserError(f"--size takes a height and a width of at least 32, got {args.size}")
    if args.num_workers < 0:
        raise UserError(f"--num_workers must not be negative, got {args.num_workers}")
    folder, start = Path(args.output), time.perf_counter()
    if args.verify:
        manifest = verify(folder)
    else:
        signals = StopSignals()
        manifest = prepare(
            args.base_dataset_path,
            folder,
            size=args.size and tuple(args.size),
            holdout_cities=args.holdout_cities,
            num_workers=args.num_workers,
            stop=lambda: signals.received is not None,
        )
        if manifest is None:
            raise Stopped(f"{signals.received}; finished shards are kept: run the same command again to go on")
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    images = ", ".join(f"{split} {len(record.names)}" for split, record in manifest.splits.items())
    size = readable(sum(shard.bytes for shard in shards))
    done = "whole" if args.verify else "ready"
    print(f"{folder} is {done}: {images}; {len(shards)} shards, {size} ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    exit_with(main)

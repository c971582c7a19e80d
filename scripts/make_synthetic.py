"""Writes a Cityscapes tree of procedural streets: images, labelIds, instanceIds and polygons.

python scripts/make_synthetic.py --output streets --train 64 --val 16 --test 16 --size 256 512 --seed 0
"""

import time

from cityseg_hf import UserError, make_synthetic
from cityseg_hf.cli import Parser, exit_with


def parser() -> Parser:
    flags = Parser(description="Write synthetic streets in the layout of Cityscapes.")
    flags.add_argument("--output", required=True, metavar="ROOT", help="folder that gets leftImg8bit/ and gtFine/")
    for split, count in (("train", 64), ("val", 16), ("test", 0)):
        flags.add_argument(
            f"--{split}", type=int, default=count, metavar="N", help=f"images of {split} (default {count})"
        )
    flags.add_argument("--size", type=int, nargs=2, default=[256, 512], metavar=("H", "W"), help="default 256 512")
    flags.add_argument("--seed", type=int, default=0, help="the same seed gives the same streets")
    flags.add_argument("--num_workers", type=int, default=1, help="processes that draw")
    return flags


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    start = time.perf_counter()
    try:
        root = make_synthetic(
            args.output,
            train=args.train,
            val=args.val,
            test=args.test,
            size=tuple(args.size),
            seed=args.seed,
            workers=args.num_workers,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"--output {args.output}: {error.strerror}") from None
    count = args.train + args.val + args.test
    print(f"{count} streets of {args.size[0]}x{args.size[1]} in {root} ({time.perf_counter() - start:.1f} s)")


if __name__ == "__main__":
    exit_with(main)

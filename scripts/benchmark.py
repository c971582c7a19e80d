"""Measures this project and its peers alternating in one run.

python scripts/benchmark.py train --models segformer_b0 unet --precisions no bf16 --peers --output train.json
"""

import sys
import tempfile
import warnings
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from cityseg_hf import UserError
from cityseg_hf.benchmark.options import MODELS, Options
from cityseg_hf.benchmark.run import MODES, benchmark
from cityseg_hf.cli import Parser, check_output_file, exit_with
from cityseg_hf.runs import write_json

# Beside this script lies evaluate.py, which must not hide the library of that name.
sys.path = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

SIZES = {"train": (512, 1024), "data": (512, 1024)}
IMAGE_SIZE = (1024, 2048)
DEFAULT_MODELS = {"train": ["segformer_b0", "segformer_b2", "unet", "resnet"], "infer": ["segformer_b0"]}


def parser() -> Parser:
    flags = Parser(description="Measure this project and its peers in turns: A B A B. Ratios above 1 are ours.")
    flags.add_argument("mode", choices=list(MODES), help="what is measured")
    flags.add_argument("--peers", action="store_true", help="also the peers that the extra 'bench' installs")
    flags.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    flags.add_argument("--models", nargs="+", help=f"for train and infer: presets, or {', '.join(MODELS)}")
    flags.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="the network's input for train and data (default 512 1024), the image for the rest (default 1024 2048)",
    )
    flags.add_argument("--batch_size", "-b", type=int, default=2, help="images of an optimiser step")
    flags.add_argument("--precisions", nargs="+", default=["no", "bf16"], choices=["no", "bf16"], help="no is float32")
    flags.add_argument("--rounds", type=int, default=5, help="turns of each contender, after one to warm up")
    flags.add_argument("--images", type=int, nargs="+", default=[10, 200], help="for metric: memory of so many images")
    flags.add_argument("-d", "--base_dataset_path", help="for data: a Cityscapes tree (default: synthetic streets)")
    flags.add_argument("--output", metavar="FILE.json", help="the measurements, with what they were taken on")
    return flags


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    size = tuple(args.size or SIZES.get(args.mode, IMAGE_SIZE))
    if min(size) < 64 or args.batch_size < 1 or args.rounds < 1 or min(args.images) < 1:
        raise UserError("--size takes at least 64 64; --batch_size, --rounds and --images at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here")
    check_output_file(args.output)
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message="Downcasting array dtype")  # evaluate, of every map it stores
    with tempfile.TemporaryDirectory() as folder:
        options = Options(
            device=torch.device(args.device),
            folder=Path(folder),
            size=size,
            peers=args.peers,
            models=tuple(args.models or DEFAULT_MODELS.get(args.mode, [])),
            batch_size=args.batch_size,
            precisions=tuple(dict.fromkeys(args.precisions)),
            images=tuple(args.images),
            root=args.base_dataset_path,
        )
        report = benchmark(args.mode, options, args.rounds)
    if args.output:
        write_json(Path(args.output), report)


if __name__ == "__main__":
    exit_with(main)

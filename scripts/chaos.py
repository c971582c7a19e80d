"""Kills trainings at random points, runs each again to its end and compares it, bit for bit, with one left in peace.

python scripts/chaos.py --kills 30
python scripts/chaos.py --kills 30 --processes 2 -- --model segformer_small -a standard --mixed_precision bf16
"""

import json
import tempfile
from pathlib import Path

from cityseg_hf import UserError, make_synthetic
from cityseg_hf.chaos import Chaos, Kill, random_kills, survive, train_under
from cityseg_hf.cli import Parser, exit_with

SCRIPTS = Path(__file__).resolve().parent
TINY = ("--model", "unet_small", "--model_args", "norm=group", "hidden_sizes=[8,16]", "-a", "--ema_decay", "0.5")
SHORT = ("-e", "3", "-b", "4", "--save_every", "2", "--logging_steps", "2", "--num_workers", "1")


def parser() -> Parser:
    flags = Parser(description="Kill trainings at random points and see whether they end as if nothing had happened.")
    flags.add_argument("--kills", type=int, default=30, help="how many")
    flags.add_argument("--processes", type=int, default=1, help="how many train together")
    flags.add_argument("--seed", type=int, default=0, help="of the points at which they are killed")
    flags.add_argument("--output", metavar="DIR", help="keep the runs there (default: a temporary folder)")
    flags.add_argument("--victim", metavar="KILL", help="train with a kill in it (used by this script itself)")
    flags.add_argument("train", nargs="*", help="flags of scripts/train.py, after --; a tiny UNet without")
    return flags


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    if args.victim:
        train_under(Kill(*json.loads(args.victim)), SCRIPTS / "train.py", args.train)
        return 0
    for name in ("kills", "processes"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(args, name)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.output or temporary)
        streets = make_synthetic(Path(temporary) / "streets", train=12, val=5, test=3, size=(64, 128), seed=1)
        data = [] if "-d" in args.train else ["-d", str(streets)]
        train = [*data, *SHORT, *(args.train or TINY)]
        kills = list(random_kills(args.kills, args.processes, args.seed))
        wrong = survive(Chaos(SCRIPTS, folder, train, args.processes), kills, lambda line: print(line, flush=True))
    print(f"{len(kills) - wrong} of {len(kills)} killed runs ended as the quiet one, bit for bit")
    return int(wrong > 0)


if __name__ == "__main__":
    exit_with(main)

"""Judges model folders on a split, as the benchmark does, and says how sure the scores and their differences are.

python scripts/evaluate.py --model saved_models/RUN/best_miou -d cityscapes_data --split val --output results.json
python scripts/evaluate.py --model saved_models/RUN/best_miou --window 1024 --stride 768 --tta ms_flip
python scripts/evaluate.py --model saved_models/*/best_miou --output results.json results.csv
"""

import argparse
from pathlib import Path

from accelerate import PartialState
from transformers.utils import logging as transformers_logging

from cityseg_hf import UserError, load_cityscapes
from cityseg_hf.cli import Parser, check_output_file, exit_with
from cityseg_hf.data.cityscapes import DEFAULT_ROOT
from cityseg_hf.data.loading import SegmentationDataset
from cityseg_hf.data.prepared import Prepared, open_prepared
from cityseg_hf.data.sources import Source, file_sources
from cityseg_hf.data.transforms import EvalTransform
from cityseg_hf.evaluation import evaluation_loader, judge
from cityseg_hf.inference import load_model_folder, processor_size
from cityseg_hf.intervals import Bootstrap
from cityseg_hf.runs import replace_file, write_json
from cityseg_hf.score_tables import as_csv, as_json, short_names, table
from cityseg_hf.views import DTYPES, add_inference_flags, views_of


def parser() -> Parser:
    flags = Parser(description="Judge models on a split of Cityscapes.")
    flags.add_argument(
        "--model",
        required=True,
        nargs="+",
        help="model folders, or models of the Hub; of several, each is compared with the first",
    )
    flags.add_argument(
        "-d", "--base_dataset_path", help=f"root of leftImg8bit/ and gtFine/, or their zips (default: {DEFAULT_ROOT})"
    )
    flags.add_argument("--prepared", metavar="DIR", help="folder of scripts/prepare_data.py to read from instead")
    flags.add_argument("--split", default="val", choices=["train", "val", "test", "holdout"], help="what is judged")
    flags.add_argument("--holdout_cities", nargs="+", help="the train cities that make the split 'holdout'")
    flags.add_argument(
        "--output", nargs="+", default=[], help="files for the scores: CSV where it ends in .csv, else JSON"
    )
    flags.add_argument("--batch_size", "-b", type=int, default=4, help="images or windows at a time")
    flags.add_argument("--num_workers", type=int, default=2, help="processes that load data")
    add_inference_flags(flags)
    return flags


def open_prepared_for(args: argparse.Namespace) -> Prepared:
    """The prepared folder, if it holds what is asked for."""
    if args.split == "train":
        raise UserError("--prepared holds no train labels of their own size to judge by: use -d ROOT for --split train")
    prepared = open_prepared(args.prepared)
    prepared.check_source(args.base_dataset_path, DEFAULT_ROOT)
    if args.holdout_cities:
        prepared.check_holdout(args.holdout_cities)
    return prepared


def labelled_split(args: argparse.Namespace, prepared: Prepared | None) -> Source:
    """A split that can be judged."""
    root = args.base_dataset_path or DEFAULT_ROOT
    if prepared is not None:
        root, sources = args.prepared, prepared.sources
    else:
        sources = file_sources(load_cityscapes(root, holdout_cities=args.holdout_cities))
    if args.split == "holdout" and args.split not in sources:
        raise UserError("--split holdout needs --holdout_cities")
    if args.split not in sources:
        raise UserError(f"{root} has no images in leftImg8bit/{args.split}; it has {', '.join(sources)}")
    if not sources[args.split].has_labels():
        raise UserError(
            f"the {args.split} split of {root} has no labels to judge by: only the benchmark server has them"
        )
    return sources[args.split]


def write(paths: list[str], judged: dict[str, Bootstrap], split: str) -> None:
    """The scores so far, into every ``--output``."""
    for path in map(Path, paths):
        if path.suffix == ".csv":
            replace_file(path, as_csv(judged, split))
        else:
            write_json(path, as_json(judged, split))


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    if args.batch_size < 1 or args.num_workers < 0:
        raise UserError(f"--batch_size {args.batch_size} and --num_workers {args.num_workers}: at least 1 and 0")
    if len({Path(model) for model in args.model}) < len(args.model):
        raise UserError(f"--model names one model twice: {', '.join(args.model)}")
    views = views_of(args)
    for path in args.output:
        check_output_file(path)
    transformers_logging.disable_progress_bar()
    state = PartialState()
    prepared = None if args.prepared is None else open_prepared_for(args)
    source = labelled_split(args, prepared)
    # All are read before the first is judged: a mistake in the last one costs no hour.
    loaded = dict(zip(short_names(args.model), map(load_model_folder, args.model), strict=True))
    judged: dict[str, Bootstrap] = {}
    for name, (model, processor) in loaded.items():
        size = processor_size(processor)
        if prepared is not None:
            prepared.check_size(size)
        dataset = SegmentationDataset(source, EvalTransform(size), instances=True)
        # Images that keep their own sizes cannot be stacked.
        batch_size = 1 if size is None else args.batch_size
        loader = evaluation_loader(dataset, batch_size=batch_size, num_workers=args.num_workers)
        model.to(state.device, DTYPES[args.dtype])
        title = args.split if len(loaded) == 1 else f"{args.split} {name}"
        judgement = judge(model, loader, title=title, views=views)
        model.cpu()
        if state.is_main_process:
            judged[name] = Bootstrap(judgement)
            write(args.output, judged, args.split)
    if state.is_main_process:
        print("\n".join(table(judged)))


if __name__ == "__main__":
    exit_with(main)

"""Makes a page of runs to look at: leaderboard, curves, classes, confusion, images, cost and commands.

python scripts/report.py saved_models --output report.html
"""

from importlib.util import find_spec
from pathlib import Path

from transformers.utils import logging as transformers_logging

from cityseg_hf import UserError
from cityseg_hf.cli import Parser, check_output_file, exit_with
from cityseg_hf.report.comparison import compare
from cityseg_hf.report.pictures import pictures_of
from cityseg_hf.report.reading import MODEL_FOLDERS, read_runs
from cityseg_hf.report.tables import csv_text, markdown_text
from cityseg_hf.runs import replace_file


def parser() -> Parser:
    flags = Parser(description="Report on runs: one HTML page, and results.csv and results.md beside it.")
    flags.add_argument("runs", nargs="+", metavar="RUNS", help="run folders, or folders that hold them")
    flags.add_argument("--output", default="report.html", help="the page (default: report.html)")
    flags.add_argument("--weights", default="best_miou", choices=MODEL_FOLDERS, help="which model of a run is judged")
    flags.add_argument("--pictures_of", metavar="RUN", help="run that predicts the images (default: the best)")
    flags.add_argument("--images", type=int, default=4, help="how many worst and how many best images; 0: none")
    flags.add_argument("-d", "--base_dataset_path", help="where the images lie (default: where the run read them)")
    return flags


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    if args.images < 0:
        raise UserError(f"--images must not be negative, got {args.images}")
    if find_spec("plotly") is None:
        raise UserError("the report needs plotly: pip install -e '.[report]'")
    output = Path(args.output)
    if output.suffix != ".html":
        raise UserError(f"--output {output} must end in .html: results.csv and results.md are written beside it")
    check_output_file(args.output)
    from cityseg_hf.report.page import page_html  # imports plotly

    transformers_logging.disable_progress_bar()
    runs, notes = read_runs(args.runs)
    configurations = compare(runs, args.weights)
    pictures = pictures_of(runs, args.pictures_of, args.weights, args.base_dataset_path, args.images)
    replace_file(output, page_html(configurations, notes, args.weights, pictures))
    replace_file(output.with_name("results.csv"), csv_text([run for one in configurations for run in one.runs]))
    replace_file(output.with_name("results.md"), markdown_text(configurations, args.weights))
    for note in notes:
        print(f"{note.path}: {note.line}")
    if not pictures.worst:
        print(f"no images: {pictures.reason}")
    print(f"{output} (runs: {len(runs)}, configurations: {len(configurations)}); results.csv and results.md beside it")


if __name__ == "__main__":
    exit_with(main)

"""`python -m rq.report A.index.json B.index.json ..`: what indexes
are like, side by side: a table, and a picture with --output.

Works on any index, also one made elsewhere. With --data_path it adds how well the codes tell the embeddings apart; with
--ckpt_path also the quantizer's own reconstruction error; with --train_file how well they suit recommendation, and which
index to train; with --item_file and --tree the words and titles of the codes.
N items, L levels, K codes of a level, D dimensions.
"""

import argparse
import string
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rq import command_line
from rq.catalogue import check_ids, plain, read_items
from rq.command_line import log
from rq.files import InputError, one_line, whole_file, whole_path
from rq.index_file import Sid, check_codes, read_sids
from rq.measures import Report, describe, full_depth, refitted_errors
from rq.publishing import MEASURED_ITEMS
from rq.reading import tree
from rq.suitability import Bought, first_codes, next_item, read_rows, split_rows
from rq.verdict import verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from rq.embeddings import Embeddings

PICTURE_DPI = 130
LETTERS = string.ascii_lowercase


def add_errors(report: Report, index: dict[int, Sid], embeddings: "Embeddings", checkpoint: Path | None) -> None:
    """Reconstruction errors of a report, over up to MEASURED_ITEMS rows."""
    import numpy as np

    measured = embeddings.spread(MEASURED_ITEMS)
    x_RD = embeddings.rows(measured)
    depth = full_depth(index)
    codes_NL = np.array([codes[:depth] for codes in index.values()], np.int64)
    report.refitted = refitted_errors(x_RD, codes_NL[measured])
    if checkpoint is None:
        return
    from rq import checkpoints, quantizers

    quantizer = checkpoints.load_checkpoint(checkpoint, n_dims=embeddings.n_dims, data_path=embeddings.path)
    quantizers.is_of_these(quantizer, embeddings, checkpoint=checkpoint)
    check_codes(codes_NL, quantizer.design.levels, where=report.name)
    report.own_mse = quantizers.squared_error(quantizer, x_RD, codes_NL[measured])
    report.own = [error / float(x_RD.var(axis=0).mean() or 1) for error in report.own_mse]


def bought_in(flags: argparse.Namespace, indexes: list[dict[int, Sid]]) -> dict[int, tuple[list[Bought], list[Bought]]]:
    """{number of items: rows to count in, rows held out}: each file is read once for all indexes of one size."""
    found = {}
    for n_items in sorted({len(index) for index in indexes}):
        train = read_rows(flags.train_file, n_items=n_items)
        found[n_items] = (train, read_rows(flags.eval_file, n_items=n_items)) if flags.eval_file else split_rows(train)
    return found


def add_suitability(report: Report, index: dict[int, Sid], train: list[Bought], held_out: list[Bought]) -> None:
    """How what is bought next goes with the SIDs of a report's index."""
    check_ids([str(item) for item in index], where=report.name)
    report.next_item = next_item(index, train, min(full_depth(index), 3))
    report.first_codes = first_codes(index, train, held_out)


def write_trees(flags: argparse.Namespace, reports: list[Report], indexes: list[dict[int, Sid]], titles: list[str]) -> None:
    """--tree: one index after the other."""
    for report, index in zip(reports, indexes, strict=True):
        if list(index) != list(range(len(titles))):
            raise InputError(f"{report.name}: its items are not the {len(titles):,} of {flags.item_file}; give its own")
    with whole_file(flags.tree) as file:
        for report, index in zip(reports, indexes, strict=True):
            file.write(f"{report.name}: {report.n_items:,} items\n\n{tree(index, titles, most_codes=flags.tree_codes)}\n\n")
    log.info("wrote %s", flags.tree)


def table(reports: list[Report]) -> str:
    """All reports as one Markdown table, an index a column."""
    depth = max(len(report.levels) for report in reports)
    rows: list[tuple[str, list[str]]] = [
        ("items", [f"{r.n_items:,}" for r in reports]),
        ("distinct SIDs", [f"{r.n_distinct:,}" for r in reports]),
        ("collision rate", [f"{r.collision_rate:.2%}" for r in reports]),
        ("items sharing a SID", [f"{r.shared:,}" for r in reports]),
        ("sharing but for the extra token", [f"{r.shared_before:,}" for r in reports]),
        ("largest group", [f"{r.largest_group}" for r in reports]),
    ]
    for at in range(depth):
        shown = [r.levels[at] if at < len(r.levels) else None for r in reports]
        letter = LETTERS[at]
        rows += [
            (f"{letter}: codes used / size", [f"{v.used} / {v.size}" if v else "" for v in shown]),
            (f"{letter}: items", [f"{v.items:,}" if v else "" for v in shown]),
            (f"{letter}: dead codes", [f"{v.size - v.used}" if v else "" for v in shown]),
            (f"{letter}: perplexity", [f"{v.perplexity:.1f}" if v else "" for v in shown]),
            (f"{letter}: Gini", [f"{v.gini:.3f}" if v else "" for v in shown]),
        ]
    for label, attribute, form in (
        ("MSE after level {}", "own_mse", "{:.3e}"),
        ("variance left after level {}", "own", "{:.4f}"),
        ("variance left after level {}, refitted", "refitted", "{:.4f}"),
    ):
        for at in range(max(len(getattr(r, attribute)) for r in reports)):
            values = [getattr(r, attribute) for r in reports]
            rows.append((label.format(at + 1), [form.format(v[at]) if at < len(v) else "" for v in values]))
    for at in range(max(len(r.next_item) for r in reports)):
        shared = [r.next_item[at] if at < len(r.next_item) else None for r in reports]
        codes = LETTERS[: at + 1]
        rows += [
            (f"next item shares {codes} with the history", [f"{n.shared:.1%}" if n else "" for n in shared]),
            (f"next item shares {codes}: by chance", [f"{n.chance:.1%}" if n else "" for n in shared]),
            (f"next item shares {codes}: lift", [f"{n.lift:.1f}" if n else "" for n in shared]),
        ]
    if any(r.first_codes is not None for r in reports):
        rows.append(
            ("HR@10 by first codes alone", ["" if r.first_codes is None else f"{r.first_codes:.4f}" for r in reports])
        )
    head = ["", *[r.name for r in reports]]
    body = [head, *[[label, *cells] for label, cells in rows]]
    widths = [max(len(line[column]) for line in body) for column in range(len(head))]

    def line(cells: list[str]) -> str:
        padded = [cells[0].ljust(widths[0]), *[c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True)]]
        return "| " + " | ".join(padded) + " |"

    rule = "| " + " | ".join(["-" * widths[0], *["-" * (w - 1) + ":" for w in widths[1:]]]) + " |"
    return "\n".join([line(head), rule, *map(line, body[1:])])


def draw(reports: list[Report], path: Path) -> None:
    """One PNG: code use per level on top; collisions, perplexity and reconstruction error below; a colour an index."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a $ in the name of a file is a $
    import numpy as np
    from matplotlib import pyplot as plt
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    depth = max(len(report.levels) for report in reports)
    colours = plt.get_cmap("tab10").colors
    figure: Figure = plt.figure(figsize=(4.4 * max(3.5, depth), 8.6), layout="constrained")
    figure.suptitle(f"{reports[0].name}: {reports[0].n_items:,} items" if len(reports) == 1 else "semantic IDs side by side")
    top, bottom = figure.subfigures(2, 1)
    for at, axes in enumerate(top.subplots(1, depth, squeeze=False)[0]):
        for number, report in enumerate(reports):
            if at < len(report.levels):
                uses_K = report.levels[at].uses_K
                axes.step(np.arange(1, len(uses_K) + 1), uses_K, where="mid", color=colours[number % 10], label=report.name)
        axes.set(title=f"level {LETTERS[at]}", xlabel="code, most used first", yscale="log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))  # its own is markup, which is off
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.25)
    top.axes[0].set_ylabel("items per code")
    handles = [Line2D([], [], color=colours[i % 10], lw=3, label=report.name) for i, report in enumerate(reports)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(reports), 6), frameon=False)
    bought = any(report.next_item for report in reports)
    groups, evenness, errors, *lifts = bottom.subplots(1, 4 if bought else 3)
    _draw_groups(groups, reports, colours)
    _draw_perplexity(evenness, reports, colours)
    _draw_errors(errors, reports, colours)
    for axes in lifts:
        _draw_next_item(axes, reports, colours)
    with whole_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=PICTURE_DPI)
    plt.close(figure)


def _draw_groups(axes: "Axes", reports: list[Report], colours: Sequence) -> None:
    """Items sharing a SID, in % with the numbers written out; pale: what would share but for the extra token."""
    at = range(len(reports))
    before = [100 * report.shared_before / report.n_items for report in reports]
    colour = [colours[i % 10] for i in at]
    axes.barh(at, before, color=colour, alpha=0.25, height=0.8)
    axes.barh(at, [100 * report.shared / report.n_items for report in reports], color=colour, height=0.8)
    for position, report in enumerate(reports):
        text = f" {report.shared:,} items, largest group {report.largest_group}" if report.shared else " none"
        if report.shared_before > report.shared:
            text += f" ({report.shared_before:,} without extra token)"
        axes.annotate(text, (0, position), va="center", fontsize=8)
    axes.set_yticks(list(at), [report.name for report in reports])
    axes.set_ylim(max(len(reports), 3) - 0.4, -0.6)  # first index on top, and a single bar no poster
    axes.set(title="items sharing their SID", xlabel="% of items", xlim=(0, max(1.0, 1.15 * max(before))))


def _draw_perplexity(axes: "Axes", reports: list[Report], colours: Sequence) -> None:
    """Perplexity over codebook size, grouped by level, with dead codes named above."""
    depth = max(len(report.levels) for report in reports)
    width = 0.8 / len(reports)
    for number, report in enumerate(reports):
        at = [level + (number - (len(reports) - 1) / 2) * width for level in range(len(report.levels))]
        axes.bar(at, [100 * v.perplexity / v.size for v in report.levels], width * 0.92, color=colours[number % 10])
        for position, level in zip(at, report.levels, strict=True):
            dead = level.size - level.used
            if dead:
                axes.annotate(
                    f"{dead} dead",
                    (position, 100 * level.perplexity / level.size),
                    ha="center",
                    va="bottom",
                    fontsize=7,
                    rotation=90,
                )
    axes.set_xticks(range(depth), [f"level {letter}" for letter in LETTERS[:depth]])
    axes.set(title="evenness of code use", ylabel="perplexity, % of codebook size", ylim=(0, 118), yticks=range(0, 101, 20))


def _draw_errors(axes: "Axes", reports: list[Report], colours: Sequence) -> None:
    """Share of the variance left after each level: the quantizer's
    own, dashed where codewords were refitted to the codes.
    """
    drawn = False
    for number, report in enumerate(reports):
        errors = report.own or report.refitted
        if errors:
            drawn = True
            style = "o-" if report.own else "o--"
            axes.plot(range(1, len(errors) + 1), [100 * e for e in errors], style, color=colours[number % 10])
    axes.set(title="reconstruction error", xlabel="levels used", ylabel="% of variance left")
    if drawn:
        axes.set_xticks(range(1, max(len(r.own or r.refitted) for r in reports) + 1))
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        if any(report.refitted and not report.own for report in reports):
            axes.annotate(
                "dashed: best codewords for the codes",
                (0.98, 0.97),
                xycoords="axes fraction",
                ha="right",
                va="top",
                fontsize=8,
            )
    else:
        axes.set_axis_off()
        axes.annotate("give --data_path to see it", (0.5, 0.5), xycoords="axes fraction", ha="center", color="grey")


def _draw_next_item(axes: "Axes", reports: list[Report], colours: Sequence) -> None:
    """How often the next item shares 1, 2, .. codes with the history; a black mark where chance would be."""
    depth = max(len(report.next_item) for report in reports)
    width = 0.8 / len(reports)
    for number, report in enumerate(reports):
        at = [level + (number - (len(reports) - 1) / 2) * width for level in range(len(report.next_item))]
        axes.bar(at, [100 * n.shared for n in report.next_item], width * 0.92, color=colours[number % 10])
        axes.hlines(
            [100 * n.chance for n in report.next_item], [x - width / 2 for x in at], [x + width / 2 for x in at], "black"
        )
    axes.set_xticks(range(depth), [LETTERS[: level + 1] for level in range(depth)])
    axes.set(title="codes the next item shares", ylabel="% of rows (black: by chance)", xlabel="codes shared")


def short_names(paths: list[Path]) -> list[str]:
    """File names without `.index.json`; with their folder where two would read alike."""
    names = [one_line(path.name.removesuffix(".json").removesuffix(".index")) for path in paths]
    return [
        name if names.count(name) == 1 else one_line(f"{path.parent.name}/{name}")
        for name, path in zip(names, paths, strict=True)
    ]


@command_line.command("report")
def main(argv: list[str] | None = None) -> None:
    """Indexes -> a table on standard output and in --table, a picture in --output."""
    parser = command_line.parser("report", __doc__, shared=("item_file", "data_path", "output", "overwrite"))
    parser.add_argument("index", nargs="+", type=command_line.existing, metavar="X.index.json")
    parser.add_argument(
        "--levels",
        type=command_line.level_sizes,
        metavar="K1,K2,..",
        help="codebook sizes (from the checkpoint, or the largest code)",
    )
    parser.add_argument(
        "--ckpt_path",
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="the quantizer of each index, in the same order; - for none",
    )
    parser.add_argument("--table", type=Path, metavar="FILE.md", help="also write the table to a file")
    parser.add_argument(
        "--train_file",
        type=command_line.existing_files,
        metavar="X.train.csv",
        help="who bought what next, to tell what to train",
    )
    parser.add_argument(
        "--eval_file",
        type=command_line.existing_files,
        metavar="X.valid.csv",
        help="rows held out (the last tenth of --train_file)",
    )
    parser.add_argument(
        "--tree", type=Path, metavar="FILE.txt", help="write the codes with their words and titles to a file"
    )
    parser.add_argument(
        "--tree_codes",
        type=command_line.at_least(1),
        default=20,
        help="how many first codes --tree shows, largest first (20)",
    )
    flags = parser.parse_args(argv)
    checkpoints = read_checkpoint_flags(flags)
    command_line.refuse_to_overwrite(flags, outputs=("output", "table", "tree"))
    if flags.tree and not flags.item_file:
        raise InputError("--tree: give --item_file too, titles come from there")
    if flags.eval_file and not flags.train_file:
        raise InputError("--eval_file: give --train_file too, what is bought next is learned there")

    from rq.embeddings import open_embeddings

    indexes = [read_sids(path) for path in flags.index]
    bought = bought_in(flags, indexes) if flags.train_file else {}
    reports = []
    for name, index, checkpoint in zip(short_names(flags.index), indexes, checkpoints, strict=True):
        sizes = flags.levels
        if checkpoint and not sizes:
            from rq.checkpoints import load_checkpoint

            sizes = load_checkpoint(checkpoint).design.levels
        report = describe(name, index, sizes=sizes)
        if flags.data_path:
            embeddings = open_embeddings(flags.data_path, n_items=len(index), items_from=Path(name))
            add_errors(report, index, embeddings, checkpoint)
        if flags.train_file:
            add_suitability(report, index, *bought[len(index)])
        reports.append(report)
    text = table(reports)
    if flags.train_file:
        text += "\n\n" + "\n".join(verdict(reports))
    command_line.show(text)
    if flags.table:
        with whole_file(flags.table) as file:
            file.write(text + "\n")
    if flags.tree:
        titles = [plain(item.get("title")) for item in read_items(flags.item_file)]
        write_trees(flags, reports, indexes, titles)
    if flags.output:
        draw(reports, flags.output)
        log.info("wrote %s", flags.output)


def read_checkpoint_flags(flags: argparse.Namespace) -> list[Path | None]:
    """--ckpt_path as one path or None for each index."""
    if flags.ckpt_path and len(flags.ckpt_path) != len(flags.index):
        raise InputError(
            f"--ckpt_path has {len(flags.ckpt_path)} entries for {len(flags.index)} indexes; give one each, - for none"
        )
    if flags.ckpt_path and flags.data_path is None:
        raise InputError("--ckpt_path: give --data_path too, reconstruction error needs the embeddings")
    checkpoints = [None if path == "-" else Path(path) for path in flags.ckpt_path] or [None] * len(flags.index)
    for path in checkpoints:
        if path is not None and not path.exists():
            raise InputError(f"--ckpt_path {path}: no such file")
    return checkpoints


if __name__ == "__main__":
    main()

"""What an evaluation leaves: metrics.json, predictions.jsonl, a picture, and recommendations in words."""

from __future__ import annotations

import html
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sid_sft.catalogue import Catalogue
from sid_sft.command_line import tell
from sid_sft.faults import disk_fault
from sid_sft.files import FaultHere, whole_file
from sid_sft.interactions import Row
from sid_sft.recommend.evaluator import Evaluator, Recommended, measurable, sampled
from sid_sft.recommend.ranking import (
    Lists,
    SidTable,
    baselines,
    bootstrap,
    breadth,
    by_shared_levels,
    item_popularity,
    level_recall,
    means,
    shared_levels,
    views,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from sid_sft.settings import EvaluateFlags

logger = logging.getLogger("sft.results")

RESULT_FILES = ("metrics.json", "predictions.jsonl", "recommendations.png")
SHOWN = 10  # recommendations per row in predictions.jsonl and in words
FREE_ROWS = 200  # rows on which unconstrained generation is tried: enough to tell a share to a few per cent
TITLE_WIDTH = 96  # characters of a title in words


def short(title: str, width: int = TITLE_WIDTH) -> str:
    """A title as a person reads it: shop data holds HTML entities, and more words than a line takes."""
    title = html.unescape(title)
    return title if len(title) <= width else title[: width - 1].rstrip() + "…"


def in_words(
    row: Row,
    sids: np.ndarray,
    scores: np.ndarray,
    catalogue: Catalogue,
    table: SidTable,
    *,
    truth: bool,
) -> list[str]:
    """The lines that tell a person what was bought and what is recommended; what was bought next is marked."""

    def name(place: int) -> str:
        item = catalogue.items[place]
        return short(item.title or f"item {item.id}")

    lines = ["  bought"] + [f"        {name(place)}" for place in row.history]
    if truth:
        lines += ["  then bought", f"        {name(row.item)}"]
    lines.append("  recommended")
    for number, (sid, score) in enumerate(zip(sids[:SHOWN], scores[:SHOWN], strict=True), start=1):
        if sid < 0:
            break
        mark = "->" if truth and sid == table.of_item[row.item] else "  "
        first, *others = table.items[sid]
        more = f" (and {len(others)} more with this SID)" if others else ""
        lines.append(f"     {mark} {number:2}. {name(first)}{more} [{''.join(table.sids[sid])}, p {np.exp(score):.2g}]")
    return lines


class Free(NamedTuple):
    """Unconstrained generation on some rows: the share of beams that are no SID of the catalogue, and the hits."""

    rows: int
    invalid: float
    invalid_at_10: float
    hit_at_10: float


def free_rows(evaluator: Evaluator, model: PreTrainedModel, seed: int) -> Free:
    """What the same model does without the constraint, on a sample of the rows."""
    count = min(FREE_ROWS, len(evaluator.prompts))
    rows = np.sort(np.random.default_rng(seed).choice(len(evaluator.prompts), count, replace=False))
    trie = evaluator.trie_on(model.device)
    found = [trie.numbers_of(beams, evaluator.end_id) for beams in evaluator.recommend_freely(model, rows)]
    wrong = [[number < 0 for number in beams] for beams in found]
    hits = [evaluator.targets[i] in beams[:10] for i, beams in zip(rows, found, strict=True)]
    first_ten = [share for beams in wrong for share in beams[:10]]
    return Free(count, float(np.mean(wrong)), float(np.mean(first_ten)), float(np.mean(hits)))


def write_results(
    flags: EvaluateFlags,
    task: str,
    rows: list[Row],
    train: list[Row],
    catalogue: Catalogue,
    table: SidTable,
    recommended: Recommended,
    free: Free,
    seconds: float,
) -> None:
    """metrics.json, predictions.jsonl and recommendations.png; the table and the examples in the log.

    Where the files cannot be written, the metrics go to standard output, before the InputError.
    """
    folder = Path(flags.output_dir)
    metrics = measure(recommended.lists(), rows, train, table, measurable(flags.num_beams), flags.seed)
    metrics["invalid"] = {
        "constrained": 0.0,
        "unconstrained": free.invalid,
        "unconstrained@10": free.invalid_at_10,
        "unconstrained_hr@10": free.hit_at_10,
        "unconstrained_rows": free.rows,
    }
    metrics["run"] = {
        "base_model": flags.base_model,
        "test_file": flags.test_file,
        "task": task,
        "rows": len(rows),
        "users": len({row.user for row in rows}),
        "num_beams": flags.num_beams,
        "seconds": round(seconds, 2),
    }
    for line in result_lines(metrics, with_train=bool(train)):
        logger.info(line)
    shown = sampled(list(range(len(rows))), flags.examples, flags.seed) if flags.examples else []
    for number, i in enumerate(shown, start=1):
        words = in_words(rows[i], recommended.sid[i], recommended.score[i], catalogue, table, truth=True)
        tell([f"Example {number} of {len(shown)}: user {rows[i].user}", *words])
    metrics_file, predictions_file, picture = (folder / name for name in RESULT_FILES)
    content = json.dumps(metrics, indent=1) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(metrics_file) as scratch:
            scratch.write_text(content)
        with whole_file(predictions_file) as scratch:
            write_predictions(scratch, rows, recommended, catalogue, table)
        with whole_file(picture) as scratch:
            draw(scratch, metrics)
    except OSError as error:
        tell(content.rstrip().split("\n"))
        raise FaultHere(
            f"--output_dir {folder}: the results cannot be written ({disk_fault(error) or error}); the metrics stand on "
            "standard output; make room, or choose another folder"
        ) from None
    logger.info(f"Wrote metrics.json and predictions.jsonl to {folder}; the picture is {picture}")


def measure(
    lists: Lists, rows: list[Row], train: list[Row], table: SidTable, ks: tuple[int, ...], seed: int
) -> dict[str, Any]:
    """All metrics of a list per row, and those of the baselines where training rows are given."""
    popularity = item_popularity(train)
    k = main_k(ks)
    found = views(lists, rows, table, ks)
    users = [row.user for row in rows]
    targets = [table.of_item[row.item] for row in rows]
    metrics: dict[str, Any] = {name: means(values) for name, values in found.items()}
    metrics["interval_95"] = {name: bootstrap(found[name], users, seed) for name in ("sid", "item")}
    shared = shared_levels(rows, table)
    metrics["by_shared_levels"] = by_shared_levels(found["sid"], shared)
    metrics["levels"] = level_recall(lists, targets, table, ks)
    metrics["breadth"] = breadth(lists, rows, table, popularity, k)
    metrics["baselines"] = {}
    for name, their_lists in baselines(train, rows, table, max(ks)).items() if train else ():
        their_views = views(their_lists, rows, table, ks)
        theirs = {view: means(values) for view, values in their_views.items()}
        metrics["baselines"][name] = {
            **theirs.pop("sid"),
            **theirs,
            "by_shared_levels": by_shared_levels(their_views["sid"], shared),
            "levels": level_recall(their_lists, targets, table, ks),
            "breadth": breadth(their_lists, rows, table, popularity, k),
        }
    return metrics


def write_predictions(path: Path, rows: list[Row], recommended: Recommended, catalogue: Catalogue, table: SidTable) -> None:
    """One JSON object per row: history, target, its rank (from 1, null if missed), recommendations."""

    def named(place: int) -> dict[str, str]:
        return {"id": catalogue.items[place].id, "title": catalogue.items[place].title}

    with path.open("w", encoding="utf-8") as file:
        for row, ranked, scores in zip(rows, recommended.lists(), recommended.score.tolist(), strict=True):
            target = table.of_item[row.item]
            line = {
                "user": row.user,
                "history": [named(place) for place in row.history],
                "target": {"sid": "".join(table.sids[target]), **named(row.item)},
                "rank": ranked.index(target) + 1 if target in ranked else None,
                "recommendations": [
                    {
                        "sid": "".join(table.sids[number]),
                        "log_p": round(score, 5),
                        "items": [named(place) for place in table.items[number]],
                    }
                    for number, score in zip(ranked[:SHOWN], scores, strict=False)
                ],
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def result_lines(metrics: dict[str, Any], *, with_train: bool) -> list[str]:
    """The table that a run ends with, and what else a reader should know, in words."""
    k = main_k(ks_of(metrics))
    main = f"hr@{k}"
    wanted = dict.fromkeys(("hr@1", "hr@5", main, "hr@50", f"ndcg@{k}", f"mrr@{k}"))
    names = [name for name in wanted if name in metrics["sid"]]
    lines = [f"{'SID level':<12}" + "".join(f"{name.upper():>9}" for name in names) + f"{'item ' + main.upper():>15}"]
    recommenders = {"this model": {**metrics["sid"], "item": metrics["item"]}, **metrics["baselines"]}
    for name, found in recommenders.items():
        lines.append(f"{name:<12}" + "".join(f"{found[n]:9.4f}" for n in names) + f"{found['item'][main]:15.4f}")
    low, high = metrics["interval_95"]["sid"][main]
    fresh, invalid = metrics["sid_without_history"], metrics["invalid"]
    recall = {name.partition("@")[0]: value for name, value in metrics["levels"].items() if name.endswith(f"@{k}")}
    lines += [
        f"{main.upper()} of this model: 95 % interval {low:.4f} to {high:.4f} (users drawn with replacement)",
        f"New items only ({fresh['rows']:,} rows, history taken out of the list): {main.upper()} {fresh[main]:.4f}",
        f"{main.upper()} by how many levels of the truth's SID are in the history: "
        + ", ".join(
            f"{name} {group[main]:.4f} ({group['rows']:,} rows)" for name, group in metrics["by_shared_levels"].items()
        ),
        f"Share of all rows where one of the first {k} agrees with the truth down to "
        + ", ".join(f"level {name.removeprefix('level')}: {value:.3f}" for name, value in recall.items()),
        f"Of all SIDs {100 * metrics['breadth'][f'coverage@{k}']:.1f} % stand among the first {k} of some row"
        + (f"; these are {x:.1f} times as popular as what was bought" if (x := popularity_of(metrics, k)) else ""),
        f"Invalid recommendations: 0; without constraint {100 * invalid['unconstrained@10']:.1f} % of the first 10, "
        f"{100 * invalid['unconstrained']:.1f} % of all beams ({invalid['unconstrained_rows']} rows)",
    ]
    if not with_train:
        lines.append("No --train_file: no baselines, and items that share a SID stand in catalogue order at item level")
    return lines


def ks_of(metrics: dict[str, Any]) -> list[int]:
    """The K that were measured."""
    return [int(name.partition("@")[2]) for name in metrics["sid"] if name.startswith("hr@")]


def main_k(ks: Sequence[int]) -> int:
    """The K in the words that a run ends with: 10 where there are so many beams, the largest below otherwise."""
    return max(k for k in ks if k <= 10)


def popularity_of(metrics: dict[str, Any], k: int) -> float:
    """How popular the first k are against what was bought; 0 where no training rows tell."""
    return metrics["breadth"].get(f"popularity@{k}", 0.0)


def draw(path: Path, metrics: dict[str, Any]) -> None:
    """HR@K and NDCG@K of the model beside the baselines, and in how many rows a SID was right down to each level."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ks = ks_of(metrics)
    styles = {
        "this model": {"color": "#1f5fbf", "marker": "o", "linewidth": 2.4, "zorder": 3},
        "markov": {"color": "#d1762b", "marker": "s", "linewidth": 1.4},
        "last": {"color": "#6a9a3d", "marker": "^", "linewidth": 1.4},
        "popularity": {"color": "#8a8a8a", "marker": "D", "linewidth": 1.4},
    }
    labels = {"markov": "Markov chain", "last": "last items"}
    found = {"this model": metrics["sid"], **metrics["baselines"]}
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    for axis, metric in zip(axes[:2], ("hr", "ndcg"), strict=True):
        for name, style in styles.items():
            if name in found:
                values = [found[name][f"{metric}@{k}"] for k in ks]
                axis.plot(ks, values, label=labels.get(name, name), markersize=5, **style)
        ends = np.array([metrics["interval_95"]["sid"][f"{metric}@{k}"] for k in ks])
        axis.fill_between(ks, *ends.T, color=styles["this model"]["color"], alpha=0.15, linewidth=0)
        if len(ks) > 1:
            axis.set_xscale("log")
        axis.set_xticks(ks, [str(k) for k in ks])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.set_xlabel("K")
        axis.set_title(f"{metric.upper()}@K, SID level")
    axes[0].legend(frameon=False, loc="upper left")
    axis, shown = axes[2], [k for k in (1, 10, 50) if k in ks]
    depth = max(int(name.removeprefix("level").partition("@")[0]) for name in metrics["levels"])
    width = 0.8 / len(shown)
    for number, k in enumerate(shown):
        heights = [metrics["levels"][f"level{level}@{k}"] for level in range(1, depth + 1)]
        places = np.arange(depth) + (number - (len(shown) - 1) / 2) * width
        bars = axis.bar(places, heights, width * 0.92, color="#1f5fbf", alpha=0.35 + 0.3 * number, label=f"first {k}")
        axis.bar_label(bars, [f"{height:.2f}" for height in heights], fontsize=8, padding=1)
    axis.set_xticks(range(depth), [f"level {level}" for level in range(1, depth + 1)])
    axis.set_ylim(0, 1.3 * max(metrics["levels"].values()) + 0.01)
    axis.set_title("Right down to level, all rows, this model")
    axis.legend(frameon=False, loc="upper right")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#dddddd", linewidth=0.7)
        axis.set_axisbelow(True)
    figure.suptitle(
        f"{metrics['run']['rows']:,} rows, {metrics['run']['num_beams']} beams; the band is a 95 % interval",
        fontsize=10,
    )
    figure.savefig(path, dpi=130, format="png")
    pyplot.close(figure)

"""What a report comes to, in sentences: which index to train, why, and what to do about the others."""

from collections.abc import Sequence

from rq.measures import Report

TOO_CLOSE = 0.01  # of HR@10: one and a half standard errors on 2,000 rows where it is 0.1
NO_LIFT = 1.5
MANY_SHARE = 0.05


def verdict(reports: Sequence[Report]) -> list[str]:
    """One line on which index to train, then one a fault of each index."""
    suited = [r for r in reports if r.next_item[0].lift >= NO_LIFT] or list(reports)
    order = sorted(suited, key=lambda r: -(r.first_codes or 0))
    best = order[0]
    lines = [
        f"Train {best.name}: knowing items by their first codes alone, the next item is among ten for "
        f"{best.first_codes:.1%} of the rows held out, and it shares a first code with the history "
        f"{best.next_item[0].lift:.1f} times as often as by chance."
    ]
    if close := [r.name for r in order[1:] if (best.first_codes or 0) - (r.first_codes or 0) < TOO_CLOSE]:
        lines[0] += f" Too close to tell from it: {', '.join(close)}."
    if worse := [f"{r.name} ({r.first_codes:.1%})" for r in order[1:] if r.name not in close]:
        lines[0] += f" Behind it: {', '.join(worse)}."
    for report in reports:
        lines += _faults(report)
    return lines


def _faults(report: Report) -> list[str]:
    found = []
    lift = report.next_item[0].lift
    if lift < NO_LIFT:
        found.append(
            f"{report.name}: the next item shares a first code with the history {lift:.1f} times as often as by chance; "
            "its codes say next to nothing of what is bought together, as if shuffled: make another from better embeddings."
        )
    if (share := report.shared / report.n_items) > MANY_SHARE:
        found.append(
            f"{report.name}: {share:.0%} of the items share their SID, up to {report.largest_group} of them one; a model "
            "cannot tell these apart, and at SID level evaluate.py counts a hit on one as a hit on all: look at its item "
            "level, and give each item its own SID by rq.generate_indices --collisions token."
        )
    return found

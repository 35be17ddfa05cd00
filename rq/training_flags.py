"""The flags of the commands that train a network; apart from rq.training so that --help needs no torch."""

import argparse

from rq.command_line import at_least, existing, numbers, whole_numbers


def add(parser: argparse.ArgumentParser, *, hidden: tuple[int, ...], learning_rate: float, epochs: int) -> None:
    """Flags of rq.rqvae and rq.rqkmeans_plus, with the defaults that differ between the two."""
    add = parser.add_argument
    add("--epochs", type=at_least(1), default=epochs, help=f"passes over the items at most ({epochs})")
    add("--batch_size", type=at_least(1), default=256, help="items a step, all processes together (256)")
    add(
        "--learning_rate",
        type=at_least(0, kind=float),
        default=learning_rate,
        help=f"peak, AdamW, cosine ({learning_rate})",
    )
    add(
        "--hidden",
        type=whole_numbers,
        default=hidden,
        metavar="W1,W2,..",
        help=f"widths of the encoder's hidden layers ({','.join(map(str, hidden))})",
    )
    add(
        "--commitment",
        type=at_least(0, kind=float),
        default=0.25,
        help="weight of the encoder's pull to its codewords (0.25)",
    )
    add(
        "--codebook_weight",
        type=at_least(0, kind=float),
        default=1.0,
        help="weight of codebook and commitment loss against the error (1)",
    )
    add(
        "--sinkhorn_epsilons",
        type=numbers,
        metavar="E1,E2,..",
        help="one a level: blur of Sinkhorn-balanced training, 0 for nearest (0 but on the last level: 0.003)",
    )
    add("--eval_every", type=at_least(1), default=10, help="epochs between measurements and revivals of dead codes (10)")
    add("--patience", type=at_least(0), default=20, help="stop after this many measurements without gain; 0: never (20)")
    add(
        "--revive_until",
        type=at_least(0, kind=float),
        default=0.7,
        help="share of the epochs in which dead codes are revived (0.7)",
    )
    add(
        "--keep_best",
        choices=("error", "collisions"),
        default="error",
        help="the quantizer kept: least error or fewest collisions (error)",
    )
    add(
        "--resume_from_checkpoint",
        type=existing,
        metavar="FOLDER",
        help="start from these weights; the optimizer starts anew",
    )


def sinkhorn_epsilons(flags: argparse.Namespace) -> tuple[float, ...]:
    """One per level; nearest everywhere but on the last level unless given, as in LC-Rec
    (https://arxiv.org/abs/2311.09049).
    """
    if flags.sinkhorn_epsilons is None:
        return (0.0,) * (len(flags.levels) - 1) + (0.003,)
    return flags.sinkhorn_epsilons

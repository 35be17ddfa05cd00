"""`python -m rq.rqkmeans_constrained`: residual k-means with
clusters of about equal size, so every code is used about equally.

Small catalogues: the exact flow problem of k-means-constrained. Large ones: Sinkhorn
in the log domain. Either way the balance is kept as one price per centroid, in the
checkpoint, so new items are assigned by the rule the old ones were.
S sampled rows, L levels, D dimensions.
"""

import argparse
from typing import TYPE_CHECKING

from rq import command_line, publishing

if TYPE_CHECKING:
    import numpy as np

    from rq.quantizers import Quantizer


def add_balance_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of balanced clusters, for this command and rq.rqkmeans_plus."""
    parser.add_argument(
        "--slack",
        type=command_line.at_least(0, kind=float, most=1),
        default=0.2,
        help="cluster sizes within N/K (1 -+ slack) (0.2)",
    )
    parser.add_argument(
        "--sinkhorn_epsilon",
        type=command_line.at_least(1e-4, kind=float, most=1e4),
        default=0.02,
        help="blur of the balance, a share of the mean distance (0.02)",
    )


def fit(
    sample_SD: "np.ndarray", levels: tuple[int, ...], *, slack: float, epsilon: float, seed: int, device: str = "cpu"
) -> "Quantizer":
    """The quantizer whose level l is balanced k-means of what the levels before it left over of `sample_SD`."""
    from tqdm import tqdm

    from rq import clustering, quantizers

    residual_SD, codebooks, prices = sample_SD.copy(), [], []
    for level, size in enumerate(tqdm(levels, desc="balanced k-means", unit=" levels", disable=None)):
        centroids_KD, prices_K = clustering.balanced_kmeans(
            residual_SD, size, slack=slack, seed=seed + level, epsilon=epsilon, device=device
        )
        codebooks.append(centroids_KD)
        prices.append(prices_K)
        residual_SD -= centroids_KD[clustering.nearest(residual_SD, centroids_KD, prices_K)]
    design = quantizers.Design("rqkmeans_constrained", sample_SD.shape[1], tuple(levels), seed=seed)
    return quantizers.quantizer_from_codebooks(design, codebooks, prices)


@command_line.command("rqkmeans_constrained")
def main(argv: list[str] | None = None) -> None:
    """Embeddings -> balanced codebooks -> index."""
    parser = command_line.parser(
        "rqkmeans_constrained",
        __doc__,
        shared=command_line.FITTING_FLAGS,
        required=("data_path",),
    )
    add_balance_flags(parser)
    flags = parser.parse_args(argv)
    command_line.single_process("rqkmeans_constrained")
    command_line.refuse_to_overwrite(flags)

    from rq import clustering, quantizers

    device = quantizers.choose_device(flags.device)
    embeddings = publishing.open_data(flags)
    sample_SD = clustering.training_sample(embeddings, flags.levels, size=flags.fit_sample, seed=flags.seed)
    quantizer = fit(
        sample_SD, flags.levels, slack=flags.slack, epsilon=flags.sinkhorn_epsilon, seed=flags.seed, device=device
    )
    del sample_SD
    publishing.finish(quantizer.to(device), embeddings, flags)


if __name__ == "__main__":
    main()

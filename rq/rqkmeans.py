"""`python -m rq.rqkmeans`: residual quantization by k-means
(faiss), level after level; the index in one pass over the data.

The codebooks come from a sample of 256 rows per centroid of
the largest level, as in faiss; every item is then assigned.
N items, S sampled rows, L levels, D dimensions.
"""

from typing import TYPE_CHECKING

from rq import command_line, publishing

if TYPE_CHECKING:
    import numpy as np

    from rq.quantizers import Quantizer


def fit(
    sample_SD: "np.ndarray", levels: tuple[int, ...], *, seed: int, rounds: int = 25, device: str = "cpu"
) -> "Quantizer":
    """The quantizer whose level l is k-means of what the levels before it left over of `sample_SD`."""
    from tqdm import tqdm

    from rq import clustering, quantizers

    residual_SD, codebooks = sample_SD.copy(), []
    for level, size in enumerate(tqdm(levels, desc="k-means", unit=" levels", disable=None)):
        centroids_KD = clustering.kmeans(residual_SD, size, seed=seed + level, rounds=rounds, device=device)
        codebooks.append(centroids_KD)
        residual_SD -= centroids_KD[clustering.nearest(residual_SD, centroids_KD)]
    design = quantizers.Design("rqkmeans", sample_SD.shape[1], tuple(levels), seed=seed)
    return quantizers.quantizer_from_codebooks(design, codebooks)


@command_line.command("rqkmeans")
def main(argv: list[str] | None = None) -> None:
    """Embeddings -> codebooks -> index."""
    parser = command_line.parser("rqkmeans", __doc__, shared=command_line.FITTING_FLAGS, required=("data_path",))
    parser.add_argument("--rounds", type=command_line.at_least(1), default=25, help="k-means iterations a level (25)")
    flags = parser.parse_args(argv)
    command_line.single_process("rqkmeans")
    command_line.refuse_to_overwrite(flags)

    from rq import clustering, quantizers

    device = quantizers.choose_device(flags.device)
    embeddings = publishing.open_data(flags)
    sample_SD = clustering.training_sample(embeddings, flags.levels, size=flags.fit_sample, seed=flags.seed)
    quantizer = fit(sample_SD, flags.levels, seed=flags.seed, rounds=flags.rounds, device=device)
    del sample_SD
    publishing.finish(quantizer.to(device), embeddings, flags)


if __name__ == "__main__":
    main()

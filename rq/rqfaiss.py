"""`python -m rq.rqfaiss`: the ResidualQuantizer of faiss with beam search, the yardstick for the other methods.

S sampled rows, K centroids of a level, D dimensions.
"""

from typing import TYPE_CHECKING

from rq import command_line, publishing
from rq.files import InputError

if TYPE_CHECKING:
    import numpy as np

    from rq.quantizers import Quantizer


def fit(sample_SD: "np.ndarray", levels: tuple[int, ...], *, beam: int, seed: int) -> "Quantizer":
    """The codebooks faiss trains on `sample_SD`, in a quantizer that assigns with the same beam."""
    import faiss
    import numpy as np

    from rq import clustering, quantizers

    for size in levels:
        if size & (size - 1):
            raise InputError(
                f"--levels {','.join(map(str, levels))}: faiss takes powers of two only, {size} is none; use rq.rqkmeans"
            )
    n_bits = faiss.UInt64Vector()
    for size in levels:
        n_bits.push_back(size.bit_length() - 1)
    trained = faiss.ResidualQuantizer(sample_SD.shape[1], n_bits)
    trained.max_beam_size = beam
    trained.cp.seed = seed
    trained.cp.min_points_per_centroid = 1
    trained.train(clustering.no_fewer_rows_than_dimensions(sample_SD))
    flat_TD = faiss.vector_to_array(trained.codebooks).reshape(-1, sample_SD.shape[1])
    codebooks = [book_KD.copy() for book_KD in np.split(flat_TD, np.cumsum(levels)[:-1])]
    design = quantizers.Design("rqfaiss", sample_SD.shape[1], tuple(levels), beam=beam, seed=seed)
    return quantizers.quantizer_from_codebooks(design, codebooks)


@command_line.command("rqfaiss")
def main(argv: list[str] | None = None) -> None:
    """Embeddings -> faiss's residual codebooks -> index."""
    parser = command_line.parser("rqfaiss", __doc__, shared=command_line.FITTING_FLAGS, required=("data_path",))
    parser.add_argument(
        "--beam",
        type=command_line.at_least(1, most=command_line.MOST_BEAMS),
        default=5,
        help="partial codes kept at each level (5)",
    )
    flags = parser.parse_args(argv)
    command_line.single_process("rqfaiss")
    command_line.refuse_to_overwrite(flags)

    from rq import clustering, quantizers

    device = quantizers.choose_device(flags.device)
    embeddings = publishing.open_data(flags)
    sample_SD = clustering.training_sample(embeddings, flags.levels, size=flags.fit_sample, seed=flags.seed)
    quantizer = fit(sample_SD, flags.levels, beam=flags.beam, seed=flags.seed)
    del sample_SD
    publishing.finish(quantizer.to(device), embeddings, flags)


if __name__ == "__main__":
    main()

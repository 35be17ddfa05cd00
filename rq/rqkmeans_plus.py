"""`python -m rq.rqkmeans_plus`: RQ-KMeans+, codebooks of
balanced residual k-means trained on with an encoder x + MLP(x).

Both networks start as the identity (GPR, https://arxiv.org/abs/2511.10138), so
training starts from balanced RQ-KMeans exactly and keeps the best it meets.
"""

from typing import TYPE_CHECKING

from rq import command_line, publishing, rqkmeans_constrained, training_flags
from rq.files import InputError

if TYPE_CHECKING:
    import argparse

    import numpy as np

    from rq.quantizers import Quantizer


def warm_start(sample_SD: "np.ndarray", flags: "argparse.Namespace") -> "Quantizer":
    """Networks that are the identity around the codebooks of balanced residual k-means, in standardised space."""
    import torch

    from rq import quantizers

    torch.manual_seed(flags.seed)
    design = quantizers.Design(
        "rqkmeans_plus",
        sample_SD.shape[1],
        flags.levels,
        hidden=flags.hidden,
        sinkhorn_epsilons=training_flags.sinkhorn_epsilons(flags),
        seed=flags.seed,
    )
    quantizer = quantizers.Quantizer(design)
    quantizer.standardise(sample_SD)
    with torch.no_grad():
        standard_SD = quantizer.encoder[0](torch.from_numpy(sample_SD)).numpy()
        start = rqkmeans_constrained.fit(
            standard_SD,
            flags.levels,
            slack=flags.slack,
            epsilon=flags.sinkhorn_epsilon,
            seed=flags.seed,
            device=flags.device,
        )
        quantizer.residual.load_state_dict(start.residual.state_dict())
        for level in range(len(flags.levels)):
            quantizer.residual.price(level).zero_()
    return quantizer


@command_line.command("rqkmeans_plus")
def main(argv: list[str] | None = None) -> None:
    """Embeddings -> balanced codebooks -> trained further -> index;
    several GPUs with `accelerate launch -m rq.rqkmeans_plus ..`.
    """
    parser = command_line.parser("rqkmeans_plus", __doc__, shared=command_line.FITTING_FLAGS, required=("data_path",))
    training_flags.add(parser, hidden=(512,), learning_rate=5e-4, epochs=200)
    rqkmeans_constrained.add_balance_flags(parser)
    flags = parser.parse_args(argv)
    if len(training_flags.sinkhorn_epsilons(flags)) != len(flags.levels):
        raise InputError(
            f"--sinkhorn_epsilons {flags.sinkhorn_epsilons}: give one number for each of {len(flags.levels)} levels"
        )
    command_line.refuse_to_overwrite(flags)

    from rq import clustering, quantizers, training

    flags.device = quantizers.choose_device(flags.device)
    embeddings = publishing.open_data(flags)
    sample_SD = clustering.training_sample(embeddings, flags.levels, size=flags.fit_sample, seed=flags.seed)
    if flags.resume_from_checkpoint:
        quantizer = training.resume(flags, method="rqkmeans_plus", embeddings=embeddings)
    else:
        quantizer = warm_start(sample_SD, flags)
    quantizer = training.train(quantizer, embeddings, sample_SD, flags)
    if command_line.is_first_process():
        publishing.finish(quantizer, embeddings, flags)


if __name__ == "__main__":
    main()

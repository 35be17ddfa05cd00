"""`python -m rq.rqvae`: a residual-quantized autoencoder; its codes are the index.

TIGER (https://arxiv.org/abs/2305.05065) on residual quantization as in SoundStream
(https://arxiv.org/abs/2107.03312): k-means
initialisation, straight-through gradient, Sinkhorn-balanced last level (LC-Rec), dead codes revived.
"""

from rq import command_line, publishing, training_flags
from rq.files import InputError


@command_line.command("rqvae")
def main(argv: list[str] | None = None) -> None:
    """Embeddings -> trained autoencoder -> index; several GPUs with `accelerate launch -m rq.rqvae ..`."""
    parser = command_line.parser("rqvae", __doc__, shared=command_line.FITTING_FLAGS, required=("data_path",))
    training_flags.add(parser, hidden=(512,), learning_rate=2e-3, epochs=200)
    parser.add_argument(
        "--latent",
        type=command_line.at_least(1, most=command_line.WIDEST_LAYER),
        default=256,
        help="dimensions that are quantized (256)",
    )
    flags = parser.parse_args(argv)
    epsilons = training_flags.sinkhorn_epsilons(flags)
    if len(epsilons) != len(flags.levels):
        raise InputError(f"--sinkhorn_epsilons has {len(epsilons)} numbers, --levels {len(flags.levels)}; give one a level")
    command_line.refuse_to_overwrite(flags)

    import torch

    from rq import clustering, quantizers, training

    flags.device = quantizers.choose_device(flags.device)
    embeddings = publishing.open_data(flags)
    sample_SD = clustering.training_sample(embeddings, flags.levels, size=flags.fit_sample, seed=flags.seed)
    if flags.resume_from_checkpoint:
        quantizer = training.resume(flags, method="rqvae", embeddings=embeddings)
    else:
        torch.manual_seed(flags.seed)
        quantizer = quantizers.Quantizer(
            quantizers.Design(
                "rqvae",
                embeddings.n_dims,
                flags.levels,
                flags.latent,
                flags.hidden,
                sinkhorn_epsilons=epsilons,
                seed=flags.seed,
            )
        )
        training.initialise(quantizer, sample_SD, seed=flags.seed)
    quantizer = training.train(quantizer, embeddings, sample_SD, flags)
    if command_line.is_first_process():
        publishing.finish(quantizer, embeddings, flags)


if __name__ == "__main__":
    main()

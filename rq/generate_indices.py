"""`python -m rq.generate_indices`: an index from a quantizer's
checkpoint or from codes made elsewhere, new or appended to.

    python -m rq.generate_indices --ckpt_path c --data_path new.npy --output X.index.json --append
"""

from collections.abc import Sequence

from rq import command_line, publishing
from rq.catalogue import read_items
from rq.files import InputError, check_output


def run(argv: list[str] | None, *, name: str, documentation: str, methods: Sequence[str] | None = None) -> None:
    """The command behind rq.generate_indices and, for some checkpoint methods only, rq.generate_indices_plus."""
    parser = command_line.parser(name, documentation, shared=command_line.QUANTIZER_FLAGS, required=("output",))
    parser.add_argument(
        "--codes_path",
        type=command_line.existing,
        metavar="C.npy",
        help="codes from elsewhere, in place of a checkpoint",
    )
    parser.add_argument(
        "--append",
        type=command_line.switch,
        nargs="?",
        const=True,
        default=False,
        help="--output exists: keep its SIDs, give the rows past its end new ones",
    )
    flags = parser.parse_args(argv)
    given = (flags.codes_path is not None, flags.ckpt_path is not None and flags.data_path is not None)
    if given not in ((True, False), (False, True)):
        raise InputError("give --ckpt_path and --data_path, or --codes_path and --levels")
    if flags.append and flags.codes_path:
        raise InputError("--append needs --ckpt_path and --data_path, to check the checkpoint against the published SIDs")
    if flags.append and not flags.output.exists():
        raise InputError(f"--append: {flags.output} does not exist; leave --append out to make it")
    command_line.refuse_to_overwrite(flags, outputs=("codes_output",) if flags.append else ("output", "codes_output"))
    if flags.append:
        check_output(flags.output)
    if flags.codes_path:
        codes_NL = publishing.load_codes(flags.codes_path)
        if flags.item_file and len(codes_NL) != len(read_items(flags.item_file)):
            raise InputError(f"{flags.codes_path} has {len(codes_NL):,} rows, not as many as {flags.item_file} has items")
        publishing.publish(codes_NL, flags, quantizer=None, embeddings=None)
        return
    from rq import checkpoints, quantizers

    embeddings = publishing.open_data(flags)
    quantizer = checkpoints.load_checkpoint(
        flags.ckpt_path,
        n_dims=embeddings.n_dims,
        data_path=flags.data_path,
        device=quantizers.choose_device(flags.device),
    )
    if methods and quantizer.design.method not in methods:
        raise InputError(
            f"{flags.ckpt_path} is of {quantizer.design.method}, rq.{name} is for {', '.join(methods)}; "
            "use rq.generate_indices"
        )
    embeddings.check_finite()
    certain = quantizers.is_of_these(quantizer, embeddings, checkpoint=flags.ckpt_path)
    if flags.append:
        publishing.append(flags, quantizer=quantizer, embeddings=embeddings)
        return
    codes_NL = quantizers.encode(quantizer, embeddings, progress=True)
    if not certain:
        publishing.check_explains(quantizer, embeddings, codes_NL, checkpoint=flags.ckpt_path)
    publishing.publish(codes_NL, flags, quantizer=quantizer, embeddings=embeddings)


@command_line.command("generate_indices")
def main(argv: list[str] | None = None) -> None:
    """Make or append to an index from a checkpoint or from codes."""
    run(argv, name="generate_indices", documentation=__doc__)


if __name__ == "__main__":
    main()

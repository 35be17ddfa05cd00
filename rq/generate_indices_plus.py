"""`python -m rq.generate_indices_plus`: rq.generate_indices for RQ-KMeans+ checkpoints, refusing any other."""

from rq import command_line, generate_indices


@command_line.command("generate_indices_plus")
def main(argv: list[str] | None = None) -> None:
    """Make or append to an index from an RQ-KMeans+ checkpoint."""
    generate_indices.run(argv, name="generate_indices_plus", documentation=__doc__, methods=("rqkmeans_plus",))


if __name__ == "__main__":
    main()

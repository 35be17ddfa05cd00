"""`python -m rq.generate_indices`: codes -> tokens -> collisions
resolved -> `.index.json`. Owns the token format and the index file.

N items, L levels, K codes of a level, R rows of a chunk, D dimensions.
"""

import argparse
import itertools
import json
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rq import command_line
from rq.catalogue import item_text, read_items
from rq.command_line import BadInput, log
from rq.origin import sha256_of_texts
from rq.whole_files import whole_file, whole_path

if TYPE_CHECKING:
    import numpy as np

    from rq.embeddings import Embeddings
    from rq.quantizers import Quantizer

TOKEN = re.compile(r"<([a-z])_(0|[1-9][0-9]*)>")
# Appending compares this many published first-level codes with what the checkpoint says now; a wrong checkpoint or
# other
# embeddings agree on about 1 in K of them, the right ones on nearly all.
COMPARED_ITEMS, LEAST_AGREEMENT = 2_000, 0.5

MEASURED_ITEMS = 65_536  # enough for an error to three digits; more would cost a pass over the file
MEASURABLE_VARIANCE = 1e-30
LEAST_EXPLAINED = 0.25


def sid_tokens(codes: Sequence[int]) -> list[str]:
    """The tokens of a SID: a letter for the level, the code counted from 0.

    >>> sid_tokens([12, 3, 255])
    ['<a_12>', '<b_3>', '<c_255>']
    """
    return [f"<{letter}_{code}>" for letter, code in zip(string.ascii_lowercase, codes, strict=False)]


def sid_codes(tokens: Sequence[str], *, where: str) -> tuple[int, ...]:
    """The codes of a SID, `sid_tokens` read backwards.

    >>> sid_codes(["<a_12>", "<b_3>"], where="X.index.json")
    (12, 3)
    """
    codes = []
    for letter, token in itertools.zip_longest(string.ascii_lowercase[: len(tokens)], tokens):
        match = TOKEN.fullmatch(token) if isinstance(token, str) else None
        if match is None or match[1] != letter:
            raise BadInput(
                f"{where}: token {token!r}, expected '<{letter}_0>' or another code of that letter; one token per level"
            )
        codes.append(int(match[2]))
    return tuple(codes)


def read_index(path: Path) -> dict[int, tuple[int, ...]]:
    """{item id: codes}, ids ascending, of an index made here or elsewhere; SIDs may differ in length."""
    try:
        pairs = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=list)
    except ValueError as error:
        raise BadInput(f"{path}: not JSON ({error}); expected {{'0': ['<a_12>', '<b_3>'], ..}}") from error
    if not pairs or not all(isinstance(pair, tuple) for pair in pairs):
        raise BadInput(f"{path}: expected a JSON object of items, like {{'0': ['<a_12>', '<b_3>'], ..}}")
    index: dict[int, tuple[int, ...]] = {}
    for item, tokens in pairs:
        if not (item.isascii() and item.isdigit()):
            raise BadInput(f"{path}: item id {item!r} is not a decimal number")
        if not isinstance(tokens, list) or not tokens:
            raise BadInput(
                f"{path}: item {item} has {json.dumps(tokens)}, expected a list of tokens like ['<a_12>', '<b_3>']"
            )
        if int(item) in index:
            raise BadInput(f"{path}: item {item} stands twice; remove one line")
        index[int(item)] = sid_codes(tokens, where=f"{path}: item {item}")
    return dict(sorted(index.items()))


def index_lines(sids: Iterable[Sequence[int]], *, first_item: int) -> Iterable[str]:
    """One line per item, the comma at its start: an appended item then leaves every line before it as it was."""
    for item, codes in enumerate(sids, first_item):
        yield f'{"," if item else "{"}"{item}": {json.dumps(sid_tokens(codes))}\n'


def write_index(path: Path, sids: Iterable[Sequence[int]]) -> None:
    """Write the index of items 0..N-1, whole or not at all."""
    with whole_file(path) as file:
        file.writelines(index_lines(sids, first_item=0))
        file.write("}\n")


def append_to_index(path: Path, sids: Iterable[Sequence[int]], *, first_item: int) -> None:
    """Add the items from `first_item` on; every byte before the closing brace stays."""
    published = path.read_text(encoding="utf-8").rstrip()
    with whole_file(path) as file:
        file.write(published.removesuffix("}").rstrip() + "\n")
        file.writelines(index_lines(sids, first_item=first_item))
        file.write("}\n")


def check_codes(codes_NL: "np.ndarray", levels: Sequence[int], *, where: object) -> None:
    """Stop at the first code outside its codebook."""
    if codes_NL.ndim != 2 or codes_NL.dtype.kind not in "iu" or codes_NL.shape[1] != len(levels):
        raise BadInput(
            f"{where}: holds {codes_NL.dtype} {codes_NL.shape}; "
            f"expected whole numbers of shape (N items, {len(levels)} levels) for levels {','.join(map(str, levels))}"
        )
    for level, size in enumerate(levels):
        wrong = (codes_NL[:, level] < 0) | (codes_NL[:, level] >= size)
        if wrong.any():
            item = int(wrong.argmax())
            raise BadInput(
                f"{where}: item {item} has code {codes_NL[item, level]} at level {level + 1}, whose "
                f"codebook holds 0..{size - 1}; codes count from 0"
            )


def check_published(published: dict[int, tuple[int, ...]], levels: Sequence[int], *, where: Path) -> None:
    """Stop unless an index can be appended to: items 0..M-1, L codes each inside these codebooks, one extra at most."""
    if list(published) != list(range(len(published))):
        raise BadInput(
            f"{where}: its {len(published):,} item ids are not 0..{len(published) - 1}; cannot tell which items are new"
        )
    for item, codes in published.items():
        if not len(levels) <= len(codes) <= len(levels) + 1:
            raise BadInput(
                f"{where}: item {item} has {len(codes)} tokens, the quantizer has {len(levels)} levels; "
                "use its own checkpoint"
            )
        for level, (code, size) in enumerate(zip(codes, levels, strict=False)):
            if code >= size:
                raise BadInput(
                    f"{where}: item {item} has code {code} at level {level + 1}, whose codebook holds 0..{size - 1}; "
                    "the index is of another quantizer, or counts codes from 1"
                )


def resolve(
    codes_NL: "np.ndarray",
    *,
    policy: str,
    n_last: int,
    capacity: int = 1,
    costs: "Callable | None" = None,
    published: Sequence[tuple[int, ...]] = (),
) -> list[tuple[int, ...]]:
    """SIDs of the items of `codes_NL`, collisions among them and with `published` treated by `policy`."""
    from rq import collisions

    if policy == "token":
        return collisions.add_a_code(codes_NL, published=published)
    if policy == "relocate":
        if costs is None:
            raise BadInput("--collisions relocate needs distances: give --data_path and --ckpt_path, not codes alone")
        sids, unplaced = collisions.relocate(codes_NL, n_last=n_last, capacity=capacity, costs=costs, published=published)
        if unplaced:
            log.warning(
                "%s items found all %s last-level codes under their prefix taken and keep a shared SID; "
                "use --collisions token, a larger last level or --capacity",
                f"{unplaced:,}",
                f"{n_last:,}",
            )
        return sids
    return collisions.keep(codes_NL)


def log_collisions(sids: Sequence[Sequence[int]], *, before: "np.ndarray", policy: str) -> None:
    """One line: how many items shared a SID before, and share one now."""
    before_groups, after_groups = Counter(map(tuple, before.tolist())), Counter(map(tuple, sids))
    shared = [sum(n for n in groups.values() if n > 1) for groups in (before_groups, after_groups)]
    log.info(
        "collisions (%s): %s of %s items shared a SID, largest group %s; now %s, largest group %s",
        policy,
        f"{shared[0]:,}",
        f"{len(sids):,}",
        max(before_groups.values()),
        f"{shared[1]:,}",
        max(after_groups.values()),
    )


def publish(
    codes_NL: "np.ndarray", flags: argparse.Namespace, *, quantizer: "Quantizer | None", embeddings: "Embeddings | None"
) -> None:
    """Save the codes, resolve collisions and write the new index: the one end of every quantizer."""
    levels = quantizer.design.levels if quantizer else flags.levels
    check_codes(codes_NL, levels, where=getattr(flags, "codes_path", None) or "codes")
    save_codes(codes_NL, flags.codes_output)
    costs = last_level_costs(quantizer, embeddings) if quantizer and embeddings else None
    sids = resolve(codes_NL, policy=flags.collisions, n_last=levels[-1], capacity=flags.capacity, costs=costs)
    log_collisions(sids, before=codes_NL, policy=flags.collisions)
    write_index(flags.output, sids)
    log.info("wrote %s: %s items, levels %s", flags.output, f"{len(sids):,}", ",".join(map(str, levels)))


def finish(quantizer: "Quantizer", embeddings: "Embeddings", flags: argparse.Namespace) -> None:
    """What every quantizer ends in: assign all items, save the checkpoint, log the error, write codes and index."""
    from rq import quantizers

    quantizers.take_origin(quantizer, embeddings)
    codes_NL = quantizers.encode(quantizer, embeddings, progress=True)
    errors, left = reconstruction_error(quantizer, embeddings, codes_NL)
    log.info(
        "reconstruction error (MSE over %s items, input space) after each level: %s; share of variance left: %.4f",
        f"{min(MEASURED_ITEMS, len(embeddings)):,}",
        ", ".join(f"{error:.3e}" for error in errors),
        left,
    )
    if flags.ckpt_path:
        quantizers.save_checkpoint(quantizer, flags.ckpt_path)
        log.info("wrote %s: the quantizer, for rq.generate_indices --append", flags.ckpt_path)
    publish(codes_NL, flags, quantizer=quantizer, embeddings=embeddings)


def reconstruction_error(
    quantizer: "Quantizer", embeddings: "Embeddings", codes_NL: "np.ndarray"
) -> tuple[list[float], float]:
    """Mean squared error after each level, and the share of variance left after the last, over up to MEASURED_ITEMS rows."""
    from rq import quantizers

    measured = embeddings.spread(MEASURED_ITEMS)
    x_RD = embeddings.rows(measured)
    errors = quantizers.squared_error(quantizer, x_RD, codes_NL[measured])
    return errors, errors[-1] / max(float(x_RD.var(axis=0).mean()), MEASURABLE_VARIANCE)


def check_explains(quantizer: "Quantizer", embeddings: "Embeddings", codes_NL: "np.ndarray", *, checkpoint: Path) -> None:
    """Refuse codebooks that tell little of the embeddings: they are of another encoder, whatever their width.

    Its first level explains some of the variance, at most what the means of the items of each code would. Codebooks of
    the Industrial items reach 100 % of that on these items, 87 % on mixtures of them, and 0 % on another TF-IDF of them.
    """
    import numpy as np

    from rq.quantizers import NETWORK_METHODS

    errors, left = reconstruction_error(quantizer, embeddings, codes_NL)
    measured = embeddings.spread(MEASURED_ITEMS)
    x_RD = embeddings.rows(measured)
    x_RD = x_RD - x_RD.mean(axis=0)
    _, group_R = np.unique(codes_NL[measured, 0], return_inverse=True)
    sums_KD = np.zeros((group_R.max() + 1, x_RD.shape[1]))
    np.add.at(sums_KD, group_R, x_RD)
    most = float((np.square(sums_KD).sum(axis=1) / np.bincount(group_R)).sum()) / x_RD.size
    explained = float(np.square(x_RD).mean()) - errors[0]
    if most <= MEASURABLE_VARIANCE:
        return
    alone = quantizer.design.method not in NETWORK_METHODS  # of a network the first level alone need not decode to anything
    if left >= 1 or (alone and explained < LEAST_EXPLAINED * most):
        raise BadInput(
            f"{checkpoint} explains hardly anything of {embeddings.path}: {left:.2f} of its variance is left, and its first "
            f"level does {max(explained, 0) / most:.0%} of what it could; "
            "the two are of different encoders: embed with the one of the checkpoint, or train again"
        )


def append(flags: argparse.Namespace, *, quantizer: "Quantizer", embeddings: "Embeddings") -> None:
    """Give SIDs to the rows past the end of the index at --output; its lines stay as they are."""
    import numpy as np

    from rq.quantizers import encode

    published = read_index(flags.output)
    levels = quantizer.design.levels
    check_published(published, levels, where=flags.output)
    first = len(published)
    if len(embeddings) <= first:
        raise BadInput(
            f"{flags.data_path} has {len(embeddings):,} rows, {flags.output} {first:,} items: no new item to append"
        )
    known_NL = np.array([codes[: len(levels)] for codes in published.values()], np.int32)
    compared = embeddings.spread(COMPARED_ITEMS)
    compared = compared[compared < first]
    agreement = float((quantizer.codes(embeddings.rows(compared))[:, 0] == known_NL[compared, 0]).mean())
    if agreement < LEAST_AGREEMENT:
        raise BadInput(
            f"{flags.output}: {flags.ckpt_path} gives {agreement:.0%} of its items their published first token; "
            "append with the checkpoint and the text encoder the index was made with"
        )
    new_NL = encode(quantizer, embeddings, first=first)
    save_codes(np.concatenate([known_NL, new_NL]), flags.codes_output)
    sids = resolve(
        new_NL,
        policy=flags.collisions,
        n_last=levels[-1],
        capacity=flags.capacity,
        costs=last_level_costs(quantizer, embeddings, first=first),
        published=list(published.values()),
    )
    if flags.collisions != "keep":
        shared = sum(n - 1 for n in Counter([*published.values(), *sids]).values())
        log.info("collisions (%s): %s items share their SID with an earlier one", flags.collisions, f"{shared:,}")
    append_to_index(flags.output, sids, first_item=first)
    log.info("appended %s items to the %s of %s, which are unchanged", f"{len(sids):,}", f"{first:,}", flags.output)


def last_level_costs(quantizer: "Quantizer", embeddings: "Embeddings", *, first: int = 0) -> Callable:
    """The costs relocation asks for; row r of the codes is row first + r of the embeddings."""
    return lambda rows_R, codes_RL: quantizer.last_level_costs(embeddings.rows(rows_R + first), codes_RL)


def save_codes(codes_NL: "np.ndarray", path: Path | None) -> None:
    """Save the codes as int32 (N, L) where --codes_output asks for it."""
    import numpy as np

    if path is None:
        return
    if path.suffix != ".npy":
        raise BadInput(f"--codes_output {path}: give it a name that ends in .npy")
    with whole_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, codes_NL.astype(np.int32), allow_pickle=False)
    log.info("wrote %s: codes %s", path, codes_NL.shape)


def load_codes(path: Path) -> "np.ndarray":
    """An array of codes saved by --codes_output."""
    import numpy as np

    from rq.embeddings import NOT_AN_ARRAY

    try:
        codes = np.load(path, allow_pickle=False)
    except NOT_AN_ARRAY as error:
        raise BadInput(f"{path}: not a plain .npy array ({error})") from error
    if not isinstance(codes, np.ndarray):
        raise BadInput(f"{path}: an archive of arrays; expected one .npy of codes")
    return codes


def open_data(flags: argparse.Namespace) -> "Embeddings":
    """The embeddings at --data_path, as many rows as --item_file has items where it is given."""
    from rq.embeddings import open_embeddings

    if not flags.item_file:
        return open_embeddings(flags.data_path)
    items = read_items(flags.item_file)
    embeddings = open_embeddings(flags.data_path, n_items=len(items), items_from=flags.item_file)
    if embeddings.record:
        texts = [item_text(item, embeddings.origin.fields.split(",")) for item in items]
        if sha256_of_texts(texts) != embeddings.record.texts_sha256:
            raise BadInput(
                f"{flags.data_path} was made of other texts than {flags.item_file} holds now, so its rows may be of other "
                "items; embed that file again with rq.text2emb"
            )
    return embeddings


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
        raise BadInput("give --ckpt_path and --data_path, or --codes_path and --levels")
    if flags.append and flags.codes_path:
        raise BadInput("--append needs --ckpt_path and --data_path, to check the checkpoint against the published SIDs")
    if flags.append and not flags.output.exists():
        raise BadInput(f"--append: {flags.output} does not exist; leave --append out to make it")
    command_line.refuse_to_overwrite(flags, outputs=("codes_output",) if flags.append else ("output", "codes_output"))
    if flags.codes_path:
        codes_NL = load_codes(flags.codes_path)
        if flags.item_file and len(codes_NL) != len(read_items(flags.item_file)):
            raise BadInput(f"{flags.codes_path} has {len(codes_NL):,} rows, not as many as {flags.item_file} has items")
        publish(codes_NL, flags, quantizer=None, embeddings=None)
        return
    from rq import quantizers

    embeddings = open_data(flags)
    quantizer = quantizers.load_checkpoint(
        flags.ckpt_path,
        n_dims=embeddings.n_dims,
        data_path=flags.data_path,
        device=quantizers.choose_device(flags.device),
    )
    if methods and quantizer.design.method not in methods:
        raise BadInput(
            f"{flags.ckpt_path} is of {quantizer.design.method}, rq.{name} is for {', '.join(methods)}; "
            "use rq.generate_indices"
        )
    embeddings.check_finite()
    certain = quantizers.is_of_these(quantizer, embeddings, checkpoint=flags.ckpt_path)
    if flags.append:
        append(flags, quantizer=quantizer, embeddings=embeddings)
        return
    codes_NL = quantizers.encode(quantizer, embeddings, progress=True)
    if not certain:
        check_explains(quantizer, embeddings, codes_NL, checkpoint=flags.ckpt_path)
    publish(codes_NL, flags, quantizer=quantizer, embeddings=embeddings)


@command_line.command("generate_indices")
def main(argv: list[str] | None = None) -> None:
    """Make or append to an index from a checkpoint or from codes."""
    run(argv, name="generate_indices", documentation=__doc__)


if __name__ == "__main__":
    main()

"""The end of every quantizer: codes -> collisions resolved -> the published index, new or appended to.

    codes (N, L)   [[12, 3], [12, 3], [7, 0]]             what the quantizer gives the items
    SIDs           [(12, 3, 0), (12, 3, 1), (7, 0)]       after --collisions token
    X.index.json   {"0": ["<a_12>", "<b_3>", "<c_0>"], .. written by rq.index_file

A published SID never changes: an index that is appended to keeps every line.
N items, L levels, K codes of a level, R rows of a chunk, D dimensions.
"""

import argparse
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rq.catalogue import item_text, read_items
from rq.files import InputError, whole_path
from rq.index_file import Sid, append_sids, check_appendable, check_codes, read_sids, write_sids
from rq.origin import sha256_of_texts

if TYPE_CHECKING:
    import numpy as np

    from rq.collisions import LastLevelCosts, Sids
    from rq.embeddings import Embeddings
    from rq.quantizers import Quantizer

log = logging.getLogger("rq.publishing")

# Appending compares this many published first-level codes with what the checkpoint says now. A wrong checkpoint or other
# embeddings agree on about 1 in K of them, the right ones on nearly all.
COMPARED_ITEMS, LEAST_AGREEMENT = 2_000, 0.5
MEASURED_ITEMS = 65_536  # enough for an error to three digits; more would cost a pass over the file
MEASURABLE_VARIANCE = 1e-30
LEAST_EXPLAINED = 0.25


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
    write_sids(flags.output, sids)
    log.info("wrote %s: %s items, levels %s", flags.output, f"{len(sids):,}", ",".join(map(str, levels)))


def finish(quantizer: "Quantizer", embeddings: "Embeddings", flags: argparse.Namespace) -> None:
    """What every quantizer ends in: assign all items, save the checkpoint, log the error, write codes and index."""
    from rq import checkpoints, quantizers

    quantizers.take_origin(quantizer, embeddings)
    errors, left = reconstruction_error(quantizer, embeddings)
    log.info(
        "reconstruction error (MSE over %s items, input space) after each level: %s; share of variance left: %.4f",
        f"{min(MEASURED_ITEMS, len(embeddings)):,}",
        ", ".join(f"{error:.3e}" for error in errors),
        left,
    )
    if flags.ckpt_path:
        checkpoints.save_checkpoint(quantizer, flags.ckpt_path)
        log.info("wrote %s: the quantizer, for rq.generate_indices", flags.ckpt_path)
    if flags.output:
        codes_NL = quantizers.encode(quantizer, embeddings, progress=True)
        publish(codes_NL, flags, quantizer=quantizer, embeddings=embeddings)
    elif flags.codes_output:
        stream_codes(flags.codes_output, quantizer, embeddings)


def stream_codes(path: Path, quantizer: "Quantizer", embeddings: "Embeddings") -> None:
    """Save the codes, int32 (N, L), of all items, of which only those of a chunk are in memory at a time."""
    import numpy as np

    from rq.quantizers import encoded_chunks

    shape = (len(embeddings), len(quantizer.design.levels))
    with whole_path(path) as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<i4", "fortran_order": False, "shape": shape})
        for codes_RL in encoded_chunks(quantizer, embeddings, progress=True):
            file.write(codes_RL.astype("<i4").tobytes())
    log.info("wrote %s: codes %s", path, shape)


def append(flags: argparse.Namespace, *, quantizer: "Quantizer", embeddings: "Embeddings") -> None:
    """Give SIDs to the rows past the end of the index at --output; its lines stay as they are."""
    import numpy as np

    from rq.quantizers import encode

    published = read_sids(flags.output)
    levels = quantizer.design.levels
    check_appendable(published, levels, where=flags.output)
    first = len(published)
    if len(embeddings) <= first:
        raise InputError(
            f"{flags.data_path} has {len(embeddings):,} rows, {flags.output} {first:,} items: no new item to append"
        )
    known_NL = np.array([codes[: len(levels)] for codes in published.values()], np.int32)
    compared = embeddings.spread(COMPARED_ITEMS)
    compared = compared[compared < first]
    agreement = float((quantizer.codes(embeddings.rows(compared))[:, 0] == known_NL[compared, 0]).mean())
    if agreement < LEAST_AGREEMENT:
        raise InputError(
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
    append_sids(flags.output, sids, first_item=first)
    log.info("appended %s items to the %s of %s, which are unchanged", f"{len(sids):,}", f"{first:,}", flags.output)


def resolve(
    codes_NL: "np.ndarray",
    *,
    policy: str,
    n_last: int,
    capacity: int = 1,
    costs: "LastLevelCosts | None" = None,
    published: Sequence[Sid] = (),
) -> "Sids":
    """The SIDs of items with these codes; items whose codes are equal, or equal a published SID's, are treated by `policy`.

    resolve(np.array([[12, 3], [12, 3]]), policy="token", n_last=256)  -> [(12, 3, 0), (12, 3, 1)]
    """
    from rq import collisions

    if policy == "token":
        return collisions.add_a_code(codes_NL, published=published)
    if policy == "relocate":
        if costs is None:
            raise InputError("--collisions relocate needs distances: give --data_path and --ckpt_path, not codes alone")
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


def log_collisions(sids: "Sids", *, before: "np.ndarray", policy: str) -> None:
    """One line: how many items shared a SID before, and share one now."""
    from rq import collisions

    before_G, after_G = collisions.group_sizes(before), collisions.group_sizes(sids.codes_NM)
    shared = [int(sizes[sizes > 1].sum()) for sizes in (before_G, after_G)]
    log.info(
        "collisions (%s): %s of %s items shared a SID, largest group %s; now %s, largest group %s",
        policy,
        f"{shared[0]:,}",
        f"{len(sids):,}",
        before_G.max(),
        f"{shared[1]:,}",
        after_G.max(),
    )


def reconstruction_error(quantizer: "Quantizer", embeddings: "Embeddings") -> tuple[list[float], float]:
    """Mean squared error after each level, and the share of variance left after the last, over up to MEASURED_ITEMS rows."""
    import numpy as np

    from rq import quantizers

    quantizer.eval()
    x_RD = embeddings.rows(embeddings.spread(MEASURED_ITEMS))
    width = quantizer.residual.beam * max(quantizer.design.levels)
    codes_RL = np.concatenate([quantizer.codes(x_RD[part]) for part in quantizers.sub_chunks(len(x_RD), width=width)])
    errors = quantizers.squared_error(quantizer, x_RD, codes_RL)
    return errors, errors[-1] / max(float(x_RD.var(axis=0).mean()), MEASURABLE_VARIANCE)


def check_explains(quantizer: "Quantizer", embeddings: "Embeddings", codes_NL: "np.ndarray", *, checkpoint: Path) -> None:
    """InputError where codebooks explain little of the embeddings: they are of another encoder, whatever their width.

    Its first level explains some of the variance, at most what the means of the items of each code would. Codebooks of
    the Industrial items reach 100 % of that on these items, 87 % on mixtures of them, and 0 % on another TF-IDF of them.
    """
    import numpy as np

    from rq.quantizers import NETWORK_METHODS

    errors, left = reconstruction_error(quantizer, embeddings)
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
        raise InputError(
            f"{checkpoint} explains hardly anything of {embeddings.path}: {left:.2f} of its variance is left, and its first "
            f"level does {max(explained, 0) / most:.0%} of what it could; "
            "the two are of different encoders: embed with the one of the checkpoint, or train again"
        )


def last_level_costs(quantizer: "Quantizer", embeddings: "Embeddings", *, first: int = 0) -> "LastLevelCosts":
    """The costs relocation asks for; row r of the codes is row first + r of the embeddings."""
    return lambda rows_R, codes_RL: quantizer.last_level_costs(embeddings.rows(rows_R + first), codes_RL)


def save_codes(codes_NL: "np.ndarray", path: Path | None) -> None:
    """Save the codes as int32 (N, L) where --codes_output asks for it."""
    import numpy as np

    if path is None:
        return
    with whole_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, codes_NL.astype(np.int32), allow_pickle=False)
    log.info("wrote %s: codes %s", path, codes_NL.shape)


def load_codes(path: Path) -> "np.ndarray":
    """An array of codes saved by --codes_output."""
    import numpy as np

    from rq.embeddings import map_npy

    return np.array(map_npy(path))


def open_data(flags: argparse.Namespace) -> "Embeddings":
    """The embeddings at --data_path, as many rows as --item_file has items where it is given."""
    from rq.embeddings import open_embeddings

    if not (flags.output or flags.ckpt_path):
        raise InputError("nothing would be kept: give --output X.index.json for the index, --ckpt_path for the quantizer")
    if not flags.item_file:
        return open_embeddings(flags.data_path)
    items = read_items(flags.item_file)
    embeddings = open_embeddings(flags.data_path, n_items=len(items), items_from=flags.item_file)
    if embeddings.record:
        texts = [item_text(item, embeddings.record.origin.fields.split(",")) for item in items]
        if sha256_of_texts(texts) != embeddings.record.texts_sha256:
            raise InputError(
                f"{flags.data_path} was made of other texts than {flags.item_file} holds now, so its rows may be of other "
                "items; embed that file again with rq.text2emb"
            )
    return embeddings

"""SID tokens in a tokenizer, and rows for them in a model."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from sid_sft.catalogue import Catalogue
from sid_sft.files import InputError, cut, error_text, shown

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger("sft.vocabulary")

FIRST_SPREAD = 0.3  # of the known rows' spread, for the first values of new rows: at the full spread a pretrained model's
# first loss is that of confident guesses, and the first steps go into taking these back
MOST_GAPS = 1_000_000  # ids without a token; the tokenizers of large models have some thousands
PLAIN_SEED = 42  # a row's generator gets the row's id alone with this seed, the default, and id and seed mixed with others


def add_sid_tokens(tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> list[int]:
    """Adds the tokens that the tokenizer lacks, as ordinary tokens that nothing normalizes; returns the ids it assigned.

    Every token is one id afterwards: InputError otherwise, or where a SID token is a piece of text to the tokenizer or
    has a role (it ends texts, pads, ...). Special tokens without a role are somebody's earlier SID tokens.
    """
    from tokenizers import AddedToken

    vocabulary, added = tokenizer.get_vocab(), tokenizer.get_added_vocab()
    roles = {getattr(tokenizer, name) for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES}
    for token in tokens:
        if token in vocabulary and (token not in added or token in roles):
            raise InputError(
                f"SID token {shown(token)} already means something else to the tokenizer; rename it in the index"
            )
    new = [token for token in tokens if token not in vocabulary]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in new])
    for token in tokens:
        if len(tokenizer(token, add_special_tokens=False)["input_ids"]) != 1:
            raise InputError(f"SID token {shown(token)} is not one id after it was added; rename it in the index")
    tell_inherited(tokenizer, [token for token in tokens if token in added])
    return tokenizer.convert_tokens_to_ids(new)


def tell_inherited(tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> None:
    """Tells what is unusual about SID tokens that came with the base model: they stay as they are."""
    settings = tokenizer.added_tokens_decoder
    kinds = [
        (token, settings[number]) for token, number in zip(tokens, tokenizer.convert_tokens_to_ids(tokens), strict=True)
    ]
    if special := [token for token, kind in kinds if kind.special]:
        logger.info(
            f"{len(special)} SID tokens are special tokens of the base model, like {cut(special[0])}, "
            "and train as they are; who decodes must keep special tokens"
        )
    if stripping := [token for token, kind in kinds if kind.lstrip or kind.rstrip]:
        logger.info(
            f"{len(stripping)} SID tokens of the base model, like {cut(stripping[0])}, take the white space beside them "
            "(lstrip or rstrip in its tokenizer.json): the model does not see the line ends there"
        )


def assert_sids_round_trip(tokenizer: PreTrainedTokenizerBase, catalogue: Catalogue) -> None:
    """Every item's SID as text is exactly its tokens to the tokenizer, alone and behind a line of text."""
    sids = sorted({item.sid for item in catalogue.items})
    for lead in ("", "x\n"):
        encoded = tokenizer([lead + "".join(sid) for sid in sids], add_special_tokens=False)["input_ids"]
        for sid, ids in zip(sids, encoded, strict=True):
            if tuple(tokenizer.convert_ids_to_tokens(ids[-len(sid) :])) != sid or (not lead and len(ids) != len(sid)):
                raise InputError(f"SID {shown(''.join(sid))} does not survive the tokenizer; rename its tokens in the index")


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many rows the ids of a tokenizer need; more than it has tokens where its ids have gaps.

    InputError where so many of them would be of no token that a broken file must have made them.
    """
    ids = tokenizer.get_vocab().values()
    if max(ids) > len(ids) + MOST_GAPS:
        raise InputError(
            f"--base_model: its tokenizer has {len(ids):,} tokens, but ids up to {max(ids):,}, which would all get a row; "
            "mend its tokenizer.json"
        )
    return max(ids) + 1


def ids_to_fill(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: list[str], new_ids: list[int]
) -> list[int]:
    """The ids of SID tokens whose rows need first values: new ones, and those for which the model never had a row.

    Tells how many tokens are new, how many keep their rows, and how many the tokenizer had without a row.
    """
    had_rows = len(model.get_input_embeddings().weight)
    rowless = sorted({i for i in tokenizer.convert_tokens_to_ids(tokens) if i >= had_rows} - set(new_ids))
    logger.info(f"Adding {len(new_ids)} new tokens to tokenizer")
    if kept := len(tokens) - len(new_ids) - len(rowless):
        logger.info(f"{kept} of {len(tokens)} SID tokens were there already and keep their rows")
    if rowless:
        logger.info(f"{len(rowless)} of {len(tokens)} SID tokens were in the tokenizer, but had no row; they get one")
    return new_ids + rowless


def grow_embeddings(model: PreTrainedModel, vocab_size: int) -> None:
    """Gives the model a row for each token. Never shrinks: many models have more rows than their tokenizer has tokens.

    InputError where a further matrix grows with the vocabulary, of whose rows freeze mode would know nothing.
    """
    from sid_sft.forward.architecture import tables_of

    rows = [len(weight) for weight in tables_of(model).values()]
    if vocab_size <= min(rows):
        return
    before = {name: len(weight) for name, weight in model.named_parameters() if weight.dim()}
    try:
        model.resize_token_embeddings(max(vocab_size, *rows), mean_resizing=False)
    except Exception as error:  # other people's code
        raise InputError(f"--base_model: {type(model).__name__} takes no new tokens ({error_text(error)[:100]})") from error
    known = {id(weight) for weight in tables_of(model).values()}
    for name, weight in model.named_parameters():
        if id(weight) not in known and weight.dim() == 2 and len(weight) > before[name]:
            raise InputError(f"--base_model: {type(model).__name__} has a further matrix with a row per token ({name})")


def init_rows(model: PreTrainedModel, ids: list[int], known: int, seed: int) -> None:
    """Gives the rows of newly assigned ids the mean of the first `known` rows, plus noise of FIRST_SPREAD of their spread.

    Each row is drawn for its own id, so it does not depend on which others are new. A generator of torch takes 32 bits
    for its seed, so id and seed are not set side by side in it, but mixed.
    """
    import torch

    from sid_sft.forward.architecture import tables_of

    known = min(known, min(ids, default=known))
    mixed = (seed ^ PLAIN_SEED) * 0x9E3779B1 % 2**32  # odd, so another number for every seed of 32 bits
    with torch.no_grad():
        for number, weight in enumerate(tables_of(model).values()):
            old = weight[:known].float()
            mean, spread = old.mean(0).cpu(), old.std(0).cpu()
            for token_id in ids:
                noise = torch.randn(len(mean), generator=torch.Generator().manual_seed(mixed ^ ((token_id << 1) + number)))
                weight[token_id] = (mean + FIRST_SPREAD * spread * noise).to(weight)

"""`python -m rq.text2emb`: the texts of `.item.json` -> embeddings in one .npy, row i for item i.

`--encoder tfidf` needs no download: TF-IDF and truncated SVD, fitted on these items and saved beside the
output, so that new items can be embedded alike later. Any other encoder is a Hugging Face name or folder;
its rows come in shards, and a run that was stopped goes on with those that it has not finished.
N items, B items of a batch, T tokens, D dimensions, V words.
"""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rq import command_line
from rq.catalogue import TEXT_FIELDS, item_text, read_items
from rq.command_line import log
from rq.files import InputError, check_output, one_line, read_json, reserve, shown, told, whole_path
from rq.origin import Origin, record_file, sha256_of, sha256_of_texts, sha256_of_weights, write_record
from rq.processes import run_in_processes
from rq.sentence_encoder import own_settings
from rq.shards import Shards

if TYPE_CHECKING:
    import numpy as np
    import torch

MOST_NAMED = 200  # characters of the encoder's name in a message, which may be a path
# What transformers raises on the files of an encoder that are not as it expects them.
BROKEN_ENCODER = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, ImportError)
USUAL_LENGTH = 512  # tokens, where neither a flag nor the encoder says another
ROWS_AT_ONCE = 8_192
VOCABULARY, WEIGHTS = "vocabulary.json", "tfidf.safetensors"


def default_output(item_file: Path, encoder: str) -> Path:
    """X.item.json and 'org/Name' -> X.emb-Name-td.npy beside it."""
    stem = item_file.name.removesuffix(".json").removesuffix(".item")
    return item_file.parent / f"{stem}.emb-{Path(encoder).name.removesuffix('.tfidf')}-td.npy"


def fit_tfidf(texts: Sequence[str], *, n_dims: int, seed: int) -> tuple[list[str], "np.ndarray", "np.ndarray"]:
    """Vocabulary (V words), their idf (V,), and the truncated SVD's components (D, V) of these texts."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=2 if len(texts) >= 1000 else 1, max_features=100_000)
    try:
        weights_NV = vectorizer.fit_transform(texts)
    except ValueError as error:
        raise InputError(f"no text to fit TF-IDF on ({told(error)}); check --fields") from error
    possible = min(n_dims, *weights_NV.shape)
    if possible < n_dims:
        log.info("%s dimensions instead of %s: no more in %s texts of %s words", possible, n_dims, *weights_NV.shape)
    svd = TruncatedSVD(possible, random_state=seed).fit(weights_NV)
    log.info(
        "TF-IDF: %s words, %s dimensions keep %.1f %% of the variance",
        weights_NV.shape[1],
        possible,
        100 * svd.explained_variance_ratio_.sum(),
    )
    return vectorizer.get_feature_names_out().tolist(), vectorizer.idf_, svd.components_


def save_tfidf(folder: Path, words: Sequence[str], idf_V: "np.ndarray", components_DV: "np.ndarray") -> None:
    """Keep a fitted TF-IDF encoder as JSON and safetensors."""
    import numpy as np
    from safetensors.numpy import save

    with whole_path(folder) as temporary:
        temporary.mkdir()
        (temporary / VOCABULARY).write_text(json.dumps(list(words), ensure_ascii=False), encoding="utf-8")
        tensors = {"idf": idf_V.astype(np.float32), "components": np.ascontiguousarray(components_DV, dtype=np.float32)}
        (temporary / WEIGHTS).write_bytes(save(tensors))  # save_file would give the rights 0600, whatever the umask


def load_tfidf(folder: Path) -> tuple[list[str], "np.ndarray", "np.ndarray"]:
    """What save_tfidf kept."""
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    expected = "expected a TF-IDF encoder saved by rq.text2emb"
    words = read_json(folder / VOCABULARY, expected=f"the words of {expected.removeprefix('expected ')}")
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        raise InputError(f"{folder / VOCABULARY}: holds {shown(words)}; {expected}")
    if len(set(words)) < len(words):
        raise InputError(f"{folder / VOCABULARY}: a word stands twice; {expected}")
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        raise InputError(f"{folder / WEIGHTS}: {told(error)}; {expected}") from error
    idf_V, components_DV = (tensors.get(name, np.empty(0)) for name in ("idf", "components"))
    for name, array, shape in (
        ("idf", idf_V, (len(words),)),
        ("components", components_DV, (len(components_DV), len(words))),
    ):
        if array.dtype != np.float32 or array.shape != shape or not array.size or not np.isfinite(array).all():
            raise InputError(
                f"{folder / WEIGHTS}: {name} is {array.dtype} {shown(array.shape)}, and not finite numbers for each of "
                f"{len(words):,} words; {expected}"
            )
    return words, idf_V, components_DV


def embed_with_tfidf(
    texts: Sequence[str], rows_ND: "np.ndarray", *, words: list[str], idf_V: "np.ndarray", components_DV: "np.ndarray"
) -> None:
    """Fill `rows_ND` with the embeddings of the texts."""
    import numpy as np
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(sublinear_tf=True, vocabulary=words)
    vectorizer.idf_ = idf_V
    components_DV = components_DV.astype(np.float32)
    for start in range(0, len(texts), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        rows_ND[part] = vectorizer.transform(texts[part]).astype(np.float32) @ components_DV.T


def pool(hidden_BTD: "torch.Tensor", mask_BT: "torch.Tensor", pooling: str) -> "torch.Tensor":
    """(B, D): the last token that is no padding, the mean of those, or the first; padding may stand on either side."""
    import torch

    if pooling == "mean":
        weights_BT1 = mask_BT[..., None].to(hidden_BTD.dtype)
        return (hidden_BTD * weights_BT1).sum(1) / weights_BT1.sum(1).clamp_min(1)
    rows = torch.arange(len(hidden_BTD), device=hidden_BTD.device)
    if pooling == "last":
        return hidden_BTD[rows, mask_BT.cumsum(1).argmax(1)]
    return hidden_BTD[rows, mask_BT.argmax(1)]


def usual_pooling(config: object) -> str:
    """What suits a model that says nothing of sentences: last for causal models, mean for the others."""
    causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in getattr(config, "architectures", None) or ())
    return "last" if causal or getattr(config, "is_decoder", False) else "mean"


class HuggingFaceEncoder:
    """A tokenizer and a model that turn texts into rows."""

    def __init__(
        self, name: str, *, pooling: str, max_len: int | None, normalize: bool | None, batch_size: int, device: str
    ) -> None:
        import torch
        from safetensors import SafetensorError
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import cached_file

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
            model = AutoModel.from_pretrained(name, dtype=dtype, trust_remote_code=False)
            self.folder = Path(cached_file(name, "config.json")).parent
        except BROKEN_ENCODER + (SafetensorError,) as error:
            first_line = Exception((str(error).strip().splitlines() or [type(error).__name__])[0])
            raise InputError(
                f"--encoder {one_line(name)[:MOST_NAMED]}: {told(first_line)} "
                "Expected tfidf, a folder, or a Hugging Face name"
            ) from error
        config = model.config
        self.model = (model.get_encoder() if getattr(config, "is_encoder_decoder", False) else model).to(device).eval()
        self.n_dims = config.hidden_size
        own = own_settings(name, pooling_asked=pooling == "auto")
        if own.not_applied:
            log.warning("%s: its %s is not applied; rows are as they are before it", name, ", ".join(own.not_applied))
        self.pooling = (own.pooling or usual_pooling(config)) if pooling == "auto" else pooling
        self.normalize = own.normalize if normalize is None else normalize
        max_len = max_len or own.max_len or USUAL_LENGTH
        self.max_len = min(
            max_len, self.tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or max_len
        )
        self.batch_size, self.device = batch_size, device
        self.tokenizer.padding_side = "right"  # absolute positions then start at 0, and a causal model never sees padding
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.convert_ids_to_tokens(0)

    def embed(self, texts: Sequence[str]) -> tuple["np.ndarray", int]:
        """float32 (N, D) of texts that are not empty, and how many were truncated to max_len tokens."""
        import numpy as np
        import torch

        lengths = [len(ids) for ids in self.tokenizer(list(texts), verbose=False)["input_ids"]]
        longest_first = sorted(range(len(texts)), key=lambda i: -lengths[i])
        rows_ND = np.empty((len(texts), self.n_dims), np.float32)  # longest_first holds every text once
        for start in range(0, len(texts), self.batch_size):
            which = longest_first[start : start + self.batch_size]
            tokens = self.tokenizer(
                [texts[i] for i in which], truncation=True, max_length=self.max_len, padding=True, return_tensors="pt"
            ).to(self.device)
            with torch.inference_mode():
                hidden_BTD = self.model(
                    input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
                ).last_hidden_state
                rows_ND[which] = pool(hidden_BTD.float(), tokens["attention_mask"], self.pooling).cpu().numpy()
        return rows_ND, sum(length > self.max_len for length in lengths)


def embed_shard(texts: Sequence[str], encoder: HuggingFaceEncoder) -> tuple["np.ndarray", int]:
    """Rows (R, D) of the texts of a shard, zeros for those that are empty, and how many texts were truncated."""
    import numpy as np

    filled = [i for i, text in enumerate(texts) if text]
    rows_RD = np.zeros((len(texts), encoder.n_dims), np.float32)
    truncated = 0
    if filled:
        rows_RD[filled], truncated = encoder.embed([texts[i] for i in filled])
    if encoder.normalize:
        normalise_rows(rows_RD)
    return rows_RD, truncated


def normalise_rows(rows_ND: "np.ndarray") -> None:
    """Divide each row by its length in place; rows of zeros stay."""
    import numpy as np

    for start in range(0, len(rows_ND), ROWS_AT_ONCE):
        part = rows_ND[start : start + ROWS_AT_ONCE]
        part /= np.maximum(np.linalg.norm(part, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def write_tfidf(texts: Sequence[str], flags: argparse.Namespace) -> None:
    """Fit or load TF-IDF, write the embeddings, and a newly fitted encoder beside them."""
    import numpy as np

    folder = flags.output.with_suffix(".tfidf")
    if flags.encoder == "tfidf":
        if folder.exists() and not flags.overwrite:
            raise InputError(
                f"{folder} exists; give it as --encoder to embed alike, --overwrite to fit anew, or another --output"
            )
        fitted = fit_tfidf(texts, n_dims=flags.dim, seed=flags.seed)
    else:
        fitted = load_tfidf(Path(flags.encoder))
    words, idf_V, components_DV = fitted
    with whole_path(flags.output) as temporary:
        rows_ND = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=(len(texts), len(components_DV)))
        reserve(temporary)
        embed_with_tfidf(texts, rows_ND, words=words, idf_V=idf_V, components_DV=components_DV)
        unknown = sum(bool(text) for text, row_D in zip(texts, rows_ND, strict=True) if not row_D.any())
        if unknown:
            log.info("%s items have text, but no word of the vocabulary: their rows are zero", f"{unknown:,}")
        if flags.normalize:
            normalise_rows(rows_ND)
        rows_ND.flush()
        if flags.encoder == "tfidf":
            save_tfidf(folder, words, idf_V, components_DV)
            log.info("wrote %s: give it as --encoder to embed new items alike", folder)
        encoder = folder if flags.encoder == "tfidf" else Path(flags.encoder)
        origin = Origin(
            encoder=encoder.name,
            encoder_sha256=sha256_of([encoder / VOCABULARY, encoder / WEIGHTS]),
            pooling="",
            max_len=0,
            normalize=bool(flags.normalize),
            fields=flags.fields,
        )
        write_record(flags.output, origin, texts, rows_ND)


def write_model(texts: Sequence[str], flags: argparse.Namespace) -> None:
    """Embed with a Hugging Face encoder, each process its share of the shards, which become one file at the end."""
    import numpy as np
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list
    from tqdm import tqdm

    state = PartialState(cpu=flags.device == "cpu")
    encoder = HuggingFaceEncoder(
        flags.encoder,
        pooling=flags.pooling,
        max_len=flags.max_len,
        normalize=flags.normalize,
        batch_size=flags.batch_size,
        device=str(state.device),
    )
    log.info(
        "%s: %s pooling, up to %s tokens, rows %s, %s processes",
        flags.encoder,
        encoder.pooling,
        encoder.max_len,
        "of length 1" if encoder.normalize else "as long as they are",
        state.num_processes,
    )
    shards = Shards(shards_folder(flags.output), n_items=len(texts), n_dims=encoder.n_dims)
    missing: list[int] = []
    if state.is_main_process:
        origin = Origin(
            encoder=Path(flags.encoder).name if Path(flags.encoder).exists() else flags.encoder,
            encoder_sha256=sha256_of_weights(encoder.folder),
            pooling=encoder.pooling,
            max_len=encoder.max_len,
            normalize=encoder.normalize,
            fields=flags.fields,
        )
        decides = {"batch_size": flags.batch_size, "device": state.device.type, "texts": sha256_of_texts(texts)}
        missing = shards.open({**asdict(origin), **decides})
        if kept := len(shards.parts()) - len(missing):
            log.info("%s of %s shards are kept of a run that was stopped", f"{kept:,}", f"{len(shards.parts()):,}")
    missing = broadcast_object_list([missing])[0]
    mine = missing[state.process_index :: state.num_processes]
    for number in tqdm(mine, desc="embed", unit=" shards", disable=None if state.is_main_process else True):
        shards.write(number, *embed_shard(texts[shards.parts()[number]], encoder))
    state.wait_for_everyone()
    if not state.is_main_process:
        return
    truncated = 0
    with whole_path(flags.output) as temporary:
        shape = (len(texts), encoder.n_dims)
        rows_ND = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape)
        reserve(temporary)
        for part, rows_RD, cut in shards:
            rows_ND[part] = rows_RD
            truncated += cut
        rows_ND.flush()
        log.info(
            "%s of %s texts were longer than %s tokens and cut there",
            f"{truncated:,}",
            f"{len(texts):,}",
            encoder.max_len,
        )
        write_record(flags.output, origin, texts, rows_ND)
    shards.remove()


def shards_folder(output: Path) -> Path:
    """X.npy -> .X.npy.shards beside it."""
    return output.with_name(f".{output.name}.shards")


@command_line.command("text2emb")
def main(argv: list[str] | None = None) -> None:
    """Items -> texts -> embeddings; several processes with --num_processes, several machines with torchrun."""
    parser = command_line.parser(
        "text2emb",
        __doc__,
        shared=("item_file", "output", "seed", "device", "overwrite"),
        required=("item_file",),
    )
    add = parser.add_argument
    add(
        "--encoder",
        default="tfidf",
        help="tfidf, a TF-IDF folder made by an earlier run, or a Hugging Face name or folder (tfidf)",
    )
    add(
        "--fields",
        default=",".join(TEXT_FIELDS),
        help=f"item fields that make the text, in order ({','.join(TEXT_FIELDS)})",
    )
    add("--dim", type=command_line.at_least(1), default=256, help="dimensions of TF-IDF embeddings (256)")
    add(
        "--pooling",
        choices=("auto", "last", "mean", "first"),
        default="auto",
        help="which hidden states make the row (auto: as the encoder's own files say, or by its kind)",
    )
    add(
        "--max_len",
        type=command_line.at_least(1),
        help="tokens of a text at most; longer ones are cut (the encoder's own max_seq_length, or 512)",
    )
    add("--batch_size", type=command_line.at_least(1), default=32, help="texts of one forward pass, a process (32)")
    add(
        "--normalize",
        type=command_line.switch,
        nargs="?",
        const=True,
        help="scale rows to length 1 (where the encoder's own files say so)",
    )
    add(
        "--num_processes",
        type=command_line.at_least(1, most=1024),
        default=1,
        help="processes on this machine, each on a GPU of its own where there are some; the rows are those of one (1)",
    )
    flags = parser.parse_args(argv)
    flags.output = flags.output or default_output(flags.item_file, flags.encoder)
    if flags.output.suffix != ".npy":
        raise InputError(f"--output {flags.output}: give it a name that ends in .npy")
    command_line.refuse_to_overwrite(flags, outputs=("output",))
    check_output(record_file(flags.output))
    if flags.encoder == "tfidf":
        check_output(flags.output.with_suffix(".tfidf"), folder_of=(VOCABULARY, WEIGHTS))
    is_tfidf = flags.encoder == "tfidf" or (Path(flags.encoder) / VOCABULARY).exists()
    if flags.num_processes > 1 and is_tfidf:
        raise InputError(f"--num_processes {flags.num_processes}: TF-IDF runs in one process; leave the flag out")
    if flags.num_processes > 1 and "WORLD_SIZE" not in os.environ:
        run_in_processes("rq.text2emb", argv, count=flags.num_processes)
        return

    fields = [field for field in flags.fields.split(",") if field]
    flags.fields = ",".join(fields)
    items = read_items(flags.item_file)
    texts = [item_text(item, fields) for item in items]
    empty = sum(not text for text in texts)
    log.info("%s items, %s with no text in %s (their rows are zero)", f"{len(texts):,}", f"{empty:,}", ", ".join(fields))
    if empty == len(texts):
        raise InputError(f"{flags.item_file}: no item has text in {', '.join(fields)}; check --fields")
    if is_tfidf:
        command_line.single_process("text2emb --encoder tfidf")
        write_tfidf(texts, flags)
    else:
        from rq.quantizers import choose_device

        flags.device = choose_device(flags.device)
        write_model(texts, flags)
    log.info("wrote %s", flags.output)


if __name__ == "__main__":
    main()

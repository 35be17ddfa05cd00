"""Times constrained beam search: ours, and transformers' generate with prefix_allowed_tokens_fn, on the same test rows.

    python tests/benchmarks/bench_evaluate.py --base_model run/final_checkpoint --rows 64 --rounds 2

Both run in one process, in turns, over random rows of the Industrial test set; ours from token ids to SIDs with its
table and the template's keys and values built anew each round, theirs with the allowed tokens in a dictionary from
written tokens to next ones. Also says how many lists are the same, SID for SID, and by how much their scores differ.
Writes a Markdown result where --output says.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

from circumstances import circumstances

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
AMAZON = ROOT.parent / "shared" / "data" / "amazon" / "Industrial_and_Scientific"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", required=True)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--num_beams", type=int, default=50)
    parser.add_argument("--batch_size", type=int, default=32, help="rows per batch of ours")
    parser.add_argument("--generate_batch_size", type=int, default=4, help="rows per batch of generate")
    parser.add_argument("--output", default="")
    return parser.parse_args()


def main() -> None:
    flags = arguments()
    import numpy as np
    import torch

    from evaluate import own_device
    from sid_sft.catalogue import read_catalogue
    from sid_sft.checkpoint import load_model, load_tokenizer, read_wording
    from sid_sft.interactions import read_rows
    from sid_sft.recommend.evaluator import Evaluator, sampled

    device = own_device()
    tokenizer = load_tokenizer(flags.base_model, trust_remote_code=False)
    model = load_model(flags.base_model, trust_remote_code=False)
    model = (model.float() if device.type == "cpu" else model).to(device).eval()
    catalogue = read_catalogue(Path(f"{AMAZON}.index.json"), None)
    rows = sampled(list(read_rows(Path(f"{AMAZON}.test.csv"), catalogue)), flags.rows, 42)
    wording = read_wording(Path(flags.base_model))
    evaluator = Evaluator(
        tokenizer, catalogue, wording.prompts, rows, num_beams=flags.num_beams, batch_size=flags.batch_size
    )
    evaluator.decoder(model)  # the trial that chooses the decoder is made once a run

    sids_of_all = [tuple(row[row >= 0].tolist()) for row in evaluator.sids]
    allowed = defaultdict(set)
    for sid in sids_of_all:
        for level, token in enumerate(sid):
            allowed[sid[:level]].add(token)
    allowed = {written: sorted(tokens) for written, tokens in allowed.items()}
    number = {sid: place for place, sid in enumerate(sids_of_all)}
    depth, pad = max(map(len, sids_of_all)), tokenizer.eos_token_id

    @torch.no_grad()
    def generate() -> tuple[np.ndarray, np.ndarray]:
        found = np.full((len(rows), flags.num_beams), -1)
        scores = np.zeros((len(rows), flags.num_beams))
        by_length = np.argsort([len(prompt) for prompt in evaluator.prompts], kind="stable")
        for start in range(0, len(rows), flags.generate_batch_size):
            batch = by_length[start : start + flags.generate_batch_size]
            prompts = [evaluator.prompts[i].tolist() for i in batch]
            size = max(map(len, prompts))
            out = model.generate(
                torch.tensor([[pad] * (size - len(prompt)) + prompt for prompt in prompts], device=device),
                attention_mask=torch.tensor(
                    [[0] * (size - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device
                ),
                num_beams=flags.num_beams,
                num_return_sequences=flags.num_beams,
                max_new_tokens=depth,
                length_penalty=0.0,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=pad,
                prefix_allowed_tokens_fn=lambda _, written, size=size: allowed.get(tuple(written[size:].tolist()), [pad]),
                return_dict_in_generate=True,
                output_scores=True,
            )
            sids = [number.get(tuple(tokens), -1) for tokens in out.sequences[:, size:].tolist()]
            found[batch] = np.array(sids).reshape(len(batch), -1)
            scores[batch] = out.sequences_scores.float().cpu().numpy().reshape(len(batch), -1)
        return found, scores

    def ours() -> tuple[np.ndarray, np.ndarray]:
        found = evaluator.recommend(model)
        return found.sid, found.score

    seconds = defaultdict(list)
    results = {}
    for _ in range(flags.rounds):
        for name, contender in (("ours", ours), ("generate", generate)):
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.monotonic()
            results[name] = contender()
            seconds[name].append(time.monotonic() - started)
            sys.stdout.write(f"{name}: {seconds[name][-1]:.2f} s\n")
            sys.stdout.flush()
    (sid, score), (their_sid, their_score) = results["ours"], results["generate"]
    same = int((sid == their_sid).all(1).sum())
    differs = float(np.abs(score - their_score)[their_sid >= 0].max())
    mine, theirs = (statistics.median(seconds[name]) for name in ("ours", "generate"))
    text = RESULT.format(
        circumstances=circumstances(f"{torch.get_num_threads()} threads, on {device.type}"),
        rows=len(rows),
        beams=flags.num_beams,
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        dtype=str(model.dtype).removeprefix("torch."),
        ours=mine,
        ours_rate=len(rows) / mine,
        theirs=theirs,
        theirs_rate=len(rows) / theirs,
        ratio=theirs / mine,
        all_seconds="; ".join(f"{name} {', '.join(f'{s:.2f}' for s in values)}" for name, values in seconds.items()),
        same=same,
        invalid=int((their_sid < 0).sum()),
        differs=differs,
    )
    sys.stdout.write(text)
    if flags.output:
        Path(flags.output).write_text(text)


RESULT = """# Constrained beam search, Industrial test rows

{circumstances}

{rows} rows, {beams} beams, a model of {parameters:.1f} M parameters in {dtype}; the median over the rounds.

| | seconds | rows/s |
| --- | ---: | ---: |
| evaluate.py | {ours:.2f} | {ours_rate:.1f} |
| generate + prefix_allowed_tokens_fn | {theirs:.2f} | {theirs_rate:.1f} |

Ratio **{ratio:.1f} x**. All rounds, seconds: {all_seconds}.
The same list, SID for SID, in {same} of {rows} rows; the largest difference of two scores is {differs:.1e};
{invalid} of generate's beams are no SID.
"""


if __name__ == "__main__":
    main()

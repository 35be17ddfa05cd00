"""What serving needs to know: generate with the exported files against our own beams, and what a beam width is worth.

    python tests/benchmarks/bench_serving.py --base_model run/final_checkpoint

Exports the checkpoint to a temporary folder, as --export_serving does. Over random Industrial test rows, transformers'
generate with LegalSids, of the exported files alone, is compared with our beams, SID for SID and score for score. Over
random valid rows, each width is timed and measured. Prints a Markdown result and writes it where --output says.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from pathlib import Path

from circumstances import circumstances

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
AMAZON = ROOT.parent / "shared" / "data" / "amazon" / "Industrial_and_Scientific"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", required=True)
    parser.add_argument("--rows", type=int, default=200, help="test rows on which generate is compared with our beams")
    parser.add_argument("--num_beams", type=int, default=20, help="there")
    parser.add_argument("--widths", default="10,20,50")
    parser.add_argument("--width_rows", type=int, default=500, help="valid rows on which the widths are measured")
    parser.add_argument("--rounds", type=int, default=2, help="of each width; the faster one counts")
    parser.add_argument("--batch_size", type=int, default=32, help="rows per batch of ours")
    parser.add_argument("--generate_batch_size", type=int, default=8, help="rows per batch of generate")
    parser.add_argument("--output", default="")
    return parser.parse_args()


def main() -> None:
    flags = arguments()
    import torch
    import transformers

    import evaluate
    from sid_sft.catalogue import read_catalogue
    from sid_sft.checkpoint import read_wording
    from sid_sft.interactions import read_rows
    from sid_sft.recommend.evaluator import Evaluator, measurable, sampled

    with tempfile.TemporaryDirectory() as temporary:
        serving = Path(temporary) / "serving"
        files = ["--sid_index_path", f"{AMAZON}.index.json", "--item_meta_path", f"{AMAZON}.item.json"]
        assert evaluate.main(["--base_model", flags.base_model, *files, "--export_serving", str(serving)]) == 0
        spec = importlib.util.spec_from_file_location("legal_sids", serving / "legal_sids.py")
        legal_sids = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(legal_sids)
        trie = legal_sids.SidTrie.load(serving / "sid_trie.npz")
        model = transformers.AutoModelForCausalLM.from_pretrained(serving / "model", dtype=torch.float32).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(serving / "model", padding_side="left")
    catalogue, wording = read_catalogue(Path(f"{AMAZON}.index.json"), None), read_wording(Path(flags.base_model))

    def evaluator(part: str, count: int, num_beams: int) -> tuple[list, Evaluator]:
        rows = sampled(list(read_rows(Path(f"{AMAZON}.{part}.csv"), catalogue)), count, 42)
        settings = {"num_beams": num_beams, "batch_size": flags.batch_size}
        return rows, Evaluator(tokenizer, catalogue, wording.prompts, rows, **settings)

    def generated(rows: list) -> list[tuple[list[int], list[float]]]:
        """The SIDs and scores of each row, from generate."""
        found = []
        for start in range(0, len(rows), flags.generate_batch_size):
            part = rows[start : start + flags.generate_batch_size]
            lines = ["".join(f"{''.join(catalogue.items[place].sid)}\n" for place in row.history) for row in part]
            texts = [wording.prompts["sid_sid"].replace("{history}", text) for text in lines]
            inputs = tokenizer(texts, padding=True, return_tensors="pt")
            size = inputs.input_ids.shape[1]
            output = model.generate(
                **inputs,
                logits_processor=[legal_sids.LegalSids(trie, prompt_len=size)],
                num_beams=flags.num_beams,
                num_return_sequences=flags.num_beams,
                max_new_tokens=trie.depth,
                length_penalty=0.0,
                output_scores=True,
                return_dict_in_generate=True,
            )
            sids = [trie.sid_of(tokens) for tokens in output.sequences[:, size:].tolist()]
            scores = output.sequences_scores.tolist()
            cuts = range(0, len(sids), flags.num_beams)
            found += [(sids[i : i + flags.num_beams], scores[i : i + flags.num_beams]) for i in cuts]
        return found

    rows, ours = evaluator("test", flags.rows, flags.num_beams)
    expected = ours.recommend(model)
    started = time.perf_counter()
    theirs = generated(rows)
    generate_s = time.perf_counter() - started
    mine = zip(expected.sid.tolist(), expected.score.tolist(), strict=True)
    pairs = [(*found, *row) for found, row in zip(theirs, mine, strict=True)]
    same = sum(sids == own for sids, _, own, _ in pairs)
    sets = sum(set(sids) == set(own) for sids, _, own, _ in pairs)
    furthest = max(abs(a - b) for _, scores, _, own in pairs for a, b in zip(scores, own, strict=True))

    lines = []
    for width in map(int, flags.widths.split(",")):
        rows, ours = evaluator("valid", flags.width_rows, width)
        seconds = []
        for _ in range(flags.rounds):
            started, processor_started = time.perf_counter(), time.process_time()
            metrics = ours.metrics(model)
            seconds.append((time.process_time() - processor_started, time.perf_counter() - started))
        busy, wall = min(seconds)
        k = max(k for k in measurable(width) if k <= 10)
        lines.append(f"| {width} | {metrics[f'hr@{k}']:.4f} | {len(rows) / busy:.1f} | {len(rows) / wall:.1f} |")

    report = f"""{circumstances("one thread, model in float32")}
- torch {torch.__version__}, transformers {transformers.__version__}

## generate with LegalSids

{flags.rows} random test rows, {flags.num_beams} beams: the same list, SID for SID, in {same}, the same SIDs in {sets};
the largest difference of two scores is {furthest:.1e}. generate took {generate_s:.0f} s.

## Widths

{flags.width_rows} random valid rows, ours; the faster of {flags.rounds} rounds.

| beams | HR@10 | users/s of processor time | users/s of wall time |
| ---: | ---: | ---: | ---: |
"""
    report += "\n".join(lines) + "\n"
    if flags.output:
        Path(flags.output).write_text(report)
    print(report)


if __name__ == "__main__":
    main()

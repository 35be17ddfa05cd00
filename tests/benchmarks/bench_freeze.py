"""Times freeze mode: the plain recipe, peft's trainable tokens, and the frozen prefix, on the same real examples.

    python tests/benchmarks/bench_freeze.py --examples 512
    python tests/benchmarks/bench_freeze.py --examples 512 --full         # freeze_LLM False: plain recipe and ours
    python tests/benchmarks/bench_freeze.py --examples 256 --shape 0.5b   # random weights of Qwen2.5-0.5B's shape

Each contender runs in a process of its own, one after another, A B C A B C. The plain recipe is the usual one: examples in
random order, micro-batches of 16 padded to a multiple of 8, all logits, a dense gradient (masked in freeze mode), AdamW on
the whole matrix. Optimizer steps are of 512 examples. The examples are those of the first users of the Industrial training
CSV, all five tasks, so that users' windows are as complete as they are in a whole epoch. On a GPU freeze mode runs in
bfloat16. `--profile` shows where the time of a later epoch of ours goes. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from operator import attrgetter
from pathlib import Path

from circumstances import circumstances

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
AMAZON = ROOT.parent / "shared" / "data" / "amazon" / "Industrial_and_Scientific"
STEP = 512
SHAPES = {
    "small": {"hidden_size": 256, "intermediate_size": 896, "num_attention_heads": 4, "vocab_size": 32_768},
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "vocab_size": 151_936},
}
PLAIN_MICRO = {"small": 16, "0.5b": 4}
FREEZE = ("plain", "peft", "ours")
FULL = ("full-plain", "full-ours")  # and full-ours-users


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def prepare(folder: Path, examples: int) -> None:
    """A byte-level BPE of 32,000 trained on the catalogue, and the tokenized examples, on disk for all contenders."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    import data
    import sft

    items = json.loads(Path(f"{AMAZON}.item.json").read_text())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=32_000, special_tokens=["<|end|>"], show_progress=False)
    tokenizer.train_from_iterator((f"{item['title']}\n{item['description']}" for item in items.values()), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    catalogue = data.read_catalogue(Path(f"{AMAZON}.index.json"), Path(f"{AMAZON}.item.json"))
    tokens = sft.token_extender(f"{AMAZON}.index.json").get_new_tokens()
    sft.add_sid_tokens(fast, tokens)
    fast.save_pretrained(folder / "tokenizer")
    dataset = data.build_dataset(
        data.Source(Path(f"{AMAZON}.train.csv")),
        list(data.DEFAULT_TASKS),
        catalogue=catalogue,
        prompts=data.read_prompts(None, "Industrial_and_Scientific"),
        tokenizer=fast,
        cutoff_len=512,
        cache_dir=folder / "cache",
    )
    import numpy as np

    tasks = np.asarray(dataset.with_format("numpy")["task"][:])
    share = examples / len(dataset)
    picks = [np.nonzero(tasks == task)[0] for task in np.unique(tasks)]
    counts = [max(1, round(share * len(members))) for members in picks]
    counts[0] += examples - sum(counts)
    chosen = np.concatenate([members[:count] for members, count in zip(picks, counts, strict=True)])
    dataset.select(chosen).flatten_indices().save_to_disk(folder / "examples")


def contender(name: str, folder: Path, shape: str, epochs: int, profile: bool) -> dict:
    """Trains for some epochs; seconds of each, tokens, peak memory, and the first step's gradient on disk."""
    import numpy as np
    import torch
    from datasets import load_from_disk
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    import sft
    from sid_sft.forward.examples import Examples
    from sid_sft.forward.frozen_prefix import FrozenPrefix
    from sid_sft.forward.plain import PlainForward
    from sid_sft.sid_rows import SidRowAdamW
    from sid_sft.steps import StepSampler

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokens = sft.token_extender(f"{AMAZON}.index.json").get_new_tokens()
    ids = tokenizer.convert_tokens_to_ids(tokens)
    examples = Examples(load_from_disk(folder / "examples"))
    torch.manual_seed(0)
    config = Qwen2Config(
        **SHAPES[shape],
        num_hidden_layers=24,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
    )
    frozen_on_gpu = device == "cuda" and not name.startswith("full")
    model = Qwen2ForCausalLM(config).to(device, torch.bfloat16 if frozen_on_gpu else torch.float32)
    sft.init_rows(model, ids, min(ids), seed=0)
    micro = PLAIN_MICRO[shape]
    sampler = StepSampler(examples, STEP, seed=0)

    def plain_nll(part: np.ndarray) -> torch.Tensor:
        """The usual recipe's loss of a micro-batch, as a sum: right padding to a multiple of 8, every logit."""
        rows = [examples.ids(i) for i in part]
        width = -(-max(map(len, rows)) // 8) * 8
        inputs = np.zeros((len(part), width), dtype=np.int64)
        mask, labels = np.zeros_like(inputs), np.full_like(inputs, -100)
        for b, (i, row) in enumerate(zip(part, rows, strict=True)):
            inputs[b, : len(row)], mask[b, : len(row)] = row, 1
            labels[b, examples.prompt_len[i] : len(row)] = row[examples.prompt_len[i] :]
        batch = {"input_ids": inputs, "attention_mask": mask, "labels": labels}
        loss = model(**{key: torch.from_numpy(value).to(device) for key, value in batch.items()}, use_cache=False).loss
        return loss * int((labels[:, 1:] != -100).sum())

    rows, ours, grouped = None, "ours" in name, name.endswith("users")
    if name == "peft":
        import peft

        model = peft.get_peft_model(model, peft.TrainableTokensConfig(token_indices=ids, target_modules=["embed_tokens"]))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
    elif name in ("plain", "ours", "ours-users"):
        rows = sft.freeze_llm(model, ids, tokens)
        trained = [model.get_input_embeddings().weight] if name == "plain" else rows.masters
        optimizer = SidRowAdamW(rows, lr=1e-3) if ours else torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    else:
        trained = list(model.parameters())
        optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def make_forward() -> FrozenPrefix | PlainForward:
        if name.startswith("full"):
            return PlainForward(model, examples, micro, group_users=grouped)
        return FrozenPrefix(model, rows, examples, micro, cache_bytes=2 * 10**9, group_users=grouped)

    def parts_of(step: list[int]) -> list[np.ndarray]:
        if ours:
            return [part.indices for part in forward.cut(np.array(step))]
        return [np.array(step[i : i + micro]) for i in range(0, len(step), micro)]

    seconds, gradient, losses, peak = [], None, [], None
    profiler = torch.profiler.profile() if profile and name == "ours" else None
    for epoch in range(epochs + (profiler is not None)):
        sampler.set_epoch(epoch)
        steps = list(sampler)
        started = time.perf_counter()
        if ours and epoch == 0:
            forward = make_forward()
        if epoch == epochs:
            peak = peak_memory(device)
            profiler.start()
        for step in steps:
            labels, total = int(examples.labels[step].sum()), 0.0
            for part in parts_of(step):
                nll = forward.nll(part).sum() if ours else plain_nll(part)
                (nll / labels).backward()
                total += nll.detach()
            losses.append(float(total) / labels)
            if gradient is None:
                gradient = [p.grad.detach().float().cpu() for p in trained]
                if name == "plain":
                    gradient = [gradient[0][sorted(ids)]]
                elif name == "peft":
                    gradient = [gradient[0][torch.tensor(ids).argsort()]]
                if name.startswith("full"):
                    gradient = [torch.cat([g.flatten() for g in gradient])]
            optimizer.step()
            optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    torch.save(gradient[0], folder / f"{name}.pt")
    result = {
        "seconds": seconds[:epochs],
        "tokens": int(examples.length.sum()),
        "peak": peak or peak_memory(device),
        "losses": losses,
    }
    if profiler is not None:
        profiler.stop()
        result["profile"] = where_time_goes(profiler)
    if name == "ours":
        result["shares"] = shares(forward, examples, sampler, micro, model)
        result["tail_flop"] = tail_flop(forward, examples, model)
        result["matmul_flop_per_s"] = matmul_rate(model)
    elif name == "full-ours":
        result["padding"] = sum(
            len(part.indices) * int(examples.length[part.indices].max())
            for step in steps
            for part in forward.cut(np.array(step))
        ) / int(examples.length.sum())
    return result


def peak_memory(device: str) -> int:
    """Bytes at the worst moment so far: of a GPU's memory, or of the whole process."""
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def parameters_of(model) -> tuple[int, int]:
    """How many numbers the layers have, and the head."""
    head = model.get_input_embeddings().weight.numel()
    return sum(p.numel() for p in model.parameters()) - head, head


def tail_flop(forward, examples, model) -> float:
    """What a later epoch cannot do without: tails forward and backward to their inputs, their labels through the head."""
    backbone, head = parameters_of(model)
    return 4.0 * (
        backbone * int(forward.plan.tail_len.sum()) + head * int((examples.labels - forward.plan.static_labels).sum())
    )


def matmul_rate(model) -> float:
    """FLOP/s of a large matrix product in the model's dtype on its device, the best of five."""
    import torch

    size = 8192 if model.device.type == "cuda" else 2048
    left, right = torch.randn(2, size, size, device=model.device).to(model.dtype)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        left @ right
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def where_time_goes(profiler, top: int = 12) -> list[str]:
    """The operations that take the most time themselves, with their shares of it."""
    events = profiler.key_averages()
    on_gpu = any(event.self_device_time_total for event in events)
    spent = attrgetter("self_device_time_total" if on_gpu else "self_cpu_time_total")
    total = sum(map(spent, events))
    events = sorted(events, key=spent, reverse=True)[:top]
    return [f"{100 * spent(event) / total:5.1f} %  {event.count:>7,} x  {event.key}" for event in events]


def shares(forward, examples, sampler, micro: int, model) -> dict:
    """What the tokens are, and the ratio of arithmetic that follows from it.

    Per token a forward costs 1 and its backward 1 more (to the inputs only); the plain recipe's head costs 3, for it has a
    dense gradient of its own.
    """
    import numpy as np

    total = int(examples.length.sum())
    order = np.concatenate([np.array(step) for step in sampler])
    padded = sum(
        len(part) * (-(-int(examples.length[part].max()) // 8) * 8)
        for part in (order[i : i + micro] for i in range(0, len(order), micro))
    )
    backbone, head = parameters_of(model)
    tail, own = int(forward.plan.tail_len.sum()), int(forward.plan.own_len.sum())
    in_trees = int(forward.plan.parts.nodes.sum())
    static, labels = int(forward.plan.static_labels.sum()), int(examples.labels.sum())
    plain = padded * (2 * backbone + 3 * head)
    later = tail_flop(forward, examples, model) / 2
    first = later + in_trees * backbone + static * head
    return {
        "template": int(forward.plan.parts.totals[1]) / total,
        "own_prefix": own / total,
        "tail": tail / total,
        "labels": labels / total,
        "own_prefix_in_trees": in_trees / total,
        "padding": padded / total,
        "arithmetic_ratio_epoch1": plain / first,
        "arithmetic_ratio_later": plain / later,
    }


def run_contender(name: str, folder: Path, options: argparse.Namespace) -> dict:
    epochs = options.epochs if name.startswith("ours") else 1  # the others' epochs are all alike
    command = [sys.executable, __file__, "--contender", name, "--folder", str(folder)]
    command += ["--shape", options.shape, "--epochs", str(epochs)] + ["--profile"] * options.profile
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def relative_error(folder: Path, name: str, reference: str) -> float:
    import torch

    found, wanted = (torch.load(folder / f"{which}.pt", weights_only=True) for which in (name, reference))
    return float((found - wanted).norm() / wanted.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=3, help="epochs of ours: the first and the later ones")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--full", action="store_true", help="freeze_LLM False instead")
    parser.add_argument("--users", action="store_true", help="also ours with --group_users: a user's tails as one tree")
    parser.add_argument("--profile", action="store_true", help="where the time of a later epoch of ours goes")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        say(json.dumps(contender(options.contender, options.folder, options.shape, options.epochs, options.profile)))
        return
    import datasets

    names = FULL if options.full else FREEZE
    if options.users:
        names += (f"{names[-1]}-users",)
    say(circumstances())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        datasets.disable_progress_bars()
        prepare(folder, options.examples)
        runs: dict[str, list[dict]] = {contestant: [] for contestant in names}
        for number in range(options.rounds):
            for contestant in names:
                runs[contestant].append(run_contender(contestant, folder, options))
                latest = runs[contestant][-1]
                say(
                    f"round {number + 1}: {contestant:10} epochs {' '.join(f'{s:.1f}' for s in latest['seconds'])} s, "
                    f"peak {latest['peak'] / 2**30:.2f} GiB, first loss {latest['losses'][0]:.6f}"
                )
        errors = {contestant: relative_error(folder, contestant, names[0]) for contestant in names[1:]}

    def epoch_s(contestant: str, *, later: bool = False) -> float:
        """The mean over rounds of the first epoch's seconds, or of the later ones'."""
        picks = [run["seconds"][1:] if later and len(run["seconds"]) > 1 else run["seconds"][:1] for run in runs[contestant]]
        return sum(map(sum, picks)) / sum(map(len, picks))

    tokens = runs[names[0]][0]["tokens"]
    say(f"\n{'':12}{'epoch 1':>10}{'later':>10}{'tokens/s':>12}{'later':>10}{'peak GiB':>10}{'gradient error':>16}")
    for contestant in names:
        first, later = epoch_s(contestant), epoch_s(contestant, later=True)
        peak = max(run["peak"] for run in runs[contestant]) / 2**30
        error = f"{errors[contestant]:.1e}" if contestant in errors else "-"
        speed = f"{tokens / first:>12,.0f}{tokens / later:>10,.0f}"
        say(f"{contestant:12}{first:>9.1f}s{later:>9.1f}s{speed}{peak:>10.2f}{error:>16}")
    last = "full-ours" if options.full else "ours"
    summary = {
        "ratio_epoch1": round(epoch_s(names[0]) / epoch_s(last), 2),
        "ratio_later": round(epoch_s(names[0]) / epoch_s(last, later=True), 2),
        "memory_ratio": round(max(r["peak"] for r in runs[last]) / max(r["peak"] for r in runs[names[0]]), 3),
        "grad_rel_err": errors[last],
        "tokens_per_s": {contestant: round(tokens / epoch_s(contestant)) for contestant in names},
        "tokens_per_s_later": round(tokens / epoch_s(last, later=True)),
        "examples": options.examples,
        "shape": options.shape,
    }
    if options.users:
        summary["ratio_epoch1_users"] = round(epoch_s(names[0]) / epoch_s(names[-1]), 2)
        summary["ratio_later_users"] = round(epoch_s(names[0]) / epoch_s(names[-1], later=True), 2)
    if not options.full:
        run = runs["ours"][-1]
        summary["shares"] = {key: round(value, 3) for key, value in run["shares"].items()}
        say("\nshares of tokens: " + ", ".join(f"{key} {value}" for key, value in summary["shares"].items()))
        reached = run["tail_flop"] / epoch_s("ours", later=True)
        summary["share_of_matmul_rate"] = round(reached / run["matmul_flop_per_s"], 3)
        say(
            f"tails of a later epoch: {run['tail_flop'] / 1e9:,.0f} GFLOP at {reached / 1e9:,.0f} GFLOP/s, "
            f"{summary['share_of_matmul_rate']:.0%} of a large matrix product's {run['matmul_flop_per_s'] / 1e9:,.0f}"
        )
        if options.profile:
            say("a later epoch of ours, by operation:\n" + "\n".join(run["profile"]))
    else:
        summary["padding"] = round(runs["full-ours"][0]["padding"], 3)
        say(f"\nours computes {summary['padding']} tokens for each of the examples'")
    say(json.dumps(summary))


if __name__ == "__main__":
    main()

"""Peak memory of each process of a run, to its very end, for results/sharded.md:

python tests/benchmarks/bench_sharded.py make output/sharded          # the demo's shop and a random Llama of 308 M numbers
python tests/benchmarks/bench_sharded.py train FLAGS OF sft.py
python -m torch.distributed.run --standalone --nproc_per_node 2 tests/benchmarks/bench_sharded.py train FLAGS OF sft.py
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def make(folder: Path) -> None:
    import torch
    from conftest import byte_bpe
    from transformers import LlamaConfig, LlamaForCausalLM

    from sid_sft import demo
    from sid_sft.tasks import PROMPTS

    folder.mkdir(parents=True, exist_ok=True)
    demo.write_files(folder, seed=1)
    tokenizer = byte_bpe([*demo.pretraining_texts(1), *PROMPTS.values()])
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 16}
    ends = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes, **ends))
    print(f"{sum(weight.numel() for weight in model.parameters()):,} numbers in {model.dtype}")
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")


def train(arguments: list[str]) -> int:
    import sft

    code = sft.main(arguments)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"process {os.environ.get('RANK', '0')}: peak {peak / 2**30:.2f} GiB", flush=True)
    return code


if __name__ == "__main__":
    if sys.argv[1:2] == ["make"]:
        make(Path(sys.argv[2]))
    else:
        sys.exit(train(sys.argv[2:]))

"""What --export_serving leaves for an inference server: legal tokens alone, and the scores of our own beams."""

import abc
import ast
import dataclasses
import enum
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
import textwrap
import types
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from stores import FIXED, MIXED, arguments_of, catalogue_of, sequences_of, shop_rows, table_of, write_store
from test_recommend_file import refused
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import evaluate
from sid_sft.recommend.evaluator import Evaluator
from sid_sft.serving import export
from sid_sft.serving.legal_sids import LegalSids, RequestLegalSids, SglangLegalSids, SidTrie, VllmLegalSids

MODULE = ROOT / "sid_sft" / "serving" / "legal_sids.py"
VOCABULARY = 12
END = 0


def trie_of(sids: list[tuple[int, ...]], **changes: int) -> SidTrie:
    trie = table_of(sequences_of(sids, END))
    numbers = {"depth": trie.depth, "end_id": END, "prompt_ends_with_text": 1, "format": 1, **changes}
    arrays = {name: getattr(trie, name).long().numpy() for name in ("start", "token", "leaf")}
    return SidTrie(arrays | {name: np.array(value) for name, value in numbers.items()})


SIDS = [(1, 5), (1, 6), (2, 5), (3,), (3, 7), (4, 5, 6)]  # (3) begins (3, 7): both end with the end token
LEGAL = {
    (): {1, 2, 3, 4},
    (1,): {5, 6},
    (2,): {5},
    (3,): {END, 7},
    (3, 7): {END},
    (4, 5): {6},
    **dict.fromkeys([(1, 5), (3, END), (3, 7, END), (4, 5, 6), (1, 5, END, END)], {END}),
    **dict.fromkeys([(9,), (1, 7), (5,), (11, 11), (1, 9, 9)], {END}),  # no beginning of a SID
}
FREE = {(1, 5), (3, END), (3, 7, END), (4, 5, 6), (1, 5, END, END), (9,), (1, 7), (5,), (11, 11), (1, 9, 9)}


# ---------------------------------------------------------------------------------------------- the trie


def test_behind_every_beginning_of_a_sid_its_next_tokens_alone_keep_their_scores():
    trie = trie_of(SIDS)
    for written, legal in LEGAL.items():
        scores = torch.arange(VOCABULARY, dtype=torch.float32) - 20
        masked = trie.mask(scores.clone()[None], [list(written)])[0]
        assert {int(token) for token in masked.isfinite().nonzero()} == legal, written
        expected = [0.0] if written in FREE else [float(scores[token]) for token in sorted(legal)]
        assert masked[sorted(legal)].tolist() == expected, written


def test_rows_of_different_lengths_are_masked_as_each_alone():
    trie, scores = trie_of(SIDS), torch.randn(len(LEGAL), VOCABULARY)
    together = trie.mask(scores.clone(), [list(written) for written in LEGAL])
    alone = [trie.mask(row.clone()[None], [list(written)])[0] for row, written in zip(scores, LEGAL, strict=True)]
    assert torch.equal(together, torch.stack(alone))


def test_generated_tokens_name_their_sid_and_nothing_else_does():
    trie = trie_of(SIDS)
    assert [trie.sid_of(sequences_of(SIDS, END)[number]) for number in range(6)] == [0, 1, 2, 3, 4, 5]
    assert trie.sid_of([1, 5, END, END]) == 0
    assert [trie.sid_of(tokens) for tokens in ([], [3], [4, 5], [9], [1, 7], [3, 7])] == [-1] * 6


def test_a_file_of_another_format_is_refused(tmp_path):
    np.savez(tmp_path / "other.npz", start=np.array([1]))
    with pytest.raises(ValueError, match="is no trie of format 1; write it anew"):
        SidTrie.load(tmp_path / "other.npz")


def test_the_module_needs_numpy_and_torch_alone():
    tree = ast.parse(MODULE.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names == {"numpy", "torch"}


# ---------------------------------------------------------------------------------------------- the export


@pytest.fixture(scope="module", params=["fixed", "mixed"])
def served(request, tmp_path_factory) -> Path:
    """A store with serving/, written by the command; SIDs of one depth, or of several."""
    folder = write_store(tmp_path_factory.mktemp("served"), FIXED if request.param == "fixed" else MIXED)
    base = GenerationConfig(do_sample=True, temperature=0.6, repetition_penalty=1.3, eos_token_id=[0, 5], bos_token_id=2)
    base.save_pretrained(folder / "model")
    (folder / "model" / "sid_rows.safetensors").write_bytes(b"no weights")
    (folder / "model" / "evaluation").mkdir()
    assert evaluate.main(arguments_of(folder, export_serving=folder / "serving")) == 0
    return folder


def load(path: Path) -> types.ModuleType:
    """A module from a file, as a server finds it in its PYTHONPATH."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_export_has_the_model_the_catalogue_and_the_module(served):
    folder = served / "serving"
    assert sorted(path.name for path in folder.iterdir()) == ["legal_sids.py", "model", "sid_trie.npz", "sids.json"]
    model = {path.name for path in (folder / "model").iterdir()}
    assert {"config.json", "model.safetensors", "prompts.json", "tokenizer.json"} <= model
    assert not model & {"sid_rows.safetensors", "evaluation"}, "no part of the model"
    weights = [served / "model" / "model.safetensors", folder / "model" / "model.safetensors"]
    assert os.path.samefile(*weights)
    assert (folder / "legal_sids.py").read_text() == MODULE.read_text()
    sids = json.loads((folder / "sids.json").read_text())
    catalogue = json.loads((served / "X.index.json").read_text())
    assert {item["id"]: sid for sid, items in sids.items() for item in items} == {
        item: "".join(sid) for item, sid in catalogue.items()
    }
    tokenizer, trie = AutoTokenizer.from_pretrained(folder / "model"), SidTrie.load(folder / "sid_trie.npz")
    ids = [tokenizer(sid)["input_ids"] for sid in sids]
    sequences = sequences_of([tuple(row) for row in ids], tokenizer.eos_token_id)
    assert [trie.sid_of(row) for row in sequences] == list(range(len(sids)))
    assert trie.prompt_ends_with_text


def test_what_the_checkpoint_says_of_sampling_and_penalties_is_not_served(served):
    found = GenerationConfig.from_pretrained(served / "serving" / "model").to_diff_dict()
    found.pop("transformers_version", None)
    assert {name: value for name, value in found.items() if not name.startswith("_")} == {
        "bos_token_id": 2,
        "eos_token_id": [0, 5],
        "pad_token_id": 0,
    }


@pytest.mark.parametrize("count", [6, "all"])
def test_generate_finds_our_beams_score_for_score(served, count):
    """With the exported files alone. Where SIDs end at several depths, with a beam for each: with fewer, generate counts an
    end only among its first candidates."""
    folder, mixed = served / "serving", len(json.loads((served / "serving" / "sids.json").read_text())) != len(FIXED)
    trie = load(folder / "legal_sids.py").SidTrie.load(folder / "sid_trie.npz")
    beams = len(MIXED if mixed else FIXED) if count == "all" or mixed else count
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        AutoTokenizer.from_pretrained(folder / "model"),
    )
    tokenizer.padding_side = "left"
    catalogue, rows = catalogue_of(MIXED if mixed else FIXED), shop_rows(8, len(FIXED))
    prompts = json.loads((folder / "model" / "prompts.json").read_text())["prompts"]
    ours = Evaluator(tokenizer, catalogue, prompts, rows, num_beams=beams).recommend(model)
    texts = ["".join(f"{''.join(catalogue.items[place].sid)}\n" for place in row.history) for row in rows]
    inputs = tokenizer([prompts["sid_sid"].replace("{history}", text) for text in texts], padding=True, return_tensors="pt")
    legal = load(folder / "legal_sids.py").LegalSids(trie, prompt_len=inputs.input_ids.shape[1])
    found = model.generate(
        **inputs,
        logits_processor=[legal],
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=trie.depth,
        length_penalty=0.0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    written = found.sequences[:, inputs.input_ids.shape[1] :].tolist()
    assert np.array([trie.sid_of(tokens) for tokens in written]).reshape(8, -1).tolist() == ours.sid.tolist()
    assert np.allclose(found.sequences_scores.view(8, -1).numpy(), ours.score, atol=1e-4, rtol=0)


def test_the_snippet_of_the_readme_recommends(served):
    (section,) = [part for part in (ROOT / "README.md").read_text().split("\n## ") if part.startswith("Serve it")]
    blocks = re.findall(r"(?:^ {4}.*\n|^\n(?= {4}))+", section, re.MULTILINE)
    (snippet,) = [textwrap.dedent(block) for block in blocks if "import LegalSids" in block]
    environment = {**os.environ, "PYTHONPATH": ""}
    command = [sys.executable, "-W", "ignore", "-c", snippet]
    done = subprocess.run(command, cwd=served, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split(" ", 2) for line in done.stdout.splitlines()]
    sids = json.loads((served / "serving" / "sids.json").read_text())
    assert len({sid for _, sid, _ in lines}) == 20
    assert [title for _, _, title in lines] == [str([item["title"] for item in sids[sid]]) for _, sid, _ in lines]
    scores = [float(score) for score, _, _ in lines]
    assert scores == sorted(scores, reverse=True)


def test_an_earlier_export_is_replaced_and_nothing_else_is(served, tmp_path, caplog):
    stale = served / "serving" / "model" / "stale.json"
    stale.write_text("{}")
    (served / "serving" / "__pycache__").mkdir(exist_ok=True)
    assert evaluate.main(arguments_of(served, export_serving=served / "serving")) == 0
    assert not stale.exists()
    (served / "serving" / "Dockerfile").write_text("FROM scratch")
    assert "has other files" in refused(caplog, *arguments_of(served, export_serving=served / "serving"))
    (served / "serving" / "Dockerfile").unlink()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    cases = [
        ({"export_serving": tmp_path / "mine"}, "has other files in it; expected a new folder, or an earlier export"),
        ({"export_serving": tmp_path / "mine" / "thesis.txt"}, "is a file; expected a new folder"),
        ({"export_serving": tmp_path / "mine" / "thesis.txt" / "x"}, "thesis.txt is a file; expected a folder"),
        ({"export_serving": served}, "holds --base_model; choose another folder"),
        ({"export_serving": served / "model"}, "holds --base_model; choose another folder"),
        ({"export_serving": tmp_path / "x", "base_model": "a/b"}, "needs a folder for --base_model, not the hub name 'a/b'"),
        ({"export_serving": tmp_path / "x", "recommend": "103"}, "--recommend and --export_serving are two things to do"),
        ({"export_serving": tmp_path / "x", "base_model": served / "plain"}, "its tokenizer knows no SID token"),
    ]
    for flags, fault in cases:
        assert fault in refused(caplog, *arguments_of(served, **flags))
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_disk_that_fills_up_leaves_the_export_of_before(served, caplog, monkeypatch):
    def sids_json(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "sids_json", sids_json)
    error = refused(caplog, *arguments_of(served, export_serving=served / "serving"))
    assert "cannot be written (No space left on device); make room" in error
    assert (served / "serving" / "sids.json").is_file()
    assert not (served / "serving.tmp").exists()


def test_weights_on_another_disk_are_copied(tmp_path, monkeypatch):
    def link(*given):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    export.link_or_copy(tmp_path / "model.safetensors", tmp_path / "copy.safetensors")
    assert (tmp_path / "copy.safetensors").read_bytes() == b"weights"


# ---------------------------------------------------------------------------------------------- servers
#
# Neither server can be installed beside the tests. These stand-ins do what their documentation says: vLLM's V1 engine keeps
# a batch whose places change and tells a processor what was removed, added and moved; SGLang hands over parameters.


class Direction(enum.Enum):
    UNIDIRECTIONAL = enum.auto()
    SWAP = enum.auto()


@dataclasses.dataclass(frozen=True)
class BatchUpdate:
    batch_size: int
    removed: Sequence[int]
    added: Sequence[tuple]
    moved: Sequence[tuple]


@dataclasses.dataclass
class Params:
    extra_args: dict | None = None


class VllmBase(abc.ABC):
    """The abstract class of vllm.v1.sample.logits_processor."""

    @classmethod
    def validate_params(cls, sampling_params):
        return None

    @abc.abstractmethod
    def __init__(self, vllm_config, device, is_pin_memory): ...

    @abc.abstractmethod
    def apply(self, logits): ...

    @abc.abstractmethod
    def is_argmax_invariant(self): ...

    @abc.abstractmethod
    def update_state(self, batch_update): ...


class SglangBase(abc.ABC):
    """The abstract class of sglang.srt.sampling.custom_logit_processor."""

    @abc.abstractmethod
    def __call__(self, logits, custom_param_list=None): ...


@pytest.fixture
def beside(tmp_path, monkeypatch) -> SidTrie:
    """The module's own trie, which servers have it load."""
    trie = trie_of(SIDS)
    monkeypatch.setattr("sid_sft.serving.legal_sids.trie_beside", lambda: trie)
    return trie


def test_the_classes_are_the_servers_own_where_these_are_installed(served, monkeypatch):
    vllm, sglang = types.ModuleType("vllm.v1.sample.logits_processor"), types.ModuleType("custom_logit_processor")
    vllm.LogitsProcessor, sglang.CustomLogitProcessor = VllmBase, SglangBase
    monkeypatch.setitem(sys.modules, "vllm.v1.sample.logits_processor", vllm)
    monkeypatch.setitem(sys.modules, "sglang.srt.sampling.custom_logit_processor", sglang)
    for name in ("vllm", "vllm.v1", "vllm.v1.sample", "sglang", "sglang.srt", "sglang.srt.sampling"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    module = load(served / "serving" / "legal_sids.py")
    assert issubclass(module.VllmLegalSids, VllmBase)
    assert issubclass(module.SglangLegalSids, SglangBase)
    processor = module.VllmLegalSids(None, torch.device("cpu"), False)
    assert processor.is_argmax_invariant() is False
    assert processor.trie.depth == SidTrie.load(served / "serving" / "sid_trie.npz").depth
    module.SglangLegalSids()


def greedy(scores: torch.Tensor) -> int:
    return int(scores.argmax())


def test_a_vllm_request_at_a_time_writes_legal_sids(beside):
    for seed in range(20):
        torch.manual_seed(seed)
        processor, output = RequestLegalSids(), []
        while not output or output[-1] != END:
            output.append(greedy(processor(output, torch.randn(VOCABULARY))))
        assert tuple(output) in {(*sid, END) for sid in SIDS}
    logits = torch.randn(VOCABULARY)
    assert torch.equal(RequestLegalSids()([1], logits.clone()), beside.mask(logits.clone()[None], [[1]])[0])


class Engine:
    """vLLM's persistent batch: places of finished requests go to new ones, what is left of the gaps is closed by moves from
    the end, and now and then two requests swap places; the processor hears of it all at once."""

    def __init__(self, processor, seed: int) -> None:
        self.processor, self.rng, self.batch = processor, random.Random(seed), []

    def new_request(self) -> dict:
        free = self.rng.random() < 0.3
        params = Params({"legal_sids": False}) if free else self.rng.choice([None, Params(), Params({"legal_sids": True})])
        return {"free": free, "params": params, "output": []}

    def update(self) -> list[dict]:
        """Tells the processor what changes before a step; returns the requests that have ended."""
        gaps = [i for i, request in enumerate(self.batch) if END in request["output"] or len(request["output"]) > 4]
        ended = [self.batch[i] for i in gaps]
        added, moved = [], []
        for _ in range(self.rng.randrange(3)):
            place = gaps.pop(0) if gaps else len(self.batch)
            self.batch[place : place + 1] = [request := self.new_request()]
            prompt = self.rng.choice([None, [8, 9]])
            added.append((place, request["params"], prompt, request["output"]))
        removed = list(gaps)
        while gaps:
            if gaps[-1] == len(self.batch) - 1:
                self.batch.pop()
                gaps.pop()
            else:
                self.batch[gaps[0]] = self.batch.pop()
                moved.append((len(self.batch), gaps.pop(0), Direction.UNIDIRECTIONAL))
        if len(self.batch) > 2 and self.rng.random() < 0.3:
            self.batch[0], self.batch[2] = self.batch[2], self.batch[0]
            moved.append((0, 2, Direction.SWAP))
        changes = removed or added or moved
        self.processor.update_state(BatchUpdate(len(self.batch), removed, added, moved) if changes else None)
        return ended


@pytest.mark.parametrize("seed", range(3))
def test_a_vllm_batch_keeps_each_request_legal_while_places_change(beside, seed):
    torch.manual_seed(seed)
    engine, done, free = Engine(VllmLegalSids(None, torch.device("cpu"), False), seed), [], 0
    for _ in range(200):
        done += [tuple(request["output"]) for request in engine.update() if not request["free"]]
        logits = torch.randn(len(engine.batch), VOCABULARY)
        masked = engine.processor.apply(logits.clone())
        for row, before, request in zip(masked, logits, engine.batch, strict=True):
            assert torch.equal(row, before) == request["free"]
            free += request["free"]
            request["output"].append(greedy(row))
    assert len(done) > 50
    assert free > 50
    assert set(done) == {(*sid, END) for sid in SIDS}


def test_vllm_beam_search_is_seen_at_the_end_of_the_prompt_where_prompts_end_with_text(beside):
    """LLM.beam_search asks for one token at a time; what a beam has written stands at the end of its prompt."""
    history = [8, 1, 5, 9]  # a SID in the prompt, then text
    for prompt_ends_with_text, written, legal in (
        (True, [], ()),
        (True, [1], (1,)),
        (True, [4, 5], (4, 5)),
        (False, [1], ()),
    ):
        beside.prompt_ends_with_text = prompt_ends_with_text
        processor = VllmLegalSids()
        processor.update_state(BatchUpdate(1, (), [(0, Params(), [*history, *written], [])], ()))
        masked = processor.apply(torch.randn(1, VOCABULARY))[0]
        assert {int(token) for token in masked.isfinite().nonzero()} == LEGAL[legal]


def test_vllm_is_told_of_an_argument_that_is_no_truth_value():
    VllmLegalSids.validate_params(Params())
    VllmLegalSids.validate_params(Params({"legal_sids": False}))
    with pytest.raises(ValueError, match="legal_sids must be true or false, not 'no'"):
        VllmLegalSids.validate_params(Params({"legal_sids": "no"}))


def test_sglang_rows_with_parameters_are_kept_legal_and_others_left_alone(beside):
    requests = [types.SimpleNamespace(output_ids=list(written)) for written in ((), (3,), (1, 5), (2,))]
    given = [{"legal_sids": True, "__req__": request} for request in requests]
    params = [given[0], None, given[1], given[2], {**given[3], "legal_sids": False}, {}]
    logits = torch.randn(len(params), VOCABULARY)
    masked = SglangLegalSids()(logits.clone(), params)
    for place, written in ((0, ()), (2, (3,)), (3, (1, 5))):
        assert {int(token) for token in masked[place].isfinite().nonzero()} == LEGAL[written]
    assert torch.equal(masked[[1, 4, 5]], logits[[1, 4, 5]])
    assert torch.equal(SglangLegalSids()(logits.clone(), None), logits)


def test_transformers_rows_are_masked_by_what_stands_behind_the_prompt():
    trie = trie_of(SIDS)
    prompt = [7, 1, 5]
    scores = torch.randn(2, VOCABULARY)
    masked = LegalSids(trie, prompt_len=3)(torch.tensor([[*prompt, 1], [*prompt, 3]]), scores)
    assert [{int(token) for token in row.isfinite().nonzero()} for row in masked] == [{5, 6}, {END, 7}]

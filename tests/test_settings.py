"""The flags: each has one home, and help, README, sft.sh, ranges and types follow from there."""

from __future__ import annotations

import dataclasses
import errno
import inspect
import io
import logging
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from conftest import ROOT, run_command

import data
import evaluate
import sft
from sid_sft.command_line import About, command, convert, flag, flags_of, one_word_each, read_flags
from sid_sft.files import InputError
from sid_sft.flag_checks import check_cache_dir
from sid_sft.settings import SCHEDULES, EvaluateFlags, TrainFlags, examples_per_step, intervals, with_defaults
from sid_sft.training_arguments import check_reports, check_schedule, training_arguments

TRAIN_FLAGS = """
    base_model train_file eval_file sid_index_path item_meta_path preference_file output_dir category tasks prompts
    chat_template sample eval_sample eval_recommendation metric_for_best_model max_left_out cutoff_len freeze_LLM
    frozen_prefix lora_rank lora_alpha lora_learning_rate load_in_8bit load_in_4bit train_from_scratch num_epochs
    max_steps batch_size micro_batch_size auto_micro_batch fsdp gradient_checkpointing learning_rate weight_decay
    lr_scheduler_type warmup_steps group_by_length group_users prefix_cache_gb prefix_cache_in seed bf16 logging_steps
    eval_steps save_steps early_stopping_patience resume_from_checkpoint allow_changed report_to wandb_project
    wandb_run_name push_to_hub hub_private trust_remote_code cache_dir num_proc check
"""
EVALUATE_FLAGS = """
    base_model test_file sid_index_path item_meta_path train_file output_dir num_beams batch_size sample seed examples
    recommend recommend_file recommendations_file exclude_history export_serving task category cutoff_len max_left_out
    trust_remote_code
"""
PUBLIC_NAMES = {
    sft: """TokenExtender add_sid_tokens apply_sid_rows assert_sids_round_trip freeze_llm grow_embeddings init_rows
        load_model load_tokenizer main token_extender train turn_dropout_off""",
    evaluate: "evaluate main",
    data: """EvalSidDataset FusionSeqRecDataset InputError PreferenceSFTDataset SFTData SidItemFeatDataset SidSFTDataset
        TitleHistory2SidSFTDataset UserPreference2sidSFTDataset build_dataset read_catalogue read_prompts render""",
}


# ---------------------------------------------------------------------------------------------- what users rely on


@pytest.mark.parametrize(
    ("function", "record", "names"),
    [(sft.train, TrainFlags, TRAIN_FLAGS), (evaluate.evaluate, EvaluateFlags, EVALUATE_FLAGS)],
)
def test_no_flag_goes_or_comes_without_being_noticed(function, record, names):
    assert list(inspect.signature(function).parameters) == names.split()
    assert list(flags_of(record)) == names.split()


@pytest.mark.parametrize("module", PUBLIC_NAMES, ids=lambda module: module.__name__)
def test_public_names_stay(module):
    assert [name for name in PUBLIC_NAMES[module].split() if not hasattr(module, name)] == []


def test_training_is_a_function_of_keyword_arguments(flags, tmp_path):
    arguments = flags(check=True)
    values = dict(zip((name[2:] for name in arguments[::2]), arguments[1::2], strict=True))
    values |= {"check": True, "sample": 5, "train_file": Path(values["train_file"])}
    assert sft.train(**values) is None
    with pytest.raises(InputError, match="--batch_size 18 is no multiple"):
        sft.train(**{**values, "batch_size": 18})
    with pytest.raises(TypeError, match="unexpected keyword argument 'freeze_LM'"):
        sft.train(**values, freeze_LM=True)
    with pytest.raises(TypeError, match="positional"):
        sft.train(values["base_model"])


# ---------------------------------------------------------------------------------------------- one home


def default_cell(about: About, default: object) -> str:
    """'128, or ...'; 'required; sft.sh: `Qwen/Qwen2.5-0.5B`'."""
    value = about.if_unset or (f"{default:g}" if isinstance(default, float) else "" if default is None else str(default))
    parts = ["required" if about.required else value, about.in_sft_sh and f"`sft.sh`: `{about.in_sft_sh}`"]
    return "; ".join(filter(None, parts))


def readme_table() -> str:
    """The table of flags as the README must have it."""
    defaults = {field.name: field.default for field in dataclasses.fields(TrainFlags)}
    lines = [
        f"| `--{name}` | {default_cell(about, defaults[name])} | {about.meaning()} |"
        for name, about in flags_of(TrainFlags).items()
    ]
    return "\n".join(["| flag | default | meaning |", "| --- | --- | --- |", *lines])


def test_the_readme_has_the_table_of_flags():
    readme = (ROOT / "README.md").read_text()
    assert readme_table() in readme, f"the table under '## Flags' is now:\n\n{readme_table()}"


def test_commands_in_the_readme_use_flags_that_exist():
    readme = (ROOT / "README.md").read_text()
    foreign = {"nproc_per_node", "encoder", "output", "levels", "data_path", "item_file", "help"}
    for line in re.findall(r"(?:sft\.py|sft\.sh)[^\n`]*", readme):
        assert set(re.findall(r"--(\w+)", line)) <= flags_of(TrainFlags).keys() | foreign, line


@pytest.mark.parametrize(("program", "record"), [("sft.py", TrainFlags), ("evaluate.py", EvaluateFlags)])
def test_help_tells_all_that_is_known_of_a_flag_and_loads_nothing_heavy(program, record):
    result = subprocess.run([sys.executable, program, "-h"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0
    words = " ".join((result.stdout + result.stderr).split())
    for name, about in flags_of(record).items():
        assert f"--{name}={name.upper()}" in words
        assert " ".join(about.meaning().split()) in words
        assert about.if_unset in words
    module = program.removesuffix(".py")
    code = f"import sys, {module}; assert not {{'torch', 'transformers', 'datasets'}} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_flags_of_both_commands_have_one_type_and_range():
    train, other = flags_of(TrainFlags), flags_of(EvaluateFlags)
    types, other_types = (typing.get_type_hints(record) for record in (TrainFlags, EvaluateFlags))
    defaults, other_defaults = (
        {field.name: field.default for field in dataclasses.fields(record)} for record in (TrainFlags, EvaluateFlags)
    )
    shared = train.keys() & other.keys() - {"batch_size"}  # there the rows of a forward pass, here the examples of a step
    assert len(shared) == 11
    for name in shared:
        assert (types[name], defaults[name]) == (other_types[name], other_defaults[name]), name
        assert train[name][1:3] == other[name][1:3], name
        assert train[name].is_file == other[name].is_file, name


def test_every_number_has_a_range():
    for record in (TrainFlags, EvaluateFlags):
        for name, hint in typing.get_type_hints(record).items():
            kind = (typing.get_args(hint) or (hint,))[0]
            assert (flags_of(record)[name].range is not None) == (kind in (int, float)), name


@pytest.mark.parametrize("record", [TrainFlags, EvaluateFlags])
def test_every_default_is_of_its_type_and_in_its_range(record):
    for field in dataclasses.fields(record):
        if field.default is not None:
            kind = (typing.get_args(hint := typing.get_type_hints(record)[field.name]) or (hint,))[0]
            assert type(field.default) is kind, field.name
    with pytest.raises(InputError, match="--base_model is missing"):
        read_flags(record, {})
    required = {name: __file__ for name, about in flags_of(record).items() if about.required}
    assert read_flags(record, required) == record(**required)


# ---------------------------------------------------------------------------------------------- one flag by itself

OUT_OF_RANGE = {
    "micro_batch_size": ("0", "at least 1"),
    "num_epochs": ("0", "above 0"),
    "learning_rate": ("1000", "above 0, at most 100"),
    "weight_decay": ("101", "from 0 to 100"),
    "seed": ("-1", "from 0 to 4294967295"),
    "num_proc": ("1025", "from 1 to 1024"),
    "prefix_cache_gb": ("-1", "at least 0"),
    "cutoff_len": ("1", "at least 2"),
    "sample": ("0", "positive, or -1 for no limit"),
    "max_steps": ("-2", "positive, or -1 for no limit"),
    "max_left_out": ("1.5", "from 0 to 1"),
    "eval_steps": ("0", "a whole number of steps"),
    "save_steps": ("2.5", "a whole number of steps"),
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_a_number_out_of_its_range_is_refused(name):
    value, words = OUT_OF_RANGE[name]
    required = {"base_model": "a/b", "sid_index_path": __file__, "output_dir": "x"}
    with pytest.raises(InputError, match=f"--{name} {value} must be {words}"):
        read_flags(TrainFlags, {**required, name: value})


@pytest.mark.parametrize("record", [TrainFlags, EvaluateFlags])
def test_a_number_that_is_larger_than_any_run_could_use_is_refused(record):
    for name, hint in typing.get_type_hints(record).items():
        kind = (typing.get_args(hint) or (hint,))[0]
        for value in ("4294967296", "-4294967296", 10**400, 10**5000) if kind in (int, float) else ():
            with pytest.raises(InputError, match=f"--{name} .{{1,70}} is beyond 4294967295$"):
                convert(name, value, hint)
        if kind in (int, float):
            with pytest.raises(InputError, match=f"--{name} '9{{57}}...' is no (finite|whole) number$"):
                convert(name, "9" * 5000, hint)


@pytest.mark.parametrize("text", ["\udcff", "a\ud800", "a\0b"])
def test_a_text_that_no_file_could_hold_is_refused(text):
    required = {"base_model": "a/b", "sid_index_path": __file__, "output_dir": "x"}
    for name in ("category", "train_file", "output_dir"):
        with pytest.raises(InputError, match=rf"--{name} '.*\\(udcff|ud800|x00).*' (is not UTF-8|holds a NUL byte)$"):
            read_flags(TrainFlags, {**required, name: text})


def test_a_cache_that_cannot_be_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "file").write_text("")
    for path, fault in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "cache", f"cannot be made, since {tmp_path / 'file'} is a file"),
        (tmp_path / ("x" * 300), "has a name of more than 255 bytes"),
        ("~no-such-user/x", "there is no such user"),
    ):
        with pytest.raises(InputError, match=rf"--cache_dir \S+: {fault}; expected a folder$"):
            check_cache_dir(str(path))
    for path in (tmp_path, tmp_path / "new" / "cache"):
        check_cache_dir(str(path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


# ---------------------------------------------------------------------------------------------- what transformers takes


def test_a_schedule_without_steps_after_its_warm_up_is_refused_where_it_would_fail(tmp_path):
    def check(**given):
        flags = TrainFlags(output_dir=str(tmp_path), batch_size=4, **given)
        check_schedule(training_arguments(flags), examples=10)

    for given in ({"max_steps": 6, "warmup_steps": 6}, {"num_epochs": 2.5, "warmup_steps": 8}):
        with pytest.raises(InputError, match=r"--warmup_steps [68] is the whole run, and --lr_scheduler_type polynomial"):
            check(lr_scheduler_type="polynomial", **given)
        check(lr_scheduler_type="cosine", **given)
        check(lr_scheduler_type="polynomial", **{**given, "warmup_steps": 5})
    with pytest.raises(InputError, match="--learning_rate 1e-08 must be above 1e-07"):
        check(lr_scheduler_type="polynomial", learning_rate=1e-8)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_that_is_offered_is_one_of_transformers_and_needs_nothing_more(name):
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    assert get_scheduler(name, optimizer, num_warmup_steps=2, num_training_steps=5) is not None


def test_a_report_that_is_unknown_or_not_installed_is_told_before_the_work(monkeypatch):
    with pytest.raises(InputError, match="--report_to 'foo': foo is not supported, only .*tensorboard"):
        check_reports(TrainFlags(report_to="foo"))

    def missing():
        raise RuntimeError("needs a package\nthat is not installed")

    monkeypatch.setattr(
        "transformers.integrations.integration_utils.get_reporting_integration_callbacks", lambda name: [missing]
    )
    with pytest.raises(InputError, match="--report_to 'wandb': needs a package that is not installed$"):
        check_reports(TrainFlags(wandb_project="x"))


def test_a_choice_that_is_none_is_refused_with_the_choices():
    values = {"base_model": "a/b", "sid_index_path": __file__}
    with pytest.raises(InputError, match="'sid' .did you mean sid_sid.*expected one of sid_sid, title_sid"):
        read_flags(EvaluateFlags, {**values, "task": "sid"})
    with pytest.raises(InputError, match="--metric_for_best_model 'loss'.*expected one of eval_loss, eval_hr@10"):
        read_flags(TrainFlags, {**values, "output_dir": "x", "metric_for_best_model": "loss"})


@pytest.mark.parametrize("value", ["true", "True", "false", "False"])
def test_true_and_false_mean_what_they_say(value):
    assert convert("freeze_LLM", value, bool) is (value.lower() == "true")


def test_values_are_read_in_the_type_of_their_field():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class ToyFlags:
        width: int = flag(80, "pixels")
        ratio: float | None = flag(None, "of the sides")
        name: str = flag("", "of the picture")
        grey: bool = flag(False, "no colours")

    assert read_flags(ToyFlags, {"width": "3", "ratio": "1e-2", "name": "5", "grey": "true"}) == ToyFlags(
        width=3, ratio=0.01, name="5", grey=True
    )
    assert read_flags(ToyFlags, {"ratio": 2}).ratio == 2.0
    for values, message in (
        ({"width": "8x"}, "--width '8x' is no whole number"),
        ({"ratio": "nan"}, "--ratio 'nan' is no finite number"),
        ({"grey": 1}, "--grey '1' is neither True nor False"),
    ):
        with pytest.raises(InputError, match=message):
            read_flags(ToyFlags, values)


# ---------------------------------------------------------------------------------------------- a command line


def test_every_way_to_write_a_flag_says_the_same():
    said = []

    @command(EvaluateFlags)
    def listen(flags: EvaluateFlags) -> None:
        """Listen."""
        said.append(flags)

    from sid_sft.command_line import run

    required = ["--base_model", "a/b", "--sid_index_path", __file__]
    expected = EvaluateFlags(base_model="a/b", sid_index_path=__file__, category="-x", sample=-1, trust_remote_code=True)
    for words in (
        ["--category", "-x", "--sample", "-1", "--trust_remote_code", "True"],
        ["--category=-x", "--sample=-1", "--trust_remote_code=true"],
        ["--trust_remote_code", "--sample", "-1", "--category", "-x"],
    ):
        assert run(listen, required + words, program="listen.py") == 0
        assert said.pop() == expected
    assert run(listen, [*required, "--category", "a = b, --c"], program="listen.py") == 0
    assert said.pop().category == "a = b, --c"


def test_a_file_that_cannot_be_written_ends_in_one_line(capsys, monkeypatch):
    from sid_sft.command_line import run

    def failing(error):
        @command(EvaluateFlags)
        def write(flags: EvaluateFlags) -> None:
            """Write."""
            raise error

        return run(write, ["--base_model", "a/b", "--sid_index_path", __file__], program="write.py")

    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(sys, "stderr", told := io.StringIO())
    assert failing(PermissionError(errno.EACCES, "Permission denied", "x\x1b[2J.csv")) == 2
    assert failing(OSError(errno.ENOSPC, "No space left on device")) == 2
    assert told.getvalue().splitlines()[0].startswith("write.py: x\\x1b[2J.csv: Permission denied; ")
    with pytest.raises(ConnectionResetError):
        failing(ConnectionResetError(errno.ECONNRESET, "Connection reset"))


def test_words_that_belong_to_no_flag_and_flags_given_twice_are_refused():
    for arguments, message in (
        (["train"], "belongs to no flag"),
        (["--seed", "1", "2"], "belongs to no flag"),
        (["--seed=1", "2"], "belongs to no flag"),
        (["--seed", "1", "--seed=2"], "given twice"),
        (["--freeze_llm", "True"], "unknown flag --freeze_llm .did you mean freeze_LLM"),
    ):
        with pytest.raises(InputError, match=message):
            one_word_each(sft.train, arguments)
    assert one_word_each(sft.train, ["--seed", "1", "--check"]) == ["--seed=1", "--check=True"]


# ---------------------------------------------------------------------------------------------- flags that follow others


@pytest.mark.parametrize(
    ("given", "evaluating", "saving"),
    [
        ({"eval_steps": 6.0}, 6, 6),
        ({"save_steps": 4.0}, 4, 4),
        ({"eval_steps": 0.1}, 0.1, 0.1),
        ({"eval_steps": 2.0, "save_steps": 4.0}, 2, 4),
        ({}, 0.05, 0.05),
        ({"eval_file": "", "eval_steps": 6.0}, 6, 0.05),
        ({"eval_file": "", "save_steps": 7.0}, 0.05, 7),
        ({"eval_file": "", "eval_steps": 6.0, "save_steps": 0.3}, 6, 0.3),
    ],
)
def test_saving_and_evaluating_follow_the_one_that_is_named(given, evaluating, saving):
    assert intervals(TrainFlags(**{"eval_file": "x.csv", **given})) == (evaluating, saving)


@pytest.mark.parametrize(
    ("processes", "given", "expected"),
    [
        ("1", {}, 128),
        ("8", {}, 128),
        ("3", {}, 132),
        ("7", {"micro_batch_size": 16}, 224),
        ("3", {"batch_size": 96}, 96),
    ],
)
def test_the_default_batch_is_one_that_the_processes_can_share(processes, given, expected, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", processes)
    assert examples_per_step(TrainFlags(**given)) == expected


def test_freeze_mode_trains_5_epochs_and_others_10_unless_it_is_given():
    found = [with_defaults(TrainFlags(**given)).num_epochs for given in ({}, {"freeze_LLM": True}, {"num_epochs": 3.0})]
    assert found == [10, 5, 3]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, 0.0),
        ({"freeze_LLM": True}, 1.0),
        ({"freeze_LLM": True, "weight_decay": 0.0}, 0.0),
        ({"freeze_LLM": True, "weight_decay": 0.3}, 0.3),
        ({"weight_decay": 0.3}, 0.3),
    ],
)
def test_weight_decay_is_1_in_freeze_mode_and_0_otherwise_unless_it_is_given(given, expected):
    assert with_defaults(TrainFlags(**given)).weight_decay == expected


def test_a_batch_that_is_not_128_by_itself_is_told(flags):
    log = run_command(*flags(batch_size=None, micro_batch_size=3, check=True)).stderr
    assert "--batch_size 129: the first multiple of micro_batch_size x processes = 3 x 1 from 128 on" in log
    assert "from 128 on" not in run_command(*flags(batch_size=None, check=True)).stderr


# ---------------------------------------------------------------------------------------------- sft.sh


@pytest.fixture
def launched(tmp_path):
    """The words with which sft.sh starts Python, one list per start, for some arguments and environment variables."""
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\nprintf "START\\n"\nfor a; do printf "%s\\n" "$a"; done\n')
    stub.chmod(0o755)

    def launch(*arguments: str, **env: str) -> list[list[str]]:
        full = {"PATH": os.environ["PATH"], "PYTHON": str(stub), "CUDA_VISIBLE_DEVICES": "", **env}
        result = subprocess.run(
            ["bash", "sft.sh", *arguments], cwd=ROOT, env=full, capture_output=True, text=True, check=True
        )
        return [start.splitlines() for start in result.stdout.split("START\n")[1:]]

    return launch


def given(words: list[str]) -> dict[str, str]:
    """The flags of a command line: ["sft.py", "--seed", "1"] -> {"seed": "1"}."""
    return {word[2:]: words[i + 1] for i, word in enumerate(words) if word.startswith("--")}


def test_sft_sh_hands_on_every_flag_as_an_environment_variable(launched):
    (words,) = launched(**{name.upper(): f"value of {name}" for name in flags_of(TrainFlags)})
    assert words[0] == "sft.py"
    assert given(words) == {name: f"value of {name}" for name in flags_of(TrainFlags)}


def test_sft_sh_has_no_default_of_its_own_but_those_that_the_flags_name(launched):
    (words,) = launched(CATEGORY="Toys")
    named = {name: about.in_sft_sh for name, about in flags_of(TrainFlags).items() if about.in_sft_sh}
    assert given(words) == {"category": "Toys", **{name: value.replace("CATEGORY", "Toys") for name, value in named.items()}}


def test_sft_sh_passes_arguments_on_and_lets_them_win(launched):
    (words,) = launched("--freeze_LLM", "True", CATEGORY="Toys", DATA_DIR="/d", LEARNING_RATE="0.1", EVAL_FILE="")
    assert given(words)["train_file"] == "/d/Toys.train.csv"
    assert given(words)["sid_index_path"] == "/d/Toys.index.json"
    assert given(words)["learning_rate"] == "0.1"
    assert "--eval_file" not in words
    assert words[-2:] == ["--freeze_LLM", "True"]
    for argument in (["--learning_rate", "0.5"], ["--learning_rate=0.5"]):
        (words,) = launched(*argument, CATEGORY="Toys", LEARNING_RATE="0.1")
        assert words[-len(argument) :] == argument
        assert sum(word.startswith("--learning_rate") for word in words) == 1


def test_sft_sh_starts_one_process_per_gpu_on_one_node_and_on_many(launched):
    (words,) = launched(CATEGORY="Toys", CUDA_VISIBLE_DEVICES="0,2,5")
    assert words[:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3"]
    (words,) = launched(CATEGORY="Toys", NPROC_PER_NODE="2", NNODES="2", NODE_RANK="1", MASTER_ADDR="host")
    assert words[:2] == ["-m", "torch.distributed.run"]
    assert given(words)["node_rank"] == "1"


def test_sft_sh_without_anything_trains_and_evaluates_the_demo(launched, tmp_path):
    made, trained, evaluated = launched("--freeze_LLM", "True", DEMO_DIR=str(tmp_path / "demo"))
    assert made == ["-m", "sid_sft.demo", str(tmp_path / "demo")]
    assert given(trained)["train_file"] == f"{tmp_path}/demo/shop.train.csv"
    assert given(trained)["eval_steps"] == "0.1"
    assert "--save_steps" not in trained
    assert trained.count("--freeze_LLM") == 1
    assert evaluated[0] == "evaluate.py"
    assert given(evaluated)["test_file"] == f"{tmp_path}/demo/shop.test.csv"
    _, saved, _ = launched("--save_steps", "6", DEMO_DIR=str(tmp_path / "demo"))
    assert "--eval_steps" not in saved
    for help in ("--help", "-h"):
        assert len(launched(help)) == 1

"""One command from two tables to what sft.sh trains on: the plan, what is redone, and what is never replaced."""

import csv
import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from refusals import refusal

from rq import build, publishing, text2emb
from rq.index_file import read_sids

KINDS, COLOURS = ("kettle", "mug", "bowl", "plate", "tray", "jar"), ("red", "blue", "green", "white")
STEPS = ["prepare", "text2emb", "quantizer", "index", "csvs"]


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """The command line of a shop of 24 items and 60 users."""
    items = [(f"P{i}", f"{colour} {kind}") for i, (kind, colour) in enumerate((k, c) for k in KINDS for c in COLOURS)]
    orders = [(f"U{u}", f"P{(5 * u + 7 * n) % 24}", 1_500_000_000 + 1000 * u + n) for u in range(60) for n in range(6)]
    for name, header, rows in (
        ("items", ("item_id", "title"), items),
        ("orders", ("user_id", "item_id", "timestamp"), orders),
    ):
        with open(tmp_path / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
    tables = ["--interactions", str(tmp_path / "orders.csv"), "--items", str(tmp_path / "items.csv")]
    return [*tables, "--output_dir", str(tmp_path / "shop")]


def plan(capsys: pytest.CaptureFixture, *typed: str) -> dict[str, str]:
    """{step: why it is to do} that the command shows; {} where all is done."""
    capsys.readouterr()
    build.main([*typed, "--plan"])
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().err.splitlines() if line[:1].isdigit()]
    assert [step for _, step, _ in lines] == STEPS
    return {step: rest.rsplit("  (", 1)[1].rstrip(")") for _, step, rest in lines if rest.startswith("to do")}


def shop(arguments: list[str]) -> Path:
    return Path(arguments[-1])


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_one_command_makes_all_that_training_takes(arguments, capsys):
    build.main(arguments)
    folder = shop(arguments)
    made = {path.name.removeprefix("shop.") for path in folder.iterdir()}
    assert made >= {"item.json", "index.json", "train.csv", "valid.csv", "test.csv", "info.txt", "rqkmeans", "build.json"}
    index = read_sids(folder / "shop.index.json")
    assert len(index) == len(set(index.values())) == 24
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 1
    assert f"CATEGORY=shop DATA_DIR={folder}" in told[0]
    assert told[0].endswith("sft.sh --freeze_LLM True")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_the_training_command_is_one_that_trains(arguments, capsys, kind):
    """As it is typed, with a check of all files in place of the training."""
    build.main([*arguments, "--output_format", kind])
    assert (shop(arguments) / f"shop.train.{kind}").exists()
    line = capsys.readouterr().out.strip().replace("BASE_MODEL=Qwen/Qwen2.5-0.5B", "")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "SFT_TEST": "1"}
    done = subprocess.run(
        ["bash", "-c", f"{line} --base_model no-such-model --check True"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "no-such-model" in done.stderr.splitlines()[-1]  # the files were found and read; a base model is the user's
    assert shlex.split(line)


def test_a_plan_writes_nothing_and_a_second_run_does_nothing(arguments, capsys):
    assert plan(capsys, *arguments) == {"prepare": "not made yet", **dict.fromkeys(STEPS[1:], "since prepare is")}
    assert not shop(arguments).exists()
    build.main(arguments)
    before = content(shop(arguments))
    assert plan(capsys, *arguments) == {}
    build.main(arguments)
    assert content(shop(arguments)) == before


@pytest.mark.parametrize(
    ("flags", "first", "why"),
    [
        (("--k_core", "3"), "prepare", "--k_core is 3, it was left out"),
        (("--fields", "title"), "text2emb", "--fields is title, it was left out"),
        (("--levels", "4,4"), "quantizer", "--levels is 4,4, it was left out"),
        (("--method", "rqfaiss"), "quantizer", "--method is rqfaiss, it was rqkmeans"),
        (("--collisions", "keep"), "index", "--collisions is keep, it was left out"),
        (("--split", "leave_one_out"), "csvs", "--split is leave_one_out, it was global"),
    ],
)
def test_a_changed_flag_redoes_its_step_and_those_after_it(arguments, capsys, flags, first, why):
    build.main(arguments)
    before = content(shop(arguments))
    shown = plan(capsys, *arguments, *flags)
    assert list(shown) == STEPS[STEPS.index(first) :]
    assert shown[first] == why
    build.main([*arguments, *flags])
    assert plan(capsys, *arguments, *flags) == {}
    after = content(shop(arguments))
    kept = {"prepare": (), "text2emb": ("item.json",), "quantizer": ("item.json", "emb-tfidf-td.npy")}
    for name in kept.get(first, ("item.json", "emb-tfidf-td.npy", "rqkmeans/model.safetensors")):
        assert after[f"shop.{name}"] == before[f"shop.{name}"]


def test_a_flag_that_is_left_out_again_has_its_default_again(arguments):
    build.main(arguments)
    before = content(shop(arguments))
    build.main([*arguments, "--split", "leave_one_out", "--max_history", "2"])
    assert content(shop(arguments))["shop.test.csv"] != before["shop.test.csv"]
    build.main(arguments)
    assert content(shop(arguments))["shop.test.csv"] == before["shop.test.csv"]


def test_another_content_of_a_table_is_seen(arguments, capsys):
    build.main(arguments)
    with open(arguments[1], "a") as file:
        file.write("U0,P1,1600000000\n")
    shown = plan(capsys, *arguments)
    assert shown["prepare"] == "other --interactions"
    assert list(shown) == STEPS


def test_a_run_that_was_stopped_goes_on_where_it_was(arguments, capsys, monkeypatch):
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(publishing, "publish", killed)
        with pytest.raises(SystemExit):
            build.main(arguments)
    shown = plan(capsys, *arguments)
    assert list(shown) == ["index", "csvs"]
    assert shown["index"] == "stopped before it was done"
    before = content(shop(arguments))
    build.main(arguments)
    after = content(shop(arguments))
    assert {name: after[name] for name in before if "build" not in name and "prepare" not in name} == {
        name: text for name, text in before.items() if "build" not in name and "prepare" not in name
    }
    assert plan(capsys, *arguments) == {}


def test_what_others_made_or_changed_is_not_replaced(arguments):
    folder = shop(arguments)
    folder.mkdir()
    index = folder / "shop.index.json"
    index.write_text('{"0": ["<a_1>"]}')
    told = refusal(build.main, *arguments)
    assert "shop.index.json exists, and shop.build.json does not say that rq.build made it" in told
    assert index.read_text() == '{"0": ["<a_1>"]}'
    assert os.listdir(folder) == ["shop.index.json"]
    build.main([*arguments, "--overwrite"])
    appended = index.read_text().replace("\n}", '\n,"24": ["<a_0>"]\n}')
    index.write_text(appended)
    told = refusal(build.main, *arguments, "--collisions", "keep")
    assert "shop.index.json was changed since rq.build made it" in told
    assert index.read_text() == appended


def test_a_file_that_is_gone_is_made_again(arguments, capsys):
    build.main(arguments)
    (shop(arguments) / "shop.info.txt").unlink()
    assert list(plan(capsys, *arguments)) == ["csvs"]


def test_an_encoder_with_other_weights_is_another_encoder(arguments, capsys):
    build.main(arguments)
    folder = shop(arguments) / "shop.emb-tfidf-td.tfidf"
    copy = shop(arguments).parent / "mine.tfidf"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    mine = [*arguments, "--encoder", str(copy)]
    build.main(mine)
    assert plan(capsys, *mine) == {}
    words = json.loads((copy / text2emb.VOCABULARY).read_text())
    (copy / text2emb.VOCABULARY).write_text(json.dumps([words[1], words[0], *words[2:]]))
    assert plan(capsys, *mine)["text2emb"] == "other --encoder"


def test_the_levels_follow_the_catalogue():
    assert build.levels_for(24) == (8, 8, 8)
    assert build.levels_for(3_686) == (128, 128, 128)
    assert build.levels_for(9_922) == build.levels_for(10**6) == (256, 256, 256)
    for n_items in (1, 2, 5, 100, 1_000, 20_000, 10**6):
        sizes = build.levels_for(n_items)
        assert max(sizes) <= max(n_items, 2)
        assert sizes[0] * sizes[1] * sizes[2] >= n_items


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--k_cor", "3"), "unknown flag --k_cor (did you mean --k_core?)"),
        (("--method", "rqkmean"), "argument --method: invalid choice: 'rqkmean'"),
        (("--levels", "3,x"), "argument --levels: '3,x' is not a list of 1 to 25 codebook sizes"),
        (("--epochs", "3"), "unknown flag --epochs"),  # of rqvae, not of rqkmeans
        (("--name", "a/b"), "'a/b' is not a plain name"),
    ],
)
def test_a_wrong_flag_is_refused_before_anything_is_made(arguments, flags, told):
    assert told in refusal(build.main, *arguments, *flags)
    assert not shop(arguments).exists()


def test_interactions_alone_give_no_titles_to_make_sids_of(arguments):
    assert "--items is missing" in refusal(build.main, *arguments[:2], *arguments[4:])
    assert not shop(arguments).exists()


def test_a_dataset_of_the_hub_is_known_by_its_address(arguments, capsys):
    hub = ["--interactions", "hf://datasets/ann/orders", *arguments[2:]]
    assert plan(capsys, *hub)["prepare"] == "not made yet"


def test_a_first_step_that_is_refused_leaves_nothing(arguments):
    assert "--k_core" in refusal(build.main, *arguments, "--k_core", "1000")
    assert not shop(arguments).exists()


def test_the_flags_of_a_method_go_to_it(arguments, capsys):
    quick = ("--method", "rqvae", "--epochs", "1", "--hidden", "8", "--latent", "4", "--batch_size", "8", "--levels", "4,4")
    build.main([*arguments, *quick])
    assert "--epochs 1" in capsys.readouterr().err
    assert plan(capsys, *arguments, *quick[:3], "2", *quick[4:])["quantizer"] == "--epochs is 2, it was 1"


def test_a_record_that_is_none_is_one_line(arguments):
    shop(arguments).mkdir()
    (shop(arguments) / "shop.build.json").write_text("[1]")
    assert "not the record of rq.build" in refusal(build.main, *arguments)

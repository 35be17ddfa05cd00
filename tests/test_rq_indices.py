"""Codes to `.index.json`: the token format, collisions, appending."""

import doctest
import json
from pathlib import Path

import numpy as np
import pytest
from refusals import refusal

from rq import catalogue, collisions, command_line, generate_indices, generate_indices_plus, index_file, rqkmeans
from rq.files import InputError
from rq.index_file import append_sids, read_sids, sid_codes, sid_tokens, write_sids
from rq.publishing import resolve


def save(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


@pytest.fixture
def catalogue_with_duplicates(tmp_path: Path) -> Path:
    """60 rows: 40 distinct ones, and 20 exact copies of row 0."""
    rows = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    return save(tmp_path / "E.npy", np.concatenate([rows, np.repeat(rows[:1], 20, axis=0)]))


@pytest.mark.parametrize("module", [index_file, collisions, catalogue])
def test_worked_examples_in_docstrings_hold(module):
    result = doctest.testmod(module, extraglobs={"np": np})
    assert result.attempted > 0
    assert result.failed == 0


def test_tokens_and_codes_are_each_others_inverse():
    assert sid_tokens([0, 255, 7, 1]) == ["<a_0>", "<b_255>", "<c_7>", "<d_1>"]
    assert sid_codes(sid_tokens([0, 255, 7, 1]), where="here") == (0, 255, 7, 1)


@pytest.mark.parametrize("tokens", [["<b_1>"], ["<a_1>", "<a_2>"], ["<a_01>"], ["<a_-1>"], ["a_1"], [3]])
def test_a_token_of_another_format_is_refused(tokens):
    with pytest.raises(InputError, match="expected '<"):
        sid_codes(tokens, where="X.index.json: item 4")


def test_the_index_is_json_with_one_item_a_line(tmp_path):
    path = tmp_path / "X.index.json"
    write_sids(path, [(1, 2), (3, 4, 0)])
    assert path.read_text() == '{"0": ["<a_1>", "<b_2>"]\n,"1": ["<a_3>", "<b_4>", "<c_0>"]\n}\n'
    assert read_sids(path) == {0: (1, 2), 1: (3, 4, 0)}


def test_appending_leaves_every_old_byte(tmp_path):
    path = tmp_path / "X.index.json"
    write_sids(path, [(1, 2), (3, 4)])
    old = path.read_bytes().removesuffix(b"}\n")
    append_sids(path, [(5, 6)], first_item=2)
    assert path.read_bytes() == old + b',"2": ["<a_5>", "<b_6>"]\n}\n'


@pytest.mark.parametrize("indent", [None, 2])
def test_an_index_made_elsewhere_can_be_read_and_appended_to(tmp_path, indent):
    path = tmp_path / "X.index.json"
    old = {"0": ["<a_1>", "<b_2>"], "1": ["<a_3>", "<b_4>"]}
    path.write_text(json.dumps(old, indent=indent))
    append_sids(path, [(5, 6)], first_item=2)
    assert path.read_text().startswith(json.dumps(old, indent=indent).removesuffix("}").rstrip())
    assert json.loads(path.read_text()) == {**old, "2": ["<a_5>", "<b_6>"]}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[]", "expected a JSON object"),
        ("{", "not JSON"),
        ('{"x": ["<a_1>"]}', "not a decimal number"),
        ('{"0": "<a_1>"}', "expected a list of tokens"),
        ('{"0": ["<a_1>"], "0": ["<a_2>"]}', "item 0 stands twice"),
    ],
)
def test_a_broken_index_is_one_clear_line(tmp_path, text, told):
    path = tmp_path / "X.index.json"
    path.write_text(text)
    with pytest.raises(InputError, match=told):
        read_sids(path)


def test_the_extra_token_goes_to_colliding_items_only():
    codes = np.array([[1, 1], [2, 2], [1, 1], [1, 1]])
    assert resolve(codes, policy="token", n_last=4) == [(1, 1, 0), (2, 2), (1, 1, 1), (1, 1, 2)]


def test_left_alone_means_left_alone():
    codes = np.array([[1, 1], [1, 1]])
    assert resolve(codes, policy="keep", n_last=4) == [(1, 1), (1, 1)]


def line_of_codes(rows_R: np.ndarray, codes_RL: np.ndarray) -> np.ndarray:
    """Codes 0..3 stand at 0..3 on a line, item r at 1 + r / 10."""
    return (1 + rows_R[:, None] / 10 - np.arange(4)) ** 2


def test_relocation_moves_the_farther_item_to_its_nearest_free_code():
    codes = np.array([[7, 1], [7, 1], [8, 1]])
    sids = resolve(codes, policy="relocate", n_last=4, costs=line_of_codes)
    assert sids == [(7, 1), (7, 2), (8, 1)]  # item 0 lies on code 1 and stays; item 1 at 1.1 is nearest to 2


def test_relocation_respects_the_capacity():
    codes = np.array([[7, 1]] * 6)
    assert len(set(resolve(codes, policy="relocate", n_last=4, capacity=2, costs=line_of_codes))) >= 3
    assert (
        max(
            np.unique(
                [sid[1] for sid in resolve(codes, policy="relocate", n_last=4, capacity=2, costs=line_of_codes)],
                return_counts=True,
            )[1]
        )
        == 2
    )


def test_relocation_without_room_says_so_and_keeps_the_rest(caplog):
    command_line.log.propagate = True
    sids = resolve(np.array([[7, 1]] * 6), policy="relocate", n_last=4, costs=line_of_codes)
    assert len(set(sids)) == 4
    assert "2 items found all 4 last-level codes under their prefix taken" in caplog.text


def test_published_sids_block_their_codes():
    codes = np.array([[7, 1]])
    assert resolve(codes, policy="relocate", n_last=4, costs=line_of_codes, published=[(7, 1), (7, 0), (7, 2)]) == [(7, 3)]
    assert resolve(codes, policy="token", n_last=4, published=[(7, 1, 0), (7, 1, 1)]) == [(7, 1, 2)]
    assert resolve(codes, policy="token", n_last=4, published=[(7, 2)]) == [(7, 1)]


@pytest.mark.parametrize("policy", ["token", "relocate"])
def test_no_collision_is_left_even_with_exact_duplicates(catalogue_with_duplicates, tmp_path, policy):
    output = tmp_path / "X.index.json"
    rqkmeans.main(
        [
            "--data_path",
            str(catalogue_with_duplicates),
            "--levels",
            "4,4,32",
            "--output",
            str(output),
            "--collisions",
            policy,
        ]
    )
    sids = list(read_sids(output).values())
    assert len(sids) == len(set(sids)) == 60
    assert {len(sid) for sid in sids} == ({3, 4} if policy == "token" else {3})


@pytest.mark.parametrize("policy", ["token", "relocate", "keep"])
def test_appending_changes_no_published_line(catalogue_with_duplicates, tmp_path, policy):
    old_rows, output, checkpoint = tmp_path / "old.npy", tmp_path / "X.index.json", tmp_path / "checkpoint"
    rows = np.load(catalogue_with_duplicates)
    save(old_rows, rows[:45])
    common = ["--output", str(output), "--ckpt_path", str(checkpoint), "--collisions", policy]
    rqkmeans.main(["--data_path", str(old_rows), "--levels", "4,4,32", *common])
    before = output.read_text().splitlines()[:-1]
    generate_indices.main(["--data_path", str(catalogue_with_duplicates), "--append", *common])
    after = output.read_text().splitlines()
    assert after[:45] == before
    sids = read_sids(output)
    assert list(sids) == list(range(60))
    assert (len(set(sids.values())) == 60) == (policy != "keep")


def test_a_checkpoint_gives_the_index_it_was_saved_with(catalogue_with_duplicates, tmp_path):
    first, second = tmp_path / "1.index.json", tmp_path / "2.index.json"
    common = ["--data_path", str(catalogue_with_duplicates), "--ckpt_path", str(tmp_path / "c")]
    rqkmeans.main([*common, "--levels", "4,4,8", "--output", str(first), "--codes_output", str(tmp_path / "codes.npy")])
    generate_indices.main([*common, "--output", str(second)])
    assert first.read_bytes() == second.read_bytes()
    third = tmp_path / "3.index.json"
    generate_indices.main(["--codes_path", str(tmp_path / "codes.npy"), "--levels", "4,4,8", "--output", str(third)])
    assert first.read_bytes() == third.read_bytes()


def test_appending_with_other_embeddings_is_refused(catalogue_with_duplicates, tmp_path):
    output, checkpoint = tmp_path / "X.index.json", tmp_path / "c"
    rqkmeans.main(
        [
            "--data_path",
            str(catalogue_with_duplicates),
            "--levels",
            "16,4",
            "--output",
            str(output),
            "--ckpt_path",
            str(checkpoint),
        ]
    )
    before = output.read_bytes()
    other = save(tmp_path / "other.npy", np.random.default_rng(9).normal(size=(70, 8)).astype(np.float32))
    told = refusal(generate_indices.main, "--data_path", other, "--ckpt_path", checkpoint, "--output", output, "--append")
    assert "append with the checkpoint and the text encoder the index was made with" in told
    assert output.read_bytes() == before
    told = refusal(
        generate_indices.main,
        "--data_path",
        catalogue_with_duplicates,
        "--ckpt_path",
        checkpoint,
        "--output",
        output,
        "--append",
    )
    assert "no new item" in told


def test_a_code_outside_its_codebook_is_named(tmp_path):
    codes = save(tmp_path / "codes.npy", np.array([[0, 1], [3, 4]]))
    told = refusal(generate_indices.main, "--codes_path", codes, "--levels", "4,4", "--output", tmp_path / "X.index.json")
    assert "item 1 has code 4 at level 2, whose codebook holds 0..3" in told
    told = refusal(generate_indices.main, "--codes_path", codes, "--levels", "4,4,4", "--output", tmp_path / "X.index.json")
    assert "expected whole numbers of shape (N items, 3 levels)" in told
    assert not (tmp_path / "X.index.json").exists()


def test_appending_to_an_index_that_counts_from_one_is_refused(catalogue_with_duplicates, tmp_path):
    output, checkpoint = tmp_path / "X.index.json", tmp_path / "c"
    rqkmeans.main(
        [
            "--data_path",
            str(catalogue_with_duplicates),
            "--levels",
            "4,4",
            "--output",
            str(output),
            "--ckpt_path",
            str(checkpoint),
        ]
    )
    output.write_text(json.dumps({"0": ["<a_4>", "<b_1>"]}))
    told = refusal(
        generate_indices.main,
        "--data_path",
        catalogue_with_duplicates,
        "--ckpt_path",
        checkpoint,
        "--output",
        output,
        "--append",
    )
    assert "counts codes from 1" in told


def test_the_plus_command_takes_plus_checkpoints_only(catalogue_with_duplicates, tmp_path):
    common = ["--data_path", str(catalogue_with_duplicates), "--ckpt_path", str(tmp_path / "c")]
    rqkmeans.main([*common, "--levels", "4,4", "--output", str(tmp_path / "X.index.json")])
    told = refusal(generate_indices_plus.main, *common, "--output", tmp_path / "Y.index.json")
    assert "is of rqkmeans, rq.generate_indices_plus is for rqkmeans_plus" in told


def test_relocation_from_codes_alone_is_refused(tmp_path):
    codes = save(tmp_path / "codes.npy", np.zeros((3, 2), np.int64))
    told = refusal(
        generate_indices.main,
        "--codes_path",
        codes,
        "--levels",
        "4,4",
        "--output",
        tmp_path / "X.index.json",
        "--collisions",
        "relocate",
    )
    assert "needs distances" in told

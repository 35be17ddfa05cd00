"""What a training run leaves for its reader, from a Trainer state made by hand."""

import dataclasses

import pytest
from conftest import small_model
from transformers import TrainerState

from sid_sft.files import file_hash
from sid_sft.run_report import measuring_command, model_card, series, write_run_report
from sid_sft.settings import TrainFlags
from sid_sft.sid_rows import SidRows
from sid_sft.tasks import PROMPTS

LOG = [
    {"step": 1, "loss": 4.0, "loss_sid_sid": 5.0, "learning_rate": 0.01, "tokens_per_s": 900.0},
    {"step": 2, "epoch": 0.5, "eval_loss": 3.5, "eval_hr@10": 0.08, "eval_ndcg@10": 0.05},
    {"step": 2, "loss": 3.0, "loss_sid_sid": 3.5, "learning_rate": 0.0, "tokens_per_s": 950.0},
]


@pytest.fixture
def finished(tmp_path) -> tuple[TrainFlags, TrainerState]:
    """The flags and the state of a run of two steps."""
    (tmp_path / "train.csv").write_text("user_id\n")
    flags = TrainFlags(
        output_dir=str(tmp_path / "run"),
        base_model="some/model",
        train_file=str(tmp_path / "train.csv"),
        freeze_LLM=True,
        tasks="sid_sid",
        batch_size=16,
        learning_rate=0.01,
    )
    return flags, TrainerState(global_step=2, epoch=1.0, log_history=LOG)


def test_a_series_is_the_steps_and_numbers_of_a_key():
    assert series(LOG, "loss") == ([1, 2], [4.0, 3.0])
    assert series(LOG, "eval_hr@10") == ([2], [0.08])


def test_the_report_says_what_trained_from_what_and_how_well(finished, tmp_path):
    flags, state = finished
    model = small_model("qwen2", 20, tie_word_embeddings=False)
    total = sum(parameter.numel() for parameter in model.parameters())
    write_run_report(flags, state, model, SidRows(model, [17, 18, 19], ["<a_0>", "<a_1>", "<b_0>"]))
    text = (tmp_path / "run" / "report.md").read_text()
    assert "| 2 | 0.50 | 3.5000 | 0.0800 | 0.0500 |" in text
    for table in ("embedding", "head"):
        assert f"| {table}: 3 SID rows, ids 17 to 19 | 3 x 32 | 96 | {9600 / total:.4f} % |" in text
    assert f"| frozen |  | {total - 192:,} |" in text
    assert f"| --train_file | train.csv | 8 | {file_hash(tmp_path / 'train.csv')[:16]} |" in text
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_logged_nothing_still_has_a_report(finished, tmp_path):
    flags, _ = finished
    flags = dataclasses.replace(flags, freeze_LLM=False)
    write_run_report(flags, TrainerState(), small_model("qwen2", 20), None)
    text = (tmp_path / "run" / "report.md").read_text()
    assert "No evaluation" in text
    assert "| all parameters |" in text
    assert not (tmp_path / "run" / "curves.png").exists()


def test_the_model_card_names_base_prompts_and_result(finished):
    flags, state = finished
    card = model_card(flags, state, PROMPTS)
    assert card.startswith("---\nbase_model: some/model\nlibrary_name: transformers\n")
    assert "for 2 optimizer steps of 16 examples, peak learning rate 0.01,\nseed 42" in card
    assert "HR@10 0.0800" in card
    assert '"sid_sid": "Semantic IDs of the {category}' in card
    assert "title_sid" not in card


def test_report_and_card_tell_of_the_model_that_is_kept_not_of_the_last(finished, tmp_path):
    """The best checkpoint, of step 2, ends in final_checkpoint/ though the run went on; its evaluation is the one quoted."""
    flags, state = finished
    state.log_history = [*LOG, {"step": 4, "eval_loss": 3.9, "eval_hr@10": 0.02, "eval_ndcg@10": 0.01}]
    state.global_step, state.best_metric, state.best_global_step = 4, 3.5, 2
    state.best_model_checkpoint = str(tmp_path / "run" / "checkpoint-2")
    write_run_report(flags, state, small_model("qwen2", 20), None)
    report, card = (tmp_path / "run" / "report.md").read_text(), model_card(flags, state, PROMPTS)
    assert "Best eval_loss 3.5000 at step 2. final_checkpoint/ holds the model of step 2." in report
    assert "for 2 optimizer steps of 16 examples" in card
    assert "It evaluated best of a run of 4 steps." in card
    assert "Its evaluation: loss 3.5000, HR@10 0.0800, NDCG@10 0.0500." in card

    state.best_model_checkpoint = None  # the best one is gone, so the last model is what is kept
    write_run_report(flags, state, small_model("qwen2", 20), None)
    report, card = (tmp_path / "run" / "report.md").read_text(), model_card(flags, state, PROMPTS)
    assert "Best eval_loss 3.5000 at step 2. final_checkpoint/ holds the model of step 4." in report
    assert "for 4 optimizer steps of 16 examples" in card
    assert "Its evaluation: loss 3.9000, HR@10 0.0200, NDCG@10 0.0100." in card


def test_what_to_type_next_measures_on_the_test_file_beside_the_evaluation_file(finished, tmp_path):
    flags, _ = finished
    valid, test = tmp_path / "my toys.valid.csv", tmp_path / "my toys.test.csv"
    flags = dataclasses.replace(flags, eval_file=str(valid), sid_index_path="toys.index.json", output_dir="run")
    begin = "python evaluate.py --base_model run/final_checkpoint --test_file"
    end = f"--train_file {tmp_path}/train.csv --sid_index_path toys.index.json"
    assert measuring_command(flags) == f"{begin} '{valid}' {end}"
    test.touch()
    assert measuring_command(flags) == f"{begin} '{test}' {end}"
    flags = dataclasses.replace(flags, cutoff_len=1024, trust_remote_code=True)
    assert measuring_command(flags) == f"{begin} '{test}' {end} --cutoff_len 1024 --trust_remote_code True"

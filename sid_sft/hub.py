"""Upload of a finished run to the Hugging Face hub, to the repository that --push_to_hub names.

    open_repository("ann/toys-recommender", private=True)                      # before the training: may we write there?
    upload(Path("output/toys/final_checkpoint"), "ann/toys-recommender")       # after it
        -> logs the address of the repository

Nothing else of the program sends anything anywhere.
"""

from __future__ import annotations

import logging
from pathlib import Path

from sid_sft.files import InputError, cut, error_text

logger = logging.getLogger("sft.hub")


def open_repository(name: str, *, private: bool) -> None:
    """Makes the repository where there is none; InputError where the hub cannot be reached or does not let us write."""
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(name, private=private, exist_ok=True)
        HfApi().auth_check(name, write=True)  # of a repository that is there, create_repo asks no more than that
    except Exception as error:  # what the hub and the network raise has no common class
        raise InputError(
            f"--push_to_hub {cut(name)}: cannot be opened ({cut(error_text(error), 200)}); expected a name like "
            "ann/toys-recommender, and a login that may write there: hf auth login, or the variable HF_TOKEN"
        ) from None


def upload(folder: Path, name: str) -> None:
    """Uploads a saved model as one commit; InputError says how to do it by hand where that fails."""
    from huggingface_hub import HfApi

    try:
        commit = HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message="Upload the trained model")
    except Exception as error:
        raise InputError(
            f"--push_to_hub {cut(name)}: the upload failed ({cut(error_text(error), 200)}); {folder} is whole: "
            f"try again with hf upload {cut(name)} {folder}"
        ) from None
    logger.info(f"Uploaded {folder} to {commit.repo_url}")

"""Every user's items in order of time, and which of them are asked for in train, valid and test.

    u bought items 0, 1 and 2, v then bought 3 and 0
        -> Histories(users ["u", "v"], start_U=[0, 3, 5], user_N=[0, 0, 0, 1, 1], item_N=[0, 1, 2, 3, 0], time_N=..)

A window is a history and its target, the item that followed. It is named by the position of the target: window 2 is
[0, 1] -> 2, and windows 0 and 3 are none, since nothing comes before. N interactions, U users.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rq.interaction_log import Kept

if TYPE_CHECKING:
    import numpy as np
    import pyarrow

PARTS = ("train", "valid", "test")
VALID_SHARE, TEST_SHARE = 0.1, 0.1


@dataclass(frozen=True)
class Histories:
    """The interactions user by user, users in the order of their first one, each user's in order of time."""

    users: "pyarrow.Array"  # texts
    start_U: "np.ndarray"  # where each user begins, and last N
    user_N: "np.ndarray"  # positions in `users`
    item_N: "np.ndarray"  # item numbers
    time_N: "np.ndarray"  # grows with time, in whatever unit

    def first_of(self, targets: "np.ndarray", *, max_history: int) -> "np.ndarray":
        """Where the history of each window begins: up to `max_history` items before its target."""
        import numpy as np

        return np.maximum(self.start_U[self.user_N[targets]], targets - max_history)


def histories(kept: Kept, number_of: Mapping[str, int]) -> Histories:
    """The rows that are kept, user by user; equal times stay in their order."""
    import numpy as np
    import pyarrow

    first_U = np.full(len(kept.users), len(kept), dtype="int64")
    first_U[kept.user_N[::-1]] = np.arange(len(kept) - 1, -1, -1)  # of several rows of a user, the last one written stays
    codes = np.argsort(first_U, kind="stable")[: int((first_U < len(kept)).sum())]
    position_U = np.empty(len(first_U), dtype="int32")  # of those without a row, none is read
    position_U[codes] = np.arange(len(codes))
    user_N = position_U[kept.user_N]
    order_N = np.argsort(user_N, kind="stable")
    number_I = np.array([number_of.get(item, -1) for item in kept.items], dtype="int64")
    if number_I.max() < 2**31:
        number_I = number_I.astype("int32")
    return Histories(
        users=kept.users.take(pyarrow.array(codes)),
        start_U=np.concatenate([[0], np.bincount(user_N).cumsum()]),
        user_N=user_N[order_N],
        item_N=number_I[kept.item_N[order_N]],
        time_N=kept.time_N[order_N],
    )


def split_windows(made: Histories, *, split: str) -> dict[str, "np.ndarray"]:
    """{'train', 'valid', 'test'} -> windows: 80/10/10 by the time of the target, in its order, or user by user each one's
    last to test and last but one to valid. Those of a user in one part follow each other in either case.
    """
    import numpy as np

    targets = np.delete(np.arange(len(made.item_N)), made.start_U[:-1])
    if split == "global":
        ordered = targets[np.argsort(made.time_N[targets], kind="stable")]
        first_test = len(ordered) - round(len(ordered) * TEST_SHARE)
        first_valid = first_test - round(len(ordered) * VALID_SHARE)
        return dict(zip(PARTS, np.split(ordered, [first_valid, first_test]), strict=True))
    users = made.user_N[targets]
    later = made.start_U[users + 1] - 1 - targets  # windows of the user that follow
    several = np.diff(made.start_U)[users] > 2  # a user's only window is for training
    return {
        "train": targets[(later > 1) | ~several],
        "valid": targets[(later == 1) & several],
        "test": targets[(later == 0) & several],
    }

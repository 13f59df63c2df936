"""What was learned in a context stays learned: goals that are far from most states, in contexts longer than those of training."""

import pytest
import torch

from icrl.omnirl.checkpoints import load, shipped
from icrl.omnirl.evaluate import mean_ci, normalized, references, run_agent
from icrl.omnirl.tokens import Tokens
from icrl.worlds.grids import dark_room
from icrl.worlds.gymnasium_tables import CLASSIC

CONTEXTS, WINDOW, FALL = 32, 500, 0.03
TASKS = {
    "DarkRoom 10": lambda: dark_room(10, CONTEXTS, seed=2**43 + 1),
    "CliffWalking": lambda: CLASSIC["CliffWalking"].table()[[0] * CONTEXTS],
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the model has learned labels")
@pytest.mark.parametrize("name", TASKS)
def test_the_shipped_model_does_not_unlearn(name):
    """No window's 95 % interval lies wholly more than .03 under the best earlier window's mean, over 4,000 steps."""
    tasks = TASKS[name]()
    run, reference = run_agent(load(shipped()), tasks, 4000, seed=1), references(tasks)
    windows = [
        mean_ci(normalized(run, reference, begin, begin + WINDOW, "episode")) for begin in range(0, 4000, WINDOW)
    ]
    best = windows[0][0]
    for mean, half in windows[1:]:
        assert mean + half > best - FALL, windows
        best = max(best, mean)
    assert best > 0.9


def test_the_first_memory_stores_the_mean_reward():
    model = load(shipped())
    state = model.initial_state(2, 4)
    rewards = torch.tensor([[0.0, 1.0, 0.0, 0.5], [0.0, -1.0, 2.0, 2.0]])
    for t in range(4):
        zeros = torch.zeros(2, 1, dtype=torch.int64)
        done = zeros + (3 if t == 0 else 0)
        tokens = Tokens(zeros + t % 4, zeros + max(t - 1, 0), zeros, rewards[:, t : t + 1], done, zeros + 7)
        model.step(tokens, state)
    counts = torch.arange(4).clamp(min=1)
    wanted = rewards.cumsum(1) / counts
    slot = state.values[0][:, 0, 3]  # of the state where the last token was
    torch.testing.assert_close(slot[:, -1] / slot[:, 0], wanted[:, 3])

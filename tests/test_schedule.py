from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import SGD
from transformers import (
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

from scaledistill.config.schedule import (
    learning_rate,
    same_rates,
    schedule_text,
    stable_until,
    with_schedule_of,
)
from scaledistill.config.schema import TrainSettings

WSD = {"schedule": "warmup_stable_decay"}


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings.model_validate(
        {
            "global_batch_size": 8,
            "learning_rate": 8.0,
            "warmup_steps": 4,
            "max_steps": 12,
            **changes,
        }
    )


def rates(train: TrainSettings, num_steps: int) -> list[float]:
    return [learning_rate(step, train) for step in range(num_steps)]


def test_linear() -> None:
    assert rates(settings(), 14) == [2, 4, 6, 8, 8, 7, 6, 5, 4, 3, 2, 1, 0, 0]
    one = settings(learning_rate=1.0, warmup_steps=0, max_steps=1)
    assert rates(one, 2) == [1, 0]


def test_cosine() -> None:
    found = rates(settings(schedule="cosine"), 14)
    assert found[:5] == [2, 4, 6, 8, 8]
    assert found[5:12] == pytest.approx(
        [4 * (1 + math.cos(math.pi * step / 8)) for step in range(1, 8)]
    )
    assert found[8] == pytest.approx(4)  # half of the peak in the middle of the decay
    assert found[12:] == [0, 0]


def test_warmup_stable_decay() -> None:
    found = rates(settings(**WSD, decay_steps=4), 14)
    assert found[:9] == [2, 4, 6, 8, 8, 8, 8, 8, 8]
    assert found[9:12] == pytest.approx([4, 8 * (1 - math.sqrt(0.5)), 8 * (1 - math.sqrt(0.75))])
    assert found[12:] == [0, 0]
    assert rates(settings(**WSD, decay_steps=8), 14)[:5] == [2, 4, 6, 8, 8]  # no stable phase


@pytest.mark.parametrize(
    ("max_steps", "warmup_steps", "begin"),
    [(100, 10, 90), (101, 10, 90), (5, 0, 4), (100, 95, 95), (100, 100, 100), (1, 0, 0)],
)
def test_the_decay_is_a_tenth_of_the_steps(max_steps: int, warmup_steps: int, begin: int) -> None:
    train = settings(**WSD, max_steps=max_steps, warmup_steps=warmup_steps)
    assert stable_until(train) == begin
    found = rates(train, max_steps + 1)
    assert found[max_steps - 1] > 0 == found[max_steps]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "warmup_stable_decay"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 12])
def test_a_warm_up_of_no_step_of_one_and_of_all(schedule: str, warmup_steps: int) -> None:
    train = settings(schedule=schedule, warmup_steps=warmup_steps)
    found = rates(train, 13)
    assert found[max(warmup_steps - 1, 0)] == max(found) == 8
    assert min(found[:12]) > 0 == found[12]


PEERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "linear": lambda optimizer: get_linear_schedule_with_warmup(optimizer, 7, 40),
    "cosine": lambda optimizer: get_cosine_schedule_with_warmup(optimizer, 7, 40),
    "warmup_stable_decay": lambda optimizer: get_wsd_schedule(
        optimizer, 7, 9, num_training_steps=40, decay_type="1-sqrt"
    ),
}


@pytest.mark.parametrize("schedule", PEERS)
def test_rates_are_those_of_transformers(schedule: str) -> None:
    """In the warm-up ours are one step ahead: the first step of transformers has the rate 0."""
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=6e-4)
    peer, theirs = PEERS[schedule](optimizer), []
    for _ in range(41):
        theirs += peer.get_last_lr()
        optimizer.step()
        peer.step()
    decay = {"decay_steps": 9} if schedule == "warmup_stable_decay" else {}
    train = settings(schedule=schedule, learning_rate=6e-4, warmup_steps=7, max_steps=40, **decay)
    ours = rates(train, 41)
    assert ours[7:] == pytest.approx(theirs[7:], rel=1e-12, abs=1e-18)
    assert ours[:7] == pytest.approx(theirs[1:8], rel=1e-12)


def test_where_two_schedules_part() -> None:
    short, long = (settings(**WSD, max_steps=steps, decay_steps=3) for steps in (12, 20))
    # Step 9 is the first of the decay, and still has the peak rate.
    assert stable_until(short) == 9
    assert same_rates(short, long, 12) == 10
    assert same_rates(short, long, 10) == 10
    assert same_rates(short, short, 12) == 12
    # The rate is 0 past the end.
    assert same_rates(settings(warmup_steps=12), settings(warmup_steps=12, max_steps=20), 20) == 12
    assert same_rates(settings(), settings(schedule="cosine"), 12) == 5
    assert same_rates(settings(), settings(learning_rate=7.0), 12) == 0


def test_the_schedule_of_an_earlier_run() -> None:
    now = settings(**WSD, decay_steps=3)
    assert with_schedule_of(now, now.model_dump()) == now
    # One that was made before schedules could be chosen.
    old = settings(max_steps=20, learning_rate=1.0).model_dump(exclude={"schedule", "decay_steps"})
    assert with_schedule_of(now, old) == settings(max_steps=20)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "4 steps of warm-up, linear decay to 0 at step 12"),
        ({"schedule": "cosine", "warmup_steps": 0}, "cosine decay to 0 at step 12"),
        (
            {**WSD, "max_steps": 4000, "decay_steps": 500},
            "4 steps of warm-up, stable until step 3,500, 1-sqrt decay to 0 at step 4,000",
        ),
    ],
)
def test_in_words(changes: dict[str, Any], text: str) -> None:
    assert schedule_text(settings(**changes)) == text

import json
from typing import Any

import pytest

from bench.records.scenario import SCENARIOS, Scenario, scenario_named
from quantize.errors import UserError
from quantize.schema import from_data, from_json, to_data


def test_named_scenarios() -> None:
    published, chat = scenario_named("published"), scenario_named("chat")
    assert (published.prompt_tokens, published.new_tokens, published.decode_steps) == (1024, 1, 0)
    assert (chat.prompt_tokens, chat.new_tokens, chat.decode_steps) == (256, 64, 63)


def test_an_unknown_name_says_which_there_are() -> None:
    with pytest.raises(UserError, match=r"unknown scenario 'fast'; there are: published, chat"):
        scenario_named("fast")


@pytest.mark.parametrize("field", ["prompt_tokens", "new_tokens", "batch"])
def test_nothing_to_do_is_rejected(field: str) -> None:
    sizes: dict[str, Any] = {"prompt_tokens": 1, "new_tokens": 1, "batch": 1} | {field: 0}
    with pytest.raises(UserError, match=f"scenario x: {field} must be at least 1"):
        Scenario("x", **sizes)


def test_json_and_back() -> None:
    others = [Scenario.over("x", (5, 7, 100), 3, batch=2, seed=4), Scenario("y", 5, 2, mode="graph")]
    for scenario in [*SCENARIOS.values(), *others]:
        again = from_json(Scenario, json.dumps(to_data(scenario)), "test")
        assert again == scenario
        assert hash(again) == hash(scenario)


def test_what_was_written_before_there_were_lengths_and_modes_is_read() -> None:
    old = {"name": "chat", "prompt_tokens": 256, "new_tokens": 64, "batch": 1, "seed": 0}
    assert from_data(Scenario, old, "test") == SCENARIOS["chat"]


def test_several_lengths_have_their_mean_and_their_sum() -> None:
    scenario = Scenario.over("x", (5, 7, 101), 3, batch=2)
    assert (scenario.prompt_tokens, scenario.prompt_lengths) == (38, (5, 7, 101))
    assert scenario.pass_prompt_tokens == 2 * 113
    assert scenario.positions == 101 + 2
    one = Scenario("x", 9, 3, batch=2)
    assert (one.prompt_lengths, one.pass_prompt_tokens, one.positions) == ((9,), 18, 11)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lengths": (3, 6)}, "prompt_tokens must be the mean of its lengths, 4"),
        ({"lengths": (0, 10)}, "each of the lengths must be at least 1"),
        ({"mode": "fast"}, "mode must be one of eager, graph, compiled"),
        ({"mode": "graph"}, "mode graph needs new_tokens of at least 2"),
        ({"mode": "compiled"}, "mode compiled needs new_tokens of at least 2"),
    ],
)
def test_contradictions_are_rejected(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"scenario x: {message}"):
        Scenario("x", 5, 1, **fields)


def test_no_lengths_at_all_are_rejected() -> None:
    with pytest.raises(UserError, match="scenario x: no prompt lengths"):
        Scenario.over("x", (), 1)


def test_what_a_file_left_out_is_written_with_its_default() -> None:
    made = from_data(Scenario, {"name": "chat", "prompt_tokens": 8, "new_tokens": 1, "batch": 1, "seed": 0}, "here")
    assert set(to_data(made)) == {"name", "prompt_tokens", "new_tokens", "batch", "seed", "lengths", "mode"}
    assert from_data(Scenario, to_data(made), "here") == made

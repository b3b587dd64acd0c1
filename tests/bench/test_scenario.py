import pytest

from bench.scenario import SCENARIOS, Scenario, scenario_named
from quantize.errors import UserError


def test_named_scenarios() -> None:
    published, chat = scenario_named("published"), scenario_named("chat")
    assert (published.prompt_tokens, published.new_tokens, published.decode_steps) == (1024, 1, 0)
    assert (chat.prompt_tokens, chat.new_tokens, chat.decode_steps) == (256, 64, 63)


def test_an_unknown_name_says_which_there_are() -> None:
    with pytest.raises(UserError, match=r"unknown scenario 'fast'; there are: published, chat"):
        scenario_named("fast")


@pytest.mark.parametrize("field", ["prompt_tokens", "new_tokens", "batch"])
def test_nothing_to_do_is_rejected(field: str) -> None:
    sizes = {"prompt_tokens": 1, "new_tokens": 1, "batch": 1} | {field: 0}
    with pytest.raises(UserError, match=f"scenario x: {field} must be at least 1"):
        Scenario("x", **sizes)


def test_json_and_back() -> None:
    for scenario in SCENARIOS.values():
        assert Scenario.from_json(scenario.to_json()) == scenario

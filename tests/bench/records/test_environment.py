from dataclasses import replace

from bench.records.environment import Environment, differences


def test_what_decides_is_compared_and_the_rest_is_not() -> None:
    one = Environment(cpu="A", torch_threads=2, os="X", libraries={"torch": "1", "triton": None})
    assert differences(one, replace(one)) == []
    assert differences(one, replace(one, os="Y", ram_bytes=5, copy_bytes_per_s=1e9)) == []
    assert differences(one, replace(one, cpu="B", torch_threads=3)) == [
        "cpu: A against B",
        "torch_threads: 2 against 3",
    ]
    other = replace(one, libraries={"torch": "2", "triton": None, "unlisted": "3"})
    assert differences(one, other) == ["torch: 1 against 2"]

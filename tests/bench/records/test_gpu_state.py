from bench.records.gpu_state import GpuExtremes, GpuState, GpuStates, extremes_of


def test_the_extremes_are_over_all_looks_and_unknown_stays_unknown() -> None:
    looks = [
        GpuState(sm_clock_mhz=1500, temperature_c=60, throttle_reasons=("power cap",), other_processes=0),
        GpuState(),
        GpuState(sm_clock_mhz=1200, temperature_c=71, throttle_reasons=("power cap", "sync boost"), other_processes=2),
    ]
    assert extremes_of(looks) == GpuExtremes(3, 1200, 1500, 71, ("power cap", "sync boost"), 2)
    assert extremes_of([GpuState()]) == GpuExtremes(looks=1)
    assert extremes_of([]) == GpuExtremes()


def test_energy_is_the_difference_of_two_looks() -> None:
    assert GpuStates(GpuState(energy_j=10.0), None, GpuState(energy_j=35.5)).energy_j == 25.5
    assert GpuStates(GpuState(energy_j=10.0), None, GpuState()).energy_j is None
    assert GpuStates().energy_j is None


def test_what_held_the_clocks_down_at_any_look_is_named_once() -> None:
    between = GpuExtremes(looks=1, throttle_reasons=("power cap", "sync boost"), other_processes=3)
    states = GpuStates(GpuState(throttle_reasons=("power cap",)), between, GpuState(other_processes=1))
    assert states.throttle_reasons == ("power cap", "sync boost")
    assert states.other_processes == 3
    assert (GpuStates().throttle_reasons, GpuStates().other_processes) == ((), 0)

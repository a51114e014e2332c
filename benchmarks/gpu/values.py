"""Part (a): the tests of tests/gpu, side by side: values against float64, the same bits in every run, graphs, launches.

Twelve processes also fill Triton's cache with the kernels that the later parts time.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest

from benchmarks.gpu.rows import Part, part_of

PROCESSES = 12
VALUES, RUNTIME, SWITCHES = (f"tests/gpu/test_{name}.py" for name in ("values", "runtime", "switches"))
FIRST = (
    f"{VALUES}::test_training",
    f"{VALUES}::test_two_runs_are_the_same_bits",
    f"{VALUES}::test_as_precise_as_torch",
    f"{VALUES}::test_launches",
    f"{RUNTIME}::test_a_training_step_in_a_cuda_graph",
    f"{VALUES}::test_shapes",
    f"{VALUES}::test_evaluation",
    f"{VALUES}::test_activation_and_residual",
    f"{RUNTIME}::test_nothing_waits_for_the_device",
    f"{RUNTIME}::test_side_stream",
    f"{VALUES}::test_mixed_precision_and_other_gradients",
    f"{VALUES}::test_nan_reaches_the_output_and_not_the_statistics",
    f"{RUNTIME}::test_dropout_in_a_cuda_graph",
    f"{RUNTIME}::test_checkpointing",
    f"{RUNTIME}::test_a_layer_compiles_itself",
    f"{RUNTIME}::test_compiled_into_cuda_graphs",
    f"{RUNTIME}::test_compiled",
    # Programs that wait for each other might wait forever, so theirs is the last turn.
    f"{SWITCHES}::test_the_same_in_every_run",
    f"{SWITCHES}::test_graphs_and_streams",
)
"""In the order in which they are worth their time; ``test_large.py`` takes minutes, and is left to pytest."""

DRY = (
    f"{VALUES}::test_training[sn-channels_last-fp32]",
    f"{VALUES}::test_training[bn-contiguous-bf16]",
    f"{VALUES}::test_two_runs_are_the_same_bits[rbn-tokens-fp16]",
    f"{VALUES}::test_launches[sn-contiguous]",
    f"{RUNTIME}::test_second_device[sn]",
    f"{SWITCHES}::test_the_same_in_every_run[OWNER-bn-channels_last]",
    f"{SWITCHES}::test_the_same_in_every_run[COOPERATIVE-sn-contiguous]",
)
"""For the interpreter: of each kind and switch one, and one that needs two devices, which is skipped."""


class Outcomes:
    """A plugin of pytest that writes a row for each finished test, and ends the session in time.

    Args:
        part: where the rows go.
    """

    def __init__(self, part: Part) -> None:
        self.part, self.waiting = part, dict[str, None]()

    def pytest_collection_finish(self, session: Any) -> None:
        """Note what is to run, where this process runs it."""
        self.session = session
        self.waiting |= dict.fromkeys(item.nodeid for item in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        """Note what is to run, where other processes run it."""
        self.waiting |= dict.fromkeys(ids)

    def pytest_sessionstart(self, session: Any) -> None:
        """Remember the session, to end it."""
        self.session = session

    def pytest_collectreport(self, report: Any) -> None:
        """Write down a file that cannot be read."""
        if report.failed:
            self.part.write("test", id=report.nodeid, outcome="failed", seconds=0.0, why=_why(report))

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Write a row when a test has failed, was skipped, or is over."""
        if report.when == "call" or report.outcome != "passed":
            self.waiting.pop(report.nodeid, None)
            why = "" if report.passed else _why(report)
            seconds = round(report.duration, 2)
            self.part.write("test", id=report.nodeid, outcome=report.outcome, seconds=seconds, why=why)
        if self.part.seconds_left < 0:
            self.session.shouldstop = "the time of this part is over"

    def pytest_sessionfinish(self) -> None:
        """Say which tests did not run, by their functions."""
        functions = [name.partition("[")[0] for name in self.waiting]
        for name in dict.fromkeys(functions):
            self.part.leave_out(f"{name}: {functions.count(name)} cases")


def _why(report: Any) -> str:
    """Return the line of a report that names the error, or why a test was skipped."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[-1])
    lines = [line[1:].strip() for line in report.longreprtext.splitlines() if line.startswith("E ")]
    return str((lines or report.longreprtext.splitlines() or [""])[0][:300])


def main() -> int:
    """Run the tests."""
    part = part_of("values", __doc__)
    tests, processes = (DRY, 2) if part.dry else (FIRST, PROCESSES)
    # One test at a time to each process, so that they start in the order above.
    how = ["-n", str(processes), "--dist", "load", "--maxschedchunk", "1"]
    arguments = ["-q", "-p", "no:cacheprovider", "--color=no", "--tb=short", "-m", "gpu", *how, *tests]
    return int(pytest.main(arguments, plugins=[Outcomes(part)]))


if __name__ == "__main__":
    sys.exit(main())

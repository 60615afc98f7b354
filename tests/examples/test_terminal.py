"""Exit codes: the user's faults are one line, an interrupt is 130, a defect keeps its traceback."""

import pytest

from examples.cifar10 import terminal


def fail(error: BaseException) -> None:
    raise error


def test_a_fault_of_the_users_world_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert terminal.exit_code(lambda: fail(KeyError("a")), LookupError) == 1
    assert capsys.readouterr().err == "error: 'a'\n"


def test_a_fault_of_the_file_system_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert terminal.exit_code(lambda: fail(PermissionError(13, "Permission denied", "x"))) == 1
    assert capsys.readouterr().err == "error: [Errno 13] Permission denied: 'x'\n"


def test_an_interrupt_is_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert terminal.exit_code(lambda: fail(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_defect_of_the_code_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        terminal.exit_code(lambda: fail(ZeroDivisionError()), LookupError)


def test_a_job_that_ends_well_is_zero() -> None:
    assert terminal.exit_code(lambda: None) == 0

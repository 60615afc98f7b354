"""Exit codes: expected errors are one line, an interrupt is 130, other errors keep their traceback."""

import pytest

from examples.cifar10 import terminal


def fail(error: BaseException) -> None:
    raise error


def test_an_expected_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert terminal.exit_code(lambda: fail(KeyError("a")), LookupError) == 1
    assert capsys.readouterr().err == "error: 'a'\n"


def test_a_fault_of_the_file_system_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert terminal.exit_code(lambda: fail(PermissionError(13, "Permission denied", "x"))) == 1
    assert capsys.readouterr().err == "error: [Errno 13] Permission denied: 'x'\n"


def test_an_interrupt_prints_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert terminal.exit_code(lambda: fail(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_defect_of_the_code_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        terminal.exit_code(lambda: fail(ZeroDivisionError()), LookupError)


def test_a_job_without_error_exits_with_zero() -> None:
    assert terminal.exit_code(lambda: None) == 0

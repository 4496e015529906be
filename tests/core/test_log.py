"""Messages: where they go, and in which form."""

import pytest

from library.core.errors import ConfigError
from library.core.log import logger, setup_logging


@pytest.fixture(autouse=True)
def quiet_again():
    yield
    setup_logging("INFO")


def test_messages_go_to_stderr_with_time_and_level(capsys):
    setup_logging("INFO")
    logger("x").info("hello %d", 3)
    logger("x").debug("too little")
    err = capsys.readouterr().err
    assert err.endswith("INFO    hello 3\n") and err.count("\n") == 1


def test_simple_messages_are_the_words_alone(capsys):
    setup_logging("INFO", simple=True)
    logger("x").warning("hello")
    assert capsys.readouterr().err == "hello\n"


def test_a_file_takes_the_place_of_the_console_and_is_appended_to(tmp_path, capsys):
    file = tmp_path / "new folder" / "é.log"
    for word in ("first", "second"):
        setup_logging("INFO", file=file, simple=True)
        logger("x").info(word)
    assert file.read_text(encoding="utf-8") == "first\nsecond\n"
    assert capsys.readouterr().err == ""


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(ConfigError, match="--console_log_file .* cannot be written"):
        setup_logging("INFO", file=tmp_path)

"""What is wrong with a command line is one line."""
import pytest

from ssl_gpu.commandline import Parser


@pytest.mark.parametrize("words, problem", [
    ([], "the following arguments are required: config"),
    (["a.yaml", "x.y=1", "--nope"], "unrecognized arguments: --nope"),
    (["a.yaml", "--number", "x"], "argument --number: invalid int value: 'x'"),
])
def test_a_wrong_command_line_is_one_line(words, problem, capsys):
    parser = Parser(prog="python -m ssl_gpu.x", description="One line.\nAnother.")
    parser.add_argument("config")
    parser.add_argument("--number", type=int)
    parser.add_overrides("for example x.y=2")
    with pytest.raises(SystemExit) as end:
        parser.parse_intermixed_args(words)
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: {problem}; options are listed by python -m ssl_gpu.x --help\n"
    assert "One line.\nAnother." in parser.format_help()                 # as it is
    assert parser.parse_intermixed_args(["x.yaml"]).overrides == []
    assert parser.parse_intermixed_args(["x.yaml", "a.b=1", "--number", "3", "c.d=2"]).overrides == ["a.b=1", "c.d=2"]

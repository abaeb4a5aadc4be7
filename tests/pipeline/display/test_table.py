"""Tables in the terminal."""

import io

from rich.console import Console

from pipeline.display.table import ResultTable, print_table


def test_brackets_are_shown_and_a_note_is_one_line() -> None:
    note = "run `ptafuse eval x --set train.lora.target_modules=[q_proj]` " + "and so on " * 10
    data = ResultTable("Title [b]", ("name",), (("modules [q_proj]",),), notes=(note,))
    out = io.StringIO()
    print_table(data, Console(file=out, width=40))
    assert "modules [q_proj]" in out.getvalue()
    assert "Title [b]" in out.getvalue()
    assert note in out.getvalue()

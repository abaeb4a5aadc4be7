"""``ptafuse report``: results of every configuration in a run directory, in the terminal or as a page."""

from pathlib import Path

from rich.console import Console

from pipeline.analysis.interpret.tables import interpretation_tables, interpretations
from pipeline.display.table import print_table
from pipeline.evaluation.suites.results import suite_rows, suite_table
from pipeline.report.held_out import held_out, held_out_table
from pipeline.report.reported import reported_runs
from pipeline.report.teacher import moved_table, teacher_rows, teacher_table
from pipeline.report.texts import text_reports, text_tables
from pipeline.report.times import time_table
from pipeline.report.weights import weight_table
from pipeline.state.status import read_status
from stages.contract.store import Store


def print_report(store: Store, console: Console) -> None:
    """Print the tables of everything that was computed in a run directory.

    Raises:
        ValueError: nothing has run there.
    """
    runs = reported_runs(store)
    if not runs:
        raise ValueError(
            f"{store.url}: no configuration has been run here; start with `make demo` or `make shard RUN={store.url}`"
        )
    statuses = {run.label: read_status(run, store) for run in runs}
    print_table(held_out_table(held_out(runs, store)), console)
    for report in text_reports(runs, store):
        for table in text_tables(report):
            print_table(table, console)
    benchmarks = suite_rows(runs, store)
    if benchmarks:
        print_table(suite_table(benchmarks), console)
    teachers = teacher_rows(runs, statuses)
    print_table(teacher_table(teachers), console)
    print_table(moved_table(teachers), console)
    weights = weight_table(runs, store)
    if weights is not None:
        print_table(weights, console)
    for name, figures in interpretations(runs, store):
        for table in interpretation_tables(name, figures):
            print_table(table, console)
    print_table(time_table(runs, statuses, store), console)


def write_page(store: Store, path: Path, console: Console) -> None:
    """Write the page of a run directory to a local file.

    Raises:
        ValueError: nothing has run there.
    """
    from pipeline.report.page.page import report_page  # Matplotlib takes a second to import

    page = report_page(store)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    console.print(f"{path}: {len(page.encode()) / 1e6:.1f} MB; open it in a browser", soft_wrap=True)


def serve_page(store: Store, console: Console, *, port: int) -> None:
    """Serve the page on 127.0.0.1 until Ctrl-C; every load shows the run as it is then.

    Raises:
        OSError: the port is taken.
    """
    from pipeline.report.page.page import report_page
    from pipeline.report.page.serve import page_server

    with page_server(lambda: report_page(store), port=port) as server:
        console.print(f"http://127.0.0.1:{server.server_address[1]}/ (Ctrl-C ends)", soft_wrap=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            console.print("ended")

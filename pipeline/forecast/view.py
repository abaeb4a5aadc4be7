"""Output of ``ptafuse plan``: a table and the reasons for people, JSON for programs."""

from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.display.durations import format_estimate
from pipeline.display.text import format_bytes
from pipeline.forecast.estimate import Cost
from pipeline.forecast.forecaster import NEVER, Forecast, StepForecast
from pipeline.settings.planning import AssumptionsConfig


def print_forecast(found: Forecast, console: Console) -> None:
    """Show a forecast: what each step takes, why it is not done, and what was assumed."""
    prices = found.config.prices
    has_prices = any(price is not None for price in prices.model_dump().values())
    columns = ["step", "state", "shards", "tokens left", "GPU time", "core time", "size", "rates"]
    table = Table(title=f"{found.config.name} in {found.url}", title_justify="left")
    for column in (*columns, *(["money"] if has_prices else [])):
        table.add_column(column, justify="left" if column in ("step", "state", "rates") else "right")
    for step in found.steps:
        work = step.work
        table.add_row(
            step.key,
            step.state,
            _shards(step),
            _amount(work.num_tokens_left),
            format_estimate(3600 * work.left.gpu_hours),
            format_estimate(3600 * work.left.core_hours),
            format_bytes(work.num_bytes),
            work.basis,
            *([_money(work.left.price(prices))] if has_prices else []),
        )
    total = found.left
    table.add_section()
    times = (format_estimate(3600 * total.gpu_hours), format_estimate(3600 * total.core_hours))
    sums = (*times, format_bytes(found.num_bytes))
    table.add_row("left", "", "", "", *sums, "", *([_money(total.price(prices))] if has_prices else []))
    console.print(table)
    console.print(
        f"text: {format_bytes(found.sizes.text_bytes)} in {_documents(found)} documents, by {found.sizes.source}",
        soft_wrap=True,
    )
    known = ", ".join(f"{name} {_amount(one.count)} by {one.source}" for name, one in found.parameters.items())
    if known:
        console.print(f"parameters: {known}", soft_wrap=True)
    _print_prices(found, console)
    never = [step.key for step in found.steps if step.why == (NEVER,)]
    if never:
        console.print(f"{NEVER}: {', '.join(never)}", soft_wrap=True)
    for step in found.steps:
        if step.why and step.key not in never:
            console.print(f"{step.key} is {step.state}: {'; '.join(step.why)}", soft_wrap=True)
    for name in found.assumptions:
        console.print(f"assumed: {_assumption(found, name)}", soft_wrap=True)
    for warning in found.warnings:
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True)
    if all(step.state == "done" for step in found.steps):
        console.print("everything is done")


def forecast_json(found: Forecast) -> dict[str, Any]:
    """Build the output of ``ptafuse plan --json``."""
    fields = AssumptionsConfig.model_fields
    prices = found.config.prices
    return {
        "config": found.config.name,
        "run": found.url,
        "text": {
            "num_documents": found.sizes.num_documents,
            "num_bytes": found.sizes.text_bytes,
            "tokens": found.sizes.tokens,
            "source": found.sizes.source,
        },
        "parameters": {name: {"count": one.count, "source": one.source} for name, one in found.parameters.items()},
        "steps": [_step_json(step, found) for step in found.steps],
        "left": _cost_json(found.left, found),
        "num_bytes": found.num_bytes,
        "storage_money_per_month": None if prices.gb_month is None else found.num_bytes / 1e9 * prices.gb_month,
        "prices": prices.model_dump(),
        "warnings": list(found.warnings),
        "assumptions": {
            name: {"value": getattr(found.config.assumptions, name), "source": fields[name].description}
            for name in found.assumptions
        },
    }


def _step_json(step: StepForecast, found: Forecast) -> dict[str, Any]:
    return {
        "step": step.key,
        "fingerprint": step.fingerprint,
        "state": step.state,
        "why": list(step.why),
        "num_shards": step.num_shards,
        "num_done": step.num_done,
        "num_tokens": step.work.num_tokens,
        "num_tokens_left": step.work.num_tokens_left,
        "num_bytes": step.work.num_bytes,
        "left": _cost_json(step.work.left, found),
        "spent": _cost_json(step.work.spent, found),
        "basis": step.work.basis,
    }


def _cost_json(cost: Cost, found: Forecast) -> dict[str, float | None]:
    return {
        "gpu_hours": cost.gpu_hours,
        "core_hours": cost.core_hours,
        "money": cost.price(found.config.prices),
    }


def _print_prices(found: Forecast, console: Console) -> None:
    prices = found.config.prices
    if prices.gb_month is not None:
        console.print(f"storage: {_money(found.num_bytes / 1e9 * prices.gb_month)} per month when all is done")
    needed = {"gpu_hour": found.left.gpu_hours, "core_hour": found.left.core_hours}
    missing = [name for name, hours in needed.items() if hours and getattr(prices, name) is None]
    if missing:
        sets = " ".join(f"--set prices.{name}=..." for name in missing)
        console.print(f"money: give the prices of what is used under [prices], or with {sets}", soft_wrap=True)


def _assumption(found: Forecast, name: str) -> str:
    value = getattr(found.config.assumptions, name)
    return f"assumptions.{name} = {value:g}: {AssumptionsConfig.model_fields[name].description}"


def _documents(found: Forecast) -> str:
    count = found.sizes.num_documents
    return "an unknown number of" if count is None else f"{count:,}"


def _shards(step: StepForecast) -> str:
    return "" if step.num_shards is None else f"{step.num_done:,}/{step.num_shards:,}"


def _amount(value: float) -> str:
    """Format a number with two or three significant digits, since an estimate is no more precise."""
    if not value:
        return ""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:,.3g} {unit}"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.2g}" if value < 10 else f"{value:.3g}"


def _money(value: float | None) -> str:
    if value is None:
        return "?"
    return f"{value:,.2f}" if value else ""

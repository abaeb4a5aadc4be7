"""Output of ``ptafuse plan``: a table and the reasons for people, JSON for programs."""

from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.display.durations import format_estimate
from pipeline.display.text import format_bytes
from pipeline.forecast.estimate import Cost
from pipeline.forecast.forecaster import NEVER, Forecast, StepForecast
from pipeline.settings.planning import AssumptionsConfig


def print_forecast(forecast: Forecast, console: Console) -> None:
    """Show a forecast: what each step takes, why it is not done, and what was assumed."""
    prices = forecast.config.prices
    has_prices = any(price is not None for price in prices.model_dump().values())
    columns = ["step", "state", "shards", "tokens left", "GPU time", "core time", "size", "rates"]
    table = Table(title=f"{forecast.config.name} in {forecast.url}", title_justify="left")
    for column in (*columns, *(["money"] if has_prices else [])):
        table.add_column(column, justify="left" if column in ("step", "state", "rates") else "right")
    for step in forecast.steps:
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
    total = forecast.left
    table.add_section()
    times = (format_estimate(3600 * total.gpu_hours), format_estimate(3600 * total.core_hours))
    sums = (*times, format_bytes(forecast.num_bytes))
    table.add_row("left", "", "", "", *sums, "", *([_money(total.price(prices))] if has_prices else []))
    console.print(table)
    console.print(
        f"text: {format_bytes(forecast.sizes.text_bytes)} in {_documents(forecast)} documents, by {forecast.sizes.source}",
        soft_wrap=True,
    )
    known = ", ".join(
        f"{name} {_amount(parameters.count)} by {parameters.source}" for name, parameters in forecast.parameters.items()
    )
    if known:
        console.print(f"parameters: {known}", soft_wrap=True)
    _print_prices(forecast, console)
    never = [step.key for step in forecast.steps if step.why == (NEVER,)]
    if never:
        console.print(f"{NEVER}: {', '.join(never)}", soft_wrap=True)
    for step in forecast.steps:
        if step.why and step.key not in never:
            console.print(f"{step.key} is {step.state}: {'; '.join(step.why)}", soft_wrap=True)
    for name in forecast.assumptions:
        value, source = getattr(forecast.config.assumptions, name), AssumptionsConfig.model_fields[name].description
        console.print(f"assumed: assumptions.{name} = {value:g}: {source}", soft_wrap=True)
    for warning in forecast.warnings:
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True)
    if all(step.state == "done" for step in forecast.steps):
        console.print("everything is done")


def forecast_json(forecast: Forecast) -> dict[str, Any]:
    """Build the output of ``ptafuse plan --json``."""
    fields = AssumptionsConfig.model_fields
    prices = forecast.config.prices
    return {
        "config": forecast.config.name,
        "run": forecast.url,
        "text": {
            "num_documents": forecast.sizes.num_documents,
            "num_bytes": forecast.sizes.text_bytes,
            "tokens": forecast.sizes.tokens,
            "source": forecast.sizes.source,
        },
        "parameters": {
            name: {"count": parameters.count, "source": parameters.source}
            for name, parameters in forecast.parameters.items()
        },
        "steps": [_step_json(step, forecast) for step in forecast.steps],
        "left": _cost_json(forecast.left, forecast),
        "num_bytes": forecast.num_bytes,
        "storage_money_per_month": None if prices.gb_month is None else forecast.num_bytes / 1e9 * prices.gb_month,
        "prices": prices.model_dump(),
        "warnings": list(forecast.warnings),
        "assumptions": {
            name: {"value": getattr(forecast.config.assumptions, name), "source": fields[name].description}
            for name in forecast.assumptions
        },
    }


def _step_json(step: StepForecast, forecast: Forecast) -> dict[str, Any]:
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
        "left": _cost_json(step.work.left, forecast),
        "spent": _cost_json(step.work.spent, forecast),
        "basis": step.work.basis,
    }


def _cost_json(cost: Cost, forecast: Forecast) -> dict[str, float | None]:
    return {
        "gpu_hours": cost.gpu_hours,
        "core_hours": cost.core_hours,
        "money": cost.price(forecast.config.prices),
    }


def _print_prices(forecast: Forecast, console: Console) -> None:
    prices = forecast.config.prices
    if prices.gb_month is not None:
        console.print(f"storage: {_money(forecast.num_bytes / 1e9 * prices.gb_month)} per month when all is done")
    needed = {"gpu_hour": forecast.left.gpu_hours, "core_hour": forecast.left.core_hours}
    missing = [name for name, hours in needed.items() if hours and getattr(prices, name) is None]
    if missing:
        sets = " ".join(f"--set prices.{name}=..." for name in missing)
        console.print(f"cost: set the prices of these resources under [prices], or with {sets}", soft_wrap=True)


def _documents(forecast: Forecast) -> str:
    count = forecast.sizes.num_documents
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

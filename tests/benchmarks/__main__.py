"""Run every benchmark; one JSON object a line on standard output, text for people on standard error."""

import json
import sys

from tests.benchmarks import engine

BENCHMARKS = (engine.overhead_per_shard,)


def main() -> None:
    for benchmark in BENCHMARKS:
        sys.stderr.write(f"{benchmark.__module__}.{benchmark.__name__}: {(benchmark.__doc__ or '').splitlines()[0]}\n")
        for figure in benchmark():
            sys.stdout.write(json.dumps(figure.to_json()) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()

"""Runs one contestant once, in this process, and prints what it did as one line of JSON.

Run it as `python -m benchmarks.contestants.run dbos-direct --database-url URL --in-flight 8 --flows 100`, on an empty
database.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from benchmarks.contestants.durability import is_durable
from benchmarks.contestants.roster import EBBS_IDLE, ENTRANTS, IDLE
from benchmarks.contestants.work import TASKS, Recorded


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepare, drain, check what the database has, and print.

    Raises:
        SystemExit: the work was not done, or its commits were not durable.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*ENTRANTS, EBBS_IDLE])
    parser.add_argument("--database-url", metavar="URL", required=True)
    parser.add_argument("--in-flight", type=int, default=1)
    parser.add_argument("--flows", type=int, default=100)
    options = parser.parse_args(arguments)
    entrant = IDLE if options.name == EBBS_IDLE else ENTRANTS[options.name]
    contestant = entrant.open(options.database_url, options.in_flight)
    contestant.prepare(options.flows)
    before = contestant.recorded()
    seconds = contestant.drain()
    after = contestant.recorded()
    durability = contestant.durability()
    latencies = contestant.latencies() if options.name == EBBS_IDLE else []
    contestant.close()
    if before != Recorded(0, 0) or after != Recorded(options.flows, options.flows * TASKS):
        sys.exit(f"of {options.flows} flows of {TASKS} tasks its database has {after}, and had before: {before}")
    if not is_durable(durability):
        sys.exit(f"its commits are not durable: {durability}")
    found = {"flows": options.flows, "seconds": seconds, "durability": durability, "latencies": latencies}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()

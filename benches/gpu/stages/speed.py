"""Whole decode and prefill steps without a server: a program that takes one case and prints JSON lines."""

import json
import subprocess
from pathlib import Path

import device
from results import Results
from values import check

ERROR_CHARACTERS_MAX = 2000


def run(options, at):
    """The program lists its cases with `--list`, one a line, and runs one with `--case NAME`; each line
    of its output that is a JSON object is a measurement. One process a case: a case that fails or hangs
    takes no other with it."""
    program = Path(options.bench)
    if not program.is_file():
        raise SystemExit(f"no program at {program}: name it with --bench or CANDELA_BENCH")
    command = [str(program.resolve()), "--device", str(at)]
    results = Results(options, "speed", device.facts(at), device.fingerprint([program]))
    listed = subprocess.run([*command, "--list"], capture_output=True, text=True)
    cases = listed.stdout.split("\n")[:-1]
    if listed.returncode != 0 or not cases:
        raise SystemExit(f"{program} lists no cases: {listed.stderr[-ERROR_CHARACTERS_MAX:]}")
    for case in results.want(cases):
        results.attempt(case, lambda: measure(results, [*command, "--case", case]))
    return results.finish()


def measure(results, command):
    ran = results.run_process(command)
    lines = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    check(ran.returncode == 0 and lines, f"exit {ran.returncode}: {ran.stderr[-ERROR_CHARACTERS_MAX:]}")
    return {"lines": lines}

"""Every kernel against torch, then its speed, then the sanitizers."""

import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import cases
import device
import emulator
import speeds
import workers
from results import OutOfTime, Results

WORKER = device.REPOSITORY / "benches/gpu/kernel_worker.py"
# A case that says nothing for so long hangs.
CASE_SECONDS_MAX = 120
ERROR_CHARACTERS_MAX = 2000
SANITIZERS = ["memcheck", "racecheck"]
SANITIZER_ERROR = 99


def run(options, at):
    if at.type == "cpu":
        libraries = emulator.build(Path(options.out))
        build = device.fingerprint(emulator.sources())
    else:
        libraries = Path(options.fatbins)
        fatbins = list(libraries.glob("*.fatbin"))
        if not fatbins:
            raise SystemExit(f"no *.fatbin in {libraries}: name their directory with --fatbins")
        build = device.fingerprint(fatbins)
    large = at.type == "cuda"
    results = Results(options, "kernels", device.facts(at), build)
    command = [sys.executable, str(WORKER), str(at), str(libraries)]
    table = cases.table(large)
    missing = results.want([case.name for case in [*table, *speeds.table(large)]])
    checks = results.want([f"sanitizer {tool}" for tool in SANITIZERS] * large)
    workers.walk(results, command, missing, CASE_SECONDS_MAX, lambda line: percents(results, line))
    sanitize(results, command, checks, [case.name for case in table if case.reduced])
    return results.finish()


def percents(results, measured):
    """Of what torch reached with a copy and with a product of large matrices in the same file."""
    found = {case["case"]: case for case in results.content["cases"] if case["ok"]}
    shares = {}
    for unit, kind in [("gb_per_s", "copy"), ("tflop_per_s", "matmul")]:
        ceiling = found.get(f"ceiling {kind}")
        if "microseconds" in measured and ceiling:
            shares[f"percent_of_{kind}"] = 100 * measured[unit] / ceiling[unit]
    return shares


def sanitize(results, command, checks, reduced):
    """compute-sanitizer over small cases; without torch's cache, whose blocks would hide what lies
    beyond a tensor."""
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    for check in checks:
        if results.out_of_time():
            return
        if not program:
            results.add(check, True, 0.0, skipped="there is no compute-sanitizer on this machine")
            continue
        tool, begun = check.split()[-1], time.monotonic()
        line = [program, "--tool", tool, "--error-exitcode", str(SANITIZER_ERROR), *command]
        try:
            ran = results.run_process(line, input=json.dumps(reduced),
                                      env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        except OutOfTime:
            return
        wrong = [name for name in reduced if f'"case": "{name}"' not in ran.stdout]
        wrong += re.findall(r'"case": "([^"]*)".*"ok": false', ran.stdout)
        measured, ok = {"reduced_cases": len(reduced)}, ran.returncode == 0 and not wrong
        if not ok:
            said = (ran.stdout + ran.stderr)[-ERROR_CHARACTERS_MAX:]
            measured["error"] = f"exit {ran.returncode}, {wrong}: {said}"
        results.add(check, ok, time.monotonic() - begun, **measured)

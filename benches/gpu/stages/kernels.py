"""Every kernel against torch, then its speed, then the sanitizers."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import cases
import device
import emulator
import speeds
from results import Results

WORKER = device.REPOSITORY / "benches/gpu/worker.py"
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
    walk(results, command, missing)
    sanitize(results, command, checks, [case.name for case in table if case.reduced])
    return results.finish()


def walk(results, command, missing):
    """Runs cases in workers: another one for what is left when one dies."""
    while missing and not results.out_of_time():
        done = work(results, command, missing)
        missing = missing[done:]


def work(results, command, missing):
    """How many cases got their results, that of one which ended the worker included."""
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True)
    said = []
    reader = threading.Thread(target=lambda: said.append(worker.stderr.read()))
    reader.start()
    worker.stdin.write(json.dumps(missing))
    worker.stdin.close()
    done, begun, started = 0, None, time.monotonic()
    alarm = watched(worker)
    for line in worker.stdout:
        alarm.cancel()
        line = json.loads(line)
        if "begin" in line:
            begun, started = line["begin"], time.monotonic()
        else:
            case, ok, seconds = line.pop("case"), line.pop("ok"), line.pop("seconds")
            results.add(case, ok, seconds, **line, **percents(results, line))
            done, begun = done + 1, None
            if results.out_of_time():
                break
        alarm = watched(worker)
    alarm.cancel()
    worker.kill() if results.out_of_time() else worker.wait()
    worker.wait()
    reader.join()
    if begun is None and done > 0 or results.out_of_time():
        return done
    # Without a case there is nothing to go on with: the worker does not start.
    error = f"the worker ended with {worker.returncode}: {said[0][-ERROR_CHARACTERS_MAX:]}"
    if begun is None:
        raise SystemExit(error)
    results.add(begun, False, time.monotonic() - started, error=error)
    return done + 1


def watched(worker):
    alarm = threading.Timer(CASE_SECONDS_MAX, worker.kill)
    alarm.daemon = True
    alarm.start()
    return alarm


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
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        try:
            ran = subprocess.run(line, input=json.dumps(reduced), capture_output=True, text=True,
                                 env=environment, timeout=results.seconds_left())
        except subprocess.TimeoutExpired:
            # Without a result: the next run has all of its time for it.
            return
        wrong = [name for name in reduced if f'"case": "{name}"' not in ran.stdout]
        wrong += re.findall(r'"case": "([^"]*)".*"ok": false', ran.stdout)
        ok = ran.returncode == 0 and not wrong
        error = {} if ok else {"error": f"exit {ran.returncode}, {wrong}: {(ran.stdout + ran.stderr)[-ERROR_CHARACTERS_MAX:]}"}
        results.add(check, ok, time.monotonic() - begun, reduced_cases=len(reduced), **error)

"""The results of one stage on one device: a JSON file, written anew after each case."""

import datetime
import json
import os
import subprocess
import time
from pathlib import Path

PASSED, FAILED, UNFINISHED = 0, 1, 2


class OutOfTime(Exception):
    """A process did not end before the stage's time did; its case has no result."""


class Results:
    """Cases that the same build has a result of already are not run again."""

    def __init__(self, options, stage, device, build):
        name = device["name"].lower().replace(" ", "-")
        self.date = options.date or datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
        self.path = Path(options.out) / f"{name}-{self.date}-{stage}.json"
        self.build = build
        self.deadline = time.monotonic() + 60 * options.minutes
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.content = {"stage": stage, "date": self.date, "cases": []}
        if self.path.exists():
            self.content = json.loads(self.path.read_text())
        self.content |= {"device": device}
        kept = [case for case in self.content["cases"] if case["build"] == build]
        self.content["cases"] = [case for case in kept if case["ok"] or not options.again]
        self.wanted = []
        # Results of this run.
        self.fresh = 0

    def has(self, case):
        return any(found["case"] == case for found in self.content["cases"])

    def want(self, cases):
        """Those of the stage's cases that are still to be run, in their order."""
        self.wanted += cases
        self.content["wanted"] = len(self.wanted)
        missing = [case for case in cases if not self.has(case)]
        if len(missing) < len(cases):
            print(f"{len(cases) - len(missing)} of {len(cases)} cases have results in {self.path}")
        return missing

    def out_of_time(self):
        return time.monotonic() > self.deadline

    def seconds_left(self):
        return max(1.0, self.deadline - time.monotonic())

    def add(self, case, ok, seconds, **found):
        """`found`: `error` if it failed, and what was measured."""
        entry = {"case": case, "ok": ok, "seconds": round(seconds, 2), "build": self.build}
        self.content["cases"].append(entry | found)
        self.fresh += 1
        whole = json.dumps(self.content, indent=1) + "\n"
        beside = self.path.with_suffix(".tmp")
        beside.write_text(whole)
        os.replace(beside, self.path)
        rest = " ".join(f"{name}={short(value)}" for name, value in found.items())
        print(f"{'ok    ' if ok else 'FAILED'} {case} ({seconds:.1f} s) {rest}", flush=True)

    def run_process(self, command, **how):
        """A process that ends before the stage's time does."""
        command = [str(word) for word in command]
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=self.seconds_left(),
                                  **how)
        except subprocess.TimeoutExpired as late:
            raise OutOfTime(f"{' '.join(command)} takes more than {late.timeout:.0f} s") from late

    def attempt(self, case, run):
        """Runs a case that has no result yet, if there is time; `run` gives what was measured."""
        if self.has(case) or self.out_of_time():
            return
        begun, ok = time.monotonic(), True
        try:
            found = run() or {}
        except AssertionError as wrong:
            ok, found = False, {"error": str(wrong)}
        except OutOfTime as late:
            # The next run has all of its time for it, which must be enough.
            if self.fresh > 0:
                return
            ok, found = False, {"error": str(late)}
        self.add(case, ok, time.monotonic() - begun, **found)

    def finish(self):
        """The exit status, said in words too."""
        failed = [case["case"] for case in self.content["cases"] if not case["ok"]]
        missing = [case for case in self.wanted if not self.has(case)]
        done = len(self.wanted) - len(missing)
        print(f"{self.content['stage']}: {done} of {len(self.wanted)} cases, {len(failed)} failed: "
              f"{self.path}")
        if missing:
            print("the same command goes on where this one stopped")
        return FAILED if failed else UNFINISHED if missing else PASSED


def short(value):
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} {short(inner)}" for name, inner in value.items()) + "}"
    text = str(value).replace("\n", " ")
    return text if len(text) <= 200 else text[:200] + "..."

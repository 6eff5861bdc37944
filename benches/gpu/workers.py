"""Cases in processes of their own: one that dies or hangs takes no other case with it.

A worker reads names as a JSON list on stdin and prints one JSON object a line: {"begin": name}, then the
name's result.
"""

import json
import os
import subprocess
import sys
import threading
import time

ERROR_CHARACTERS_MAX = 2000


def walk(results, command, missing, seconds_max, more=lambda line: {}):
    """Runs cases in workers, another one for what is left when one ends; `seconds_max` is of one case.
    `more` is what to add to a result."""
    while missing and not results.out_of_time():
        worker = Watched(command, missing)
        for line in worker.lines(results, seconds_max):
            name, ok, seconds = line.pop("case"), line.pop("ok"), line.pop("seconds")
            results.add(name, ok, seconds, **line, **more(line))
        if worker.begun is None and worker.silent:
            raise SystemExit(f"the worker does not start: {worker.error()}")
        if worker.begun is not None and (not results.out_of_time() or results.fresh == 0):
            results.add(worker.begun, False, time.monotonic() - worker.since, error=worker.error())
        missing = [name for name in missing if not results.has(name)]


class Watched:
    """A worker, what it has begun, and when."""

    def __init__(self, command, names):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True)
        self.begun, self.since, self.silent, self.said = None, time.monotonic(), True, ""
        self.reader = threading.Thread(target=self.read_errors)
        self.reader.start()
        self.process.stdin.write(json.dumps(names))
        self.process.stdin.close()

    def read_errors(self):
        self.said = self.process.stderr.read()

    def lines(self, results, seconds_max):
        """Results as they come; the process has ended after the last."""
        while True:
            alarm = threading.Timer(min(seconds_max, results.seconds_left()), self.process.kill)
            alarm.start()
            line = self.process.stdout.readline()
            alarm.cancel()
            if not line or results.out_of_time():
                break
            # Whatever else a library prints is not for us.
            if not line.startswith("{"):
                continue
            line, self.silent = json.loads(line), False
            if "begin" in line:
                self.begun, self.since = line["begin"], time.monotonic()
            else:
                self.begun = None
                yield line
        if results.out_of_time():
            self.process.kill()
        self.process.wait()
        self.reader.join()

    def error(self):
        return (f"ended with {self.process.returncode} after "
                f"{time.monotonic() - self.since:.0f} s: {self.said[-ERROR_CHARACTERS_MAX:]}")


def serve(run):
    """The worker's side: `run` takes a name, and gives what was measured."""
    for name in json.load(sys.stdin):
        print(json.dumps({"begin": name}), flush=True)
        begun, found = time.monotonic(), {}
        try:
            found = {"ok": True, **(run(name) or {})}
        except (AssertionError, RuntimeError) as error:
            found = {"ok": False, "error": str(error)}
            is_fatal = isinstance(error, RuntimeError)
        print(json.dumps({"case": name, "seconds": time.monotonic() - begun, **found}), flush=True)
        if not found["ok"] and is_fatal:
            # Of the driver, after which its context may not be used any more.
            os._exit(1)

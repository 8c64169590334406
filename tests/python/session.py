"""What the scripted sessions share: named checks, run in order, that stop at the first failure with exit code 1."""

import sys
import time
import traceback


class CheckFailed(Exception):
    pass


def check(condition, *explanation):
    """Fails the running check unless `condition` holds."""
    if not condition:
        raise CheckFailed(" ".join(str(part) for part in explanation))


def equal(found, expected, what):
    check(found == expected, f"{what}: expected {expected!r}, found {found!r}")


def refused(error_type, call, *parts):
    """The error with which `call` fails; its text names each of `parts`."""
    try:
        result = call()
    except error_type as error:
        for part in parts:
            check(part in str(error), f"the error does not name {part!r}: {error}")
        return error
    raise CheckFailed(f"expected {error_type}, got an answer: {result!r}")


def run(title, checks):
    """Runs (name, function) pairs; ends the process."""
    began = time.monotonic()
    for name, function in checks:
        at = time.monotonic()
        try:
            function()
        except Exception as error:  # whatever it is, it is this check's failure
            traceback.print_exc()
            print(f"FAILED {title}: {name}: {type(error).__name__}: {error}", flush=True)
            sys.exit(1)
        print(f"ok {title}: {name} ({time.monotonic() - at:.1f} s)", flush=True)
    print(f"passed {title}: {len(checks)} checks in {time.monotonic() - began:.1f} s", flush=True)
    sys.exit(0)

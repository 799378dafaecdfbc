"""The rows of made-up comparisons, and the one of them that something happens to."""

ROWS = {f"kernels/{name}/fp32/1e5": 1.0 + k for k, name in enumerate("abcdefgh")}
SLOW = "kernels/c/fp32/1e5"


def slowed(factor):
    return ROWS | {SLOW: ROWS[SLOW] * factor}


def broken(content, **facts):
    for record in content["records"]:
        if record["workload"] == SLOW:
            record |= facts
    return content

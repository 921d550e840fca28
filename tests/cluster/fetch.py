"""`python -m tests.cluster.fetch URL [BODY]`: one HTTP request from wherever this runs. Prints [status, answer]."""

import json
import sys
import urllib.error
import urllib.request

LIMIT_S = 60


def main() -> None:
    url, *body = sys.argv[1:]
    request = urllib.request.Request(url, body[0].encode() if body else None, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=LIMIT_S) as response:
            status, raw = response.status, response.read()
    except urllib.error.HTTPError as error:
        status, raw = error.code, error.read()
    except OSError as error:
        status, raw = 0, json.dumps(str(error)).encode()
    try:
        answer = json.loads(raw)
    except ValueError:
        answer = raw.decode(errors="replace")
    print(json.dumps([status, answer]))


if __name__ == "__main__":
    main()

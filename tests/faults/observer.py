"""A process of its own that is joined to the Ray cluster of a service and answers, for every line that it
reads, what Ray and the engines say now. Joining takes seconds, asking does not.

    python observer.py GCS_ADDRESS SERVICE
"""

import json
import os
import sys


def look(service):
    import ray
    from ray.util.placement_group import placement_group_table

    from actors.cluster import NAMESPACE, engines_status

    groups = [row for row in placement_group_table().values() if row["state"] != "REMOVED"]
    named = ray.util.list_named_actors(all_namespaces=True)
    return {
        "engines": engines_status(service),
        "actors": [row["name"] for row in named if row["namespace"] == NAMESPACE],
        "groups": sorted(row["name"] for row in groups),
    }


def main():
    address, service = sys.argv[1:]
    from r1_cluster.cli.running import require_token

    require_token()
    # Only answers may reach stdout.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from actors.cluster import attach

    with attach(address):
        for _ in sys.stdin:
            try:
                answer = look(service)
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()

"""Deploys a service file once more on a cluster that runs, as `serve deploy` does with `actors.app:build`.

python redeploy.py GCS_ADDRESS SERVICE.yaml
"""

import sys
from pathlib import Path


def main():
    address, file = sys.argv[1:]
    from r1_cluster.cli.running import require_token

    require_token()
    from ray import serve

    from actors.app import build
    from actors.cluster import attach
    from r1_cluster.config import load_service

    with attach(address):
        serve.run(build({"service": file}), name=load_service(Path(file)).name, route_prefix="/")


if __name__ == "__main__":
    main()

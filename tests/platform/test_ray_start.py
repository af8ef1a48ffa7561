"""Ray is given a second chance where a busy machine makes it give up its own start, and leaves nothing of the first."""

import os
import subprocess
import sys

CODE = """if True:
    import json, os, sys, time
    from types import SimpleNamespace
    import psutil
    from wattier import ray_cluster

    def names():
        return sorted(p.name() for p in psutil.Process().children(recursive=True) if p.status() != "zombie")

    started, asked = ray_cluster._started, []

    def too_slow_at_first(**options):
        import ray._private.services as services  # which holds the token of now

        real = services.get_node

        def get_node(*arguments):
            asked.append(arguments)
            if len(asked) == 1:
                raise Exception("The current node timed out during startup. This could happen because ...")
            return real(*arguments)

        services.get_node = get_node
        return started(**options)

    ray_cluster._started = too_slow_at_first
    with ray_cluster.cluster(SimpleNamespace(address=None)):
        import ray
        inside = names()
        cores = ray.cluster_resources()["CPU"]
    deadline = time.monotonic() + 20
    while names() and time.monotonic() < deadline:
        time.sleep(0.1)
    print(json.dumps({"raylets": inside.count("raylet"), "servers": inside.count("gcs_server"), "cores": cores,
                      "left": names()}))
"""


def test_the_second_start_is_alone():
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "once more" in done.stderr
    cores = len(os.sched_getaffinity(0))
    assert done.stdout.splitlines()[-1] == (f'{{"raylets": 1, "servers": 1, "cores": {cores:.1f}, "left": []}}'), (
        done.stdout
    )

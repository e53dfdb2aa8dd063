"""Runs examples/ray_serve.py with replicas on this machine; prints the port, and serves until its standard input ends."""

import json
import logging
import socket
import sys

import ray
from ray import serve

_, example, model, replicas = sys.argv
sys.path.insert(0, example)

from ray_serve import app  # noqa: E402  in the directory of examples

with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
ray.init(num_cpus=int(replicas), include_dashboard=False, logging_level=logging.ERROR, object_store_memory=100 << 20,
         runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}})  # fmt: skip
serve.start(http_options={"host": "127.0.0.1", "port": port})
serve.run(app({"model": model, "name": "model", "replicas": replicas, "slots": 4}), name="slm")
print(json.dumps({"port": port}), flush=True)
sys.stdin.read()
serve.shutdown()
ray.shutdown()

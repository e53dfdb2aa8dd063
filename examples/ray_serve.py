"""Replicas of the server behind one address, with Ray Serve.

    pip install 'slm-edge[cpu,serve]' 'ray[serve]'
    serve run examples.ray_serve:app model=runs/tiny/onnx-int8 replicas=4

Each replica has its own model and caches. Ray sends a request to the replica with fewer running requests. Streams pass
through. See docs/deploy.md.
"""

from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application

import slm
from slm.cli.choosing import default_model
from slm.runtime.decoder import OnnxDecoder
from slm.serve.app import make_app
from slm.serve.engine import Engine
from slm.serve.service import Limits, Service

GRACE_S = 30.0


def app(settings: dict[str, Any]) -> Application:
    """Returns the application, for `serve run` and `serve.run`.

    Args:
        settings: All optional: "model", a bundle; "name", what requests call it; "replicas"; "slots" and "queue" of each
            replica; "threads" of each, which are also the processor cores that Ray keeps for it.
    """
    path = Path(settings.get("model") or default_model(bundle=True)).resolve()
    slots, queue, threads = (
        int(settings.get(key, value)) for key, value in (("slots", 8), ("queue", 64), ("threads", 1))
    )

    def replica() -> Any:
        """Returns the ASGI application of one replica, created in its process."""
        model = slm.load(path, threads=threads)
        assert isinstance(model.decoder, OnnxDecoder)
        engine = Engine(model.decoder, model.tokenizer, slots=slots, queue=queue)
        return make_app(Service(model, settings.get("name") or path.name, engine, limits=Limits(), grace_s=GRACE_S))

    deployment = serve.deployment(
        serve.ingress(replica)(),
        name="slm",
        num_replicas=int(settings.get("replicas", 1)),
        # More than slots and queue, so that the replica itself rejects excess requests: 429 with Retry-After.
        max_ongoing_requests=slots + queue + 8,
        graceful_shutdown_timeout_s=GRACE_S + 5,
        ray_actor_options={"num_cpus": threads},
    )
    return deployment.bind()
